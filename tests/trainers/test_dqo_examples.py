"""Rows of a rollout table as DQO's examples: rewards, truncation, who sampled them, and tables that cannot be used."""

from types import SimpleNamespace

import pytest

from posttrain.errors import UserError
from posttrain.rollouts.table import read_table, write_manifest, write_shard
from posttrain.trainers.dqo_examples import check_vocabulary, examples_of

NAN, INF = float("nan"), float("inf")
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 9, "seed": 0}


def row(completion_ids, reward, **changes):
    return {
        "prompt_id": "a",
        "sample": 0,
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
        "logprobs": None,
        "policy": "p@f",
        "guide": None,
        "beta": None,
        "kl": 0.0,
        "log_ratio": 0.0,
        "cut": 0,
        "sampling": PLAIN,
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


def test_examples_of_several_tables_keep_their_order(table):
    first, second = table(row([3, 4, 2], 1.0), row([5, 2], 0.0)), table(row([6, 2], -0.5, prompt_id="b"))
    assert examples_of([first, second], "f") == [
        {
            "input_ids": [11, 12, *ids],
            "first": 2,
            "reward": reward,
            "process_rewards": None,
            "behaviour_logprobs": None,
            "truncated": False,
            "prompt_id": prompt_id,
        }
        for ids, reward, prompt_id in (([3, 4, 2], 1.0, "a"), ([5, 2], 0.0, "a"), ([6, 2], -0.5, "b"))
    ]


def test_unpaired_and_unanimous_prompts_are_kept(table):
    rows = [row([3, 2], 1.0, prompt_id=prompt_id) for prompt_id in ("a", "b", "b", "c")]
    assert [example["prompt_id"] for example in examples_of([table(*rows)], "f")] == ["a", "b", "b", "c"]


def test_an_empty_completion_has_nothing_to_learn(table):
    found = examples_of([table(row([], 0.0), row([4, 2], 1.0))], "f")
    assert [example["input_ids"] for example in found] == [[11, 12, 4, 2]]


# -- truncated completions


def test_a_truncated_completion_keeps_no_reward(table):
    """What it is punished with stays, where wrong answers are."""
    rows = [row([3, 4], reward, finish_reason="length") for reward in (1.0, 0.0, -1.0)]
    found = examples_of([table(*rows, row([5, 2], 1.0))], "f")
    assert [example["reward"] for example in found] == [0.0, 0.0, -1.0, 1.0]
    assert [example["truncated"] for example in found] == [True, True, True, False]


def test_truncated_completions_can_be_dropped(table):
    cut_off = row([3, 4], 1.0, finish_reason="length")
    found = examples_of([table(cut_off, row([5, 2], 1.0))], "f", truncated="drop")
    assert [example["input_ids"] for example in found] == [[11, 12, 5, 2]]
    with pytest.raises(UserError, match="table: no completion is left"):
        examples_of([table(cut_off)], "f", truncated="drop")


def test_what_to_do_with_them_is_named(table):
    with pytest.raises(UserError, match="truncated: must be 'keep' or 'drop', got 'zero'"):
        examples_of([table(row([3, 2], 1.0))], "f", truncated="zero")


# -- process rewards


def steps(*scores):
    return {"process_rewards": [{"token": token, "reward": reward} for token, reward in scores]}


def test_scores_are_paid_at_their_tokens(table):
    found = examples_of([table(row([3, 4, 5, 2], 1.0, **steps((0, 0.5), (2, 0.25))))], "f", process_scale=2.0)
    assert found[0]["reward"] == 1.0
    assert found[0]["process_rewards"] == [1.0, 0.0, 0.5, 0.0]


def test_potentials_are_paid_back(table):
    found = examples_of([table(row([3, 4, 5, 2], 1.0, **steps((0, 0.5), (2, 0.25))))], "f", process="shaping")
    assert found[0]["process_rewards"] == [0.5, 0.0, -0.25, -0.25]


def test_steps_without_a_score_have_no_reward(table):
    found = examples_of([table(row([3, 2], 1.0, **steps()), row([4, 2], 1.0))], "f", process="shaping")
    assert [example["process_rewards"] for example in found] == [None, None]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([(2, 1.0)], "process_rewards: row 'a' of .*: token 2 is not in a completion of 2 tokens"),
        ([(-1, 1.0)], "process_rewards: row 'a' of .*: token -1 is not in"),
        ([(0, 1.0), (0, 0.5)], "process_rewards: row 'a' of .*: token 0 has two potentials"),
        ([(0, NAN)], "process_rewards: row 'a' of .* not a token and a finite number"),
        ([(None, 1.0)], "process_rewards: row 'a' of .* not a token and a finite number"),
    ],
)
def test_scores_that_cannot_be_paid_are_refused(table, scores, message):
    with pytest.raises(UserError, match=message):
        examples_of([table(row([3, 2], 1.0, **steps(*scores)))], "f", process="shaping")


def test_what_scores_are_is_named(table):
    with pytest.raises(UserError, match="process: must be 'additive' or 'shaping', got 'potential'"):
        examples_of([table(row([3, 2], 1.0))], "f", process="potential")
    with pytest.raises(UserError, match="process_scale: must be a finite number, got inf"):
        examples_of([table(row([3, 2], 1.0))], "f", process_scale=INF)


# -- the law that sampled them

OTHERS = [
    {"policy": "p@other"},
    {"policy": None},
    {"guide": "g"},
    {"cut": 1},
    {"sampling": None},
    {"sampling": PLAIN | {"temperature": 0.7}},
    {"sampling": PLAIN | {"temperature": 0.0}},
    {"sampling": PLAIN | {"top_p": 0.9}},
    {"sampling": PLAIN | {"top_k": 50}},
]


def test_the_references_own_samples_take_its_log_probabilities(table):
    """Not the stored ones: another kernel's rounding would be taken for a change of the policy."""
    found = examples_of([table(row([3, 2], 1.0, logprobs=[-1.0, -0.5]))], "f")
    assert found[0]["behaviour_logprobs"] is None


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_samples_of_another_law_take_the_stored_ones(table, other):
    found = examples_of([table(row([3, 2], 1.0, logprobs=[-1.0, -0.5], **other))], "f")
    assert found[0]["behaviour_logprobs"] == [-1.0, -0.5]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_samples_of_another_law_need_them(table, other):
    with pytest.raises(UserError, match="logprobs: row 'a' of .* has none, and was not sampled from the reference"):
        examples_of([table(row([3, 2], 1.0), row([4, 2], 1.0, **other))], "f")


@pytest.mark.parametrize("logprobs", [[], [-1.0], [-1.0, -0.5, -0.5]])
def test_there_is_one_for_each_token(table, logprobs):
    with pytest.raises(UserError, match=f"logprobs: row 'a' of .* has {len(logprobs)} for 2 tokens"):
        examples_of([table(row([3, 2], 1.0, logprobs=logprobs, policy="p@other"))], "f")


@pytest.mark.parametrize("value", [NAN, -INF, INF, None])
def test_they_are_finite(table, value):
    with pytest.raises(UserError, match="logprobs: row 'a' of .* not a finite number"):
        examples_of([table(row([3, 2], 1.0, logprobs=[-1.0, value], policy="p@other"))], "f")


# -- tables that cannot be used


@pytest.mark.parametrize("reward", [None, NAN, INF, -INF])
def test_every_completion_has_a_reward(table, reward):
    with pytest.raises(UserError, match=f"reward: row 'a' of .* has {reward}; every completion"):
        examples_of([table(row([3, 2], 1.0), row([4, 2], reward))], "f")


@pytest.mark.parametrize("ids", [[], None])
def test_every_completion_has_a_prompt(table, ids):
    with pytest.raises(UserError, match="prompt_ids: row 'a' of .* has none"):
        examples_of([table(row([3, 2], 1.0, prompt_ids=ids))], "f")


def test_every_row_has_its_tokens(table):
    with pytest.raises(UserError, match="completion_ids: row 'a' of .* has none"):
        examples_of([table(row(None, 1.0))], "f")


def test_completions_that_repeat_their_prompts_are_refused(table):
    whole = table(*(row([11, 12, token, 2], 1.0) for token in (3, 4, 5)))
    with pytest.raises(UserError, match="completion_ids: 3 of 3 completions of .* begin with their prompt"):
        examples_of([whole], "f")


def test_prompts_that_hold_the_completion_are_refused(table):
    whole = table(*(row([token, 2], 1.0, prompt_ids=[11, 12, token, 2]) for token in (3, 4, 5)))
    with pytest.raises(UserError, match="prompt_ids: 3 of 3 prompts of .* end with their completion"):
        examples_of([whole], "f")


def test_a_model_that_repeats_the_question_once_is_no_mistake_of_the_table(table):
    found = examples_of([table(row([11, 12, 3, 2], 0.0), row([12], 0.0), row([4, 2], 1.0), row([5, 2], 1.0))], "f")
    assert len(found) == 4


@pytest.mark.parametrize("rows", [[], [row([], 0.0)]])
def test_nothing_to_learn_from_is_said(table, rows):
    tables = [table(*rows)] if rows else []
    with pytest.raises(UserError, match="table: no completion is left to learn from"):
        examples_of(tables, "f")


def test_a_table_of_another_vocabulary_is_refused(table):
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    check_vocabulary(table(row([5, 6], 1.0, completion="5 6")), tokenizer, 13)
    with pytest.raises(UserError, match=r"vocabulary: .* has the token 12, and the model 12 embeddings"):
        check_vocabulary(table(row([5, 6], 1.0)), tokenizer, 12)
    with pytest.raises(UserError, match=r"vocabulary: the tokens of row .* do not say '5, 6' in this model's"):
        check_vocabulary(table(row([5, 6], 1.0, completion="5, 6")), tokenizer, 13)
