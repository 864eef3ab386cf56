"""Best-of-n distillation: which completions are learned."""

import math

import pyarrow as pa
import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.rollouts.table import SCHEMA, RolloutTable
from posttrain.trainers.baselines import IGNORED, BaselineTraining, sft_trainer
from posttrain.trainers.distil import bon_distill

# Of two prompts: token ids of the completions, and how each ended.
COMPLETIONS = [
    [([5, 1], "stop"), ([6, 6, 1], "stop"), ([7, 1], "stop")],
    [([8, 8], "length"), ([9, 1], "stop"), ([3], "stop")],
]


@pytest.fixture
def table(tmp_path):
    rows = [
        {name: None for name in SCHEMA.names}
        | {"prompt_id": str(group), "group": group, "sample": k, "prompt_ids": [4, group + 2]}
        | {"completion_ids": ids, "finish_reason": end}
        for group, completions in enumerate(COMPLETIONS)
        for k, (ids, end) in enumerate(completions)
    ]
    return RolloutTable(pa.Table.from_pylist(rows, schema=SCHEMA), {}, tmp_path)


def by_first_token(prompt, completions):
    return torch.tensor([float(ids[0]) for ids in completions])


def test_the_best_of_each_prompt_is_learned_where_it_is_far_above_the_mean(table):
    (first, second) = bon_distill(table, [lambda *ids: -by_first_token(*ids)], n=3)
    assert first == {"input_ids": [4, 2, 5, 1], "labels": [IGNORED, IGNORED, 5, 1]}
    assert second["input_ids"] == [4, 3, 3]
    assert [row["input_ids"] for row in bon_distill(table, [lambda *ids: -by_first_token(*ids)], 3, 2.0)] == [[4, 3, 3]]


def test_a_completion_that_was_cut_is_never_learned(table):
    rows = bon_distill(table, [lambda *ids: -by_first_token(*ids)], n=2)
    assert [row["input_ids"] for row in rows] == [[4, 2, 5, 1]]
    with pytest.raises(UserError, match="min_advantage: no completion is 9 above"):
        bon_distill(table, [by_first_token], n=3, min_advantage=9)


def test_a_completion_that_one_of_two_scorers_believes_in_is_none_by_the_least(table):
    doubtful = lambda *ids: by_first_token(*ids) * torch.tensor([1.0, 1.0, -1.0])  # noqa: E731
    assert bon_distill(table, [by_first_token], n=3)[0]["input_ids"] == [4, 2, 7, 1]
    assert bon_distill(table, [by_first_token, doubtful], n=3)[0]["input_ids"] == [4, 2, 6, 6, 1]
    assert bon_distill(table, [by_first_token, doubtful], n=3, head_reduce="max")[0]["input_ids"] == [4, 2, 7, 1]


@pytest.mark.parametrize("n", [1, 4])
def test_n_is_of_the_completions_that_there_are(table, n):
    with pytest.raises(UserError, match=f"n: must be between 2 and the 3 completions of a prompt, got {n}"):
        bon_distill(table, [by_first_token], n=n)
    with pytest.raises(UserError, match="scorers: at least one"):
        bon_distill(table, [], n=2)


@pytest.mark.slow
def test_the_rows_are_those_of_supervised_fine_tuning(table, tmp_path):
    policy = load_model("tiny", "cpu", "float32")
    rows = bon_distill(table, [by_first_token], n=3)
    training = BaselineTraining(batch_size=2, epochs=1)
    trainer = sft_trainer(policy.model, policy.tokenizer, rows, training, tmp_path / "run")
    trainer.train()
    assert trainer.state.global_step == 1 and math.isfinite(trainer.state.log_history[-1]["train_loss"])
