"""A training of a handful of steps: what it logs, in the record of the run."""

import json
import signal

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from posttrain.errors import Terminated
from posttrain.record import EVENTS, begin, read_metrics, recording
from posttrain.trainers.follow import follow


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels, input_ids):
        return {"loss": ((self.slope * x - labels) ** 2).mean()}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def training(folder, order="random"):
    arguments = TrainingArguments(
        str(folder / "scratch"), max_steps=8, logging_steps=1, save_steps=2, use_cpu=True, report_to="none",
        disable_tqdm=True, learning_rate=1e-3, optim="sgd", max_grad_norm=0, train_sampling_strategy=order,
    )  # fmt: skip
    numbers = [torch.tensor([float(i)]) for i in range(16)]
    data = [{"x": x, "labels": 2 * x, "input_ids": torch.zeros(1)} for x in numbers]
    return Trainer(Line(), arguments, train_dataset=data)


@pytest.mark.slow
def test_an_interrupted_training_logs_every_step_once(tmp_path, capsys):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with recording(["dqo"]):
        begin(whole, {}, ["tensorboard"])
        trainer = training(whole)
        with follow(trainer, whole / "policy"):
            trainer.train()
    with pytest.raises(KeyboardInterrupt), recording(["dqo"]):
        begin(parts, {}, ["tensorboard"])
        trainer = training(parts)
        with follow(trainer, parts / "policy"):
            trainer.add_callback(Stop())
            trainer.train()
    assert [row["step"] for row in read_metrics(parts)] == [1, 2, 3, 4]
    with recording(["dqo"]):
        begin(parts, {}, ["tensorboard"])
        trainer = training(parts)
        saved = parts / "scratch" / "checkpoint-4" / "trainer_state.json"
        state = json.loads(saved.read_text())
        assert 0 < state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] < 600
        state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] = 3600.0
        saved.write_text(json.dumps(state))
        with follow(trainer, parts / "policy") as clock:
            assert clock.earlier == 0.0
            trainer.train(resume_from_checkpoint=True)
        assert clock.earlier == 3600.0
        last = json.loads((parts / "scratch" / "checkpoint-8" / "trainer_state.json").read_text())
        assert 3600 < last["stateful_callbacks"]["Clock"]["attributes"]["seconds"] < 4200
    losses = [
        [(row["part"], row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]
        for folder in (whole, parts)
    ]
    assert losses[0] == losses[1] and [step for _, step, _ in losses[0]] == list(range(1, 9))
    assert losses[0][0][0] == "policy" and len(read_metrics(whole)) == len(read_metrics(parts)) == 9
    events = tensorboard.EventAccumulator(str(parts / EVENTS / "policy")).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == list(range(1, 9))
    assert not any("loss" in said for said in capsys.readouterr())  # quiet: no terminal


@pytest.mark.slow
def test_without_a_run_it_trains_and_says_nothing(tmp_path, capsys):
    trainer = training(tmp_path)
    with follow(trainer, tmp_path / "policy"):
        trainer.train()
    assert not any("loss" in said for said in capsys.readouterr()) and trainer.state.global_step == 8


class Terminate(TrainerCallback):
    """SIGTERM in the middle of step 5."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_sigterm_leaves_a_checkpoint_of_the_step_under_way_from_which_the_training_goes_on(order, tmp_path):
    """In the middle of the third epoch, whose order is drawn from torch's generator where it is by length."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        whole = training(tmp_path / "whole", order)
        with follow(whole, tmp_path / "whole" / "policy"):
            whole.train()
        with pytest.raises(Terminated):
            trainer = training(tmp_path / "parts", order)
            with follow(trainer, tmp_path / "parts" / "policy"):
                trainer.add_callback(Terminate())
                trainer.train()
        assert trainer.state.global_step == 5 and (tmp_path / "parts" / "scratch" / "checkpoint-5").is_dir()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        trainer = training(tmp_path / "parts", order)
        with follow(trainer, tmp_path / "parts" / "policy"):
            trainer.train(resume_from_checkpoint=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.state.global_step == 8
    assert trainer.model.slope.equal(whole.model.slope)


@pytest.mark.slow
def test_a_training_that_fails_leaves_sigterm_as_it_was(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = training(tmp_path)
    with pytest.raises(KeyboardInterrupt), follow(trainer, tmp_path / "policy"):
        trainer.add_callback(Stop())
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before
