"""Which option of a multiple-choice question a text names.

A letter is named by a text that is the letter alone, by one that calls it the answer, by one that begins with it as
options begin ("B. red", "(b) red"), or by standing alone as a capital; in this order, and a text that names several in
one of these ways names none. What a text denies ("not A", "A is wrong") it does not name. The article "A" before a word
in small letters is no option.
"""

from __future__ import annotations

import re

from rewards.functions.text import plain

LETTERS = "ABCDEFGH"

_EDGE_BEFORE, _EDGE_AFTER = r"(?<![\w'])", r"(?![\w'])"
_OPEN, _CLOSE = r"[(\[{]?", r"[)\]}]?"
# Words that may follow a letter, but not the article: "A is right", "A or B".
_AFTER_A_LETTER = (
    r"and|or|nor|but|not|is|isn't|was|are|can|cannot|can't|could|must|should|would|will|does|doesn't|seems|looks|fits|"
    r"because|since|as|for|rather|instead|over|than|only|then|therefore|though"
)
_JOINT = r"\s*(?:,|/|&|;|\bor\b|\band\b|\bnor\b)+\s*(?:\b(?:option|choice|answer)\s+)?"  # between letters of a list
_DENIED_BEFORE = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\bnever|\bexcept(?:\s+for)?|\bexclud\w+|\binstead\s+of|\brather\s+than|\bunlike|"
    r"\brul(?:e|ed|es|ing)\s+out|\beliminat\w+|\breject\w*)\s+(?:(?:be|the|is|it|option|choice|answer|either)\s+)*[(\[{]?$",
    re.I,
)
_DENIED_AFTER = re.compile(
    rf"[)\]}}]?(?:{_JOINT}[(\[{{]?\w[)\]}}]?(?!\w))*\s*"
    r"(?:(?:is|are|was|were|seems?|looks?|must\s+be|can\s+be|would\s+be)\s+(?:\w+ly\s+|also\s+|both\s+|then\s+)?"
    r"(?:not|wrong|incorrect|false|impossible|out\b|excluded|eliminated|ruled\s+out|rejected)|"
    r"isn't|aren't|wasn't|doesn't|does\s+not|can't|cannot|can\s+not)",
    re.I,
)
_REACH = 80  # characters around a letter in which it may be denied


def choice_letter(text: str, letters: str = LETTERS) -> str | None:
    """The option that a text names, as an upper-case letter; None where it names none, or several."""
    bare = re.sub(r"\\[()\[\]]|\$", " ", plain(text)).strip(" *`\"'")
    either = f"[{letters}{letters.lower()}]"
    if alone := re.fullmatch(rf"{_OPEN}\s*({either})\s*{_CLOSE}[.:,;!]*{_CLOSE}", bare):
        return alone[1].upper()
    for found in (_called(bare, either), _optioned(bare, either), _begun(bare, either), _capitals(bare, letters)):
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _letters(text: str, pattern: str) -> set[str]:
    """What the pattern's first group names and the text does not deny."""
    found = set()
    for match in re.finditer(pattern, text):
        before, after = text[max(0, match.start(1) - _REACH) : match.start(1)], text[match.end(1) :][:_REACH]
        if not _DENIED_BEFORE.search(before) and not _DENIED_AFTER.match(after):
            found.add(match[1].upper())
    return found


def _one(either: str) -> tuple[str, str]:
    """Patterns of a letter, and of what must follow one that may be the article."""
    return (
        rf"{_OPEN}({either}){_CLOSE}{_EDGE_AFTER}",
        rf"(?=\s*(?:[.:,;!?)\]/&]|$|\b(?i:{_AFTER_A_LETTER})\b))",
    )


def _called(text: str, either: str) -> set[str]:
    """Letters that the text calls the answer: "the answer is B", "A is correct"; and those listed with them."""
    one, ends = _one(either)
    labelled = rf"(?i:\banswers?)\s*(?i:is\b|are\b|:|=)?\s*(?i:(?:option|choice)\s+)?{one}{ends}"
    judged = rf"{_EDGE_BEFORE}{one}\s+(?i:is|would\s+be|must\s+be)\s+(?i:the\s+)?(?i:correct|right|true|best|answer)\b"
    listed = rf"{_EDGE_BEFORE}{one}(?={_JOINT}{judged.replace(f'({either})', either)})"
    return _letters(text, labelled) | _listed(text, labelled, either) | _letters(text, judged) | _letters(text, listed)


def _optioned(text: str, either: str) -> set[str]:
    """Letters that the text calls an option: "option b"; and those listed with them."""
    one, ends = _one(either)
    labelled = rf"(?i:\b(?:option|choice)s?)\s*(?i:is\b|are\b|:|=)?\s*{one}{ends}"
    return _letters(text, labelled) | _listed(text, labelled, either)


def _listed(text: str, labelled: str, either: str) -> set[str]:
    """The further letters of a list that begins with what `labelled` names: "answers B and C"."""
    one, ends = _one(either)
    found: set[str] = set()
    for match in re.finditer(labelled, text):
        rest = text[match.end(1) :]
        while more := re.match(rf"{_CLOSE}{_JOINT}{one}{ends}", rest):
            found |= _letters(rest, rf"^{_CLOSE}{_JOINT}{one}")
            rest = rest[more.end(1) :]
    return found


def _begun(text: str, either: str) -> set[str]:
    """Letters with which the text, or a part of it behind "or" and the like, begins as options begin; and all in
    brackets."""
    bracketed = rf"{_EDGE_BEFORE}[(\[]({either})[)\]]"
    if not re.match(rf"(?:{either}[).:]|[(\[{{]{either}[)\]}}])(?=\s|$)|{either}\s+[-\u2014]\s", text):
        return _letters(text, bracketed)
    begun = rf"(?:^|\b(?:or|and)\s+|[,;/]\s*|\n\s*)[(\[{{]?({either})(?:[)\]}}.:]+|\s+[-\u2014])(?=\s|$)"
    return _letters(text, begun) | _letters(text, bracketed)


def _capitals(text: str, letters: str) -> set[str]:
    """Capital letters that stand alone. "A" before a word in small letters is the article, unless the word cannot
    follow an article."""
    article = rf"(?!(?<=A)\s+(?!(?i:{_AFTER_A_LETTER})\b)[a-z])"
    return _letters(text, rf"{_EDGE_BEFORE}([{letters}]){_EDGE_AFTER}{article}")


def option_text(text: str, letters: str = LETTERS) -> str:
    """What stands behind the letter of an option written out ("B. red" is red); the text itself without one."""
    either = f"[{letters}{letters.lower()}]"
    found = re.match(rf"(?:[(\[{{]{either}[)\]}}][.:]?|{either}[).:]|{either}\s+[-\u2014])\s+(?=\S)", plain(text))
    return plain(text)[found.end() :] if found else text
