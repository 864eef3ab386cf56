import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data.load import load_rows
from posttrain.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_ones_own(tmp_path):
    data = write(
        tmp_path / "mine.jsonl", [{"question": "1+1?", "answer": 2}, {"problem": "2+2?", "answer": "4", "id": "b"}]
    )
    assert load_rows(data) == [
        {"question": "1+1?", "problem": "1+1?", "answer": "2", "id": "1"},
        {"problem": "2+2?", "answer": "4", "id": "b"},
    ]


def test_parquet_is_read_too(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"problem": "p", "answer": "1"}]), tmp_path / "mine.parquet")
    assert load_rows(str(tmp_path / "mine.parquet"))[0]["problem"] == "p"


def test_posttrain_data_is_looked_up_by_name(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    write(tmp_path / "toy" / "val.jsonl", [{"problem": "p", "answer": "1"}])
    monkeypatch.setenv("POSTTRAIN_DATA", str(tmp_path))
    assert len(load_rows("toy", "val")) == 1
    with pytest.raises(UserError, match="split: toy has no split 'test'; it has val"):
        load_rows("toy", "test")


def test_real_gsm8k(data_dir, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_DATA", str(data_dir))
    rows = load_rows("gsm8k", "test")
    assert len(rows) == 1319 and rows[0]["answer"] == "18"


def test_hub_rows_become_ours(monkeypatch):
    import datasets

    asked = []

    def load_dataset(repository, configuration, split):
        asked.append((repository, configuration, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "because 1 + 1\n#### 1,234"}])

    monkeypatch.delenv("POSTTRAIN_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("gsm8k", "test") == [{"id": "1", "problem": "q", "solution": "because 1 + 1", "answer": "1234"}]
    assert asked == [("openai/gsm8k", "main", "test")]


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.delenv("POSTTRAIN_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="could not be loaded from the hub: no route; or set POSTTRAIN_DATA") as caught:
        load_rows("svamp")
    assert "\n" not in str(caught.value)


def test_arithmetic_is_generated():
    assert load_rows("arithmetic", "val", 3, seed=1) == load_rows("arithmetic", "val", 5, seed=1)[:3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data: .* is empty"),
        ("{\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 must be a JSON object"),
        ('{"problem": "p"}\n', "answer: .* row 1 has none"),
        ('{"problem": "p", "answer": " "}\n', "answer: .* row 1 has none"),
        ('{"problem": "p", "answer": null}\n', "answer: .* row 1 has none"),
        ('{"answer": "1"}\n', "problem: .* row 1 has none"),
        ('{"problem": "p", "answer": "1", "id": "x"}\n' * 2, "has the id 'x' twice"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_or_no_parquet_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match="data: "):
            load_rows(str(tmp_path / name))


def test_unknown_names_get_a_suggestion(monkeypatch):
    monkeypatch.delenv("POSTTRAIN_DATA", raising=False)
    with pytest.raises(UserError, match=r"named gsm8 \(did you mean gsm8k\?\)"):
        load_rows("gsm8")


def test_limit_must_be_positive():
    with pytest.raises(UserError, match="limit: "):
        load_rows("arithmetic", "test", 0)
