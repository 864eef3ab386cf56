"""The long checks: `make soak` runs them whole (POSTTRAIN_SOAK=1), `make test` a short instance of each, by the same code."""

import os
from typing import TypeVar

T = TypeVar("T")

SOAK = os.environ.get("POSTTRAIN_SOAK") == "1"


def size(short: T, whole: T) -> T:
    return whole if SOAK else short
