"""Where a parser stands in its stream of tokens."""

from posttrain.rewards.answers.lexer import DEEPEST, ParseError, Token
from posttrain.rewards.answers.tree import Node

RELATIONS = frozenset(("=", "!=", "<", "<=", ">", ">=", "~", "in", "==", "->"))
SEPARATORS = frozenset((",", ";", "and", "or"))
SET_OPERATIONS = frozenset(("cup", "cap", "setminus"))
MONEY = frozenset(("$", "€", "£", "¥", "₹"))
CLOSING = {"(": ")", "[": "]", "{": "}", "{|": "|}", "⌊": "⌋", "⌈": "⌉", "⟨": "⟩"}


class Cursor:
    """A position, how deep it is and what is open there; the rules of the grammar come with the classes below."""

    def __init__(self, stream: list[Token], latex: bool):
        self.stream = stream
        self.at = 0
        self.latex = latex
        self.depth = 0
        self.bars = 0  # absolute values that are open
        self.in_set = False  # directly inside set braces, where a bar separates
        self.outward = False  # inside ]a, b[
        self.money = ""  # the currency sign last seen before a number

    def item(self) -> Node:
        """What may stand between two commas; see the parser of answers."""
        raise NotImplementedError

    def answer(self, closing: str = "") -> Node:
        """Items and what separates them."""
        raise NotImplementedError

    def sum(self) -> Node:
        raise NotImplementedError

    def function(self, name: str) -> Node:
        raise NotImplementedError

    def macro(self, name: str) -> Node:
        raise NotImplementedError

    # -- the stream

    def peek(self, ahead: int = 0) -> Token | None:
        index = self.at + ahead
        return self.stream[index] if index < len(self.stream) else None

    def op(self, ahead: int = 0) -> str:
        """The next sign, or nothing where the next token is none."""
        token = self.peek(ahead)
        return token.text if token and token.kind == "op" else ""

    def kind(self, ahead: int = 0) -> str:
        token = self.peek(ahead)
        return token.kind if token else ""

    def is_macro(self, *names: str, ahead: int = 0) -> bool:
        token = self.peek(ahead)
        return token is not None and token.kind == "cmd" and token.text in names

    def take(self) -> Token:
        token = self.peek()
        if token is None:
            raise ParseError("ends too soon")
        self.at += 1
        return token

    def expect(self, sign: str) -> None:
        if self.op() != sign:
            raise ParseError(f"expected {sign}")
        self.at += 1

    def descend(self) -> None:
        self.depth += 1
        if self.depth > 3 * DEEPEST:
            raise ParseError("too deep")
