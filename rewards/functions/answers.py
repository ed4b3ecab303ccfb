r"""Is this answer right? One comparison a kind of answer, and the reward `answer` that pays for it.

    math     mathematically equal (math-verify)                   exact    the same words (SQuAD's normal form)
    choice   the same option letter                               f1       shared words (SQuAD)
    numeric  within 5 % of a number, else the same words (ChartQA)  anls   1 - edit distance, 0 from one half (DocVQA)

Each takes what the policy answered and one reference; `best` takes the best of several references. They are pure but
for math-verify's time limits, which are signals and so hold only in the main thread of a process: `math_agrees` refuses
to run elsewhere (a recipe's parts that use it run in processes of their own).
"""

from __future__ import annotations

import logging
import math
import re
import string
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from record.trajectory import Author, Trajectory
from rewards.contract import RewardError
from rewards.functions.text import WRAPPER, blocks, boxed, last_turn, policy_turns, unwrapped, without_chat_marks
from runtime.errors import UserError, nearest

logger = logging.getLogger(__name__)

Kind = Literal["math", "choice", "exact", "f1", "anls", "numeric"]
Comparison = Callable[[str, str], float | bool | None]
Place = Literal["auto", "tag", "boxed", "label", "segment", "text"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?")
_LABEL = re.compile(r"(?:final answer|answer)\s*(?:is\b|:)\s*", re.I)


# ---- comparisons ------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks."""
    bare = "".join(c for c in str(text).lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(answer: str, gold: str) -> float:
    """1 if the normal forms are the same. An answer that is punctuation or articles alone is compared as it stands."""
    mine, theirs = normalised(answer), normalised(gold)
    if not mine or not theirs:
        return float(str(answer).strip().lower() == str(gold).strip().lower())
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
    arXiv:1905.13648). Case and white space at the ends do not count."""
    mine, theirs = " ".join(str(answer).lower().split()), " ".join(str(gold).lower().split())
    longer = max(len(mine), len(theirs))
    distance = edit_distance(mine, theirs) / longer if longer else 0.0
    return 1 - distance if distance < threshold else 0.0


def number(text: str) -> float | None:
    """The text as one number (sign, thousands, decimals, exponent, a currency before it, % behind it), else None.
    A per cent sign is dropped, not divided by: "41%" is 41."""
    bare = str(text).strip().rstrip(".").strip("$€£ ").removesuffix("%").strip()
    if not _NUMBER.fullmatch(bare):
        return None
    value = float(bare.replace(",", ""))
    return value if math.isfinite(value) else None


def relaxed(answer: str, gold: str, tolerance: float = 0.05) -> float:
    """1 if a number is within `tolerance` of the reference, relative to the reference (exactly it where that is 0);
    1 for the same words where the reference is no number (ChartQA, arXiv:2203.10244)."""
    theirs, mine = number(gold), number(answer)
    if theirs is None:
        return exact(answer, gold)
    if mine is None:
        return 0.0
    return float(mine == theirs if theirs == 0 else abs(mine - theirs) <= tolerance * abs(theirs) + 1e-12)


def choice_letter(text: str, letters: str = "ABCDEFGH") -> str | None:
    """The option that a text names, as an upper-case letter; None where it names none or more than one.

    Read in this order: a letter alone, in brackets or not; a letter after "answer is", "option" and the like; a letter
    at the start that punctuation follows ("B. red", "(b) red"); the only capital letter standing alone. The article
    "A" before a word is no option.
    """
    bare, either = str(text).strip().strip("*` "), f"[{letters}{letters.lower()}]"
    for pattern in (rf"[(\[]?({either})[)\].:,]*", rf"[(\[]({either})[)\]].*", rf"({either})[).:](?:\s.*|$)"):
        if found := re.fullmatch(pattern, bare, re.DOTALL):
            return found.group(1).upper()
    named = {
        found.upper()
        for found in re.findall(
            rf"(?:answer|option|choice)\s*(?:is|:)?\s*[(\[]?({either})(?:[)\].:,;!]|\s*$|\s+(?:because|since|as)\b)",
            bare,
            re.I,
        )
    }
    if len(named) == 1:
        return named.pop()
    alone = {
        found
        for found in re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", bare)
        if found != "A" or not re.search(r"(?<![\w'])A\s+[a-z]", bare)
    }
    return alone.pop() if len(alone) == 1 and not named else None


def choice(answer: str, gold: str) -> float:
    """1 if the answer names the reference's letter. A reference that names no letter is compared word by word."""
    theirs = choice_letter(gold)
    return exact(answer, gold) if theirs is None else float(choice_letter(answer) == theirs)


def math_agrees(answer: str, gold: str, timeout_s: int = 5) -> bool | None:
    r"""Whether two answers are mathematically equal by math-verify; None where it ran out of time.

    Words without a digit or a command are compared as words: math-verify takes \boxed{rats} for the product r·a·t·s,
    to which \boxed{star} is equal. \text and its like are no command; inside a formula they are left to math-verify,
    which drops units.

    Raises:
        RewardError: called off the main thread, where math-verify would run without a time limit.
    """
    answer, gold = _unboxed(answer), _unboxed(gold)
    if _is_words(unwrapped(answer)) or _is_words(unwrapped(gold)):
        return bool(exact(unwrapped(answer), unwrapped(gold)))
    mine = parsed(rf"\boxed{{{answer}}}", timeout_s)
    theirs = parsed(rf"\boxed{{{gold}}}", timeout_s)
    if mine is None or theirs is None:
        return None
    return verified(theirs, mine, timeout_s)


def same_reading(answer: str, gold: str) -> bool:
    """math-verify over both texts as they stand, its failures taken for "no": how several releases call it."""
    theirs, mine = parsed(gold), parsed(answer)
    return bool(theirs is not None and mine is not None and verified(theirs, mine))


def parsed(text: str, timeout_s: int = 5) -> list[Any] | None:
    """math-verify's reading of a text; empty where it finds nothing, None where it ran out of time."""
    from math_verify import parse
    from math_verify.errors import TimeoutException

    _in_main_thread()
    try:
        return parse(text, parsing_timeout=timeout_s, raise_on_error=True)
    except TimeoutException:
        return None
    except Exception:  # an expression that latex2sympy cannot read: nothing found, as math-verify has it
        logger.debug("math-verify could not read %r", text[:200], exc_info=True)
        return []


def verified(gold: list[Any], answer: list[Any], timeout_s: int = 5) -> bool | None:
    """math-verify's comparison of two readings; None where it ran out of time."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    _in_main_thread()
    try:
        return bool(verify(gold, answer, timeout_seconds=timeout_s, raise_on_error=True))
    except TimeoutException:
        return None
    except Exception:  # two things that sympy cannot compare are not the same
        logger.debug("math-verify could not compare %r and %r", gold, answer, exc_info=True)
        return False


def _in_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RewardError(
            "math-verify keeps its time limits only in the main thread of a process; run this part in a "
            "process of its own (isolate: true)"
        )


def _unboxed(text: str) -> str:
    found = boxed(text)
    bare = found[-1] if found else text.strip().strip("$")
    return unwrapped(bare) if WRAPPER.fullmatch(bare) else bare


def _is_words(bare: str) -> bool:
    return re.search(r"[^\W\d_]{2}", bare) is not None and re.search(r"[\d\\^=+*/<>]", bare) is None


def plainly(compare: Comparison) -> Comparison:
    r"""`compare` over the words alone: \text{red} is red."""
    return lambda answer, gold: compare(unwrapped(answer), unwrapped(gold))


COMPARISONS: dict[str, Comparison] = {
    "math": math_agrees,
    "choice": plainly(choice),
    "exact": plainly(exact),
    "f1": plainly(token_f1),
    "anls": plainly(anls),
    "numeric": plainly(relaxed),
}


def best(compare: Comparison, answer: str, golds: Sequence[str]) -> float | None:
    """The best score over several references. None where none of them was enough and one could not be compared."""
    scores = [compare(answer, gold) for gold in golds]
    top = max((float(s) for s in scores if s is not None), default=None)
    return None if top is None or (top < 1 and None in scores) else top


# ---- the reward -------------------------------------------------------------------------------------------------


def answer_of(trajectory: Trajectory, place: Place = "auto") -> str | None:
    r"""What the policy gave as its final answer, from its own words alone; None where it gave none.

    tag: the last closed <answer> block; boxed: the last \boxed{...}; label: the rest of the line after the last
    "Answer:" or "the answer is"; segment: the last segment with the role "answer"; text: all of its last turn.
    auto: the first of these that is there, where the whole last turn counts only if it calls no tool.
    """
    own = "".join(policy_turns(trajectory))
    readings: dict[str, Callable[[], str | None]] = {
        "tag": lambda: _last(blocks(own, "answer")),
        "boxed": lambda: _last(boxed(own)),
        "segment": lambda: _last(
            [s.text for s in trajectory.segments if s.author is Author.POLICY and s.role == "answer"]
        ),
        "label": lambda: _labelled(last_turn(trajectory)),
        "text": lambda: last_turn(trajectory) or None,
    }
    if place != "auto":
        found = readings[place]()
        return None if found is None else without_chat_marks(found)
    for name in ("tag", "boxed", "segment", "label", "text"):
        found = readings[name]()
        if found is not None and (name != "text" or "<tool_call>" not in found):
            return _last(boxed(found)) or without_chat_marks(found)
    return None


def references(record: dict[str, Any], gold: str) -> list[str]:
    """The record's references as strings; empty where it has none."""
    value = record.get(gold)
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]


def answer(
    trajectories: Sequence[Trajectory],
    context: Any = None,
    log_metric: Any = None,
    log_extra: Any = None,
    kind: Kind = "exact",
    place: Place = "auto",
    gold: str = "ground_truth",
    tolerance: float = 0.05,
    threshold: float = 0.5,
    **columns: Any,
) -> list[float | None]:
    """How right the final answer is, in [0, 1]; 0 where the policy gave none, None without a reference.

    Args:
        kind: which comparison (at the top of this file).
        place: where the answer stands (`answer_of`).
        gold: the record's column with the reference, or a list of references of which the best counts.
        tolerance: of `numeric`, relative to the reference.
        threshold: of `anls`.
    """
    for name, value, known in (("kind", kind, get_args(Kind)), ("place", place, get_args(Place))):
        if value not in known:
            raise UserError(f"answer: no {name} '{value}'; {nearest(str(value), known)}")
    if tolerance < 0 or not 0 <= threshold <= 1:
        raise UserError(
            f"answer: tolerance is {tolerance} and threshold {threshold}; tolerance is at least 0, "
            f"threshold a share, 0 to 1"
        )
    compare = {
        "numeric": plainly(lambda a, g: relaxed(a, g, tolerance)),
        "anls": plainly(lambda a, g: anls(a, g, threshold)),
    }.get(kind, COMPARISONS[kind])
    found = [answer_of(t, place) for t in trajectories]
    values: list[float | None] = []
    for trajectory, given in zip(trajectories, found, strict=True):
        golds = references(trajectory.record, gold)
        values.append(None if not golds else 0.0 if given is None else best(compare, given, golds))
    if log_extra is not None:
        log_extra("answer", found)
    if log_metric is not None and found:
        log_metric("unanswered", sum(given is None for given in found) / len(found))
    return values


def _last(found: Sequence[str]) -> str | None:
    return found[-1] if found else None


def _labelled(text: str) -> str | None:
    found = list(_LABEL.finditer(text))
    if not found:
        return None
    return text[found[-1].end() :].strip().partition("\n")[0].removesuffix("TERMINATE").strip().rstrip(".") or None
