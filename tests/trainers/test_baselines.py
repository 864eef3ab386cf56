"""The baselines learn from the ids that were sampled, and from the rows that are theirs."""

import math

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.trainers.baselines import (
    IGNORED,
    TRAINERS,
    BaselineTraining,
    judged_rows,
    pair_rows,
    right_rows,
    split,
)


def example(prompt, completion, reward, name=None):
    return {
        "input_ids": [*prompt, *completion],
        "first": len(prompt),
        "reward": reward,
        "behaviour_logprobs": None,
        "truncated": False,
        "prompt_id": name or str(prompt),
    }


# Ids that no tokeniser would give for any text: reading them back from their text would change them.
EXAMPLES = [
    example([5, 6], [10, 11, 12], 1.0),
    example([5, 6], [13, 14], 0.0),
    example([5, 6], [13, 15, 16], 1.0),
    example([7, 8, 9], [20], 0.0),
    example([7, 8, 9], [21, 22, 0, 23], 1.0),
]


def test_rejection_sampling_learns_the_right_completions_only():
    rows = right_rows(EXAMPLES)
    assert [row["input_ids"] for row in rows] == [[5, 6, 10, 11, 12], [5, 6, 13, 15, 16], [7, 8, 9, 21, 22, 0, 23]]
    assert rows[0]["labels"] == [IGNORED, IGNORED, 10, 11, 12]


def test_pairs_are_best_with_worst_and_no_completion_is_in_two():
    graded = [example([1], [10 + i], reward, "a") for i, reward in enumerate((0.2, 0.9, 0.5, 0.4, 0.2))]
    pairs = pair_rows(
        [*graded, example([2], [30], 1.0, "b"), example([2], [31], 1.0, "b"), example([3], [40], 0.0, "c")]
    )
    assert pairs == [
        {"prompt_ids": [1], "chosen_ids": [11], "rejected_ids": [14]},
        {"prompt_ids": [1], "chosen_ids": [12], "rejected_ids": [10]},
    ]


def test_kto_sees_every_completion_once_and_another_one_of_its_batch():
    rows = judged_rows(EXAMPLES, batch_size=3, seed=1)
    seen = sorted((row["prompt_ids"], row["completion_ids"], row["label"]) for row in rows)
    assert seen == sorted((*split(row), row["reward"] == 1) for row in EXAMPLES)
    for start in (0, 3):
        batch = rows[start : start + 3]
        own, other = ([row[name] for row in batch] for name in ("completion_ids", "KL_completion_ids"))
        assert sorted(own) == sorted(other) and all(a != b for a, b in zip(own, other, strict=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: right_rows([EXAMPLES[1]]), "reward: no completion is right"),
        (lambda: pair_rows([EXAMPLES[0], EXAMPLES[2], EXAMPLES[3]]), "reward: no prompt has a better and a worse"),
        (lambda: judged_rows([EXAMPLES[0], EXAMPLES[2]], 2, 0), "reward: the completions are all right or all wrong"),
        (lambda: judged_rows(EXAMPLES, 1, 0), "batch_size: KTO .* must be at least 2"),
        (lambda: BaselineTraining(learning_rate=0.0), "learning_rate: must be positive"),
        (lambda: BaselineTraining(beta=math.nan), "beta: must be positive"),
    ],
)
def test_what_cannot_be_learned_from_is_said(rows, message):
    with pytest.raises(UserError, match=f"^{message}"):
        rows()


@pytest.fixture
def trainer(tmp_path):
    def make(method, **settings):
        tiny = load_model("tiny", "cpu", "float32")
        settings = BaselineTraining(batch_size=8, **settings)
        return TRAINERS[method](tiny.model, tiny.tokenizer, EXAMPLES, settings, tmp_path / "run", seed=0)

    return make


def rows_of(batch, mask):
    """(prompt, completion) of every row of a padded batch, by the mask of what is learned"""
    found = []
    for ids, real, learned in zip(batch["input_ids"], batch["attention_mask"].bool(), mask, strict=True):
        found.append((ids[real & ~learned].tolist(), ids[real & learned].tolist()))
    return sorted(found)


@pytest.mark.parametrize("method", ["rejection", "dpo", "kto"])
def test_the_batches_hold_the_ids_as_they_were_sampled(trainer, method):
    batch = next(iter(trainer(method).get_train_dataloader()))
    mask = batch["labels"] != IGNORED if method == "rejection" else batch["completion_mask"].bool()
    expected = {
        "rejection": [EXAMPLES[0], EXAMPLES[2], EXAMPLES[4]],
        "dpo": [EXAMPLES[0], EXAMPLES[1], EXAMPLES[4], EXAMPLES[3]],
        "kto": EXAMPLES,
    }[method]
    assert rows_of(batch, mask) == sorted(map(split, expected))


def nll(model, row):
    """of its completion, nats per token"""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return -logprobs.gather(1, ids[0, 1:, None])[row["first"] - 1 :, 0]


# Of KTO: 1 - sigmoid(0) of every row, the three right ones weighing two thirds each.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "known"), [("dpo", math.log(2)), ("kto", 0.5 * (3 * 2 / 3 + 2) / 5)])
def test_a_policy_that_is_its_own_reference_has_the_known_loss(trainer, method, known):
    made = trainer(method, epochs=1)  # a single step
    made.train()
    assert made.state.log_history[-1]["train_loss"] == pytest.approx(known, abs=1e-5)


@pytest.mark.slow
def test_rejection_sampling_starts_at_the_mean_over_right_tokens_and_falls(trainer):
    made = trainer("rejection", epochs=4)
    before = torch.cat([nll(made.model, row) for row in EXAMPLES if row["reward"]]).mean()
    losses = []
    made.args.logging_steps = 1
    made.log = lambda logs, *_, **__: losses.append(logs.get("loss"))
    made.train()
    assert losses[0] == pytest.approx(float(before), abs=1e-4)
    assert torch.cat([nll(made.model, row) for row in EXAMPLES if row["reward"]]).mean() < before
