"""Completions of somebody else's making as a rollout table."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.normalizers import NFKC

from posttrain.errors import UserError
from posttrain.models.load import load_tokenizer
from posttrain.rollouts.given import given_table

TOKENIZER = load_tokenizer("tiny").tokenizer
ROWS = [
    {"prompt": "1+2=?", "completion": "#### 3", "reward": 1},
    {"prompt_ids": [5, 6], "completion_ids": [7, 8, 1], "reward": 0.25, "logprobs": [-0.5, -1.0, -0.25]},
    {"prompt": [{"role": "user", "content": "1+2=?"}], "completion": "#### 4", "reward": False, "truncated": True},
]


def written(folder, rows):
    file = folder / "given.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_text_is_tokenised_and_ended_and_ids_are_left_alone(tmp_path):
    rows = list(given_table(written(tmp_path, ROWS), TOKENIZER, tmp_path / "table").rows())
    assert [(row["prompt_id"], row["sample"], row["group"]) for row in rows] == [("0", 0, 0), ("0", 1, 0), ("1", 0, 1)]
    right, cut, ids = rows
    prompt = TOKENIZER.apply_chat_template([{"role": "user", "content": "1+2=?"}], add_generation_prompt=True)
    assert right["prompt_ids"] == cut["prompt_ids"] == list(prompt["input_ids"])
    text = TOKENIZER("#### 3", add_special_tokens=False)["input_ids"]
    assert right["completion_ids"] == [*text, TOKENIZER.eos_token_id] and right["finish_reason"] == "stop"
    assert cut["completion_ids"] == TOKENIZER("#### 4", add_special_tokens=False)["input_ids"]
    assert (cut["finish_reason"], cut["reward"], right["reward"], right["correct"]) == ("length", 0.0, 1.0, True)
    assert (ids["completion_ids"], ids["reward"], ids["logprobs"]) == ([7, 8, 1], 0.25, [-0.5, -1.0, -0.25])


def test_parquet_is_read_too_and_what_is_made_is_kept(tmp_path):
    file = tmp_path / "given.parquet"
    pq.write_table(pa.Table.from_pylist([ROWS[1], ROWS[1]]), file)
    table = given_table(file, TOKENIZER, tmp_path / "table")
    assert table.column("completion_ids") == [[7, 8, 1]] * 2
    stamp = (tmp_path / "table" / "shard-00000.parquet").stat().st_mtime_ns
    given_table(file, TOKENIZER, tmp_path / "table")
    assert (tmp_path / "table" / "shard-00000.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="out: .*table holds other completions"):
        given_table(written(tmp_path, ROWS), TOKENIZER, tmp_path / "table")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "given.jsonl row 2 has the reward None; every row needs a finite number"),
        ({"reward": float("nan")}, "row 2 has the reward nan"),
        ({"prompt_ids": None}, "row 2 has neither prompt_ids nor a prompt"),
        ({"completion_ids": None}, "row 2 has neither completion_ids nor a completion"),
        (
            {"completion_ids": None, "completion": "a"},
            "row 2 has logprobs or process_rewards, which need its completion_ids",
        ),
        ({"prompt": ["hi"]}, "row 2 has a prompt whose messages are not all {role, content}, two texts"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
            "row 2 has a prompt whose messages",
        ),
        (
            {"logprobs": ["-0.5", -1.0, -0.25]},
            "row 2 has logprobs that are not a list of 3 numbers, one for each token",
        ),
        ({"logprobs": [-0.5]}, "row 2 has logprobs that are not a list of 3 numbers"),
        (
            {"process_rewards": [0.5]},
            "row 2 has process_rewards that are not a list of {token, reward}, tokens below 3",
        ),
        ({"process_rewards": [{"token": 3, "reward": 1}]}, "row 2 has process_rewards that are not a list"),
        ({"completion_ids": [7, 100_000]}, "row 2 has completion_ids that are not a list of token ids below"),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=f"^completions: .*{message}"):
        given_table(written(tmp_path, [ROWS[0], {**ROWS[1], **change}]), TOKENIZER, tmp_path / "table")
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("1+2=3\n#### é, é or 日", r"given.jsonl row 2 has '\\n', 'é', '日', which the model's tokenizer cannot spell"),
        (
            "3<|end|>",
            r"row 2 has '<\|end\|>', which the model's tokenizer cannot spell as text; change it, or give compl",
        ),
    ],
)
def test_a_text_that_its_tokens_do_not_say_is_refused_and_the_mended_file_is_taken(tmp_path, completion, message):
    broken = written(tmp_path, [ROWS[0], {**ROWS[2], "completion": completion}])
    with pytest.raises(UserError, match=f"^completions: .*{message}"):
        given_table(broken, TOKENIZER, tmp_path / "table")
    assert len(given_table(written(tmp_path, ROWS), TOKENIZER, tmp_path / "table")) == 3


def test_another_normal_form_of_a_text_is_no_loss(tmp_path):
    """As a tokenizer that normalises reads it."""
    file = written(tmp_path, [{**ROWS[0], "completion": "#### \uff13"}])  # a wide 3
    with pytest.raises(UserError, match="cannot spell"):
        given_table(file, TOKENIZER, tmp_path / "table")
    normalising = copy.deepcopy(TOKENIZER)
    normalising.backend_tokenizer.normalizer = NFKC()
    (row,) = given_table(file, normalising, tmp_path / "table").rows()
    assert TOKENIZER.decode(row["completion_ids"], skip_special_tokens=True) == "#### 3"


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(UserError, match="completions: no such .jsonl or .parquet file"):
        given_table(tmp_path / "none.jsonl", TOKENIZER, tmp_path / "table")
    with pytest.raises(UserError, match="completions: .* is empty"):
        given_table(written(tmp_path, []), TOKENIZER, tmp_path / "table")
