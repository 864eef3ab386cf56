import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from posttrain import record
from posttrain.errors import UserError
from posttrain.record import begin, checkouts, current, log, read_attempts, read_metrics, read_status, recording

CHILD = """
import os, signal, sys
from pathlib import Path
from posttrain.record import begin, log, recording
out = Path(sys.argv[1])
with recording(["dqo", "--config", "x.yaml"]):
    begin(out, {"seed": 3})
    log(out / "policy", 10, {"loss": 1.0})
    print("begun", flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Config:
    out: Path
    seed: int = 0
    layers: tuple[int, ...] = (1, 2)


def test_a_run_says_what_was_asked_for_what_made_it_and_that_it_is_finished(tmp_path):
    out = tmp_path / "run"
    with recording(["qsharp", "--config", "a.yaml"]):
        begin(out, Config(out), report_to=["none"])
        assert read_status(out).state == "running" and read_status(out).pid == os.getpid()
        log(out / "round-1" / "value", 5, {"loss": 0.5, "auc": float("nan")})
    status = read_status(out)
    assert (status.state, status.reason) == ("finished", None) and status.ended >= status.started
    assert (out / "STATUS").read_text().splitlines()[0] == "finished"
    assert yaml.safe_load((out / "config.yaml").read_text()) == {"out": str(out), "seed": 0, "layers": [1, 2]}
    (attempt,) = read_attempts(out)
    assert attempt["argv"] == ["qsharp", "--config", "a.yaml"] and "torch" in attempt["versions"]
    assert read_metrics(out) == [{"part": "round-1/value", "step": 5, "loss": 0.5}]
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]  # scratch


def test_failures_and_interruptions_say_so(tmp_path):
    for error, state, reason in (
        (UserError("training.beta: must be\n positive"), "failed", "training.beta: must be positive"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), "interrupted", None),
    ):
        out = tmp_path / type(error).__name__
        with pytest.raises(type(error)), recording(["dqo"]):
            begin(out, {})
            (out / "train").mkdir()
            raise error
        assert (read_status(out).state, read_status(out).reason) == (state, reason)


def test_a_mistake_that_is_refused_before_anything_is_made_leaves_no_folder(tmp_path):
    with pytest.raises(UserError), recording(["dqo"]):
        begin(tmp_path / "run", {})
        raise UserError("model: no such folder: ./nowhere")
    assert not (tmp_path / "run").exists()


def test_what_a_kill_left_half_written_of_a_record_is_nothing_made(tmp_path):
    for name in ("STATUS", ".config.yaml.123", ".attempts.json.7"):
        (tmp_path / name).touch()
    assert record.is_bare(tmp_path)
    (tmp_path / ".manifest.json.7").touch()
    assert not record.is_bare(tmp_path)


def test_a_killed_run_is_told_from_one_that_runs_and_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "begun\n" and read_status(out).state == "running"
    with pytest.raises(UserError, match=f"out: another run is at work in {out}"), recording(["dqo"]):
        begin(out, {})
    assert read_status(out).state == "running"  # it was not touched
    child.kill()
    child.wait()
    assert read_status(out).state == "killed" and read_status(out).pid == child.pid
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"part": "policy", "st')  # cut off
    with recording(["dqo", "again"]):
        begin(out, {"seed": 3})
        log(out / "policy", 20, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(out)] == [(10, 1.0), (20, 0.5)]
    assert (out / "metrics.jsonl").read_text().count("\n") == 2
    assert [attempt["argv"][-1] for attempt in read_attempts(out)] == ["x.yaml", "again"]


def test_a_step_that_is_done_again_stands_there_once(tmp_path):
    for value in (1.0, 2.0):
        with recording(["dqo"]):
            begin(tmp_path, {})
            log(tmp_path / "policy", 10, {"loss": value})
            log(tmp_path / "policy", 10, {"eval_loss": value})  # another line of the same step
            log(tmp_path / "other", 10, {"loss": value})
    expected = [("policy", {"loss": 2.0}), ("policy", {"eval_loss": 2.0}), ("other", {"loss": 2.0})]
    assert [(row.pop("part"), row) for row in read_metrics(tmp_path) if row.pop("step")] == expected


def test_what_was_logged_of_a_folder_goes_with_it(tmp_path):
    with recording(["pipeline"]):
        begin(tmp_path, {}, ["none"])
        for part in ("dqo", "dqo/policy", "dqo-2/policy"):
            log(tmp_path / part, 10, {"loss": 1.0})
        (tmp_path / "tensorboard" / "dqo" / "policy").mkdir(parents=True)
        current().move(tmp_path / "dqo", tmp_path / "dqo-abc")
        log(tmp_path / "dqo" / "policy", 10, {"loss": 2.0})
    assert [(row["part"], row["loss"]) for row in read_metrics(tmp_path)] == [
        *(("dqo-abc", 1.0), ("dqo-abc/policy", 1.0), ("dqo-2/policy", 1.0), ("dqo/policy", 2.0)),
    ]
    assert (tmp_path / "tensorboard" / "dqo-abc" / "policy").is_dir()


def test_without_a_run_and_beside_the_first_process_nothing_is_written(tmp_path):
    log(tmp_path / "policy", 1, {"loss": 1.0})
    with recording(["dqo"], first=False):
        begin(tmp_path / "run", {})
        log(tmp_path / "run" / "policy", 1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_reported_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, message in (
        ("tensorboard", "tensorboard is not installed; pip install 'posttrain\\[tensorboard\\]'"),
        ("wandb", "wandb is not installed; pip install wandb"),
        ("tensorbord", "must be none, tensorboard, wandb or trackio, got 'tensorbord'"),
    ):
        with pytest.raises(UserError, match=f"report-to: {message}"), recording(["dqo"]):
            begin(tmp_path / "run", {}, [name])
    assert not (tmp_path / "run").exists()
    with recording(["dqo"]):
        begin(tmp_path / "run", {})  # by default it is no mistake
        assert record.current().report_to == ()


def test_the_state_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = checkouts()[str(tmp_path)]
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("a")
    assert checkouts()[str(tmp_path)]["dirty"] is False
    subprocess.run([*git, "add", "file"], check=True)
    assert checkouts()[str(tmp_path)]["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert checkouts() == {}


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write to .*file/run"), recording(["dqo"]):
        begin(tmp_path / "file" / "run", {})


def test_a_damaged_record_is_none(tmp_path):
    (tmp_path / "STATUS").write_text("finished\nnonsense")
    (tmp_path / "attempts.json").write_text("[")
    (tmp_path / "metrics.jsonl").write_text(f"[1]\n{json.dumps({'part': 1})}\n")
    assert (read_status(tmp_path), read_attempts(tmp_path), read_metrics(tmp_path)) == (None, [], [])
