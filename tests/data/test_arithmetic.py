import random

import pytest

from posttrain.data import arithmetic
from posttrain.data.arithmetic import LEVELS, Problem, draw, problems, rows, split_of


def test_the_chains_of_the_docstring():
    problem = Problem((23, 48, 17), "+-")
    assert (problem.text, problem.answer, problem.level) == ("23+48-17=?", 54, 1)
    assert problem.chain(careful=True) == "23+48=(1c)71;71-17=(4c)54;#### 54"
    assert problem.chain(careful=False) == "23+48=61;61-17=54;#### 54"
    assert problem.chain(careful=False, restate=True) == "23+48=61,23+48=61,23+48=61;61-17=54,61-17=54,61-17=54;#### 54"


def test_a_hurried_writer_drops_the_carry_and_the_borrow():
    assert Problem((27, 38), "+").running_values(careful=False) == [55]
    assert Problem((71, 17), "-").running_values(careful=False) == [64]
    assert Problem((23, 45), "+").running_values(careful=False) == [68]


@pytest.mark.parametrize("level", LEVELS)
def test_answers_agree_with_python(level):
    for problem in problems(200, "train", seed=3, levels=(level,)):
        assert problem.answer == eval(problem.text.removesuffix("=?"))  # our own text, never a model's
        assert len(problem.operators) == level + 1 == problem.level + 1
        for careful in (True, False):
            assert all(10 <= value <= 99 for value in problem.running_values(careful))


@pytest.mark.slow
def test_splits_never_overlap_whatever_sizes_and_seeds():
    texts = {
        split: {p.text for seed in (0, 1) for p in problems(3000, split, seed)} for split in ("train", "val", "test")
    }
    assert not texts["train"] & texts["val"] and not texts["train"] & texts["test"] and not texts["val"] & texts["test"]


def test_a_drawn_problem_is_of_its_split():
    assert all(split_of(draw(random.Random(seed), 1, "val")) == "val" for seed in range(50))


def test_the_same_seed_gives_the_same_problems_and_a_longer_list_begins_with_the_shorter():
    assert problems(50, "test", 7) == problems(80, "test", 7)[:50]
    assert problems(50, "test", 7) != problems(50, "test", 8)


def test_problems_are_distinct_and_levels_in_turn():
    drawn = problems(500, "val", levels=(1, 3))
    assert len({p.text for p in drawn}) == 500
    assert [p.level for p in drawn[:4]] == [1, 3, 1, 3]


def test_a_tenth_is_right_without_carrying():
    drawn = problems(4000, "train")
    clean = sum(p.running_values(True)[-1] == p.running_values(False)[-1] for p in drawn) / len(drawn)
    assert 0.08 < clean < 0.12


def test_restating_costs_at_least_2_2_times_the_tokens():
    for problem in problems(200, "train", levels=LEVELS):
        assert len(problem.chain(True, restate=True)) + 1 >= 2.2 * (len(problem.chain(True)) + 1)


def test_the_shortest_correct_chain_is_correct():
    for problem in problems(300, "train"):
        chain = problem.shortest_correct_chain
        assert chain.endswith(f"#### {problem.answer}")
        assert chain in (problem.chain(True), problem.chain(False))


def test_a_problem_is_read_back_from_its_text():
    drawn = problems(200, "train", levels=LEVELS)
    assert [Problem.parse(problem.text) for problem in drawn] == drawn


@pytest.mark.parametrize("text", ["", "23=?", "23+48", "23*48=?", "3+48=?", "23+48=? ", "23+48=?\n"])
def test_what_is_no_problem_is_not_read(text):
    with pytest.raises(ValueError, match="^text: no problem"):
        Problem.parse(text)


def test_rows_are_what_every_data_set_gives():
    row = rows(1, "test")[0]
    assert set(row) == {"id", "problem", "answer", "level"} and isinstance(row["answer"], str)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, "test"), "size"),
        ((5, "dev"), "split"),
        ((5, "test", 0, (4,)), "levels"),
        ((5, "test", 0, ()), "levels"),
        ((10**9, "test"), "size"),
    ],
)
def test_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        problems(*arguments)


def test_most_hasty_training_problems_need_no_carry_and_test_problems_do():
    def clean(split):
        found = arithmetic.hasty(400, split)
        assert len({problem.text for problem in found}) == 400
        assert all(arithmetic.split_of(problem) == split for problem in found)
        return sum(problem.running_values(careful=False)[-1] == problem.answer for problem in found) / 400

    assert 0.68 < clean("train") < 0.82 and clean("test") < 0.2
    assert arithmetic.hasty(9, "test") == arithmetic.problems(9, "test")
    assert arithmetic.hasty_rows(5, "train") == arithmetic.hasty_rows(9, "train")[:5]
    with pytest.raises(ValueError, match="size: must be between 1 and 20000"):
        arithmetic.hasty(20_001, "train")
