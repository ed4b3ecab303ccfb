"""How alike an answer and a reference are, as words and as numbers. Pure functions of two texts.

What typesetting adds is off before anything is compared: bold type, LaTeX around words, other forms of the same
characters (`text.plain`). What changes an answer stays: signs, decimal points, bars of fractions, what joins numbers,
the ++ and # of a name.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter

from rewards.functions.options import choice_letter, option_text
from rewards.functions.text import plain, unwrapped

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CURRENCIES = "$€£¥"
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_JOINED = re.compile(r"(?<=\d)(\s*)([-+*/=<>^|:])\1(?=\d)")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?")
_SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
# What a minus is the sign of: a number, a single letter (x, x1, but no word and no article), a LaTeX command, a root or
# infinity, also behind what opens a bracket or a formula.
_OPENED = r"[(\[{|$]*"
_VARIABLE = r"(?!a\s+\w)[^\W\d_]\d*(?![^\W_])"
_OTHER = r"\.?\d|\\[a-z]|[\u221a\u221e]"
_SIGNED = re.compile(rf"{_OPENED}(?:{_OTHER}|{_VARIABLE})")
# With a blank behind it a minus may be a dash or a bullet: it is no sign after a word, nor before words.
_APART = re.compile(rf"(^|[=<>(\[{{,:;+*/^|][ \t]*)([-+])[ \t]+(?={_OPENED}(?:{_OTHER}|{_VARIABLE}(?![ \t]+[^\W\d_])))")
_EXPONENT = re.compile(r"(?<![\w.])(?:\d+\.?\d*|\.\d+)e$")  # up to the sign of a number's exponent
_NAME_MARK = re.compile(r"(?<=[^\W_])(?:\+{2,}|[+#](?![^\W_])|(?<![^\W_][^\W_]{2})-$)")  # C++, C#, A+, Disney+, O-
# An operator between two operands: numbers, single letters with or without digits (2x, x1), brackets. ^ is left out,
# since x^2 is also written as x2 with a raised 2.
_TERM = r"(?:\d*[^\W\d_]\d*(?![^\W_])|\d)"
_OPERATOR = re.compile(
    rf"(?P<left>(?<![^\W_]){_TERM}|(?<=\d)|[)\]}}])(?P<gap>\s*)(?P<sign>[-+*/=<>])\s*(?=(?P<right>{_TERM}|[(\[{{]))"
)
_KEPT = str.maketrans({sign: chr(0xE000 + number) for number, sign in enumerate("-+*/=<>")})  # no punctuation
_RESTORED: dict[int, int] = {ord(kept): sign for sign, kept in _KEPT.items()}
_FRACTION = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_POWER = re.compile(r"(?<=[\d.])\s*(?:[x*\u00d7\u22c5\u00b7]|\\times|\\cdot)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")


# ---- words ------------------------------------------------------------------------------------------------------


def squad_normalised(text: str) -> str:
    """SQuAD's normal form as released: lower case, no punctuation at all, no articles, single blanks."""
    bare = "".join(c for c in str(text).lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def normalised(text: str) -> str:
    """SQuAD's normal form (lower case, no punctuation, no articles, single blanks) of the plain words, in which numbers
    stay what they are: -5, 3.5, 1e-5, 3/4, 10:30 and 2024-05-01 keep their marks; 1,000 is 1000, +5 is 5, - 5 and $-5
    are -5. So do the sign of a variable (-x), what joins two terms (x + 5 is x+5, and no x-5) and the end of a name
    (C++, C#, A+, O-)."""
    bare = _OPERATOR.sub(_joining, unshelled(str(text)))
    bare = _APART.sub(r"\1\2", bare.lower().replace("\\#", "#").replace("\\+", "+"))
    bare = re.sub(rf"([-+]?)\s*[{_CURRENCIES}]\s*([-+]?)(?=\.?\d)", r"\1\2", bare)
    bare = _JOINED.sub(r"\2", _THOUSANDS.sub(lambda found: found[0].replace(",", ""), bare))
    of_names = {at for found in _NAME_MARK.finditer(bare) for at in range(*found.span())}
    kept = "".join(
        c if not _is_punctuation(c) or at in of_names or _belongs_to_an_operand(bare, at) else ""
        for at, c in enumerate(bare)
    )
    kept = re.sub(r"(?<![\w.])\.(?=\d)", "0.", kept).translate(_RESTORED)
    return " ".join(re.sub(rf"(?<![-+*/=<>]){_ARTICLES.pattern}(?![-+#*/=<>])", " ", kept).split())


def _joining(found: re.Match[str]) -> str:
    """The two terms of an operator closed up around it. The hyphen of a name (F-16), the stroke between two letters
    (N/A) and the sign of an exponent join no terms."""
    left, sign, right = found["left"], found["sign"], found["right"]
    named = sign == "-" and not found["gap"] and left[:1].isupper() and right[0].isdigit()
    exponent = sign in "-+" and right[0].isdigit() and re.fullmatch(r"\d+[eE]", left)
    either = sign == "/" and left.isalpha() and right.isalpha()
    return found[0] if named or exponent or either else left + sign.translate(_KEPT)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _belongs_to_an_operand(text: str, at: int) -> bool:
    """Whether the mark of punctuation stands between two digits, is the sign or the point that a number begins with,
    or the sign of an exponent, a variable or a term in brackets."""
    first, last = at, at
    while first and _is_punctuation(text[first - 1]):
        first -= 1
    while last + 1 < len(text) and _is_punctuation(text[last + 1]):
        last += 1
    before, after = text[first - 1 : first], text[last + 1 : last + 2]
    if before.isdigit() and after.isdigit():
        return text[at] != "_"
    if text[at] == "-" and after.isdigit() and _EXPONENT.search(text, 0, at):
        return True
    if at and (text[at - 1].isalnum() or text[at - 1] in ")]}%"):
        return False
    if text[at] == "-":
        return _SIGNED.match(text, at + 1) is not None
    return text[at] in "<>." and re.match(r"\d" if text[at] == "." else r"\.?\d", text[at + 1 : at + 3]) is not None


def exact(answer: str, gold: str) -> float:
    """1 if the normal forms are the same. An answer that is punctuation or articles alone is compared as it stands."""
    mine, theirs = normalised(answer), normalised(gold)
    if not mine or not theirs:
        return float(plain(answer).lower() == plain(gold).lower())
    return float(mine == theirs)


def token_f1(answer: str, gold: str) -> float:
    """F1 over the words of the normal forms, each as often as it stands (SQuAD, arXiv:1606.05250)."""
    mine, theirs = normalised(answer).split(), normalised(gold).split()
    if not mine or not theirs:
        return float(mine == theirs)
    shared = (Counter(mine) & Counter(theirs)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(mine), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions of single characters."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls(answer: str, gold: str, threshold: float = 0.5) -> float:
    """1 - d with d the edit distance over the longer length, 0 where d reaches the threshold (Biten et al.,
    arXiv:1905.13648). Case, typesetting and white space at the ends do not count."""
    mine, theirs = (" ".join(unshelled(str(text)).lower().split()) for text in (answer, gold))
    longer = max(len(mine), len(theirs))
    distance = edit_distance(mine, theirs) / longer if longer else 0.0
    return 1 - distance if distance < threshold else 0.0


def unshelled(text: str) -> str:
    r"""The plain words without LaTeX around them: \text{red}, $red$ and \(red\) are red, \% is %, 1{,}000 is 1,000."""
    bare = unwrapped(plain(text))
    bare = bare.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$")
    bare = re.sub(r"(?<=\d)\\[,;:! ](?=\d)", "", bare)
    if shelled := re.fullmatch(r"\s*(?:\$\$?([^$]*)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\])\s*", bare, re.DOTALL):
        bare = next(inside for inside in shelled.groups() if inside is not None)
    return bare.strip()


# ---- numbers ----------------------------------------------------------------------------------------------------


def number(text: str) -> float | None:
    """The text as one number (sign, thousands, decimals, exponent, a fraction, a mixed number, a currency before it, %
    behind it), else None. A per cent sign is dropped, not divided by: "41%" is 41."""
    bare = _LATEX_FRACTION.sub(r" \1/\2", unshelled(str(text))).strip().rstrip(".").strip()
    bare = re.sub(r"^([-+])\s+(?=\.?\d)", r"\1", bare.removesuffix("%").strip())
    bare = re.sub(rf"^([-+]?)\s*[{_CURRENCIES}]\s*|\s*[{_CURRENCIES}]$", r"\1", bare)
    bare = _POWER.sub(r"e\1", bare)
    if _SPACED.fullmatch(bare):
        bare = bare.replace(" ", "")
    if fraction := _FRACTION.fullmatch(bare):
        sign, whole, above, below = fraction[1], int(fraction[2] or 0), int(fraction[3]), int(fraction[4])
        if below == 0 or (fraction[2] is not None and above >= below):
            return None
        return (-1 if sign == "-" else 1) * (whole + above / below)
    if not _NUMBER.fullmatch(bare):
        return None
    value = float(bare.replace(",", ""))
    return value if math.isfinite(value) else None


def relaxed(answer: str, gold: str, tolerance: float = 0.05) -> float:
    """1 if a number is within `tolerance` of the reference, relative to the reference (exactly it where that is 0);
    1 for the same words where the reference is no number (ChartQA, arXiv:2203.10244). Where one of the two has a per
    cent sign, 41% is 41 or 0.41, whichever the other one means."""
    theirs, mine = number(gold), number(answer)
    if theirs is None:
        return exact(answer, gold)
    if mine is None:
        return 0.0
    pairs = [(mine, theirs)]
    of_mine, of_theirs = ("%" in str(text) for text in (answer, gold))
    if of_mine != of_theirs:
        pairs.append((mine / 100, theirs) if of_mine else (mine, theirs / 100))
    return float(any(a == b if b == 0 else abs(a - b) <= tolerance * abs(b) + 1e-12 for a, b in pairs))


# ---- options ----------------------------------------------------------------------------------------------------


def choice(answer: str, gold: str) -> float:
    """1 if the answer names the reference's letter and no other, or is the text of an option that the reference writes
    out ("B. red"). A reference that names no letter is compared word by word."""
    answer, gold = unshelled(str(answer)), unshelled(str(gold))
    theirs, mine = choice_letter(gold), choice_letter(answer)
    if theirs is None:
        return exact(answer, gold)
    if mine is not None:
        return float(mine == theirs)
    words = option_text(gold)
    return float(words != gold and bool(exact(answer, words)))
