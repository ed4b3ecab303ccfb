"""Chain-of-Focus: look closer only where it is needed, as the group shows.

    base:         0.9 accuracy + 0.1 format, both in {0, 1}
    group-aware:  replaces the base score of every member, by whether it zoomed and whether it is right

                          direct, right   zoom, right   zoom, wrong   direct, wrong
        a direct one right     1.0            0.8           0.5        0, or 0.1
        only zooming ones       -             1.0           0.5        0, or 0.1
        none right              -              -            0.5        0, or 0.1

where a direct wrong one keeps 0.1 if that was its base score (a good format). Zhang et al., arXiv:2505.15436;
xtong-zhang/Chain-of-Focus, verl/recipe/zoomin/zoomin_reward3.py and verl/verl/trainer/ppo/core_algos.py.

The release reads the tool's replies with the model's words, asks the judge about an answer that is not there, pays an
unreadable verdict as wrong, stops at a data set that it does not list, and lets a group of one keep its base score.
`repaired`, the default, reads the policy's words alone, asks about nothing that is not there, leaves the unjudged
unjudged and out of the group's table, and applies the table to a group of any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from record.trajectory import Trajectory
from rewards.contract import RewardContext, groups_of, policy_text
from rewards.functions.answers import math_agrees, same_reading
from rewards.functions.text import balanced, blocks, transcript, without_chat_marks
from rewards.functions.tool_use import tool_calls
from rewards.published.judge_helpers import column_or, gold_of, log_parts, one_of, resolve_verdicts, totals

DataKind = Literal["perception", "math"]
Variant = Literal["repaired", "release"]

TOO_MANY_WORDS = 1000  # of an answer; this many are still well-formed
RIGHT = 0.5  # a base score above it is right


@dataclass(frozen=True)
class Reading:
    answer: str
    well_formed: bool
    asks: bool


@dataclass(frozen=True)
class Table:
    """What replaces the base score."""

    best: float = 1.0  # direct and right; zoomed and right where no direct one is
    zoom_right: float = 0.8  # zoomed and right although a direct one is
    zoom_wrong: float = 0.5
    well_formed_wrong: float = 0.1  # direct and wrong, in good format: the base score that is kept


def read(text: str, data_kind: DataKind, release: bool = False) -> Reading:
    """The last closed answer block, and whether both kinds of tag are there and balanced.

    Args:
        text: the policy's own words; in the release the whole conversation.
        data_kind: perception (a judge decides) or math (a rule, then a judge).
    """
    one_of("chain_of_focus", "kind of data", data_kind, get_args(DataKind))
    found = blocks(text, "answer")
    answer = found[-1] if found else ""
    formed = (
        balanced(text, "think", needed=True)
        and balanced(text, "answer", needed=True)
        and len(answer.split()) <= TOO_MANY_WORDS
    )
    return Reading(answer, formed and (release or bool(answer)), bool(answer) or (release and data_kind != "math"))


def score(reading: Reading, right: bool, accuracy: float = 0.9, format: float = 0.1) -> dict[str, float]:
    """0.9 accuracy + 0.1 format."""
    parts = {"accuracy": float(right and reading.asks), "format": float(reading.well_formed)}
    return {"total": accuracy * parts["accuracy"] + format * parts["format"], **parts}


def replaced(
    zoomed: Sequence[bool], base: Sequence[float | None], table: Table = Table(), alone_keeps: bool = False
) -> list[float | None]:
    """The table at the top of this file over one group; None for a member without a base score.

    Args:
        zoomed: whether each member called the tool.
        base: base scores, above one half where the answer is right.
        alone_keeps: a group of one keeps its base score, as in the release.
    """
    if alone_keeps and len(base) == 1:
        return list(base)
    direct_right = any(
        score is not None and score > RIGHT and not zoom for zoom, score in zip(zoomed, base, strict=True)
    )
    return [
        None if score is None else _replaced(zoom, score, direct_right, table)
        for zoom, score in zip(zoomed, base, strict=True)
    ]


def _replaced(zoomed: bool, base: float, direct_right: bool, table: Table) -> float:
    if base > RIGHT:
        return table.zoom_right if zoomed and direct_right else table.best
    if zoomed:
        return table.zoom_wrong
    return table.well_formed_wrong if math.isclose(base, table.well_formed_wrong, abs_tol=1e-6) else 0.0


def advantages(scores: Sequence[float], epsilon: float = 1e-6) -> list[float]:
    """The release's: (score - mean) / (sample standard deviation + epsilon); a lone member's is its score.

    Training takes its advantages from rl/advantages.py; this one serves to compare with the release.
    """
    if len(scores) == 1:
        return [scores[0] / (1 + epsilon)]
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
    return [(s - mean) / (deviation + epsilon) for s in scores]


def chain_of_focus_base(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    log_extra: Any = None,
    data_kind: DataKind = "perception",
    kind_column: str | None = None,
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    accuracy: float = 0.9,
    format: float = 0.1,
    **columns: Any,
) -> list[float | None]:
    """0.9 accuracy + 0.1 format; None without a reference or a verdict.

    Args:
        data_kind: perception (a judge decides) or math (a rule, then a judge).
        kind_column: the record's column that names the kind, where a data set mixes them; a record that lacks it
            is not judged.
        variant: repaired or release (at the top of this file).
        accuracy, format: weights.
    """
    one_of("chain_of_focus", "variant", variant, get_args(Variant))
    release = variant == "release"
    kinds = column_or(trajectories, kind_column, data_kind, "chain_of_focus", get_args(DataKind))
    readings = [
        None
        if of is None or gold_of(t, gold) is None
        else read(transcript(t) if release else without_chat_marks(policy_text(t)), of, release)  # type: ignore[arg-type]
        for t, of in zip(trajectories, kinds, strict=True)
    ]
    rule = same_reading if release else math_agrees
    known = [
        None
        if reading is None
        else False
        if not reading.asks
        else True
        if of == "math" and rule(reading.answer, gold_of(t, gold) or "")
        else None
        for t, of, reading in zip(trajectories, kinds, readings, strict=True)
    ]
    right = resolve_verdicts(
        context,
        "chain_of_focus",
        trajectories,
        [None if reading is None else reading.answer for reading in readings],
        known,
        gold,
        unread=False if release else None,
    )
    parts = [
        None if reading is None or correct is None else score(reading, correct, accuracy, format)
        for reading, correct in zip(readings, right, strict=True)
    ]
    log_parts(parts, log_metric, log_extra)
    return totals(parts)


def chain_of_focus(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    log_extra: Any = None,
    data_kind: DataKind = "perception",
    kind_column: str | None = None,
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    zoom_right: float = 0.8,
    zoom_wrong: float = 0.5,
    **columns: Any,
) -> list[float | None]:
    """The group-aware score: it replaces chain_of_focus_base by the table over each group; None as there.

    Args:
        data_kind, kind_column, variant, gold: as for chain_of_focus_base.
        zoom_right: for a right answer by zooming where a direct one was right, too.
        zoom_wrong: for a wrong answer by zooming.
    """
    base = chain_of_focus_base(trajectories, context, log_metric, log_extra, data_kind, kind_column, variant, gold)
    if variant == "release":
        zoomed = ["<tool_call>" in transcript(t) for t in trajectories]
    else:
        zoomed = [bool(tool_calls(t)) for t in trajectories]
    values: list[float | None] = [None] * len(trajectories)
    for rows in groups_of(trajectories):
        scores = replaced(
            [zoomed[i] for i in rows],
            [base[i] for i in rows],
            Table(zoom_right=zoom_right, zoom_wrong=zoom_wrong),
            alone_keeps=variant == "release",
        )
        for row, value in zip(rows, scores, strict=True):
            values[row] = value
    if log_metric is not None and trajectories:
        log_metric("zoom_rate", sum(zoomed) / len(zoomed))
    return values
