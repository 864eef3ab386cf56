"""`posttrain` and `python -m posttrain`: the command line, and what Ctrl-C does to it: one line, exit code 130, at any moment."""

import os
import signal
from types import FrameType

from posttrain.pipelines.ranks import rank


def main() -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has it ignored
        signal.signal(signal.SIGINT, _interrupted)
    from posttrain.cli import main as cli

    try:
        return cli.main()
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupted:
            signal.signal(signal.SIGINT, _leave)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, except in the middle of an import: there an exception may be swallowed, or become another one."""
    signal.signal(signal.SIGINT, _leave)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    """At once. What this loses is no more than kill -9 would: everything is written atomically."""
    if rank() == 0:
        os.write(2, b"posttrain: interrupted; what is finished is kept\n")
    os._exit(130)


if __name__ == "__main__":
    raise SystemExit(main())
