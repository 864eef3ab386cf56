"""The one error that a user's mistake raises, the end that SIGTERM asks for, and a full disk in the words of libraries."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One line: the field, what is wrong with it, what would be right. The command line prints it and exits with 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: what is finished is kept, as at Ctrl-C; a training has left a checkpoint first."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing when no known name is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def why_unwritten(error: BaseException) -> str | None:
    """Why safetensors or torch, whose errors are not Python's, could not write a file, as on a full disk; None for any other
    error. torch gives no reason."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "SafetensorError" and "I/O error: " in text:
        return text.partition("I/O error: ")[2]
    torchs = ("iostream error", "unexpected pos", "PytorchStreamWriter failed")
    if isinstance(error, RuntimeError) and any(words in text for words in torchs):
        return "torch could not write a file; is the disk full?"
    return None
