"""Text to tokens: LaTeX and plain notation end in one alphabet, so the parser knows only one.

Kinds: `num` (a literal), `sym` (a name), `run` (two or three letters: a product or a word), `word` (text), `fn` (a
known function), `cmd` (a LaTeX construction with arguments), `op` (everything else). `upright` marks what stood in
`\\text{}` or `\\mathrm{}`.
"""

import re
from dataclasses import dataclass

from posttrain.rewards.answers.spelling import CURRENCIES


class ParseError(ValueError):
    """The text is not an answer that we can read."""


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    space: bool  # whether a space stands before it
    upright: bool = False


LONGEST = 2_000  # characters; no answer worth reading is longer
DEEPEST = 40  # nested groups

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc log ln lg exp sqrt cbrt "
    "abs floor ceil "
    "min max gcd lcm binom factorial det".split()
)
_ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "acot": "arccot", "arctg": "arctan", "tg": "tan",
    "ctg": "cot", "cosec": "csc",
    "ceiling": "ceil",
}  # fmt: skip
_NAMES = {"pi": "pi", "inf": "oo", "infty": "oo", "infinity": "oo", "oo": "oo", "Infinity": "oo", "Pi": "pi"}
_GREEK_WORDS = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega".split()
)

_OPERATORS = {
    "cdot": "*", "times": "*", "ast": "*", "star": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=",
    "leqq": "<=", "lt": "<",
    "ge": ">=", "geq": ">=", "geqslant": ">=", "geqq": ">=", "gt": ">", "ne": "!=", "neq": "!=", "approx": "~",
    "simeq": "~",
    "sim": "~", "cong": "~", "doteq": "~", "equiv": "==", "in": "in", "cup": "cup", "bigcup": "cup", "cap": "cap",
    "bigcap": "cap",
    "setminus": "setminus", "backslash": "setminus", "smallsetminus": "setminus", "pm": "pm", "mp": "mp",
    "ldots": "dots",
    "dots": "dots", "cdots": "dots", "dotsc": "dots", "dotsb": "dots", "dotsm": "dots", "vdots": "dots",
    "ddots": "dots",
    "circ": "°", "degree": "°", "textdegree": "°", "lbrace": "{|", "rbrace": "|}", "lfloor": "⌊", "rfloor": "⌋",
    "lceil": "⌈",
    "rceil": "⌉", "langle": "⟨", "rangle": "⟩", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "Vert": "|",
    "lVert": "|",
    "rVert": "|", "prime": "'", "colon": ":", "land": "and", "wedge": "and", "lor": "or", "vee": "or", "lbrack": "[",
    "rbrack": "]",
    "percent": "%", "textdollar": "$", "lparen": "(", "rparen": ")", "to": "->", "rightarrow": "->",
    "longrightarrow": "->",
    "implies": "->", "Rightarrow": "->", "newline": "\\\\", "cr": "\\\\",
    "pmod": "mod", "bmod": "mod", "mod": "mod", "cents": "cent", "euro": "€", "pounds": "£",
}  # fmt: skip
_IGNORED = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle scriptstyle "
    "limits nolimits quad "
    "qquad thinspace enspace hfill rm bf it sf tt mathrm mathbf operatorname text mbox middle noindent centering "
    "nonumber notag "
    "hline ensuremath mathstrut strut large Large small normalsize kern".split()
)
_TEXT_MACROS = frozenset(
    "text textbf textit textrm textnormal textsf texttt textsc mbox hbox mathrm mathit mathsf mathtt operatorname "
    "emph underline".split()
)
_BOLD_MACROS = frozenset(
    "mathbf boldsymbol bm pmb mathbb mathcal mathfrak mathscr vec hat bar widehat tilde widetilde "
    "overrightarrow".split()
)
_ARGUMENT_DROPPED = frozenset("phantom hphantom vphantom hspace vspace label tag color hskip vskip".split())
CONSTRUCTIONS = frozenset(
    "frac sqrt binom begin end sum prod int lim iint oint overline choose over atop limsup liminf mathop stackrel "
    "overset underset "
    "underbrace overbrace cancel not nabla partial".split()
)
_CONSTRUCTION_ALIASES = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom"}
_NAMED_OPERATORS = {"emptyset": "∅", "varnothing": "∅", "infty": "oo", "Re": "Re", "Im": "Im"}

_TOKEN = re.compile(
    r"""
    (?P<space>(?:\s|~|\\[,;:!\ ])+)
  | (?P<rep>\d*\.\d*\\(?:overline|bar|dot)\s*(?:\{\s*\d+\s*\}|\d) | \d*\.\d*\\dot\s*\{?\d\}?\d*\\dot\s*\{?\d\}?
      | \d*\.\d+(?:\.\.\.|\\[lc]?dots(?:b|c)?(?![a-zA-Z])) | \d+\.\d*\(\d+\))
  | (?P<num>[1-9]\d{0,2}(?:,\d{3})+(?![\d,])(?:\.\d+)? | (?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?)
  | (?P<row>\\\\(?:\[[^\]]*\])?)
  | (?P<cmd>\\[a-zA-Z]+\*?)
  | (?P<esc>\\.)
  | (?P<letters>[A-Za-z]+)
  | (?P<op>\*\*|<=|>=|=<|=>|!=|==|:=|\.\.\.+|->|[-+*/^_=<>(){}\[\],;:|!'&%°$€£¥¢₹\ue000])
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_PROSE = re.compile(r"[A-Za-z][A-Za-z\s,.'-]*")
_RUN = re.compile(r"[A-Za-z]+")
_SHORT_WORDS = frozenset("the is are for has was its his her our you all any not no yes odd an so at to of".split())
STATES = frozenset(("is", "are", "equals"))  # "the area is 12"
_SPELT = {"**": "^", ":=": "=", "=<": "<=", "=>": "->", "...": "dots", "{": "{", "}": "}"}
_WORD = re.compile(r"[A-Za-zÀ-ÿ]+(?:['’-][A-Za-zÀ-ÿ]+)*")


def tokens(text: str, grouped: bool = True) -> list[Token]:
    """All tokens of a respelled text. `grouped`: whether `1,234` is one number (else it is a list)."""
    if len(text) > LONGEST:
        raise ParseError("too long")
    found: list[Token] = []
    _scan(text, grouped, _is_prose(text), found, 0)
    return found


def _is_prose(text: str) -> bool:
    runs = _RUN.findall(text) if _PROSE.fullmatch(text) else []
    return any(
        (run.lower() in _SHORT_WORDS and not run.isupper()) or (len(run) > 3 and not _has_meaning(run)) for run in runs
    )


def _has_meaning(run: str) -> bool:
    return (
        run.lower() in FUNCTIONS
        or run.lower() in _ALIASES
        or run in _NAMES
        or run in _GREEK_WORDS
        or _glued(run) is not None
    )


def _scan(text: str, grouped: bool, upright: bool, out: list[Token], depth: int) -> None:
    if depth > DEEPEST:
        raise ParseError("too deep")
    position, space = 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match  # the last alternative takes any character
        kind, piece = match.lastgroup, match.group()
        position = match.end()
        if kind == "space":
            space = True
            continue
        if kind == "num" and not grouped and "," in piece:
            piece = piece[: piece.index(",")]
            position = match.start() + len(piece)
        if kind == "cmd":
            position = _command(piece[1:].rstrip("*"), text, position, grouped, upright, space, out, depth)
        elif kind == "letters":
            _letters(piece, upright, space, out)
        elif kind in ("num", "rep"):
            out.append(Token("num", piece, space))
        elif kind == "row":
            out.append(Token("op", "\\\\", space))
        elif kind == "esc":
            sign = {"\\{": "{|", "\\}": "|}", "\\|": "|", "\\%": "%", "\\&": "&", "\\#": "#", "\\_": "_"}.get(piece, "")
            if not sign:
                raise ParseError(f"unknown sign {piece}")
            out.append(Token("op", sign, space))
        elif kind == "op":
            sign = "dots" if piece.startswith("...") else _SPELT.get(piece, CURRENCIES.get(piece, piece))
            out.append(Token("op", sign, space, upright))
        elif upright and piece in '.?"-':
            pass
        elif piece.isalpha():  # a word in another script
            word = _WORD.match(text, match.start())
            end = word.end() if word else match.end()
            out.append(Token("word", text[match.start() : end], space, True))
            position = end
        elif piece == "." and out and out[-1].kind in ("word", "run", "sym"):
            pass  # an abbreviation
        else:
            raise ParseError(f"unknown sign {piece}")
        space = False


def _letters(run: str, upright: bool, space: bool, out: list[Token]) -> None:
    lowered = run.lower()
    function = _ALIASES.get(lowered, lowered)
    if len(run) == 1:
        out.append(Token("sym", run, space, upright))
    elif lowered in ("and", "or"):
        out.append(Token("op", lowered, space, upright))
    elif function in FUNCTIONS and not (run.isupper() and len(run) > 1):
        out.append(Token("fn", function, space, upright))
    elif run in _NAMES:
        out.append(Token("sym", _NAMES[run], space))
    elif run in _GREEK_WORDS:
        out.append(Token("sym", run, space))
    elif lowered in STATES and not upright:
        out.append(Token("op", "=", space))
    elif upright or (lowered in _SHORT_WORDS and not run.isupper()):
        out.append(Token("word", run, space, upright))
    elif lowered == "mod":
        out.append(Token("op", "mod", space))
    elif (parts := _glued(run)) is not None:
        for i, part in enumerate(parts):
            _letters(part, upright, space and i == 0, out)
    elif len(run) <= 3:
        out.append(Token("run", run, space))
    else:
        out.append(Token("word", run, space))


def _glued(run: str) -> tuple[str, str] | None:
    """`sinx` and `xsqrt` are a function and a letter."""
    for name in ("sqrt", "sin", "cos", "tan", "ln", "log", "pi"):
        if run.startswith(name) and len(run) == len(name) + 1:
            return name, run[-1]
        if run.endswith(name) and len(run) == len(name) + 1 and name != "pi":
            return run[0], name
    return None


_UNBRACED = re.compile(r"\s*([A-Z])")


def _command(
    name: str, text: str, position: int, grouped: bool, upright: bool, space: bool, out: list[Token], depth: int
) -> int:
    if name in _TEXT_MACROS or name in _BOLD_MACROS:
        content, end = braced(text, position)
        if content is not None:
            before = len(out)
            if name == "mathbb":
                out.append(Token("sym", f"set {content.strip()}", space))
            elif name in ("overrightarrow", "vec", "bar", "widehat", "hat") and len(content) > 1 and content.isalpha():
                out.append(Token("sym", content, space))
            else:
                _scan(content, grouped, upright or name in _TEXT_MACROS, out, depth + 1)
            if space and len(out) > before:
                first = out[before]
                out[before] = Token(first.kind, first.text, True, first.upright)
            return end
        if name == "mathbb" and (letter := _UNBRACED.match(text, position)):
            out.append(Token("sym", f"set {letter[1]}", space))
            return letter.end()
        return position
    if name in _IGNORED:
        # `\left.` and `\right.` are invisible brackets
        return position + 1 if name in ("left", "right") and text[position : position + 1] == "." else position
    if name in _ARGUMENT_DROPPED:
        content, end = braced(text, position)
        return end
    if name == "textcolor":
        _, position = braced(text, position)
        return position
    name = _CONSTRUCTION_ALIASES.get(name, name)
    if name in _NAMED_OPERATORS:
        out.append(Token("sym", _NAMED_OPERATORS[name], space))
    elif name in _OPERATORS:
        out.append(Token("op", _OPERATORS[name], space))
    elif _ALIASES.get(name, name) in FUNCTIONS and name not in ("binom", "sqrt"):
        out.append(Token("fn", _ALIASES.get(name, name), space))
    elif name in CONSTRUCTIONS or name in ("binom", "sqrt"):
        out.append(Token("cmd", name, space))
    elif name in _NAMES:
        out.append(Token("sym", _NAMES[name], space))
    else:
        out.append(Token("sym", name.removeprefix("var") if name.startswith("var") else name, space))
    return position


def braced(text: str, position: int) -> tuple[str | None, int]:
    """The content of the brace group that begins at or just after `position`, and where it ends."""
    start = position
    while start < len(text) and text[start].isspace():
        start += 1
    if start >= len(text) or text[start] != "{":
        return None, position
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start + 1 : match.start()], match.end()
    raise ParseError("a brace is never closed")
