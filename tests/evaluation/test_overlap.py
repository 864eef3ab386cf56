import pytest

from posttrain.data.load import load_rows
from posttrain.errors import UserError
from posttrain.evaluation.overlap import find_overlap, load_texts

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def test_a_copy_is_exact_whatever_its_case_and_spacing():
    found = find_overlap({"t": "What is\n1+1?"}, {"e": "what  is 1+1?", "f": "What is 1-1?"})
    assert [(hit.id, hit.exact, hit.twin) for hit in found.hits] == [("e", True, "t")]
    assert found.short == 2


def test_the_share_is_that_of_13_grams():
    found = find_overlap(
        {"t": LONG}, {"same": LONG, "near": LONG.replace("fifteen", "x"), "far": LONG.replace("eight", "x")}
    )
    assert {hit.id: hit.share for hit in found.hits} == {"same": 1.0, "near": pytest.approx(2 / 3)}


def test_punctuation_and_case_do_not_hide_a_copy():
    found = find_overlap({"t": LONG}, {"e": LONG.upper().replace(" ", ", ")})
    assert found.hits[0].share == 1 and not found.hits[0].exact


def test_the_twin_is_the_text_that_shares_most():
    found = find_overlap({"a": LONG.rsplit(" ", 2)[0], "b": LONG}, {"e": LONG + " sixteen"})
    assert found.hits[0].twin == "b"


def test_math_has_its_documented_twins(data_dir, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_DATA", str(data_dir))
    found = find_overlap(load_texts("math/train", "train"), load_texts("math500/test", "eval"))
    assert found.counts()["more than half of the 13-grams"] == 14
    assert found.hits[0].id == "math500-test-precalculus-285"
    assert found.hits[0].twin == "math-train-precalculus-474"


def test_sources_are_files_or_named_splits(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n')
    assert load_texts(str(path), "train") == {"1": "p"}
    assert len(load_texts("arithmetic/val", "eval")) == len(load_rows("arithmetic", "val"))
    with pytest.raises(UserError, match="^train: give a .jsonl or .parquet file, or a data set as NAME/SPLIT"):
        load_texts("gsm8k", "train")
