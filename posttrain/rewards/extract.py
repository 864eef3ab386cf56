"""Where is the answer in a completion?

The whole completion is searched, in time linear in its length, in this order:

1. finished think blocks are cut out; after an unfinished one there is no answer,
2. `boxed`: the last balanced `\\boxed{...}` or `\\fbox{...}` that has content,
3. `hash`: the last `#### answer`,
4. `tag`: the last `<answer>...</answer>`,
5. `phrase`: the last explicit statement ("the answer is ...", "Answer: ...", what is below "Final answer"),
6. `bold`: a bold number on the last line,
7. `bare`: a completion that is one number and nothing else.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.rewards.statement import last_statement, trim


@dataclass(frozen=True)
class Extraction:
    """The answer's text (None: none was given) and the rule that found it (`none` likewise)."""

    answer: str | None
    rule: str


NOTHING = Extraction(None, "none")


def extract(text: str) -> Extraction:
    """The stated answer of a completion and the rule that found it; the module says in which order rules are tried."""
    visible = without_thinking(text)
    if visible is None:
        return NOTHING
    prose = without_code(visible)
    for rule, find in RULES:
        answer = find(visible if rule == "boxed" else prose)
        if answer:
            return Extraction(answer, rule)
    return NOTHING


_THINK = re.compile(
    r"<(/?)(?:think(?:ing)?|thought|reasoning|reflection|seed:think)>|◁(/?)think▷|\[(/?)think\]|<\|(?:begin|(end))_of_thought\|>",
    re.IGNORECASE,
)


def without_thinking(text: str) -> str | None:
    """The text outside think blocks; None when a block is never finished."""
    kept: list[str] = []
    depth = start = 0
    for tag in _THINK.finditer(text):
        closing = any(tag.groups())
        if closing and depth == 0:  # the opening tag stood in the prompt: all that came before was thinking
            kept.clear()
            start = tag.end()
        elif closing:
            depth -= 1
            start = tag.end()
        else:
            if depth == 0:
                kept.append(text[start : tag.start()])
            depth += 1
    if depth:
        return None
    kept.append(text[start:])
    return "".join(kept)


def open_tag(prompt: str) -> str:
    """The think tag that a prompt ends with, and all of its completions begin in; else nothing."""
    end = prompt[-100:].rstrip()
    *_, last = [None, *_THINK.finditer(end)]
    return last.group() if last and last.end() == len(end) and not any(last.groups()) else ""


_FENCE = re.compile(r"^[ \t]*```[ \t]*([a-zA-Z+#]*)[^\n]*$", re.MULTILINE)


def without_code(text: str) -> str:
    """The text outside fenced blocks of a programming language: what a program prints is not stated."""
    if "```" not in text:
        return text
    kept: list[str] = []
    start, inside = 0, False
    for fence in _FENCE.finditer(text):
        if inside:
            start, inside = fence.end(), False
        elif fence.group(1) and fence.group(1).lower() not in ("text", "math", "latex", "tex", "plaintext"):
            kept.append(text[start : fence.start()])
            inside = True
    return "".join(kept) if inside else "".join([*kept, text[start:]])


_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)(?![a-zA-Z])\s*+\{?|\\.|[{}]", re.DOTALL)
_ONE_TOKEN = re.compile(r"\\[a-zA-Z]+(?:\{[^{}]*\})+|[^\s${}]+")  # \boxed 5, \boxed\frac{1}{2}
_NOT_SPACE = re.compile(r"\S")


def last_box(text: str) -> str | None:
    """The content of the last balanced box that has any; an outer box counts before a box inside it."""
    if "box" not in text:
        return None
    found: tuple[int, int] | None = None
    open_braces: list[int] = []  # where a box's content starts; -1 for any other brace
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "{":
            open_braces.append(-1)
        elif token == "}":
            start = open_braces.pop() if open_braces else -1
            content = _NOT_SPACE.search(text, start, match.start()) if start >= 0 else None
            if content:
                found = (start, match.start())
        elif len(token) > 2 and token[-1] == "{":
            open_braces.append(match.end())
        elif len(token) > 2 and (bare := _ONE_TOKEN.match(text, match.end())):
            found = bare.span()
    return text[slice(*found)].strip() if found else None


_HASH = re.compile(r"####[ \t]*+([^\n]*)")
_HEADING = re.compile(
    r"(?i)(?:\d+[.)]\s+[a-z]|\W*(?:step|part|case|solution|explanation|note|conclusion|summary|verif|check|given|method|approach|"
    r"analysis|problem|question|example|therefore|calculat|comput|find|determin|solv|understand|let|final|answer|key|interpret)(?:\b|[a-z]))"
)


def last_hash(text: str) -> str | None:
    """What follows the last `####` that is not a Markdown heading."""
    if "####" not in text:
        return None
    found = None
    for match in _HASH.finditer(text):
        line = match.group(1).lstrip("# \t")
        if line.strip("*_ \t\r") and not _HEADING.match(line):
            found = line
    return trim(found) if found else None


def last_tag(text: str) -> str | None:
    """The content of the last finished `<answer>` element."""
    if "</" not in text:
        return None
    lowered = text.lower()
    if len(lowered) != len(text):  # a few letters change length; then positions would not agree
        lowered = text
    end = lowered.rfind("</answer>")
    start = lowered.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


_BOLD = re.compile(r"\*\*([^*\n]{1,100})\*\*|__([^_\n]{1,100})__")
_NUMBER = re.compile(
    r"[-+−$\\€£\s]*+(?:\d[\d,]*+(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?\s*(?:\\?[%$]|°)?(?:\s?[a-zA-Z]+(?:\s[a-zA-Z]+)?)?[\s.!]*+"
)


def bold_number(text: str) -> str | None:
    """The only bold number of the last line."""
    tail = text[-1_000:].rstrip()
    bold = [a or b for a, b in _BOLD.findall(tail[tail.rfind("\n") + 1 :])]
    return trim(bold[0]) if len(bold) == 1 and _NUMBER.fullmatch(bold[0]) else None


_DISPLAY = re.compile(r"\\[()\[\]]|\$\$")


def bare_number(text: str) -> str | None:
    """The whole completion, where that is one number."""
    if len(text) >= 200:
        return None
    text = _DISPLAY.sub(" ", text)
    return trim(text) if _NUMBER.fullmatch(text) else None


RULES: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    ("boxed", last_box),
    ("hash", last_hash),
    ("tag", last_tag),
    ("phrase", last_statement),
    ("bold", bold_number),
    ("bare", bare_number),
)
