"""Answers: what may stand around an expression.

    answer := item ((`,` | `;` | and | or) item)*
    item   := words | words? side (relation side)*
    side   := union unit?

Text stands alone (`east`), names what follows (`Area = 12`) or is the unit of what precedes it (`12 feet`); anything
else is no answer.
"""

from posttrain.rewards.answers.cursor import RELATIONS, SEPARATORS, SET_OPERATIONS
from posttrain.rewards.answers.lexer import STATES, ParseError, Token, tokens
from posttrain.rewards.answers.measures import Measures
from posttrain.rewards.answers.number_words import spelt_number
from posttrain.rewards.answers.tree import (
    EMPTY_SET,
    Listing,
    Node,
    Relation,
    Sym,
    Words,
    fits,
    number,
)

ARTICLES = frozenset(("a", "an", "the"))
LEAD_INS = frozenset("approximately about exactly only option choice part".split())
THINGS = frozenset("a an the ordered point points pair pairs triple vector matrix interval set coordinates".split())
NOTHING = frozenset(
    ("none", "empty", "empty set", "no solution", "no solutions", "no real solutions", "no real solution",
     "there are no solutions",
     "there is no solution", "no roots", "no real roots", "there are no real solutions")
)  # fmt: skip
EVERYTHING = frozenset(
    ("all real numbers", "all reals", "all real", "any real number", "every real number", "real numbers", "reals")
)
EVENTS = RELATIONS | SET_OPERATIONS | {"|", "and", "or", "'"}  # in the bracket of a probability
LONGEST_CHAIN = 50
MOST_NODES, TALLEST = 4_000, 100


def parse(text: str, *, grouped: bool = True, trusted: bool = False) -> Node:
    """The tree of a respelled answer; raises ParseError.

    `grouped`: `1,234` is one number; `trusted`: a gold, whose words are taken for units more freely.
    """
    parser = Parser(tokens(text, grouped), "\\" in text, trusted)
    node = parser.answer()
    if parser.peek() is not None:
        raise ParseError(f"unexpected {parser.take().text}")
    if not fits(node, MOST_NODES, TALLEST):
        raise ParseError("too large a tree")
    return node


class Parser(Measures):
    def answer(self, closing: str = "") -> Node:
        """A list; semicolons separate lists of commas."""
        groups: list[list[Node]] = [[self.item()]]
        joint = ","
        while self.op() in SEPARATORS or self.op() == "\\\\":
            semicolon = False
            while self.op() in SEPARATORS or self.op() == "\\\\":
                sign = self.take().text
                semicolon = semicolon or sign == ";"
                joint = sign if sign in ("and", "or") else joint
            if self.peek() is None or (closing and self.op() == closing):
                break
            if semicolon:
                groups.append([])
            groups[-1].append(self.item())
        if len(groups) > 1 and any(len(group) > 1 for group in groups):
            return Listing(tuple(Listing(tuple(group)) if len(group) > 1 else group[0] for group in groups))
        items = tuple(item for group in groups for item in group)
        return items[0] if len(items) == 1 else Listing(items, joint)

    def item(self) -> Node:
        if self.op() in ("~", "="):
            self.take()  # "≈ 5": nothing on the left
        self.skip_kind_of_thing()
        words = self.leading_words()
        if not words or words[-1].text.lower() in LEAD_INS:
            return self.relation()
        if words[-1].text in STATES and len(words) > 1 and self.peek() is not None:
            return self.chain([as_words(words[:-1]), self.side()], ["="])
        if self.op() == ":" or self.op() in RELATIONS:
            sign = self.take().text
            return self.chain([as_words(words), self.side()], ["=" if sign == ":" else sign])
        return as_words([*words, *self.rest_of_text()])

    # -- words

    def skip_kind_of_thing(self) -> None:
        """`the point (1, 2)` is (1, 2)."""
        start = self.at
        while (token := self.peek()) and token.text.lower() in THINGS and (token.kind == "word" or token.upright):
            self.at += 1
        if self.op() not in ("(", "[", "⟨", "{|") and not self.is_macro("begin"):
            self.at = start

    def leading_words(self) -> list[Token]:
        """The words at the start of an item; none where they are multiplied or applied."""
        start = self.at
        words: list[Token] = []
        while (token := self.peek()) and (token.kind == "word" or self.is_text(token, first=not words)):
            words.append(self.take())
        stops = self.op() and self.op() not in RELATIONS | SEPARATORS | {":", "}", "&", "\\\\"}
        if stops or not any(word.kind == "word" for word in words):
            self.at = start
            return []
        return words

    def is_text(self, token: Token, first: bool) -> bool:
        if token.kind not in ("sym", "run", "fn"):
            return False
        return token.upright or (not first and (token.kind == "run" or (token.kind == "sym" and not self.latex)))

    def rest_of_text(self) -> list[Token]:
        """`October` is followed by `30`; mathematics among words is no answer."""
        rest: list[Token] = []
        while self.peek() is not None and self.op() not in SEPARATORS | {"}", "&", "\\\\"}:
            token = self.take()
            if token.kind in ("op", "cmd") and token.text not in (":", "'", "-"):
                raise ParseError("text and mathematics mixed")
            rest.append(token)
        return rest

    # -- relations

    def relation(self) -> Node:
        first = self.side()
        return self.chain([first], []) if self.is_relation() else first

    def is_relation(self) -> bool:
        token = self.peek()
        plain_in = (
            token is not None and token.kind == "run" and token.text == "in" and self.op(1) in ("(", "[", "{|", "{")
        )
        return self.op() in RELATIONS or plain_in

    def chain(self, sides: list[Node], ops: list[str]) -> Node:
        while self.is_relation():
            ops.append(self.take().text)
            sides.append(self.side())
            if len(sides) > LONGEST_CHAIN:
                raise ParseError("too long a chain")
        return Relation(tuple(sides), tuple(ops))

    def side(self) -> Node:
        words = self.leading_words()
        if words:
            return as_words(words)
        return self.probability() or self.measure()

    def probability(self) -> Node | None:
        """`P(X = 2)` and `P(A | B)`, left of an equals sign: a label, whatever stands in the bracket."""
        if not (
            self.kind() == "sym" and self.peek() and self.stream[self.at].text in ("P", "Pr") and self.op(1) == "("
        ):
            return None
        depth, end = 0, self.at + 1
        while end < len(self.stream):
            text = self.stream[end].text
            depth += (text == "(") - (text == ")")
            end += 1
            if depth == 0:
                break
        inside = [token.text for token in self.stream[self.at + 2 : end - 1]]
        if end >= len(self.stream) or self.stream[end].text not in ("=", "~") or not EVENTS.intersection(inside):
            return None
        self.at = end
        return Sym(f"P({' '.join(inside)})")


def as_words(words: list[Token]) -> Node:
    """Text, or the number or the set that it spells."""
    kept = [word.text.lower() for word in words if word.text.lower() not in ARTICLES or len(words) == 1]
    text = " ".join(kept)
    value = spelt_number(text)
    if value is not None:
        return number(value)
    if text in NOTHING:
        return EMPTY_SET
    return Sym("set R") if text in EVERYTHING else Words(text)
