"""What a transformers Trainer logs, in the record of the run and wherever else it reports to; its progress on a terminal; what
SIGTERM does to it; and of one that was ended early, in which order it goes on, and how long it had taken."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState

from posttrain import record
from posttrain.errors import Terminated
from posttrain.progress import Bar, bar

TIMES = frozenset({"total_flos"})  # of the machine, not of the training


LOSS = {"loss": "loss"}


@contextmanager
def follow(trainer: Any, folder: Path, shown: Mapping[str, str] = LOSS) -> Iterator["Clock"]:
    """A training within it, instead of the trainer's own ways to print. folder: what it makes, within the run's, which names its
    lines; shown: which of what it logs stands beside the bar, and as what. Yields what knows of former attempts' time."""
    with ExitStack() as stack:  # a training that fails has no end of which a callback is told
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress(folder.name, shown, stack))
        trainer.add_callback(_Stop(stack))
        trainer.add_callback(_Order())
        clock = Clock()
        trainer.add_callback(clock)
        run = record.current()
        if run is not None:
            events = run.folder / record.EVENTS / run.part(folder)
            reports = [report() for report in get_reporting_integration_callbacks(list(run.report_to))]
            trainer.add_callback(_Record(run, folder, events, reports))
            for report in reports:
                trainer.add_callback(report)
        yield clock


class Clock(TrainerCallback, ExportableState):
    """earlier: seconds that former attempts took up to the checkpoint from which a training goes on."""

    def __init__(self) -> None:
        self.earlier, self.begun = 0.0, time.perf_counter()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.earlier + time.perf_counter() - self.begun}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        known = state.stateful_callbacks.get(type(self).__name__)
        self.earlier = known["attributes"]["seconds"] if known else 0.0


class _Stop(TrainerCallback):
    """At SIGTERM, which clusters send before they kill: a checkpoint after the step under way, and then `Terminated`, in all
    processes after the same step; a second SIGTERM ends the process at once. (transformers' own, enable_jit_checkpoint, saves
    in the middle of a step, each process when it likes, and ends as if the training were finished.) What is logged next, once
    the training goes on, is a mean over the steps since."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.asked = False
        self.before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before = signal.signal(signal.SIGTERM, self._ask)
        self.stack.callback(signal.signal, signal.SIGTERM, self.before)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and state.epoch % 1:  # transformers ends it early
            control.should_log = control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            raise Terminated

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, self.before)


class _Order(TrainerCallback, ExportableState):
    """Some samplers draw an epoch's order from torch's generator. In the middle of an epoch a training goes on in the same order,
    as a checkpoint knows where the generator stood when the epoch began."""

    def __init__(self) -> None:
        self.epoch, self.generator = -1, ""

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"epoch": self.epoch, "generator": self.generator}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        begun = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.epoch, self.generator = begun["epoch"], begun["generator"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        epoch = int(state.epoch or 0)
        if epoch == self.epoch:  # it has begun before
            torch.set_rng_state(torch.tensor(list(bytes.fromhex(self.generator)), dtype=torch.uint8))
        self.epoch, self.generator = epoch, bytes(torch.get_rng_state().tolist()).hex()


class _Record(TrainerCallback):
    """Before the reports, whose event files it places."""

    def __init__(self, run: record.Run, folder: Path, events: Path, reports: list[Any]) -> None:
        self.run, self.folder, self.events, self.reports = run, folder, events, reports

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What an interrupted attempt logged after its last checkpoint is logged again."""
        if not state.is_world_process_zero:
            return
        self.run.rewind(self.folder, state.global_step)
        for report in self.reports:
            if hasattr(report, "tb_writer"):
                from torch.utils.tensorboard import SummaryWriter

                report.logging_dir = str(self.events)
                report.tb_writer = SummaryWriter(report.logging_dir, purge_step=state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            kept = {name: value for name, value in logs.items() if name not in TIMES}
            self.run.log(self.folder, state.global_step, kept)


class _Progress(TrainerCallback):
    """Steps, and some of what is logged."""

    def __init__(self, title: str, shown: Mapping[str, str], stack: ExitStack) -> None:
        self.title, self.shown, self.stack = title, shown, stack
        self.bar = Bar()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = self.stack.enter_context(bar(self.title, state.max_steps))
            self.bar.skip(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = [f"{title} {logs[name]:.4g}" for name, title in self.shown.items() if logs and name in logs]
        if numbers:
            self.bar.advance(0, ", ".join(numbers))
