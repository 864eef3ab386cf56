"""Many spellings, one string: Unicode, math delimiters, spacing macros and thousands separators, before any parsing."""

import re
import unicodedata

CURRENCIES = {"\ue000": "$", "€": "€", "£": "£", "¥": "¥", "¢": "cent", "₹": "₹"}
DOLLAR = "\ue000"  # `\$` once math delimiters are gone

_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ϵ": "epsilon", "ζ": "zeta", "η": "eta",
    "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "µ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma",
    "τ": "tau",
    "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta",
    "Λ": "Lambda",
    "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega", "ℏ": "hbar", "∅": "emptyset",
    "∞": "infty",
    "≤": "le", "≦": "le", "⩽": "le", "≥": "ge", "≧": "ge", "⩾": "ge", "≠": "ne", "≈": "approx", "≃": "approx",
    "≅": "approx",
    "≡": "equiv", "∈": "in", "∪": "cup", "∩": "cap", "∖": "setminus", "±": "pm", "∓": "mp", "×": "times", "·": "cdot",
    "⋅": "cdot",
    "∙": "cdot", "÷": "div", "√": "sqrt", "⟨": "langle", "⟩": "rangle", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil",
    "⌉": "rceil",
    "∠": "angle", "△": "triangle", "∧": "land", "∨": "lor", "…": "ldots", "⋯": "ldots", "∑": "sum", "∏": "prod",
    "∫": "int", "∣": "mid",
}  # fmt: skip
_PLAIN = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-", "﹣": "-", "∗": "*", "⁄": "/", "∶": ":", "、": ",",
    "′": "'", "’": "'",
    "‘": "'", "″": "''", "º": "°", "˚": "°", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "\u200b": "", "\ufeff": "", "\u2061": "", "\u2062": "",
    "“": '"', "”": '"',
}  # fmt: skip
_TABLE = str.maketrans({**{k: f"\\{v} " for k, v in _GREEK.items()}, **_PLAIN})
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")

_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
_DOUBLED = re.compile(  # JSON written twice
    r"\\\\(?=(?:[dtc]?frac|sqrt|left|right|text|mathrm|boxed|pi|infty|cdot|times|leq?|geq?|neq?|cup|cap|in|pm|circ)(?![a-zA-Z]))"
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])")
_THOUSANDS = re.compile(  # 1,\!234 and 1{,}234 and 1\,234 and 1~234
    r"(?<=\d)\s*(?:(?:\{\s*,\s*\}|,)\s*\\!\s*|\{\s*,\s*\}\s*|\\[!,;:]\s*,?\s*|\\ |\\thinspace\s*|~|'|_|\\text\s*\{\s*,\s*\})"
    r"\s*(?=\d{3}(?!\d))"
)
_DOTTED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])")  # 1.234.567
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_MONEY_NAMES = {"us$": DOLLAR, "us" + DOLLAR: DOLLAR, "usd": DOLLAR, "eur": "€", "gbp": "£", "rs": "₹", "inr": "₹"}
_MONEY_NAME = re.compile(rf"(?i)(?<![a-z])(US[${DOLLAR}]|USD|EUR|GBP|Rs|INR)\.?\s*(?=\d)")
_HALF_DAY = re.compile(r"(?i)\b([ap])\.\s?m\b\.?")
_RATE = re.compile(  # 460/week, 460 a week
    r"(?i)(?<=\d)(?:\s*/\s*|\s+an?\s+)(?=(?:second|minute|hour|day|night|week|month|year|person|piece|item|mile|gallon|pound)s?\b)"
)
MOST_TRIMS = 20
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])(?!\s*(?:/|\\[dtc]?frac))")


def respell(text: str) -> str:
    """The text with one spelling for each symbol; meaning is untouched."""
    if not text.isascii():
        text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPT)}}}", text)
        text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPT)}}}", text)
        text = _VULGAR.sub(lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
        text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    if "\\\\" in text and "begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = _BOX.sub("", text)
    text = text.replace("\\$", DOLLAR)
    text = _DELIMITER.sub(" ", text)
    text = _math_dollars(text)
    text = _TIMES_TEN.sub(r"\\times ", text)
    text = _MONEY_NAME.sub(lambda m: _MONEY_NAMES[m[1].lower()], text)
    text = _THOUSANDS.sub("", text)
    text = _RATE.sub(" per ", text)
    if "=" in text and text.count(DOLLAR) > 1:  # $5 + $3 = $8: one sign says it for all
        terms, _, last = text.rpartition(DOLLAR)
        text = terms.replace(DOLLAR, "") + DOLLAR + last
    text = _DOTTED_THOUSANDS.sub(lambda m: m[0].replace(".", ""), text)
    text = _HALF_DAY.sub(r"\1m", text)
    text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), text)
    return trim(text)


def trim(text: str) -> str:
    """Without what says nothing at either end: spaces, a leading `=`, a final full stop or line break."""
    for _ in range(MOST_TRIMS):
        before = text
        text = text.strip().removesuffix("\\\\").removesuffix("\\,").removesuffix("\\").rstrip()
        if text.endswith((",", ";", ":")) or (text.endswith(".") and not text.endswith("...")):
            text = text[:-1]
        if text.startswith("{") and len(text) > 2 and _closes_at_end(text) and not _INFIX.search(text):
            text = text[1:-1]
        if text.startswith((":", "=")) and not text.startswith("=="):
            text = text[1:]
        if text == before:
            break
    return text


def _closes_at_end(text: str) -> bool:
    """Whether the brace that opens a text is closed by its last character."""
    depth = 0
    for match in _BRACE.finditer(text):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth <= 0:
            return match.end() == len(text)
    return False


def _math_dollars(text: str) -> str:
    """Paired `$` are math delimiters; a lone one is money."""
    count = text.count("$")
    if count == 0:
        return text
    if text.replace("$$", "").count("$") % 2 == 0:
        return text.replace("$", " ")
    return text.replace("$$", " ").replace("$", DOLLAR)


_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|hbox|math(?:rm|bf|it|sf|tt)|operatorname\*?)\s*\{([^{}]*)\}"
)
_STYLE = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|[bB]ig{1,2}[lr]?)(?![a-zA-Z])|\\[,;:!]|\\q?quad(?![a-zA-Z])"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_INFIX = re.compile(r"\\(?:choose|over)(?![a-zA-Z])")  # these need the braces around them
_VARIANT = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SPACES = re.compile(r"(?<![^\W_])[\s~]+|[\s~]+(?![^\W_])")


def squeeze(text: str) -> str:
    """Without styling and without spaces that separate nothing: where two of these agree, so do the answers."""
    text = _VARIANT.sub(r"\\frac", _STYLE.sub(" ", _TEXT.sub(r" \1 ", text)))
    return _SPACES.sub("", re.sub(r"[\s~]+", " ", text))
