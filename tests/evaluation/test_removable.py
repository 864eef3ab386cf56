"""What a right answer is longer than the shortest right one, counted by hand."""

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from posttrain.data.arithmetic import Problem
from posttrain.evaluation.removable import Removable, removable, removed, shortest_tokens
from posttrain.models.load import TINY
from posttrain.rollouts.table import SCHEMA, RolloutTable

CARRIES = Problem((23, 48, 11), "+-")  # only the careful chain is right
PLAIN = Problem((23, 45, 11), "+-")  # nothing is carried: the hurried chain is right too, and shorter


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def table(tmp_path, tokenizer, answers):
    """answers: problem -> chains"""
    rows = [
        {
            **dict.fromkeys(SCHEMA.names),
            "prompt_id": problem.text,
            "sample": sample,
            "group": group,
            "prompt": [{"role": "user", "content": problem.text}],
            "completion_ids": [*tokenizer(chain, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
            "correct": chain.endswith(f" {problem.answer}"),
        }
        for group, (problem, chains) in enumerate(answers.items())
        for sample, chain in enumerate(chains)
    ]
    return RolloutTable(pa.Table.from_pylist(rows, schema=SCHEMA), {}, tmp_path)


def test_a_token_is_a_character_and_one_ends_it(tokenizer):
    assert shortest_tokens(CARRIES.text, tokenizer) == len("23+48=(1c)71;71-11=(0.)60;#### 60") + 1
    assert shortest_tokens(PLAIN.text, tokenizer) == len("23+45=68;68-11=57;#### 57") + 1


def test_only_right_answers_count_each_against_its_own_problem(tmp_path, tokenizer):
    answers = {
        CARRIES: [CARRIES.chain(True), CARRIES.chain(True, restate=True), CARRIES.chain(False)],
        PLAIN: [PLAIN.chain(False), PLAIN.chain(True), PLAIN.chain(True)],
    }
    found = removable(table(tmp_path, tokenizer, answers), tokenizer)
    restated = len(CARRIES.chain(True, restate=True)) - len(CARRIES.chain(True))
    marks = len("(8.)(7.)")
    assert found.right.tolist() == [2, 3]
    assert found.removable.tolist() == [restated, 2 * marks]
    assert found.mean == pytest.approx((restated + 2 * marks) / 5)
    assert found.mean_tokens == pytest.approx(sum(found.tokens) / 5)


def test_a_problem_of_another_task_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no problem of this task"):
        shortest_tokens("what is 23+48?", tokenizer)


def test_the_share_that_is_gone():
    before = Removable(np.array([1.0, 4.0]), np.array([40.0, 200.0]), np.array([10.0, 40.0]))
    after = Removable(np.array([5.0, 5.0]), np.array([150.0, 200.0]), np.array([10.0, 15.0]))
    assert removed(after, before).share == pytest.approx(1 - 2.5 / 10)
    assert removed(before, before).share == 0


@pytest.mark.slow
def test_the_interval_covers_the_share():
    """In 200 draws of 60 problems; the share of a large population is 0.6."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        ease = rng.uniform(0.2, 1.0, 60)  # the easier, the less there is to remove: what makes a ratio of sums differ
        counts = [rng.binomial(8, ease), rng.binomial(8, ease)]
        before, after = (
            Removable(right, 50.0 * right, right * scale * (2 - ease) * rng.uniform(0.5, 1.5, 60))
            for right, scale in zip(counts, (20.0, 8.0), strict=True)
        )
        found = removed(after, before)
        hits += found.low <= 0.6 <= found.high
    assert 180 <= hits <= 199


def test_nothing_to_remove_is_an_error():
    none = Removable(np.zeros(2), np.zeros(2), np.zeros(2))
    some = Removable(np.ones(2), np.ones(2), np.ones(2))
    for after, before in ((none, some), (some, none)):
        with pytest.raises(ValueError, match="^before: needs right answers"):
            removed(after, before)
    assert np.isnan(none.mean) and np.isnan(none.mean_tokens)
