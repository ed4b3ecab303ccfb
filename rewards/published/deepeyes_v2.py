"""DeepEyesV2: no pay for a tool any more, and a tenth off where it searched.

    perception:  0.8 accuracy + 0.2 format
    search:      0.8 accuracy (0.9 of it once a search call occurs) + 0.2 format

with accuracy in {0, 1} by a judge and format in {0, 1}: think and answer tags there and balanced, code tags balanced
(search: call tags, too), an answer under 300 characters. Hong et al., arXiv:2511.05271; Visual-Agent/DeepEyesV2,
reinforcement_learning/verl/utils/reward_score/deepeyesv2.py.

The release asks the judge about an answer that is not there and pays what it says, reads tags in the tools' replies as
the model's, and pays an unreadable verdict as wrong. `repaired`, the default, reads the policy's words alone, pays
nothing for a missing answer, and leaves the unjudged unjudged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from record.trajectory import Trajectory
from rewards.contract import RewardContext, policy_text
from rewards.functions.text import after_last, balanced, blocks, last_turn, transcript, without_chat_marks
from rewards.published.judge_helpers import column_or, gold_of, log_parts, one_of, resolve_verdicts, totals

Kind = Literal["perception", "search"]
Variant = Literal["repaired", "release"]

TOO_LONG = 300  # characters of an answer
SEARCHED = 0.9  # share of the accuracy that is paid once a call occurs


@dataclass(frozen=True)
class Reading:
    answer: str | None
    well_formed: bool
    searched: bool
    asks: bool


def score(
    reading: Reading, right: bool, kind: Kind, accuracy: float = 0.8, format: float = 0.2, searched: float = SEARCHED
) -> dict[str, float]:
    """The formula at the top of this file: total, accuracy, format."""
    share = searched if kind == "search" and reading.searched else 1.0
    parts = {"accuracy": float(right and reading.asks), "format": float(reading.well_formed)}
    return {"total": accuracy * share * parts["accuracy"] + format * parts["format"], **parts}


def read(text: str, final: str, kind: Kind, release: bool = False) -> Reading:
    """What the rule sees: tags are counted in `text`, the answer stands in `final` behind the last closing think tag.

    In the release both are the whole conversation; else the policy's own words, and those after the last observation.
    A think tag is put in front of a text that does not begin with one: chat templates open it for the model.
    """
    text = text if text.startswith("<think>") else "<think>" + text
    tail = after_last(final, "</think>")
    found = blocks(tail, "answer")
    answer = found[0] if found else None
    short = answer is None or len(answer) < TOO_LONG
    formed = (
        balanced(text, "think", needed=True)
        and balanced(text, "code")
        and bool(answer)
        and short
        and balanced(tail, "answer", needed=True)
        and (kind != "search" or balanced(text, "tool_call"))
    )
    return Reading(answer, formed, "<tool_call>" in text, short if release else bool(answer) and short)


def deepeyes_v2(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    log_extra: Any = None,
    kind: Kind = "perception",
    kind_column: str | None = None,
    variant: Variant = "repaired",
    gold: str = "ground_truth",
    accuracy: float = 0.8,
    format: float = 0.2,
    searched: float = SEARCHED,
    **columns: Any,
) -> list[float | None]:
    """0.8 accuracy + 0.2 format, the accuracy at 90 % where a search thought called; None without reference or verdict.

    Args:
        kind: perception or search.
        kind_column: the record's column that names the kind, where a data set mixes them; a record that lacks it
            is not judged.
        variant: repaired or release (at the top of this file).
        accuracy, format: weights. searched: share of the accuracy that a thought with a call is paid.
    """
    one_of("deepeyes_v2", "variant", variant, get_args(Variant))
    kinds = column_or(trajectories, kind_column, kind, "deepeyes_v2", get_args(Kind))
    readings = [
        None if of is None or gold_of(t, gold) is None else _read(t, of, variant)  # type: ignore[arg-type]
        for t, of in zip(trajectories, kinds, strict=True)
    ]
    right = resolve_verdicts(
        context,
        "deepeyes_v2",
        trajectories,
        [None if reading is None else reading.answer or "" for reading in readings],
        [None if reading is None or reading.asks else False for reading in readings],
        gold,
        unread=False if variant == "release" else None,
    )
    parts = [
        None if reading is None or correct is None else score(reading, correct, of, accuracy, format, searched)  # type: ignore[arg-type]
        for of, reading, correct in zip(kinds, readings, right, strict=True)
    ]
    log_parts(parts, log_metric, log_extra)
    return totals(parts)


def _read(trajectory: Trajectory, kind: Kind, variant: Variant) -> Reading:
    if variant == "release":
        whole = transcript(trajectory)
        return read(whole, whole, kind, release=True)
    return read(without_chat_marks(policy_text(trajectory)), last_turn(trajectory), kind)
