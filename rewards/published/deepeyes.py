r"""DeepEyes: a right answer, a well-formed one, and a bonus for an image that was looked at and helped.

    perception, charts, general reasoning:  0.8 accuracy + 0.2 format + 1.2 tool
    math (no tool):                         1.2 accuracy + 0.4 format

with accuracy in {0, 1} by a judge (math: a rule first), format in {0, -1}, and tool 1 only if the answer is right and a
image came back. Zheng et al., arXiv:2505.14362; Visual-Agent/DeepEyes, verl/utils/reward_score/vl_agent.py.

The release reads one string in which the tool's replies stand beside the model's words: an answer tag or a think tag in
a reply counts as the model's, text without an opening answer tag is judged whole, a box ends at its first closing
brace, and a reply of the judge that cannot be read pays 0. `repaired`, the default, reads the policy's words alone,
takes returned images from the trajectory, matches braces, asks nothing about a missing answer (accuracy 0, a format
error, as the release's own general_reasoning has it), and leaves the unjudged unjudged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from record.trajectory import Trajectory
from rewards.contract import RewardContext, policy_text
from rewards.functions.answers import math_agrees, same_reading
from rewards.functions.text import (
    after_last,
    balanced,
    blocks,
    boxed,
    last_opened,
    last_turn,
    transcript,
    without_chat_marks,
)
from rewards.functions.tool_use import tool_calls
from rewards.published.judge_helpers import column_or, gold_of, log_parts, one_of, resolve_verdicts, totals

Kind = Literal["vstar_chart", "general_reasoning", "math"]
Variant = Literal["repaired", "release"]

TOO_LONG = 1000  # characters of an answer, a guard against answers that please a judge by length
_MARKS = ("<|vision_start|><|image_pad|>", "<|image_pad|><|vision_end|>")


@dataclass(frozen=True)
class Reading:
    """What the rule sees in one thought."""

    answer: str | None
    well_formed: bool
    looked: bool = False  # an image came back from a tool
    asks: bool = True  # whether the judge is asked about the answer
    void: bool = False  # right or not, the answer is paid as wrong


@dataclass(frozen=True)
class Weights:
    accuracy: float = 0.8
    format: float = 0.2
    tool: float = 1.2


MATH_WEIGHTS = Weights(1.2, 0.4, 0.0)


def score(reading: Reading, right: bool, weights: Weights = Weights()) -> dict[str, float]:
    """The formula at the top of this file: total, accuracy, format, tool."""
    accuracy = float(right and not reading.void)
    parts = {
        "accuracy": accuracy,
        "format": 0.0 if reading.well_formed else -1.0,
        "tool": float(reading.looked and accuracy > 0.5),
    }
    return {
        "total": weights.accuracy * parts["accuracy"] + weights.format * parts["format"] + weights.tool * parts["tool"],
        **parts,
    }


def read_release(text: str, kind: Kind) -> Reading:
    """As the release reads the whole conversation as one string."""
    tail = after_last(text, "</think>")
    if kind == "math":
        found = re.findall(r"\\boxed\{([^}]+)\}", tail, re.DOTALL)
        return Reading(found[-1] if found else "", balanced(text, "think") and len(found) == 1, asks=bool(found))
    opened, closed = (text.count(mark) for mark in _MARKS)
    formed = balanced(text, "think") and opened == closed and balanced(tail, "answer")
    if kind == "vstar_chart":
        answer = text.split("<answer>")[-1].split("</answer>")[0].strip()
        return Reading(answer, formed and len(answer) < TOO_LONG, opened > 0, void=len(answer) >= TOO_LONG)
    found = blocks(tail, "answer")
    usable = bool(found) and 0 < len(found[0]) < TOO_LONG
    return Reading(found[0] if found else None, formed and usable, opened > 0, asks=usable)


def read(own: str, final: str, looked: bool, kind: Kind) -> Reading:
    """The repaired reading.

    Args:
        own: all words of the policy.
        final: those after the last observation.
        looked: a tool answered with an image.
    """
    own, final = without_chat_marks(own), without_chat_marks(final)
    tail = after_last(final, "</think>")
    if kind == "math":
        boxes = [content for content in boxed(tail) if content]
        return Reading(boxes[-1] if boxes else None, balanced(own, "think") and len(boxes) == 1, asks=bool(boxes))
    if kind == "vstar_chart":  # the release's perception rule takes an answer inside the thinking, too
        answer = last_opened(final, "answer")
    else:
        answer = next(iter(blocks(tail, "answer")), None)
    usable = answer is not None and 0 < len(answer) < TOO_LONG
    return Reading(answer, balanced(own, "think") and balanced(tail, "answer") and usable, looked, asks=usable)


def deepeyes(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    log_extra: Any = None,
    kind: Kind = "vstar_chart",
    kind_column: str | None = None,
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    accuracy: float | None = None,
    format: float | None = None,
    tool: float | None = None,
    **columns: Any,
) -> list[float | None]:
    """0.8 accuracy + 0.2 format + 1.2 tool, for math 1.2 accuracy + 0.4 format; None without a reference or verdict.

    Args:
        kind: vstar_chart (an answer tag), general_reasoning (after the last closing think tag only) or math (a box).
        kind_column: the record's column that names the kind, where a data set mixes them; a record that lacks it
            is not judged.
        variant: repaired or release (at the top of this file).
        accuracy, format, tool: weights; None: those of the kind.
    """
    one_of("deepeyes", "variant", variant, get_args(Variant))
    kinds = column_or(trajectories, kind_column, kind, "deepeyes", get_args(Kind))
    readings = [
        None if of is None or gold_of(t, gold) is None else _read(t, of, variant)  # type: ignore[arg-type]
        for t, of in zip(trajectories, kinds, strict=True)
    ]
    known = [
        None
        if reading is None
        else False
        if reading.void or not reading.asks
        else _by_rule(reading.answer or "", gold_of(t, gold) or "", variant)
        if of == "math"
        else None
        for t, of, reading in zip(trajectories, kinds, readings, strict=True)
    ]
    right = resolve_verdicts(
        context,
        "deepeyes",
        trajectories,
        [None if reading is None else reading.answer or "" for reading in readings],
        known,
        gold,
        unread=False if variant == "release" else None,
    )
    parts: list[dict[str, float] | None] = []
    for of, reading, correct in zip(kinds, readings, right, strict=True):
        usual = MATH_WEIGHTS if of == "math" else Weights()
        weights = Weights(
            *(
                own if given is None else given
                for own, given in ((usual.accuracy, accuracy), (usual.format, format), (usual.tool, tool))
            )
        )
        parts.append(None if reading is None or correct is None else score(reading, correct, weights))
    log_parts(parts, log_metric, log_extra)
    return totals(parts)


def _by_rule(answer: str, gold: str, variant: Variant) -> bool | None:
    """True if the rule already agrees; None leaves it to the judge."""
    return True if (same_reading if variant == "release" else math_agrees)(answer, gold) else None


def _read(trajectory: Trajectory, kind: Kind, variant: Variant) -> Reading:
    if variant == "release":
        return read_release(transcript(trajectory), kind)
    looked = any(call.returned_image for call in tool_calls(trajectory))
    return read(policy_text(trajectory), last_turn(trajectory), looked, kind)
