import os

import pytest

from posttrain.errors import UserError
from posttrain.provenance import hash_files, hash_json, read_json, versions, write_json


def test_hash_of_files_depends_on_names_and_contents_only(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "a").write_text("x")
        (folder / "b").write_text("y")
    assert hash_files([one / "a", one / "b"]) == hash_files([two / "b", two / "a"])
    (two / "b").write_text("z")
    assert hash_files([one / "a", one / "b"]) != hash_files([two / "a", two / "b"])


def test_hash_of_a_value_ignores_the_order_of_keys():
    assert hash_json({"a": 1, "b": (2, 3)}) == hash_json({"b": [2, 3], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})


def test_versions_name_what_can_change_a_result():
    assert {"python", "torch", "transformers"} <= versions().keys()


def test_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "made_by.json"
    write_json(path, {"a": (1, None)})
    assert read_json(path, "out") == {"a": [1, None]}
    path.write_text(path.read_text()[:-3])
    with pytest.raises(UserError, match=rf"^out: {path} is damaged: it must be JSON; mend it"):
        read_json(path, "out")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    old = path.read_text()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert path.read_text() == old
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
