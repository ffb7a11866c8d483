"""Reads answers as values and compares them in exact arithmetic: numbers, tuples, intervals, sets, ratios, with units.

`compare` returns None for what it cannot read (roots, letters, unions, inequalities); math-verify then decides. The
table in docs/graders.md, "What exact arithmetic adds", is why this exists beside math-verify.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)  # of a decimal, relative and at most absolute; two integers compare exactly
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—", "-"), **dict.fromkeys("×·", "*"), **dict.fromkeys("÷⁄", "/"), **dict.fromkeys("£€", ""),
        **dict.fromkeys("\u00a0\u202f\u2009", " "), "²": "^2", "³": "^3", "°": r"^\circ", "％": "%",
        "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "∪": r"\cup ",
        "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "∅": r"\emptyset ", "、": ",", "。": ".",
    }
)  # fmt: skip
_MULTIPLES = {
    "hundred": "*10^2", "thousand": "*10^3", "million": "*10^6", "billion": "*10^9", "trillion": "*10^12",
    "dozen": "*12", "百": "*10^2", "千": "*10^3", "万": "*10^4", "亿": "*10^8",
}  # fmt: skip
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])", " degrees "),
        (r"(?<=\d)(?:\{,\}|,\s?\\!)\s*(?=\d)", ","),
        (r"(?<=\d)(?:\\[,!;:]|~)(?=\d{3}(?!\d))", ","),
        (r"\\(?:varnothing|O)(?![a-zA-Z])|\b(?:the )?empty set\b", r"\\emptyset"),
        (r"\\(?:ldots|dots|cdots)(?![a-zA-Z])", "..."),
        (r"\b([ap])\.m\b\.?", r"\1m"),
        (r"(?<!\\)\\[,!;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\([%$&#_])", r"\1"),
        (r"\\(?:cdot|times|ast)(?![a-zA-Z])|\*\*?(?=\s*10\b)", "*"),
        (r"\*\*", "^"),
        (r"\\le(?![a-zA-Z])", r"\\leq"),
        (r"\\ge(?![a-zA-Z])", r"\\geq"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi"),
        (r"\s*([\^_])\s*(?:\{(\w)\})?", r"\1\2"),
        (r"\+\s*\\infty", r"\\infty"),
        (r"(?<=\d)\s+(?=\d+/\d)(\d+)/(\d+)", r"\\frac{\1}{\2}"),  # 5 1/2 is five and a half
        (r"(?<![_^\d.])(\d[\d.]*)\s+(?=\d)(?!\d{3}(?!\d))", r"\1, "),  # 5 6 are two numbers, 1 234 is one
        *((rf"(?<=\d)\s{'+' if word.isascii() else '*'}{word}s?(?![a-zA-Z])", new) for word, new in _MULTIPLES.items()),
        (r"(?<=[\d)}\]%])\s*[\u4e00-\u9fff]+\s*$", ""),  # a unit or a counter in Chinese
    )
)
# A prediction that is still to be worked out: what the problem asks for, not what it is.
_TO_DO = re.compile(
    r"\\(?:sum|prod|i{0,2}int|oint|lim|gcd|lcm|max|min|[bp]?mod)(?![a-zA-Z])|\\frac\{d\}\{d|[∑∏∫]"
    r"|\b(?:plus|minus|times|over|choose|more than|less than) +\S"
    r"|\d +(?:squared|cubed|factorial|halves|thirds|fourths)\b"
)
_SUM = re.compile(r"(?=.+[-+])[-+]?[\d.,() ]+(?:[-+*/]+[\d.,() ]+)+")  # not a product: a factorisation is an answer
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre",
        "in inch inche", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram", "kg kilogram", "lb pound",
        "oz ounce", "s sec second", "min minute", "h hr hour", "day", "week", "month", "year", "gallon",
        "ml milliliter", "L l liter litre", "dollar USD", "cent", "degree", "rad radian", "K kelvin", "J joule", "kJ",
        "N newton", "W watt", "V volt", "Hz hertz", "mol mole", "am", "pm",
    )
    for name in names.split()
}  # fmt: skip
_WORD = r"[a-zA-Z]+(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(rf"(?<=[\d.)\]}}%])(\s*){_WORD}(?:(?:\s*[/*]\s*|\s+){_WORD})*\s*$")
_NO_UNIT = {"sin", "cos", "tan", "log", "exp", "mod", "and", "or", "to", "if", "for", "not"}
_NAME = re.compile(r"^\\?[a-zA-Z]+(?:_\w|_\{\w+\})?(?:\([a-z]\))?\s*=\s*(?=[^=])")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_PLAIN = re.compile(_NUMBER)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_RATIO = re.compile(
    rf"([+-]?)(?:\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}|\(?(-?\d+(?:\.\d+)?)\)?/\(?(-?\d+(?:\.\d+)?)\)?)"
)
_MIXED = re.compile(r"([+-]?)(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_SCIENTIFIC = re.compile(rf"({_NUMBER})(?:\*10\^\{{?|[eE])([+-]?\d{{1,3}})\}}?")
_NAME_LAST = re.compile(r"([^=]*\d[^=]*)=\s*(\\?[a-zA-Z](?:_\w|_\{\w+\})?)\s*")
_RATIO_OR_TIME = re.compile(r"\d+(?:\.\d+)?(?::\d+(?:\.\d+)?)+")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{?(\d+)\}?|\\dot\{?(\d)\}?(\d*)\\dot\{?(\d)\}?)")
_ELLIPSIS = re.compile(r"([+-]?)(\d*)\.(\d*?)((\d+?)\5+)\.\.\.")
_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}"}


@dataclasses.dataclass(frozen=True)
class Value:
    """A number, an infinity ("oo", "-oo"), a division by zero ("zoo"), or a list of values.

    `kind` of a list is its brackets, "" for none, ":" for a ratio or a time.
    """

    number: Fraction | str | None = None
    percent: bool = False
    kind: str = ""
    items: tuple[Value, ...] = ()


def clean(text: str) -> str:
    """The answer in one spelling; its meaning and its units are kept."""
    text = text.strip().rstrip("\\ ")  # "42\\ " ends in a LaTeX space
    text = text.replace("**", "", 2) if text.startswith("**") else text
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS))  # full-width digits and punctuation
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = re.sub(r"\s+", " ", text).strip(" `")
    for _ in range(3):
        text = text.strip(" ")
        text = text if text.endswith("...") else text.removesuffix(".").removesuffix(",").removesuffix(";")
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
    return text.strip().removeprefix("$").strip()


def split_unit(text: str) -> tuple[str, str]:
    """The answer without its unit, and the unit in one spelling ("" for none or an unknown one), e.g. "m s^-2".

    After a space any words of three letters and more are a unit ("18 eggs"), shorter ones only if known. Without a
    space only known units count, and no single letter, which may be a variable.
    """
    found = _UNIT.search(text)
    if not found:
        return text, ""
    factors = _factors(found[0])
    words = [word for word, _ in factors]
    named = [_UNITS.get(w) or _UNITS.get(w.removesuffix("s")) for w in words]
    if found[1]:
        unit = all(name or len(w) > 2 for w, name in zip(words, named, strict=True)) and not _NO_UNIT & set(words)
    else:
        unit = all(name and len(w) > 1 for w, name in zip(words, named, strict=True))
    if not unit:
        return text, ""
    powers: dict[str, int] = {}
    for name, (_, power) in zip(named, factors, strict=True):
        powers[str(name)] = powers.get(str(name), 0) + power
    known = bool(named) and all(named)
    spelled = " ".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power)
    return text[: found.start()].strip(), spelled if known else ""


def _factors(unit: str) -> list[tuple[str, int]]:
    """(word, power) of each factor of a unit such as "m/s^2", "square feet" or "meters per second squared"."""
    factors: list[tuple[str, int]] = []
    sign, power = 1, 1
    for word, exponent, slash in re.findall(r"([a-zA-Z]+)(?:\^\{?(-?\d)\}?)?|(/)", unit):
        if slash or word == "per":
            sign = -1
        elif word in ("square", "sq", "cubic"):
            power = 3 if word == "cubic" else 2
        elif word in ("squared", "cubed") and factors:
            factors[-1] = (factors[-1][0], factors[-1][1] * (3 if word == "cubed" else 2))
        else:
            factors.append((word, sign * power * int(exponent or 1)))
            power = 1
    return factors


def compare(prediction: str, truth: str) -> bool | None:
    """Whether two answers are equal; None where this module cannot decide."""
    p, t = (_name_first(clean(text)) for text in (prediction, truth))
    if not p or not t:
        return False
    if _squash(p) == _squash(t):
        return True
    if _unfinished(p, t):
        return False
    if "=" not in t:
        p = _NAME.sub("", p)
    elif "=" not in p:
        t = _NAME.sub("", t)
    else:
        p, t = _same_name(p, t)
    read = [value(side.strip()) for side in p.split("=")]
    if len(read) > 1 and all(read) and not all(_equal(read[0], side) for side in read):
        return False  # "5 = 6" does not mean 6
    (p, p_unit), (t, t_unit) = split_unit(p), split_unit(t)
    if p_unit and t_unit and p_unit != t_unit:
        return False
    if _squash(p) == _squash(t) and p:
        return True
    got, want = value(p), value(t)
    if got is None or want is None:
        return None
    return _equal(got, want) or _equal(value(p, thousands=False), value(t, thousands=False))


def _name_first(text: str) -> str:
    """ "5 = x" as "x = 5"."""
    found = _NAME_LAST.fullmatch(text)
    if not found or re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", found[1])):
        return text
    return f"{found[2]} = {found[1].strip()}"


def _unfinished(p: str, t: str) -> bool:
    """Whether a prediction only says what is to be calculated ("17+23", a limit), and the truth does not."""
    p = sides(p)[-1].strip()
    if _TO_DO.search(p):
        return not _TO_DO.search(t)
    want = value(t)
    whole = want is not None and isinstance(want.number, Fraction) and want.number.denominator == 1
    return whole and bool(_SUM.fullmatch(p)) and value(p) is None


def sides(text: str) -> list[str]:
    """What stands between the equals signs that are outside all braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if c == "=" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _squash(text: str) -> str:
    """For comparing as strings: no spaces, words without case, one letter without its parentheses."""
    text = re.sub(r"\s", "", text)
    if re.fullmatch(r"[a-zA-Z]{2,}", text):
        return text.lower()
    return text[1:-1] if re.fullmatch(r"\([A-Z]\)", text) else text


def _same_name(p: str, t: str) -> tuple[str, str]:
    names = [m[0].rstrip(" =") if (m := _NAME.match(s)) else None for s in (p, t)]
    return (_NAME.sub("", p), _NAME.sub("", t)) if names[0] == names[1] and names[0] else (p, t)


def value(text: str, *, thousands: bool = True) -> Value | None:
    """Reads a number or a list of numbers; None for anything else. `thousands` reads 1,234 as one number."""
    thousands = thousands and not re.search(r",\s", text)  # "1, 234" is a list
    text = re.sub(r"\s+", "", re.sub(r",?\s(?:and|or)\s", ",", text))
    if text in ("\\emptyset", "\\{\\}"):
        return Value(kind="\\{\\}")
    if _RATIO_OR_TIME.fullmatch(text):
        return Value(kind=":", items=tuple(Value(Fraction(part)) for part in text.split(":")))
    single = _scalar(text, thousands)
    if single is not None:
        return single
    kind = ""
    for left, right in _BRACKETS.items():
        if text.startswith(left):
            ends = (right,) if left == "\\{" else (")", "]")
            end = next((e for e in ends if text.endswith(e)), "")
            if end and _closes(text, left, end):
                kind, text = left + end, text[len(left) : -len(end)]
                break
    parts = _parts(text)
    if len(parts) < 2 and kind != "\\{\\}":
        return value(text, thousands=thousands) if kind == "()" and text else None
    items = [_scalar(part, False) or (value(part) if part[:1] in "([" else None) for part in parts]
    if any(item is None for item in items):
        return None
    return Value(kind=kind, items=tuple(item for item in items if item is not None))


def _scalar(text: str, thousands: bool) -> Value | None:
    if text in ("\\infty", "-\\infty"):
        return Value("-oo" if text[0] == "-" else "oo")
    percent = text.endswith(("%", "percent"))
    text = text.removesuffix("%").removesuffix("percent")
    if len(text) > 1000:
        return None
    if thousands and _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _PLAIN.fullmatch(text):
        return Value(Fraction(text), percent)
    if m := _MIXED.fullmatch(text):
        if not int(m[4]):
            return Value("zoo")
        number = int(m[2]) + Fraction(int(m[3]), int(m[4]))
    elif m := _RATIO.fullmatch(text):
        top, bottom = Fraction(m[2] or m[4]), Fraction(m[3] or m[5])
        if not bottom:
            return Value("zoo")
        number = top / bottom
    elif m := _SCIENTIFIC.fullmatch(text):
        return Value(Fraction(m[1]) * Fraction(10) ** int(m[2]), percent)
    elif (m := _REPEATING.fullmatch(text)) or (m := _ELLIPSIS.fullmatch(text)):
        repeated = _repeated(m)
        if repeated is None:
            return None
        number = Fraction(f"{m[2] or 0}.{m[3] or 0}") + repeated / 10 ** len(m[3])
    else:
        return None
    return Value(-number if m[1] == "-" else number, percent)


def _repeated(found: re.Match[str]) -> Fraction | None:
    """The value of a repeating block that begins after the decimal point; None where too little of it is written."""
    if found.re is _REPEATING:
        block = found[4] or f"{found[5]}{found[6]}{found[7]}"
    else:
        block = found[5]
        if len(block) == 1 and len(found[4]) < 3 and found[3]:
            return None  # 3.1411... may go on in any way, 0.33... hardly
    return Fraction(int(block), 10 ** len(block) - 1)


def _closes(text: str, left: str, right: str) -> bool:
    """Whether the first bracket is closed by the last: true of "(1,2)", false of "(1)(2)"."""
    depth = 0
    inside = text[len(left) : -len(right)]
    for c in inside:
        depth += (c in "([") - (c in ")]")
        if depth < 0:
            return False
    return depth == 0


def _parts(text: str) -> list[str]:
    """Splits at the commas and semicolons outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c in ",;" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _equal(got: Value | None, want: Value | None) -> bool:
    if got is None or want is None:
        return False
    if ":" in (got.kind, want.kind):
        return _ratios(got, want)
    if got.items and got.kind == "" and want.number is not None:
        return all(_equal(item, want) for item in got.items)  # "3/4 or 0.75"
    if bool(got.items) != bool(want.items):
        return False
    if not want.items:
        return _numbers(got, want)
    unordered = {"", "\\{\\}"}
    if (
        got.kind in unordered and want.kind in unordered
    ):  # sets, and lists without brackets: order and repetition are nothing
        return all(any(_equal(a, b) for b in want.items) for a in got.items) and all(
            any(_equal(a, b) for a in got.items) for b in want.items
        )
    if got.kind != want.kind and not (
        (got.kind in ("", "()", "[]") and want.kind == "") or (got.kind, want.kind) == ("", "()")
    ):
        return False
    return len(got.items) == len(want.items) and all(map(_equal, got.items, want.items))


def _ratios(got: Value, want: Value) -> bool:
    """Equality of ratios, of times, and of a ratio with its quotient."""
    pairs = [
        [item.number for item in side.items] if side.kind == ":" else [side.number, Fraction(1)] for side in (got, want)
    ]
    a, b = ([x for x in numbers if isinstance(x, Fraction)] for numbers in pairs)
    if a == b:
        return True
    return len(a) == len(b) and all((*a, *b)) and all(x * b[0] == y * a[0] for x, y in zip(a, b, strict=True))


def _numbers(got: Value, want: Value) -> bool:
    a, b = got.number, want.number
    if not isinstance(a, Fraction) or not isinstance(b, Fraction):
        return a == b
    pairs = [(a, b)]
    if want.percent and not got.percent:  # 50 % is given as 50 or as 0.5
        pairs.append((a * 100, b))
    elif got.percent and not want.percent:
        pairs.append((a / 100, b))
    return any(_close(x, y) for x, y in pairs)


def _close(a: Fraction, b: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= TOLERANCE * min(Fraction(1), abs(b))
