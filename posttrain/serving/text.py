"""Token ids to text while they come: nothing is shown that a later token could still change or take back."""

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what half of a character decodes to
LONGEST_CHARACTER = 4  # bytes, hence tokens: after so many it is no half, but what the model wrote


class TextStream:
    """Text held back: the beginning of what may become a stop text, and a character whose bytes are not all there.

    Only the tokens since the last whole piece are decoded anew, with the piece before them, since some tokenizers drop the
    space at the beginning of what they decode.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.shown = 0  # characters given out
        self._ids: list[int] = []
        self._before = self._done = 0  # ids before these are not decoded again; ids before these are in `_text`
        self._held = ""

    @property
    def length(self) -> int:
        """Characters so far, those held back included."""
        return self.shown + len(self._held)

    def push(self, id: int) -> str:
        """What can be shown now."""
        self._ids.append(id)
        known = self._decode(self._ids[self._before : self._done])
        text = self._decode(self._ids[self._before :])
        if text.endswith(HALF) and len(self._ids) - self._done < LONGEST_CHARACTER:
            return ""
        self._held += text[len(known) :]
        self._before, self._done = self._done, len(self._ids)
        certain = len(self._held) - self._perhaps_stop()
        piece, self._held = self._held[:certain], self._held[certain:]
        self.shown += len(piece)
        return piece

    def finish(self, text: str) -> str:
        """The rest of a completion's whole text, which is cut where it should be."""
        rest, self.shown = text[self.shown :], len(text)
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _perhaps_stop(self) -> int:
        """Length of the longest end of the held text that a stop text begins with."""
        longest = min(len(self._held), max((len(text) - 1 for text in self.stop), default=0))
        ends = (length for length in range(longest, 0, -1) if self._any_begins(self._held[-length:]))
        return next(ends, 0)

    def _any_begins(self, end: str) -> bool:
        return any(text.startswith(end) for text in self.stop)
