r"""Is this answer right? One comparison a kind of answer, and the reward `answer` that pays for it.

    math     mathematically equal (math-verify)                   exact    the same words (SQuAD's normal form)
    choice   the same option letter (options.py)                  f1       shared words (SQuAD)
    numeric  within 5 % of a number, else the same words (ChartQA)  anls   1 - edit distance, 0 from one half (DocVQA)

Each takes what the policy answered and one reference (comparisons.py); `best` takes the best of several references.
They are pure but for math-verify's time limits, which are signals and so hold only in the main thread of a process:
`math_agrees` refuses to run elsewhere (a recipe's parts that use it run in processes of their own).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from record.trajectory import Author, Trajectory
from rewards.contract import RewardError
from rewards.functions.comparisons import anls, choice, exact, relaxed, token_f1
from rewards.functions.text import (
    WRAPPER,
    blocks,
    boxed,
    last_turn,
    plain,
    policy_turns,
    unwrapped,
    without_chat_marks,
)
from runtime.errors import UserError, nearest

logger = logging.getLogger(__name__)

Kind = Literal["math", "choice", "exact", "f1", "anls", "numeric"]
Comparison = Callable[[str, str], float | bool | None]
Place = Literal["auto", "tag", "boxed", "label", "segment", "text"]

_LABEL = re.compile(r"(?:final answer|answer)[*_]*\s*(?:is\b\s*:?|:)[*_]*\s*", re.I)  # its own bold type goes with it
# A whole number and a proper fraction: 11 5/6. Blanks between groups of three digits that are a whole text: 1 000.
_MIXED = re.compile(r"(?<![\w./^])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/^.])")
_SPACED = re.compile(r"([-+]?\d{1,3})((?: \d{3})+)(\.\d+)?")


# ---- mathematics ------------------------------------------------------------------------------------------------


def math_agrees(answer: str, gold: str, timeout_s: int = 5) -> bool | None:
    r"""Whether two answers are mathematically equal by math-verify; None where it ran out of time.

    Words without a digit or a command are compared as words: math-verify takes \boxed{rats} for the product r·a·t·s,
    to which \boxed{star} is equal. \text and its like are no command; inside a formula they are left to math-verify,
    which drops units.

    Raises:
        RewardError: called off the main thread, where math-verify would run without a time limit.
    """
    answer, gold = _tidied(answer), _tidied(gold)
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


def _tidied(text: str) -> str:
    """A formula as math-verify reads it: plain, without a box, mixed numbers as sums."""
    bare = plain(_unboxed(plain(text))).removesuffix(".").strip()
    bare = re.sub(r"(?<=[\w)}\]])\*\*(?=[\w({\\-])", "^", bare)
    bare = re.sub(r"(?<=\d)\\[,;:! ](?=\d{3}(?!\d))", "", bare)
    if _SPACED.fullmatch(bare):
        bare = bare.replace(" ", "")
    return _MIXED.sub(lambda m: f"({m[1]}+{m[2]}/{m[3]})" if int(m[2]) < int(m[3]) else m[0], bare)


def _unboxed(text: str) -> str:
    found = boxed(text)
    bare = found[-1] if found else text.strip().strip("$")
    return unwrapped(bare) if WRAPPER.fullmatch(bare) else bare


def _is_words(bare: str) -> bool:
    return re.search(r"[^\W\d_]{2}", bare) is not None and re.search(r"[\d\\^=+*/<>]", bare) is None


COMPARISONS: dict[str, Comparison] = {
    "math": math_agrees,
    "choice": choice,
    "exact": exact,
    "f1": token_f1,
    "anls": anls,
    "numeric": relaxed,
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
        "numeric": lambda a, g: relaxed(a, g, tolerance),
        "anls": lambda a, g: anls(a, g, threshold),
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
