import hashlib
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.errors import UserError
from posttrain.rollouts.table import (
    SCHEMA,
    read_manifest,
    read_table,
    remove_scratch,
    shard_name,
    write_manifest,
    write_shard,
)


def make_row(group, sample, **changes):
    row = {
        "prompt_id": f"p{group}",
        "sample": sample,
        "group": group,
        "prompt": [{"role": "user", "content": "1+1=?"}],
        "prompt_ids": [1, 2],
        "completion": "2 ✓",
        "completion_ids": [3, 4, 5],
        "finish_reason": "stop",
        "answer": "2",
        "extracted": None if sample else "2",
        "verdict": "no_answer" if sample else "equal",
        "reward": 1.0 - sample,
        "correct": not sample,
        "logprobs": [-0.5, -0.25, -1.0],
        "policy": "tiny@abc",
        "guide": None,
        "beta": None,
        "kl": 0.0,
        "log_ratio": 0.0,
        "process_rewards": [{"token": 1, "reward": 0.5}] if sample else None,
        "cut": 0,
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 8, "seed": 2**62},
    }
    return row | changes


@pytest.fixture
def folder(tmp_path):
    """A finished table of two shards: prompts 0 and 1, then prompt 2, two samples each."""
    shards = {}
    for index, groups in enumerate([(0, 1), (2,)]):
        rows = [make_row(group, sample) for group in groups for sample in (0, 1)]
        shards[shard_name(index)] = write_shard(tmp_path, index, rows)
    write_manifest(tmp_path, {"settings": {}, "versions": {}, "expected_shards": 2, "shards": shards})
    return tmp_path


def replace_shard(folder, index, content):
    """As a careless tool would, checksum included."""
    name = shard_name(index)
    (folder / name).write_bytes(content)
    manifest = read_manifest(folder)
    manifest["shards"][name]["sha256"] = hashlib.sha256(content).hexdigest()
    write_manifest(folder, manifest)


def test_rows_come_back_as_they_were_written(folder):
    table = read_table(folder)
    assert list(table.rows()) == [make_row(group, sample) for group in range(3) for sample in (0, 1)]
    assert len(table) == 6 and table.data.schema.equals(SCHEMA)


def test_columns_are_grouped_by_prompt(folder):
    assert read_table(folder).rectangle("reward") == [[1.0, 0.0]] * 3


def test_a_ragged_table_has_no_rectangle(tmp_path):
    entry = write_shard(tmp_path, 0, [make_row(0, 0), make_row(0, 1), make_row(1, 0)])
    write_manifest(tmp_path, {"settings": {}, "versions": {}, "expected_shards": 1, "shards": {shard_name(0): entry}})
    table = read_table(tmp_path)
    assert table.by_prompt("sample") == [[0, 1], [0]]
    with pytest.raises(UserError, match="^table: .*between 1 and 2 samples"):
        table.rectangle("sample")


def test_log_probs_may_be_absent(tmp_path):
    entry = write_shard(tmp_path, 0, [make_row(0, 0, logprobs=None)])
    write_manifest(tmp_path, {"settings": {}, "versions": {}, "expected_shards": 1, "shards": {shard_name(0): entry}})
    assert read_table(tmp_path).column("logprobs") == [None]


def test_equal_rows_give_equal_bytes(tmp_path):
    rows = [make_row(0, sample) for sample in (0, 1)]
    assert write_shard(tmp_path, 0, rows) == write_shard(tmp_path, 1, rows)
    assert (tmp_path / shard_name(0)).read_bytes() == (tmp_path / shard_name(1)).read_bytes()


def test_datasets_reads_the_shards(folder):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_parquet([str(folder / shard_name(i)) for i in (0, 1)], cache_dir=str(folder / "cache"))
    assert rows[5]["sampling"]["seed"] == 2**62


def test_a_write_that_fails_leaves_the_old_shard(folder, monkeypatch):
    before = (folder / shard_name(0)).read_bytes()

    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        write_shard(folder, 0, [make_row(0, 0)])
    assert (folder / shard_name(0)).read_bytes() == before
    remove_scratch(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", shard_name(0), shard_name(1)]


def test_the_policy_is_checked(folder):
    table = read_table(folder)
    table.expect_policy("abc")
    with pytest.raises(UserError, match="^table: .*tiny@abc"):
        table.expect_policy("abd")


def error_of(folder):
    with pytest.raises(UserError) as caught:
        read_table(folder)
    message = str(caught.value)
    assert message.startswith("table: ") and "\n" not in message
    return message


def test_no_folder(tmp_path):
    assert "no such folder" in error_of(tmp_path / "nowhere")


def test_no_manifest(tmp_path):
    assert "manifest.json" in error_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"shards": 3}', '{"settings": {}, "versions": {}, "shards": {}, "expected_shards": null}']
)
def test_a_damaged_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert "damaged" in error_of(tmp_path)


def test_an_unfinished_collection(folder):
    manifest = read_manifest(folder)
    del manifest["shards"][shard_name(1)]
    write_manifest(folder, manifest)
    assert "1 of 2 shards" in error_of(folder) and "--resume" in error_of(folder)


def test_a_missing_shard(folder):
    (folder / shard_name(1)).unlink()
    assert shard_name(1) in error_of(folder)


def test_a_truncated_shard(folder):
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:-20])
    assert shard_name(1) in error_of(folder) and "corrupted" in error_of(folder)


def test_one_flipped_bit_that_parquet_does_not_notice(folder):
    path = folder / shard_name(0)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert shard_name(0) in error_of(folder)


def test_a_shard_that_is_not_parquet(folder):
    replace_shard(folder, 1, b"not a table")
    assert f"{shard_name(1)} is not a Parquet file" in error_of(folder)


def rewrite(folder, change):
    path = folder / shard_name(1)
    pq.write_table(change(pq.read_table(path)), path)
    replace_shard(folder, 1, path.read_bytes())


def test_a_missing_column_is_named(folder):
    rewrite(folder, lambda table: table.drop_columns(["logprobs", "reward"]))
    assert "no column reward, logprobs" in error_of(folder)


def test_a_column_of_the_wrong_type_is_named(folder):
    rewrite(folder, lambda table: table.set_column(5, "completion", pa.array([1, 2])))
    assert "column completion" in error_of(folder) and "int64" in error_of(folder)


def test_a_column_more_does_no_harm(folder):
    rewrite(folder, lambda table: table.append_column("note", pa.array(["a", "b"])))
    assert read_table(folder).data.schema.equals(SCHEMA)


def test_the_manifest_is_plain_json(folder):
    assert json.loads((folder / "manifest.json").read_text())["shards"][shard_name(0)]["rows"] == 4


def test_a_table_of_somebody_elses_making_may_lack_what_only_guidance_has(folder):
    import pyarrow.parquet as pq

    manifest = read_manifest(folder)
    for name in manifest["shards"]:
        kept = pq.read_table(folder / name).drop_columns(["guide", "beta", "kl", "log_ratio", "cut"])
        pq.write_table(kept, folder / name)
        manifest["shards"][name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_manifest(folder, manifest)
    table = read_table(folder)
    assert set(table.column("kl")) == {0.0} and set(table.column("cut")) == {0} and set(table.column("guide")) == {None}
