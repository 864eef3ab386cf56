"""`posttrain` and `python -m posttrain`: the command line, and what Ctrl-C and SIGTERM do to it: one line, exit code 130 or 143,
at any moment."""

import os
import signal
from types import FrameType

from posttrain.errors import Terminated
from posttrain.pipelines.ranks import LAUNCHED, leave, rank

SAID = {signal.SIGINT: b"posttrain: interrupted; what is finished is kept\n"}
SAID[signal.SIGTERM] = SAID[signal.SIGINT].replace(b"interrupted", b"terminated")


def main() -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has it ignored
        signal.signal(signal.SIGINT, _interrupted)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and rank() == 0:  # the others end at once, and silently
        signal.signal(signal.SIGTERM, _interrupted)
    from posttrain.cli import main as cli

    try:
        return cli.main()
    finally:
        for number in SAID:
            if signal.getsignal(number) is _interrupted:
                signal.signal(number, _leave)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """An exception, except in the middle of an import: there it may be swallowed, or become another one."""
    signal.signal(number, _leave)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave(number, frame)
        frame = frame.f_back
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    """At once. What this loses is no more than kill -9 would: everything is written atomically."""
    if rank() == 0:
        os.write(2, SAID[signal.Signals(number)])
    os._exit(128 + number)


if __name__ == "__main__":
    status = main()
    if os.environ.keys() >= LAUNCHED:
        leave(status)
    raise SystemExit(status)
