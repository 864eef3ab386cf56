"""How much work one comparison may cost: counted, not timed, so the verdict does not depend on the machine's load."""

import threading

UNITS = 150_000  # one to two microseconds each


class Exhausted(Exception):
    """The comparison costs more than it is allowed to."""


_local = threading.local()


def start() -> None:
    """A fresh allowance for this thread."""
    _local.left = UNITS


def spend(units: int) -> None:
    """Take units from the allowance; raises Exhausted when it is used up."""
    left = getattr(_local, "left", UNITS) - units
    _local.left = left
    if left < 0:
        raise Exhausted
