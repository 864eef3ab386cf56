"""The one error that a user's mistake raises, and the end that SIGTERM asks for."""

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
