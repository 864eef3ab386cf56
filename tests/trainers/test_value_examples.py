"""Labels, masks and batches (vector E of the paper's account), and what is held out."""

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.value import ValueModel, ValueModelConfig
from posttrain.objectives.qsharp import bernoulli_loss, categorical_loss, squared_loss
from posttrain.rollouts.table import read_table, write_manifest, write_shard
from posttrain.trainers.value_examples import collate, collate_pairs, examples_of, pairs_of, split_by_prompt, unpack
from tests.small_models import build_model


def row(prompt_id, completion_ids, reward, sample=0, **changes):
    return {
        "prompt_id": prompt_id,
        "sample": sample,
        "group": 0,
        "prompt": [{"role": "user", "content": "?"}],
        "prompt_ids": [11, 12],
        "completion": "",
        "completion_ids": completion_ids,
        "finish_reason": "stop",
        "answer": "1",
        "extracted": None,
        "verdict": "equal",
        "reward": reward,
        "correct": reward == 1,
        "logprobs": [-1.0] * len(completion_ids),
        "policy": "p@f",
        "guide": None,
        "beta": None,
        "kl": 0.0,
        "log_ratio": 0.0,
        "cut": 0,
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 9, "seed": 0},
        **changes,
    }


@pytest.fixture
def table(tmp_path):
    """rows -> a rollout table of them."""
    count = iter(range(100))

    def make(*rows):
        folder = tmp_path / str(next(count))
        folder.mkdir()
        shards = {"shard-00000.parquet": write_shard(folder, 0, rows)}
        write_manifest(folder, {"settings": {}, "versions": {}, "shards": shards, "expected_shards": 1})
        return read_table(folder)

    return make


# -- vector E


def test_labels_begin_with_the_token_at_the_cut(table):
    """Stored prefixes 11 12 21 22 (cut at 1) and 11 12 21 (cut at 0); the paper's rows are padded on the left."""
    rows = row("a", [21, 22, 31, 32], 1.0, cut=1), row("a", [21, 33], 0.0, cut=0)
    batch = collate(examples_of([table(*rows)]))
    assert batch["input_ids"].tolist() == [[11, 12, 21, 22, 31, 32], [11, 12, 21, 33, 0, 0]]
    assert batch["mask"].int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch["returns"].tolist() == [1, 0]


def test_losses_of_the_vector(table):
    """As many labels as in the paper's rows, 3 and 1, and the same logits at them."""
    rows = row("a", [21, 22, 31, 32], 1.0, cut=1), row("b", [21, 33], 0.0, cut=1)
    batch = collate(examples_of([table(*rows)], drop_unanimous=False))
    mask, returns = batch["mask"], batch["returns"]
    logits = torch.tensor([[0, 0, 0.5, -1, 2, 0.3], [-0.4, 1, -2, 0.7, 0, 0.2]])
    assert bernoulli_loss(logits, returns, mask).item() == pytest.approx(0.88401717, abs=1e-6)
    assert bernoulli_loss(logits, returns, mask, "token").item() == pytest.approx(0.77443272, abs=1e-6)
    assert squared_loss(logits, returns, mask).item() == pytest.approx(0.34486330, abs=1e-6)
    logits, atoms = logits.unsqueeze(-1) * torch.arange(5), torch.linspace(0, 1, 5)
    loss = categorical_loss(logits, torch.tensor([0.37, 1.0]), atoms, mask)
    assert loss.item() == pytest.approx(1.92701018, abs=1e-6)


# -- examples


def test_every_token_of_a_sample_of_the_reference_is_labelled(table):
    found = examples_of([table(row("a", [3, 4, 5], 1.0), row("a", [6], 0.0))])
    assert found == [
        {"input_ids": [11, 12, 3, 4, 5], "first": 2, "return_": 1.0, "prompt_id": "a"},
        {"input_ids": [11, 12, 6], "first": 2, "return_": 0.0, "prompt_id": "a"},
    ]


def test_rounds_aggregate_and_unanimous_prompts_are_told_over_all_of_them(table):
    first = table(row("a", [3], 1.0), row("a", [4], 1.0), row("b", [5], 0.0), row("b", [6], 1.0), row("c", [7], 0.0))
    second = table(row("a", [8], 0.0), row("b", [9], 0.0), row("c", [10], 0.0))
    prompts = [example["prompt_id"] for example in examples_of([first, second])]
    assert prompts == ["a", "a", "b", "b", "a", "b"]
    assert [example["prompt_id"] for example in examples_of([first])] == ["b", "b"]
    assert len(examples_of([first, second], drop_unanimous=False)) == 8


def test_rewards_that_are_not_binary_are_kept(table):
    found = examples_of([table(row("a", [3], -0.5), row("a", [4], 0.25))])
    assert [example["return_"] for example in found] == [-0.5, 0.25]


def test_an_empty_completion_has_no_token_but_an_outcome(table):
    found = examples_of([table(row("a", [], 0.0), row("a", [4], 1.0))])
    assert [example["input_ids"] for example in found] == [[11, 12, 4]]


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_number_is_refused(table, reward):
    with pytest.raises(UserError, match="reward: .* has a row of prompt 'a' without a finite reward"):
        examples_of([table(row("a", [3], 1.0), row("a", [4], reward))])


def test_a_guided_sample_is_not_one_of_the_reference(table):
    """Its outcome is not that of the reference's law, which is what is learned."""
    guided = table(row("a", [3], 1.0, guide="g", beta=0.1), row("a", [4], 0.0))
    with pytest.raises(UserError, match="table: .* was sampled with a guide"):
        examples_of([guided])


def test_nothing_left_is_said(table):
    with pytest.raises(UserError, match="reward: no prompt has completions with different rewards"):
        examples_of([table(row("a", [3], 1.0), row("b", [4], 0.0))])


# -- the split


def examples(prompts, samples=6, seed=0):
    """Prompt i succeeds with a probability that grows with i."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": [1, 2, i],
            "first": 2,
            "return_": float(torch.rand((), generator=generator) < i / prompts),
            "prompt_id": f"p{i}",
        }
        for i in torch.randperm(prompts, generator=generator).tolist()
        for _ in range(samples)
    ]


def prompts_of(part):
    return {example["prompt_id"] for example in part}


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.34, 0.5, 0.9])
def test_no_prompt_is_on_both_sides_and_none_is_lost(fraction):
    every = examples(60)
    train, held_out = split_by_prompt(every, fraction)
    assert not prompts_of(train) & prompts_of(held_out)
    assert len(prompts_of(held_out)) == round(60 * fraction)
    assert sorted(map(id, train + held_out)) == sorted(map(id, every))


@pytest.mark.parametrize("seed", range(5))
def test_both_sides_have_the_same_mixture(seed):
    train, held_out = split_by_prompt(examples(100, seed=seed), 0.1, seed)
    means = [sum(example["return_"] for example in part) / len(part) for part in (train, held_out)]
    assert means[0] == pytest.approx(means[1], abs=0.05)


def test_the_split_is_the_seeds_alone():
    every = examples(50)
    state = torch.get_rng_state()
    first, again, other = (split_by_prompt(every, 0.2, seed) for seed in (3, 3, 4))
    assert first == again and prompts_of(first[1]) != prompts_of(other[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("prompts", "fraction"), [(1, 0.5), (4, 0.1), (4, 0.9), (10, 0.0), (10, 1.0), (10, -1.0)])
def test_neither_side_may_be_empty(prompts, fraction):
    with pytest.raises(UserError, match=f"eval_fraction: {fraction} of {prompts} prompts"):
        split_by_prompt(examples(prompts), fraction)


# -- pairs


def completion(state, token, return_):
    return {"input_ids": [1, state, token], "first": 2, "return_": return_, "prompt_id": "p"}


def test_right_is_paired_with_wrong_after_the_same_prefix():
    """Every completion above its prefix's mean, and every one below; one that is at it tells nothing."""
    returns = {2: (1.0, 0.0, 1.0, 1.0), 3: (0.0, 0.0), 4: (1.0,), 5: (-1.0, 0.5, 2.0, 0.5, 0.5)}
    every = [completion(state, 10 + i, value) for state, values in returns.items() for i, value in enumerate(values)]
    batch = collate_pairs(pairs_of(every))
    chosen, rejected = batch["input_ids"].chunk(2)
    assert chosen.tolist() == [[1, 2, 10], [1, 2, 12], [1, 2, 13], [1, 5, 12]]
    assert rejected.tolist() == [[1, 2, 11], [1, 2, 11], [1, 2, 11], [1, 5, 10]]
    assert batch["returns"].tolist() == [1, 1, 1, 2, 0, 0, 0, -1]


def test_no_pair_is_said():
    """Right and wrong, but not of the same prefix."""
    with pytest.raises(UserError, match=r"^reward: no prompt has completions with different rewards to make pairs of"):
        pairs_of([completion(2, 3, 1.0), completion(2, 4, 1.0), completion(3, 5, 0.0)])


# -- batches


def ragged():
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(2, 101, (length,), generator=generator).tolist(),
            "first": first,
            "return_": return_,
            "prompt_id": "a",
        }
        for length, first, return_ in ((9, 3, 1.0), (4, 2, 0.0), (17, 16, 0.5), (2, 1, 1.0))
    ]


@pytest.mark.parametrize("atoms", [None, [0.0, 0.5, 1.0]])
@pytest.mark.parametrize("head", ["v", "q"])
def test_packed_and_padded_batches_have_the_same_values_and_loss(head, atoms):
    decoder = build_model("llama").get_decoder()
    config = ValueModelConfig(
        backbone=decoder.config, head=head, atoms=atoms, hidden_size=64, embedding_size=64, vocab_size=101, width=16
    )
    torch.manual_seed(1)
    value = ValueModel(config).eval()
    padded, packed = collate(ragged()), collate(ragged(), packed=True)
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, 32)
    assert torch.equal(padded["mask"], packed["mask"]) and torch.equal(padded["returns"], packed["returns"])
    with torch.no_grad():
        expected = value(padded["input_ids"], attention_mask=padded["attention_mask"])
        flat = value(packed["input_ids"], position_ids=packed["position_ids"])
        alone = [value(torch.tensor([example["input_ids"]]))[0] for example in ragged()]
    found = unpack(flat, packed["lengths"])
    assert found.shape == expected.shape
    mask = padded["mask"]
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)
    by_row = torch.cat([values[row[: len(values)]] for values, row in zip(alone, mask, strict=True)])
    torch.testing.assert_close(found[mask], by_row, atol=1e-5, rtol=1e-5)
    losses = [
        bernoulli_loss(logits, padded["returns"], mask)
        if atoms is None
        else categorical_loss(logits, padded["returns"], torch.tensor(atoms), mask)
        for logits in (expected, found)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)


def test_one_row_alone():
    batch = collate(ragged()[:1])
    assert batch["input_ids"].shape == (1, 9) and batch["mask"].sum() == 6
