"""Process scores by Monte Carlo: where steps end, what is asked of the engine, and what comes of it."""

from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.actor_critic import new_critic
from posttrain.rollouts.collect import collect
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.process import critic_scores, monte_carlo_scores, step_ends, write_scored
from tests.small_models import build_model

SAMPLING = Sampling(max_tokens=8, seed=5)


class Letters:
    """Token id i is the i-th character; whatever is completed is stated as it is."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join("0123456789\n;"[i] for i in ids)


def parity(completions, golds):
    """Right: the sum of all digits is even."""
    return [SimpleNamespace(correct=sum(map(int, filter(str.isdigit, text))) % 2 == 0) for text in completions]


@pytest.fixture
def table(engine, tokenizer, prompts, tmp_path):
    return collect(
        engine,
        tokenizer,
        prompts[:3],
        samples=2,
        sampling=SAMPLING,
        policy="digits",
        out=tmp_path / "table",
        shard_prompts=2,
    )


@pytest.mark.parametrize(
    ("ids", "separator", "ends"),
    [
        ([1, 10, 2, 3, 10, 4], "\n", [1, 4]),
        ([1, 2, 3], "\n", []),
        ([1, 10, 10, 10, 2], "\n", [3]),
        ([1, 10, 10, 2], "\n\n", [2]),
        ([10, 1, 10], "\n", [0]),
        ([], "\n", []),
    ],
)
def test_a_step_ends_with_its_separators(ids, separator, ends):
    assert step_ends(Letters(), ids, separator) == ends


@pytest.mark.parametrize("digit", "1257")
def test_scores_are_the_shares_of_right_continuations(engine, table, digit):
    """The digit ends a step; the engine is asked for what is left, and the whole text is graded."""
    engine.requests.clear()
    scores = monte_carlo_scores(engine, Letters(), table, samples=5, sampling=SAMPLING, separator=digit, grader=parity)
    requests = list(engine.requests)
    assert len({request.sampling.seed for request in requests}) == len(requests) > 0
    for row, own in zip(table.rows(), scores, strict=True):
        ids = row["completion_ids"]
        assert [score["token"] for score in own] == step_ends(Letters(), ids, digit)
        for score in own:
            prefix = ids[: score["token"] + 1]
            mine = [request for request in requests if request.prompt_ids == (*row["prompt_ids"], *prefix)]
            assert all(request.sampling.max_tokens == 8 - len(prefix) for request in mine)
            texts = [Letters().decode([*prefix, *completion.ids]) for completion in engine.generate(mine)]
            assert score["reward"] == sum(graded.correct for graded in parity(texts, None)) / 5


def test_the_scores_of_a_seed_are_the_same_again(engine, table):
    arguments = {"samples": 3, "sampling": SAMPLING, "separator": "3", "grader": parity}
    first = monte_carlo_scores(engine, Letters(), table, **arguments)
    assert monte_carlo_scores(engine, Letters(), table, **arguments) == first


def test_a_prefix_that_leaves_nothing_to_sample_has_no_score(engine, table):
    short = Sampling(max_tokens=3, seed=5)
    scores = monte_carlo_scores(engine, Letters(), table, samples=1, sampling=short, separator="3", grader=parity)
    assert all(score["token"] < 2 for own in scores for score in own)


def test_scores_are_written_into_a_table(engine, table, tmp_path):
    scores = monte_carlo_scores(engine, Letters(), table, samples=2, sampling=SAMPLING, separator="3", grader=parity)
    scored = write_scored(table, scores, tmp_path / "scored")
    assert scored.column("process_rewards") == scores
    assert scored.data.drop_columns("process_rewards").equals(table.data.drop_columns("process_rewards"))
    assert table.column("process_rewards") == [None] * 6


def test_mistakes_are_named(engine, table, tmp_path):
    with pytest.raises(UserError, match="samples: must be at least 1, got 0"):
        monte_carlo_scores(engine, Letters(), table, samples=0, sampling=SAMPLING)
    with pytest.raises(UserError, match="scores: there are 1 of 6 rows"):
        write_scored(table, [[]], tmp_path / "scored")
    with pytest.raises(UserError, match="^out: .* is not empty; delete it, or give another folder$"):
        write_scored(table, [[]] * 6, table.folder)


def test_a_critic_scores_the_ends_of_steps(table):
    policy = build_model("llama")
    critic = new_critic(policy, "reference").eval()
    torch.nn.init.normal_(critic.head.weight)
    row = next(table.rows())
    ids = [3, 10, 4, 5, 10, 6]
    steps = replace(table, data=pa.Table.from_pylist([{**row, "completion_ids": ids}], schema=table.data.schema))
    (scores,) = critic_scores(critic, Letters(), steps)
    assert [score["token"] for score in scores] == [1, 4]
    for score in scores:
        prefix = torch.tensor([[*row["prompt_ids"], *ids[: score["token"] + 1]]])
        assert score["reward"] == pytest.approx(critic(prefix)[0, -1].item(), abs=1e-5)
