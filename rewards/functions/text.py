"""Reading a thought's words: tag blocks, boxes, turns, and the whole conversation as one string.

The rules in rewards/published/ are written over strings; this is where a trajectory becomes one. What the policy wrote
is `rewards.contract.policy_text` or, turn by turn, `policy_turns`; `transcript` also holds what the environment
answered, which only a `release` variant whose release read it may use.
"""

from __future__ import annotations

import re
import unicodedata

from record.trajectory import Author, Trajectory

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # how Qwen2.5-VL's template writes an image
WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|md|normal|rm|sc|sf|sl|tt|up)?|math(?:bf|it|rm|sf|tt)|mbox|hbox|emph)"
    r"\s*\{([^{}]*)\}"
)
# What `plain` takes for the same. NFKC alone would read "1\u00bd" as 11/2, and "10\u00b2" as 102.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_GROUPED = re.compile("(?<=\\d)[\u00a0\u2007\u2009\u202f'\u2019](?=\\d{3}(?!\\d))")  # between groups of three digits
_RAISED = re.compile("(?<=[\\w)\\]}])[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_LOWERED = dict(
    zip(map(ord, "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"), "0123456789-", strict=True)
)
_ALIKE = {
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-"),
    **dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e"), '"'),
    ord("\u2044"): "/",
}
# Emphasis stands between blanks, marks of punctuation or the ends; between letters and digits * is a product.
_EMPHASIS = re.compile(r"(?<![\w*)\]}])(\*{1,3}|_{1,3}|`+|~~)(?=\S)(.{1,1000}?)(?<=\S)\1(?![\w*(\[{\\])", re.DOTALL)
_LINE_MARKS = re.compile(r"^\s*(?:#{1,6}|[*\u2022])\s+(?=\S)")
_STRAY = re.compile(r"^(?:\*+|_{2,}|`+)\s*|\s*(?:\*+|_{2,}|`+)$")  # of emphasis whose other end was cut off
CHAT_MARKS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "</s>")


def blocks(text: str, tag: str) -> list[str]:
    """What stands inside each closed <tag> ... </tag>, outer white space cut off; an inner opening tag is content."""
    return [found.strip() for found in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]


def count(text: str, tag: str) -> tuple[int, int]:
    """(opening tags, closing tags)."""
    return text.count(f"<{tag}>"), text.count(f"</{tag}>")


def balanced(text: str, tag: str, needed: bool = False) -> bool:
    """As many opening as closing tags; with `needed` at least one."""
    opened, closed = count(text, tag)
    return opened == closed and (opened > 0 or not needed)


def after_last(text: str, mark: str) -> str:
    """What follows the last `mark`, or the whole text without one; outer white space cut off."""
    return text.rpartition(mark)[2].strip()


def last_opened(text: str, tag: str) -> str | None:
    """From the last opening tag to its closing tag, or to the end where it is never closed; None without one."""
    if f"<{tag}>" not in text:
        return None
    return text.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0].strip()


def boxed(text: str) -> list[str]:
    r"""The content of every \boxed{...} with its braces matched; one that is never closed is left out."""
    found = []
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for position in range(start.end(), len(text)):
            if text[position] in "{}" and text[position - 1] != "\\":
                depth += 1 if text[position] == "{" else -1
            if depth == 0:
                found.append(text[start.end() : position].strip())
                break
    return found


def unwrapped(text: str) -> str:
    r"""Without LaTeX's wrappers of words, nested ones too: \text{New \textbf{York}} is New York."""
    while (bare := WRAPPER.sub(r"\1", text)) != text:
        text = bare
    return text


def plain(text: str) -> str:
    """The same text without typesetting: one form for characters that mean the same (full-width letters, minus signs,
    quotes, composed and decomposed accents, blanks of other widths, vulgar fractions, raised digits), and without
    Markdown's emphasis, headings and code marks, or white space at the ends."""
    text = _GROUPED.sub("", _UNSEEN.sub("", unicodedata.normalize("NFC", text)))
    text = _RAISED.sub(lambda found: "^" + found[0].translate(_LOWERED), text)
    text = "".join(_fraction_of(c, text[at - 1 : at]) or c for at, c in enumerate(text))
    text = unicodedata.normalize("NFKC", text).translate(_ALIKE).strip()
    while (bare := _EMPHASIS.sub(r"\2", text)) != text:
        text = bare
    return _STRAY.sub("", _LINE_MARKS.sub("", text)).strip()


def _fraction_of(character: str, before: str) -> str | None:
    """A vulgar fraction written out, apart from the digits before it; None for any other character."""
    if not unicodedata.decomposition(character).startswith("<fraction>"):
        return None
    return (" " if before.isdigit() else "") + unicodedata.normalize("NFKC", character).replace("\u2044", "/")


def without_chat_marks(text: str, strip: bool = True) -> str:
    """Without the end-of-turn tokens that a policy samples; `strip` cuts off outer white space, too."""
    for mark in CHAT_MARKS:
        text = text.replace(mark, "")
    return text.strip() if strip else text


def policy_turns(trajectory: Trajectory) -> list[str]:
    """The policy's own words, one string for each stretch that no environment or user interrupts."""
    turns: list[str] = []
    interrupted = True
    for segment in trajectory.segments:
        if segment.author is not Author.POLICY:
            interrupted = True
        elif segment.image is None and segment.text:
            if interrupted:
                turns.append("")
            turns[-1] += segment.text
            interrupted = False
    return turns


def last_turn(trajectory: Trajectory) -> str:
    """The policy's words after the last observation, without chat marks; empty where it never spoke."""
    turns = policy_turns(trajectory)
    return without_chat_marks(turns[-1]) if turns else ""


def transcript(trajectory: Trajectory, image: str = IMAGE) -> str:
    """Everything from the policy's first segment on, observations included, with a mark for each of their images."""
    first = next((i for i, s in enumerate(trajectory.segments) if s.author is Author.POLICY), None)
    if first is None:
        return ""
    return "".join(
        segment.text if segment.image is None else segment.text or image for segment in trajectory.segments[first:]
    )
