"""What does a sentence that states an answer state?

"The final answer is therefore $x = 5$, because ..." states `$x = 5$`: fillers before it and asides after it are cut
off, a hedge is kept, so that "5, or perhaps 6" stays what it is and is equal to nothing.
"""

import re
from collections.abc import Iterator

LONGEST = 2_000  # characters; a statement is shorter

_SIGNALS = (
    "answer",
    "final result",
    "correct option",
    "correct choice",
    "答案",
    "respuesta",
    "réponse",
    "antwort",
    "ответ",
)
_WEAKER_SIGNALS = ("solution",)  # heard only where no answer is stated
_STATED = re.compile(
    r"""
    s? (?: \s (?:to|for|of) \s (?:the|this|that|part) \b [^.:;=\n$\\]{0,80}? )?
    (?: \s (?:choice|option|key) )?
    (?: [\s*_}"]*+ (?: [:：] | =(?!=) | 是 | 为 | 為 )
      | [\s*_]*+ (?: is|was|are|(?:will|would|must|should)\sbe|equals|comes\s(?:out\s)?to|es|est|ist|lautet ) (?![a-z])
        [\s*_]*+ [:：]?
      | \s*+ (?= \$ | \\[(\[] )
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_BELOW_HEADING = re.compile(r"[*_ \t]*\r?\n")
_BEFORE_HEADING = re.compile(r"(?im)^[#*_ \t✅]*(?:the )?(?:final )?answer\Z")
_IS_THE_ANSWER = re.compile(
    r"(?is)(\$[^$\n]{1,200}\$|\\\([^\n]{1,200}?\\\)|\*\*[^*\n]{1,100}\*\*|(?<![\w.,$])[-+]?\d[\d,./]*%?|\([A-J]\))\s+"
    r"(?:is|are)\s+(?:the|our|my)\s+(?:final\s+|correct\s+|only\s+)?(?:answer|solution)\Z"
)
_POSSESSED = re.compile(r"(?i)\s(?:the|our|my)\s")
_FILLER = re.compile(
    r"(?i)(?:[\s*_:`}\"]+|(?:therefore|thus|then|hence|simply|just|exactly|precisely|indeed|clearly|obviously|definitely|certainly|surely|"
    r"for sure|given by|equal to|option|choice|as follows|that)(?![a-z])[\s,*_:]*)+"
)
_DISPLAY = re.compile(r"\\\[(.*?)\\\]|\$\$(.*?)\$\$", re.DOTALL)
_SENTENCE_END = re.compile(r"[.?。](?=\s|\*|$)|!(?=\s+[A-Z]|\s*$)|[。;]|\n")
_ASIDE = re.compile(
    r"(?i)(?:,\s*|\s+|\s*\()(?:because|since|as|so|which|where|it|this|when|while|given|meaning|that is|thus|hence|"
    r"therefore|we|there|after|by|using|i\.e|not|and so|making|obtained|if we)\b"
)
_HEDGE = re.compile(
    r"(?i)\b(?:or|but|maybe|perhaps|possibly|could|might|may|either|unless|alternatively|not sure|unsure)\b"
)
_DENIED = re.compile(r"(?i)(?:\bnot|\bnever|n't|\bunclear|\bunknown|\bimpossible)\b")
_CLAUSE = re.compile(r"(?i)(?:the|that|this|there|so|our)\b.*\b(?:is|are|equals)\s+(?=\S)")


def last_statement(text: str) -> str | None:
    """The object of the last explicit statement of an answer in a text; None where there is none."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a few letters change length; then positions would not agree
        lowered = text
    for signals in (_SIGNALS, _WEAKER_SIGNALS):
        found = sorted(
            ((at, at + len(signal)) for signal in signals for at in _positions(signal, lowered)), reverse=True
        )
        if stated := next(filter(None, (_stated_at(text, start, end) for start, end in found)), None):
            return stated
    return None


def _positions(word: str, text: str) -> Iterator[int]:
    """Where a word begins in a text; an ASCII word not inside another one."""
    at = text.find(word)
    while at >= 0:
        if at == 0 or not word.isascii() or not text[at - 1].isalnum():
            yield at
        at = text.find(word, at + len(word))


def _stated_at(text: str, start: int, end: int) -> str | None:
    """What is stated around a signal word: after it, below it, or before it."""
    if stated := _STATED.match(text, end):
        return _statement(text[stated.end() : stated.end() + LONGEST])
    below = _BELOW_HEADING.match(text, end)
    if below and _BEFORE_HEADING.search(text[max(0, start - 60) : end]):
        return _statement(text[below.end() : below.end() + LONGEST])
    if _POSSESSED.search(text, max(0, start - 20), start):
        before = _IS_THE_ANSWER.search(text[max(0, start - 300) : end])
        return trim(before.group(1)) if before else None
    return None


def _statement(text: str) -> str | None:
    filler = _FILLER.match(text)
    text = text[filler.end() :] if filler else text
    if display := _DISPLAY.match(text):
        return trim(display.group(1) or display.group(2) or "")
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    aside = _ASIDE.search(sentence)
    # "D, it can't be A or B" takes nothing back, "5, so maybe 6" does
    if aside and (not _HEDGE.search(sentence, aside.end()) or _DENIED.search(sentence, aside.end())):
        sentence = sentence[: aside.start()]
    if clause := _CLAUSE.match(sentence):  # "the largest n is 34"
        sentence = sentence[clause.end() :]
    return trim(sentence) if "\\boxed" not in sentence else None  # a box here is one that never closed


def trim(text: str) -> str:
    """Without the spaces, the emphasis, the quotes and the full stop around it."""
    text = text.strip().strip("*_`").strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text
