import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from posttrain.cli.main import main
from posttrain.evaluation.arms_file import read_arms
from posttrain.models.load import load_model
from posttrain.models.value import new_value_model
from posttrain.rollouts.table import read_table, shard_name
from tests.small_models import smollm2

FAST = ["--max-tokens", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def same_threads():
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path):
    """A function that writes rows to a .jsonl file."""

    def write(*rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def rollout(out, *, data="arithmetic", model="tiny", samples=2, more=("--limit", "3")):
    return main(
        ["rollout", "--model", model, "--data", data, "--samples", str(samples), "--out", str(out), *FAST, *more]
    )


def test_a_table_is_collected_and_summarised(tmp_path, capsys):
    assert rollout(tmp_path / "t") == 0
    shown = capsys.readouterr().out
    table = read_table(tmp_path / "t")
    assert len(table) == 6
    assert "<|user|>" in shown and "<|assistant|>" in shown  # one prompt, special tokens visible
    for figure in ("accuracy", "truncated", "answer found", "tokens/s"):
        assert figure in shown


@pytest.mark.slow
def test_of_a_lazily_guided_table_what_is_not_known_is_null(tmp_path, capsys):
    policy = load_model("tiny", "cpu", "float32")
    new_value_model(policy, "v", layers=1, zero_init=False).save_pretrained(tmp_path / "value")
    guided = ("--limit", "3", "--guide", str(tmp_path / "value"), "--beta", "0.05", "--device", "cpu")
    assert rollout(tmp_path / "lazy", more=(*guided, "--lazy")) == rollout(tmp_path / "all", more=guided) == 0
    shown = capsys.readouterr().out
    assert re.search(r"KL, nats +not known", shown) and re.search(r"KL, nats +\d", shown)
    lazy, all_of_them = read_table(tmp_path / "lazy"), read_table(tmp_path / "all")
    for column in ("logprobs", "kl", "log_ratio"):
        assert set(lazy.column(column)) == {None} and None not in all_of_them.column(column)
    assert lazy.column("beta") == all_of_them.column("beta") and lazy.column("guide") != all_of_them.column("guide")
    assert "KL, nats not known" in (tmp_path / "lazy" / "report.html").read_text()
    arms = [read_arms(tmp_path / name)[0].arms[0] for name in ("lazy", "all")]
    assert [arm.name for arm in arms] == ["guided", "guided"] and arms[0].measures == {}
    assert arms[1].measures["kl"] == pytest.approx(sum(all_of_them.column("kl")) / 6)


@pytest.mark.slow
def test_an_interrupted_table_is_continued_to_the_same_bytes(tmp_path):
    options = ("--limit", "4", "--shard-prompts", "1")
    assert rollout(tmp_path / "whole", more=options) == rollout(tmp_path / "cut", more=options) == 0
    for index in (1, 3):
        (tmp_path / "cut" / shard_name(index)).unlink()
    assert rollout(tmp_path / "cut", more=(*options, "--resume")) == 0
    for index in range(4):
        assert (tmp_path / "cut" / shard_name(index)).read_bytes() == (
            tmp_path / "whole" / shard_name(index)
        ).read_bytes()


def refused(capsys, field, *arguments, **keywords):
    """Exit code 2 and one line that names the field."""
    capsys.readouterr()
    assert rollout(*arguments, **keywords) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"posttrain: error: {field}: ", message), message
    return message


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("temperature", ["--temperature", "-1"]),
        ("top_p", ["--top-p", "0"]),
        ("top_k", ["--top-k", "-1"]),
        ("max_tokens", ["--max-tokens", "0"]),
        ("max_tokens", ["--max-tokens", "512"]),
        ("seed", ["--seed", "-1"]),
        ("slots", ["--slots", "0"]),
        ("threads", ["--threads", "0"]),
        ("shard_prompts", ["--shard-prompts", "0"]),
        ("limit", ["--limit", "0"]),
        ("split", ["--split", "tets"]),
        ("prompt", ["--prompt", "no placeholder"]),
        ("dtype", ["--dtype", "float8"]),
        ("device", ["--device", "abacus"]),
    ],
)
def test_an_option_out_of_range_names_itself(field, more, tmp_path, capsys):
    refused(capsys, field, tmp_path / "t", more=["--limit", "3", *more])
    assert not (tmp_path / "t").exists()


def test_no_samples(tmp_path, capsys):
    refused(capsys, "samples", tmp_path / "t", samples=0)


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr("posttrain.models.load.load_model", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("samples", ["--samples", "0"]),
        ("slots", ["--slots", "0"]),
        ("shard_prompts", ["--shard-prompts", "0"]),
        ("limit", ["--limit", "0"]),
        ("split", ["--split", "tets"]),
        ("prompt", ["--prompt", "no placeholder"]),
        ("data", ["--data", "nothing.jsonl"]),
        ("top_p", ["--top-p", "2"]),
        ("top_p", ["--guide", "./no-guide", "--lazy", "--top-p", "0.9"]),
        ("--lazy", ["--lazy"]),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(field, more, tmp_path, capsys, no_model):
    refused(capsys, field, tmp_path / "t", more=["--limit", "3", *more])


def test_the_out_folder_is_looked_at_before_a_model_is_loaded(tmp_path, capsys, no_model):
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file", tmp_path / "file" / "t"):
        refused(capsys, "out", taken)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_model(tmp_path, capsys):
    refused(capsys, "model", tmp_path / "t", model="./nowhere")


def test_an_empty_data_file(tmp_path, capsys, data):
    refused(capsys, "data", tmp_path / "t", data=data())


def test_a_row_without_an_answer(tmp_path, capsys, data):
    row = {"id": "1", "problem": "2+2=?"}
    refused(capsys, "answer", tmp_path / "t", data=data(row))


def test_a_prompt_longer_than_the_context_names_its_row(tmp_path, capsys, data):
    rows = {"id": "ok", "problem": "2+2=?", "answer": "4"}, {"id": "long", "problem": "2+" * 300, "answer": "4"}
    more = ("--prompt", "{problem}")
    assert rollout(tmp_path / "t", data=data(*rows), more=more) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("posttrain: error: prompt: row 'long' has ")
    assert shown.err.count("\n") == 1


def test_an_out_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, "out", tmp_path / "file" / "t")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_out_folder(tmp_path, capsys):
    tmp_path.chmod(0o555)
    refused(capsys, "out", tmp_path / "t")


def test_an_out_folder_that_is_taken(tmp_path, capsys):
    assert rollout(tmp_path / "t") == 0
    refused(capsys, "out", tmp_path / "t")


def test_resume_at_another_temperature(tmp_path, capsys):
    assert rollout(tmp_path / "t") == 0
    refused(capsys, "temperature", tmp_path / "t", more=("--limit", "3", "--temperature", "2", "--resume"))


def test_resume_onto_a_corrupted_shard(tmp_path, capsys):
    assert rollout(tmp_path / "t") == 0
    path = tmp_path / "t" / shard_name(0)
    path.write_bytes(path.read_bytes()[:-9])
    assert shard_name(0) in refused(capsys, "table", tmp_path / "t", more=("--limit", "3", "--resume"))


REAL = (
    "rollout --model tiny --data arithmetic --samples 4 --limit 24 --shard-prompts 2 --device cpu --threads 1".split()
)


def started(out, *more):
    """The real command, in a process of its own, once its first shard is there."""
    command = [sys.executable, "-m", "posttrain", *REAL, "--out", str(out), *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / shard_name(0)).exists() and process.poll() is None:
        time.sleep(0.01)
    return process


def shards_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.parquet")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGINT, 130, "posttrain: interrupted; what is finished is kept\n"),
    ],
)
def test_a_command_that_was_ended_resumes_to_the_same_bytes(sent, code, said, tmp_path):
    process = started(tmp_path / "cut")
    process.send_signal(sent)
    assert (process.communicate()[1], process.returncode) == (said, code)
    assert 0 < len(shards_of(tmp_path / "cut")) < 12
    process = started(tmp_path / "cut", "--resume")
    assert (process.communicate()[1], process.returncode) == ("", 0)
    assert main([*REAL, "--out", str(tmp_path / "whole")]) == 0
    assert len(shards_of(tmp_path / "whole")) == 12
    assert shards_of(tmp_path / "cut") == shards_of(tmp_path / "whole")


QUESTIONS = {
    "What is 2 + 3?": "5",
    "Tom has 4 apples and buys 3 more. How many apples does he have?": "7",
    "A book costs 6 dollars. How many dollars do 2 books cost?": "12",
    "What is 10 - 1?": "9",
}


@pytest.mark.slow
def test_a_real_model_from_a_gguf_file_answers_through_its_chat_template(tmp_path, capsys, data, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    rows = [
        {"id": f"q{i}", "problem": problem, "answer": answer} for i, (problem, answer) in enumerate(QUESTIONS.items())
    ]
    gguf = smollm2()
    more = ("--max-tokens", "24")
    assert rollout(tmp_path / "t", data=data(*rows), model=str(gguf), samples=1, more=more) == 0
    table = read_table(tmp_path / "t")
    assert table.column("prompt_id") == ["q0", "q1", "q2", "q3"] and table.column("answer") == list(QUESTIONS.values())
    assert all(1 <= len(ids) <= 24 for ids in table.column("completion_ids"))
    assert all(any(character.isalnum() for character in text) for text in table.column("completion"))
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nWhat is 2 + 3?" in shown and shown.count("<|im_start|>assistant") == 1
    assert "accuracy" in shown and "truncated" in shown
