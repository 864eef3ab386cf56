"""A full disk, a folder that may not be written to, damaged checkpoints and SIGTERM, through each method's own command: one line,
what was saved is kept, and the same command goes on to what an undisturbed run leaves."""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import CallbackHandler

from posttrain import record
from posttrain.cli.main import main
from posttrain.models import features
from posttrain.models.probe import Probe
from posttrain.pipelines import matching, qsharp
from posttrain.pipelines.checkpoints import last_checkpoint
from posttrain.rollouts import collect
from posttrain.trainers import baselines
from tests.chaos import ROOT, state

TABLES = {"train_prompts": 13, "train_samples": 4, "test_prompts": 2, "shard_prompts": 7, "device": "cpu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "dqo": {
        **{**TABLES, "test_samples": 2, "training": {"batch_size": 1, "critic_warmup_steps": 0, "epochs": 1}},
        **{"baselines": ["rejection", "dpo", "kto"], "dpo": {"batch_size": 4, "epochs": 1}},
        "kto": {"batch_size": 8, "epochs": 1},
        "rejection": {"batch_size": 8, "epochs": 2},
    },
    "qsharp": {
        **{**TABLES, "rounds": 1, "k": 2, "guided_samples": 1},
        "value": {
            **{"head": "q", "layers": 1, "epochs": 3, "batch_size": 12},
            **{"eval_fraction": 0.3, "drop_unanimous": False},
        },
    },
    "grpo-lambda": {
        **{"train_prompts": 13, "validation_prompts": 0, "test_prompts": 2, "test_samples": 2, "device": "cpu"},
        "training": {
            **{"steps": 4, "prompts_per_step": 2, "samples": 2, "batch_size": 4, "penalty_warmup_steps": 1},
            "trl": {"save_steps": 1},
        },
    },
}
# name -> (command, the folder that is made, the step after which it is saved; in the next one it is disturbed)
TRAININGS = {
    "dqo": ("dqo", "policy", 50),
    "qsharp": ("qsharp", "round-1/value", 3),
    "grpo-lambda": ("grpo-lambda", "grpo_lambda", 2),
    "rejection": ("dqo", "rejection/policy", 6),
    "dpo": ("dqo", "dpo/policy", 2),
    "kto": ("dqo", "kto/policy", 2),
}


class Run:
    """In one folder, as rows name a policy by its own: left alone first, and then disturbed, on the same tables."""

    def __init__(self, command: str, out: Path) -> None:
        self.out = out
        config = out.with_suffix(".yaml")
        config.write_text(yaml.safe_dump({"out": str(out), **CONFIGS[command]}))
        self.argv = [command, "--config", str(config)]
        assert main(self.argv) == 0
        self.alone, self.logged = state(out), self.losses()

    def losses(self) -> dict[tuple[str, int], float]:
        rows = record.read_metrics(self.out)
        return {(row["part"], row["step"]): row["loss"] for row in rows if "loss" in row}


@dataclass(frozen=True)
class Training:
    run: Run
    part: Path
    saved: int

    @property
    def scratch(self) -> Path:
        """Where the checkpoints of an interrupted one are."""
        (found,) = self.part.parent.glob(f"{self.part.name}-checkpoints-*")
        return found

    def forget(self) -> None:
        """What it made, and what was measured of that."""
        measured = (self.part.with_name("trained"), self.part.with_name("grpo_lambda-test"), self.run.out / "guided")
        for path in (self.part, *self.part.parent.glob(f"{self.part.name}-checkpoints-*"), *measured):
            shutil.rmtree(path, ignore_errors=True)

    def terminate(self, capsys: Any) -> None:
        """SIGTERM in the middle of the step after the checkpoint."""
        begin = CallbackHandler.on_step_begin

        def step_begins(handler: Any, args: Any, state: Any, control: Any) -> Any:
            if state.global_step == self.saved:
                signal.raise_signal(signal.SIGTERM)
            return begin(handler, args, state, control)

        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CallbackHandler, "on_step_begin", step_begins)
            assert main(self.run.argv) == 143
        assert capsys.readouterr().err == "posttrain: terminated; what is finished is kept\n"

    def goes_on(self, capsys: Any, step: int | None) -> str:
        """From the checkpoint of that step to the undisturbed run's end; what it says of that on stderr."""
        begun = []
        train = Trainer.train

        def trained(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            begun.append(resume_from_checkpoint)
            return train(trainer, resume_from_checkpoint, *args, **kwargs)

        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train", trained)
            assert main(self.run.argv) == 0
        assert [Path(found).name if found else None for found in begun] == [step and f"checkpoint-{step}"]
        now, alone = state(self.run.out), self.run.alone
        assert now.keys() == alone.keys() and [name for name in now if now[name] != alone[name]] == []
        logged, others = self.run.losses(), self.run.logged
        assert logged.keys() == others.keys()
        different = [key for key in logged if logged[key] != others[key]]
        assert len(different) <= 1, "of the steps that a mean is over some may be those before"
        assert not list(self.part.parent.glob("*-checkpoints-*"))
        said: str = capsys.readouterr().err
        return said


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Baselines are saved every other step, and the beta of Q#'s comparison is looked for in fewer places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "SAVE_STEPS", 2)
        patch.setattr(qsharp, "MATCHING_PROMPTS", 2)
        patch.setattr(matching, "STEPS", 1)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """command -> its run, left alone once"""
    return functools.cache(lambda command: Run(command, tmp_path_factory.mktemp(command) / "run"))


@pytest.fixture
def training_of(runs: Callable[[str], Run]) -> Callable[[str], Training]:
    """name -> a training that has not begun, on the tables of its run"""

    def found(name: str) -> Training:
        command, part, saved = TRAININGS[name]
        training = Training(runs(command), runs(command).out / part, saved)
        training.forget()
        return training

    return found


@contextmanager
def no_room(limit: int) -> Iterator[None]:
    """No file grows beyond so many bytes, by the kernel, for root too: writing ends in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def disk_fills(patch: pytest.MonkeyPatch, owner: Any, name: str, limit: Callable[..., int | None]) -> None:
    """While `owner`.`name` runs there is no room beyond limit(its arguments); None: there is."""
    method = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        room = limit(*args)
        with nullcontext() if room is None else no_room(room):
            return method(*args, **kwargs)

    patch.setattr(owner, name, called)


def one_line(capsys: Any) -> str:
    said: str = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("posttrain: error: "), said
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [*((name, "optimizer.pt") for name in TRAININGS), ("qsharp", "model.safetensors"), ("grpo-lambda", "config.json")],
)
def test_a_disk_that_fills_while_a_checkpoint_is_written(name, file, training_of, capsys, monkeypatch):
    """Where `file` has no room: the checkpoint before it is gone on from."""
    training = training_of(name)

    def limit(trainer, *_):
        whole = Path(trainer.args.output_dir) / f"checkpoint-{training.saved}" / file
        return whole.stat().st_size - 1 if whole.is_file() and trainer.state.global_step > training.saved else None

    with monkeypatch.context() as patch:
        disk_fills(patch, Trainer, "_save_checkpoint", limit)
        assert main(training.run.argv) == 2
    reason = "torch could not write a file; is the disk full?" if file == "optimizer.pt" else "File too large"
    assert f" system: {reason}" in one_line(capsys)
    assert training.goes_on(capsys, training.saved) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("dqo", 52), ("qsharp", 9), ("grpo-lambda", 4)])
def test_a_disk_that_fills_while_the_result_is_written(name, last, training_of, capsys, monkeypatch):
    """It is written again, from the last checkpoint."""
    training = training_of(name)

    def limit(model, folder, *_):
        return 4096 if Path(folder) == training.part else None

    with monkeypatch.context() as patch:
        disk_fills(patch, PreTrainedModel, "save_pretrained", limit)
        assert main(training.run.argv) == 2
    assert one_line(capsys) == "posttrain: error: system: File too large (os error 27)\n"
    assert training.goes_on(capsys, last) == ""


@pytest.mark.slow
def test_a_disk_that_fills_while_metrics_are_written(training_of, capsys, monkeypatch):
    training = training_of("grpo-lambda")

    def limit(run, folder, step, values):
        return (run.folder / record.METRICS).stat().st_size + 9 if folder == training.part and step == 4 else None

    with monkeypatch.context() as patch:
        disk_fills(patch, record.Run, "log", limit)
        assert main(training.run.argv) == 2
    assert one_line(capsys) == "posttrain: error: system: File too large\n"
    assert not (training.run.out / record.METRICS).read_text().endswith("\n")
    assert training.goes_on(capsys, 3) == ""


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[Callable[[int], None]]:
    """What is in a folder, on a disk of its own with so many bytes left; (bytes) -> as many more. Skips where none can be mounted."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.mkdir()
    size = room + sum(path.stat().st_size for path in aside.rglob("*") if path.is_file())

    def mount(size: int, *options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")

    try:
        mount(size)
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield lambda more: mount(size + more, "remount")
    finally:
        if folder.is_mount():
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the event file is still open
        folder.rmdir()
        aside.rename(folder)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_a_disk_that_is_full(training_of, capsys):
    """In earnest: the second checkpoint has no room, nor has what the run says of itself."""
    training = training_of("dqo")
    weights = (training.run.out / "rejection" / "policy" / "model.safetensors").stat().st_size
    checkpoint = 2 * 3 * weights  # two models, and two moments of every weight
    with small_disk(training.run.out, checkpoint * 3 // 2) as grow:
        assert main(training.run.argv) == 2
        one_line(capsys)
        grow(2 * checkpoint)
        assert training.goes_on(capsys, 50) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_sigterm_leaves_a_checkpoint_that_is_gone_on_from(name, training_of, capsys):
    training = training_of(name)
    training.terminate(capsys)
    assert training.goes_on(capsys, training.saved + 1) == ""


@pytest.mark.slow
def test_a_process_that_is_terminated_leaves_a_checkpoint_within_half_a_minute(tmp_path):
    """As a cluster does it, which then kills."""
    config = {**CONFIGS["grpo-lambda"], "out": str(tmp_path / "run")}
    config["training"] = {**config["training"], "steps": 1000, "trl": {"save_steps": 1000}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain", "grpo-lambda", "--config", str(tmp_path / "config.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not any("loss" in row for row in record.read_metrics(tmp_path / "run")) and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=30)[1]
    assert said.endswith("posttrain: terminated; what is finished is kept\n") and "Traceback" not in said
    assert process.returncode == 143 and record.read_status(tmp_path / "run").state == "interrupted"
    (scratch,) = (tmp_path / "run").glob("grpo_lambda-checkpoints-*")
    assert last_checkpoint(scratch) is not None


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "no optimizer": ("optimizer.pt", lambda content: None),
    "state garbled": ("trainer_state.json", lambda content: bytes(len(content))),
    "weights cut off": ("model.safetensors", lambda content: content[:-1000]),
    "state cut off": ("trainer_state.json", lambda content: content[: len(content) // 2]),
}


def damage(checkpoint: Path, kind: str) -> None:
    name, change = DAMAGES[kind]
    content = change((checkpoint / name).read_bytes())
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), zip(("dqo", "qsharp", "grpo-lambda", "rejection"), DAMAGES, strict=True))
def test_a_damaged_checkpoint_is_passed_over(name, kind, training_of, capsys):
    training = training_of(name)
    training.terminate(capsys)
    newest = training.scratch / f"checkpoint-{training.saved + 1}"
    damage(newest, kind)
    said = training.goes_on(capsys, training.saved)
    fault = f"{newest} has no optimizer.pt" if kind == "no optimizer" else f"{newest / DAMAGES[kind][0]} is damaged"
    assert said == f"posttrain: warning: {fault}; going on from the checkpoint before it, or anew\n"


@pytest.mark.slow
def test_without_a_whole_checkpoint_a_training_begins_anew(training_of, capsys):
    training = training_of("qsharp")
    training.terminate(capsys)
    for checkpoint in training.scratch.iterdir():
        damage(checkpoint, "weights cut off")
    said = training.goes_on(capsys, None).splitlines()
    assert [line.partition("checkpoint-")[2][:1] for line in said] == ["4", "3"]
    assert all(line.startswith("posttrain: warning: ") for line in said)


@pytest.mark.slow
def test_a_disk_that_fills_while_a_shard_is_written(tmp_path, capsys, monkeypatch):
    argv = "rollout --model tiny --data arithmetic --samples 2 --limit 4 --shard-prompts 2 --max-tokens 8".split()
    argv += ["--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    whole = shards(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        disk_fills(patch, collect, "write_shard", lambda folder, index, rows: 1000 if index == 1 else None)
        capsys.readouterr()
        assert main(argv) == 2
    assert one_line(capsys) == f"posttrain: error: out: cannot write to {tmp_path}/run: File too large\n"
    assert shards(tmp_path / "run") == whole[:1]
    assert main([*argv, "--resume"]) == 0
    assert shards(tmp_path / "run") == whole and record.read_status(tmp_path / "run").state == "finished"


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("shard-*.parquet"))]


QPROBE = {"train_prompts": 10, "train_samples": 4, "test_prompts": 4, "k": 2, "layers": [1], "poolings": ["mean"]}


@pytest.mark.slow
def test_a_disk_that_fills_under_qprobe(tmp_path, capsys, monkeypatch):
    """While the features are written, and then while the probe is."""
    config = tmp_path / "qprobe.yaml"
    config.write_text(yaml.safe_dump({"out": str(tmp_path / "run"), **QPROBE, "device": "cpu"}))
    argv = ["qprobe", "--config", str(config)]
    for owner, name, where in ((features, "save_file", "features"), (Probe, "save_pretrained", "probe")):
        with monkeypatch.context() as patch:
            disk_fills(patch, owner, name, lambda *_: 300)
            assert main(argv) == 2
        assert one_line(capsys).startswith(f"posttrain: error: {where}: cannot write to {tmp_path}/run/{where}: ")
    assert main(argv) == 0
    after = state(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert main(argv) == 0
    assert state(tmp_path / "run") == after


# -- what may not be written to


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder that nobody may write to; root, who may, is somebody else meanwhile."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.setresuid(65534, 65534, 0)
        yield folder
    finally:
        if root:
            os.setresuid(0, 0, 0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("command", ["dqo", "qsharp", "grpo-lambda", "qprobe", "rollout"])
def test_a_folder_that_may_not_be_written_to(command, forbidden, capsys):
    recipe = {"qprobe": "qprobe", "dqo": "dqo", "qsharp": "qsharp", "grpo-lambda": "grpo_lambda"}.get(command)
    asked = (
        ["--config", f"{ROOT}/recipes/{recipe}/arithmetic.yaml"]
        if recipe
        else ["--model", "tiny", "--data", "arithmetic", "--samples", "2"]
    )
    assert main([command, *asked, "--out", str(forbidden / "run")]) == 2
    assert one_line(capsys) == f"posttrain: error: out: cannot write to {forbidden}/run: Permission denied\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqo", "qsharp", "grpo-lambda"])
def test_a_file_where_a_folder_is_to_be(name, training_of, capsys):
    """Which binds root too."""
    training = training_of(name)
    training.part.write_text("")
    assert main(training.run.argv) == 2
    assert one_line(capsys) == f"posttrain: error: out: cannot write to {training.part}: Not a directory\n"
    training.part.unlink()


@pytest.mark.slow
def test_a_folder_where_a_file_is_to_be(training_of, capsys):
    """What is written last has no place: the training is not lost."""
    training = training_of("grpo-lambda")
    made_by = training.part / "made_by.json"
    made_by.mkdir(parents=True)
    assert main(training.run.argv) == 2
    said = one_line(capsys)
    assert "made_by.json" in said and said.endswith(": Is a directory\n")
    made_by.rmdir()
    assert training.goes_on(capsys, 4) == ""
