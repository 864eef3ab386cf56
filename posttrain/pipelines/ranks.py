"""The processes that `accelerate launch` or `torchrun` started for one command: all train, the first does everything else."""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from posttrain.errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # for all that the first process does alone
GRACE = 20.0  # seconds that a process leaves the first one to say what is wrong


LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}  # what every launcher tells its processes


def rank() -> int:
    """This process's number; 0 where there is no other."""
    return int(os.environ["RANK"]) if os.environ.keys() >= LAUNCHED else 0


def one_process(why: str) -> None:
    """Errors: UserError naming `launch` where a launcher started several."""
    if os.environ.keys() >= LAUNCHED and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError(f"launch: this runs in one process: {why}")


class Ranks:
    """The processes of this command, joined as accelerate joins them. device: as configured.

    Errors: UserError naming `device`, which is each process's own.
    """

    def __init__(self, device: str | None) -> None:
        import torch

        self.count = int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= LAUNCHED else 1
        self.first = rank() == 0
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.count == 1 and not self.deepspeed:
            return
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"device: {device} would be that of all {self.count} processes; leave it out, or give cpu")
        from accelerate import PartialState

        # DeepSpeed finds its device by itself; a `cpu` would hide it here, but not from transformers' TrainingArguments.
        device = str(PartialState(cpu=self.device == "cpu" and not self.deepspeed).device)
        self.device = "cpu" if device.startswith("cpu") else device  # accelerate numbers processors too
        self._waiting = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def deepspeed(self) -> bool:
        return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"

    @property
    def use_cpu(self) -> bool:
        """What transformers' TrainingArguments are to be told, under DeepSpeed too: only then are there several processes."""
        return self.device == "cpu"

    @property
    def launch(self) -> list[Any]:
        """How they were launched, as far as a checkpoint depends on it: it goes on only under the like."""
        named = ("USE_DEEPSPEED", "DEEPSPEED_ZERO_STAGE", "DEEPSPEED_CONFIG_FILE")
        return [self.count, *(os.environ.get(f"ACCELERATE_{name}") for name in named)] if self.count > 1 else []

    def alone(self, work: Callable[[], T]) -> T | None:
        """What `work` returns to the first process. The others wait for its end, and have None.

        Errors: on the others, UserError where the first has ended.
        """
        found = work() if self.first else None
        if self.count > 1:
            import torch

            try:
                torch.distributed.barrier(self._waiting)
            except RuntimeError:  # a closed connection; the first would have said why
                raise UserError("launch: another process has ended; the last checkpoint is kept") from None
        return found


def release(trainer: Any) -> None:
    """After training: frees what the trainer holds on its device, and models that are loaded from now on are whole again,
    which under ZeRO-3 each would be a part of."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    unset_hf_deepspeed_config()


def part() -> None:
    """Ends what joined the processes of a command that is done: a thread of it that outlives the interpreter would abort that."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends one of several processes, after what is to be done at exit but without the interpreter's own end: a thread of gloo's
    or DeepSpeed's that is met there aborts it, with everything done and saved."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective call has failed because another process is gone, in the words of gloo, NCCL or the store."""
    words = (
        "connection closed by peer",
        "connection reset by peer",
        "broken pipe",
        "remote process exited",
        "ncclremoteerror",
    )
    return (
        "RANK" in os.environ and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def let_the_first_speak() -> None:
    """Of a command that fails in all its processes, one says why. Returns in the first at once, which then is deaf to the
    launcher's SIGTERM, or that would overtake the reason; elsewhere only where the error is this process's own: as a rule the
    launcher ends it before, and it leaves with code 2."""
    if rank():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
        time.sleep(GRACE)
    elif "RANK" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
