import json
from pathlib import Path

import pytest

from posttrain.data.load import load_rows
from posttrain.errors import UserError
from posttrain.evaluation.benchmarks import Problems, data_sha256, find, load_all, load_problems, preset_names, readable
from posttrain.evaluation.harness import render_prompts
from tests.evaluation.stand_ins import Characters, adder, write_data

GOLDEN = Path(__file__).with_name("prompts")
ROW = {"id": "1", "problem": "What is \\frac{1}{2} of {8}?", "answer": "4"}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_s_rendered_prompt_is_what_it_was(name):
    preset = find(name)
    exemplars = load_rows(preset.fewshot) if preset.fewshot else []
    (prompt,) = render_prompts(Problems(preset, [ROW], exemplars, 1, ""), adder())
    assert Characters().decode(prompt.ids) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_pins_the_data_it_names(name, data_dir, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_DATA", str(data_dir))
    preset = find(name)
    assert data_sha256(load_rows(preset.data, preset.split)) == preset.sha256


def test_every_gold_of_math500_is_read(data_dir, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_DATA", str(data_dir))
    assert len(load_problems(find("math500")).rows) == 500


def test_other_data_is_refused_unless_told(tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    write_data(tmp_path / "gsm8k" / "test.jsonl")
    monkeypatch.setenv("POSTTRAIN_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"^data: gsm8k/test is not the data of gsm8k: its 12 problems .* --any-data"):
        load_problems(find("gsm8k"))
    assert len(load_problems(find("gsm8k"), any_data=True).rows) == 12


def test_the_hash_is_of_problems_and_golds_in_any_order():
    rows = [{"id": "1", "problem": "a  b", "answer": "1"}, {"id": "2", "problem": "c", "answer": "2"}]
    same = [{"id": "y", "problem": "c\n", "answer": "2"}, {"id": "x", "problem": "a b", "answer": "1", "level": 3}]
    assert data_sha256(rows) == data_sha256(same)
    assert data_sha256(rows) != data_sha256([rows[0], {**rows[1], "answer": "3"}])
    assert data_sha256(rows) != data_sha256(rows[:1])


def test_the_nearest_name_is_suggested():
    with pytest.raises(UserError, match=r"^benchmark: no benchmark 'gsm8' \(did you mean gsm8k\?\)"):
        find("gsm8")


@pytest.mark.parametrize("gold", ["\\frac{1}{", "}", "???", "\\left(1,2"])
def test_a_gold_that_says_nothing_is_refused(tmp_path, gold):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"id": "7", "problem": "?", "answer": gold}) + "\n")
    with pytest.raises(UserError, match=r"^answer: mine row '7' has the gold .* which the grader cannot read$"):
        load_problems(find(str(path)))


@pytest.mark.parametrize(
    "gold", ["4", "\\frac{3}{4}", "\\text{Evelyn}", "(3, \\frac{\\pi}{2})", "x \\in [-2,7]", "52_8"]
)
def test_a_gold_that_says_something_is_read(gold):
    assert readable(gold)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n": 4, "k": (1, 8)}, "n: 4 samples per problem cannot give mine pass@8"),
        ({"k": (0,)}, "k: must be at least 1"),
        ({"n": 0}, "n: must be between 1 and 1000, got 0"),
        ({"n": 1001}, "n: must be between 1 and 1000, got 1001"),
        ({"n": 2, "temperature": 0.0}, "n: temperature 0 gives 2 times the same sample"),
        ({"temperature": -1.0}, "temperature: "),
        ({"top_p": 0.0}, "top_p: "),
        ({"max_tokens": 0}, "max_tokens: "),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(tmp_path, overrides, message):
    path = write_data(tmp_path / "mine.jsonl")
    with pytest.raises(UserError) as caught:
        load_all([str(path)], overrides)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_benchmark_may_be_named_once(data):
    with pytest.raises(UserError, match="^benchmark: sums is named twice"):
        load_all([str(data), str(data)], {})


def test_a_smaller_limit_s_problems_are_among_a_larger_one_s(data):
    few, more = (load_problems(find(str(data)), limit).rows for limit in (3, 7))
    assert len(few) == 3 and len(more) == 7
    assert [row for row in more if row in few] == few
    assert [row["id"] for row in few] != ["p0", "p1", "p2"]
    with pytest.raises(UserError, match="^limit: "):
        load_problems(find(str(data)), 0)


def test_a_yaml_of_one_s_own(tmp_path, data):
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"problem": "1+1=?", "answer": "2", "solution": "2"}) + "\n")
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {data}\nfewshot: examples.jsonl\nchat: false\nprompt: '{{problem}}'\nn: 1\n")
    task = load_problems(find(str(path)))
    assert Characters().decode(render_prompts(task, adder())[1].ids) == "1+1=? 2\n\n7+1=?"
    examples.write_text(json.dumps({"problem": "1+1=?", "answer": "2"}) + "\n")
    with pytest.raises(UserError, match=r"^fewshot: .* has no text `solution`"):
        load_problems(find(str(path)))
    path.write_text("data: x\ntemprature: 1\n")
    with pytest.raises(UserError, match=r"^temprature: unknown field \(did you mean temperature\?\)"):
        find(str(path))


def test_the_sizes_in_tables_are_powers_of_two_and_n():
    preset = find("arithmetic")
    assert preset.ks == (1, 2, 4, 8)
    assert find("aime24").ks == (1, 2, 4, 8, 16, 32, 64)
