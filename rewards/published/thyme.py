"""Thyme: the result, whether the thinking agrees with the answer, and the format.

    paper:    result (1 + 0.5 consistency) + 0.5 format        result, consistency, format in {0, 1}
    release:  result + consistency + format                    result in {1, 0, -1}, the others in {0, 0.5}

Zhang et al., arXiv:2508.11630; yfzhang114/Thyme, examples/train/grpo/plugin/agent_rm.py and
swift/trainers/rlhf_trainer/grpo_trainer.py.

In the release a wrong answer costs 1 while a missing answer, and one whose judge could not be read, is paid 0 and so
better; an unreadable judge of consistency is paid 0 as well; and the sandbox's output stands in the string that is
read, so an answer tag in it counts. `paper`, the default, reads the policy's words alone, pays a missing answer like a
wrong one, and leaves the unjudged unjudged. Consistency is asked about only where the result is right: it pays nowhere
else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from record.trajectory import Trajectory
from rewards.contract import RewardContext, policy_text
from rewards.functions.answers import math_agrees, same_reading
from rewards.functions.options import choice_letter
from rewards.functions.text import blocks, count, transcript, without_chat_marks
from rewards.judge.base import Question
from rewards.published.judge_helpers import flags, gold_of, log_parts, one_of, resolve_verdicts, totals

Variant = Literal["paper", "release"]

TAIL = 500  # characters of the thinking, from its end, that the judge of consistency sees
_FORM = re.compile(r"(?:(?!</think>).)*</think>\s<answer>(?:(?!</answer>).)*</answer>", re.DOTALL)
_OPENINGS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer: ",
    "Answer: ",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?")
_UNITS = re.compile(
    r"\b(?:degree|centimeter|cm|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard|"
    r"liter)(?:es)?s?\b"
)


@dataclass(frozen=True)
class Reading:
    answer: str  # of the first answer block; empty without one
    thinking: str
    well_formed: bool


def read(text: str) -> Reading:
    """The first answer block, the thinking, and the format: one think block, exactly one white-space character, one
    answer block, and nothing after it."""
    found = blocks(text, "answer")
    single = count(text, "think") == (1, 1) and count(text, "answer") == (1, 1)
    trajectory = blocks(text, "think")
    thinking = trajectory[0] if trajectory and trajectory[0] else text.split("</think>")[0].replace("<think>", "")
    for mark in ("<image>", "<sandbox_output>", "</sandbox_output>"):
        thinking = thinking.replace(mark, "")
    return Reading(found[0] if found else "", thinking, single and _FORM.fullmatch(text) is not None)


def plain_answer(answer: str) -> str:
    """The answer without a customary opening ("The answer is C" is C)."""
    for opening in _OPENINGS:
        answer = answer.replace(opening, "")
    return answer.strip()


def by_rule(answer: str, gold: str) -> bool:
    """Whether the release's rules find the answer right: the same text or number once units, currency, per cent signs
    and case are off, or the same by math-verify."""
    mine, theirs = plain_answer(answer), gold.strip()
    if _bare(mine) == _bare(theirs) or _bare(_behind_last_verb(mine)) == _bare(theirs):
        return True
    a, b = _number(_bare(mine)), _number(_bare(theirs))
    return (a is not None and a == b) or same_reading(mine, theirs)


def score_release(reading: Reading, right: bool | None, consistent: bool | None) -> dict[str, float]:
    """Result, consistency and format added up; `right` and `consistent` None: the judge could not be read."""
    result = 0.0 if not reading.answer or right is None else 1.0 if right else -1.0
    before = 0.5 if consistent and reading.answer else 0.0
    parts = {
        "format": 0.5 if reading.well_formed else 0.0,
        "result": result,
        "consistency": before if result > 0 else 0.0,
        "consistency_before_gate": before,
    }
    return {"total": parts["format"] + parts["result"] + parts["consistency"], **parts}


def score(
    reading: Reading, right: bool, consistent: bool, consistency: float = 0.5, format: float = 0.5, wrong: float = 0.0
) -> dict[str, float]:
    """The paper's formula: result (1 + 0.5 consistency) + 0.5 format, where only a right result is multiplied."""
    result = 1.0 if right and reading.answer else wrong
    parts = {"result": result, "consistency": float(consistent and result > 0), "format": float(reading.well_formed)}
    return {"total": result * (1 + consistency * parts["consistency"]) + format * parts["format"], **parts}


def thyme(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    log_extra: Any = None,
    variant: Variant = "paper",
    gold: str = "ground_truth",
    consistency: float = 0.5,
    format: float = 0.5,
    wrong: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """result (1 + 0.5 consistency) + 0.5 format; None without a reference or where a verdict that counts is missing.

    Args:
        variant: paper or release (at the top of this file).
        consistency, format: weights of the paper's formula.
        wrong: the result of an answer that is wrong or missing.
    """
    one_of("thyme", "variant", variant, get_args(Variant))
    release = variant == "release"
    golds = [gold_of(t, gold) for t in trajectories]
    readings = [
        None
        if reference is None
        else read(transcript(t, image="<image>") if release else without_chat_marks(policy_text(t), strip=False))
        for t, reference in zip(trajectories, golds, strict=True)
    ]
    rule = by_rule if release else _by_rule
    known = [
        None
        if reading is None or reference is None
        else False
        if not reading.answer
        else True
        if rule(reading.answer, reference)
        else None
        for reading, reference in zip(readings, golds, strict=True)
    ]
    right = resolve_verdicts(
        context,
        "thyme",
        trajectories,
        [None if reading is None else reading.answer for reading in readings],
        known,
        gold,
    )
    agree = flags(
        context,
        "thyme",
        [
            _question(reading) if reading is not None and reading.answer and correct else None
            for reading, correct in zip(readings, right, strict=True)
        ],
        "Consistency",
    )
    parts: list[dict[str, float] | None] = []
    for reading, correct, consistent in zip(readings, right, agree, strict=True):
        if reading is None:
            parts.append(None)
        elif release:
            parts.append(score_release(reading, correct, consistent))
        elif correct is None or (correct and consistent is None):
            parts.append(None)
        else:
            parts.append(score(reading, correct, bool(consistent), consistency, format, wrong))
    log_parts(parts, log_metric, log_extra)
    return totals(parts)


def _by_rule(answer: str, gold: str) -> bool | None:
    letter = choice_letter(gold)
    if letter is not None and len(gold.strip(" ().")) == 1:
        return choice_letter(answer) == letter or None
    return math_agrees(plain_answer(answer), gold)


def _question(reading: Reading) -> Question:
    return Question.of(
        "Below are the end of someone's reasoning and the answer that they gave after it. Decide only whether the "
        "answer is the one that the reasoning arrives at; whether it is true does not matter.\n\n"
        f"Reasoning:\n{reading.thinking[-TAIL:]}\n\nAnswer:\n{reading.answer}\n\n"
        'Reply with one JSON object and nothing else: {"Consistency": 1} if it is, {"Consistency": 0} if it is not.'
    )


def _bare(text: str) -> str:
    text = re.sub(r"^\\text\{(.+)\}$", r"\1", text.strip())
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text.replace("\\", "").replace("$", "").replace("%", ""))
    text = _UNITS.sub("", text.lower()).strip()
    value = _number(text)
    return f"{value:g}" if value is not None and value == int(value) and abs(value) < 1e6 else text


def _number(text: str) -> float | None:
    bare = text.strip().rstrip(".").strip("$€£ ").removesuffix("%").strip()
    return (
        float(bare.replace(",", ""))
        if _NUMBER.fullmatch(bare) and math.isfinite(float(bare.replace(",", "")))
        else None
    )


def _behind_last_verb(text: str) -> str:
    """What follows the last "is", "are", "=" and the like: the release takes that for the answer."""
    for mark in ("answer:", "answer is", "be ", "is ", "are ", "=", ": ", "get "):
        place = text.lower().rfind(mark)
        if place != -1:
            text = text[place + len(mark) :].strip()
    return text
