"""VR-Thinker: a judge of two videos that looks again; paid for each dimension, for what looking gained, for looking.

    R = format + accuracy + k sum over rounds of (accuracy after - accuracy before) + eta explore
    accuracy = alpha [overall right] + (1 - alpha) share of dimensions right
    explore  = max(omega - share of the group that looked, 0) for a thought that looked, else 0

alpha 0.5, k 0.2, eta 0.5, omega 0.2. Wang et al., arXiv:2510.10518, section 3.2.2 and appendix A.2 and B.1. No code of
it was available: this is the formula alone. Where the paper is silent: format is 1 or 0; a round without a judgement
is passed over, a final one without counts as wrong; a thought looked if a call of its worked.

The sum telescopes: what is gained is the final accuracy less that of the first judgement, however many rounds lie
between, so changing one's mind and back gains nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from record.trajectory import Trajectory
from rewards.contract import RewardError, groups_of
from rewards.functions.text import policy_turns, without_chat_marks
from rewards.functions.tool_use import tool_calls
from rewards.published.judge_helpers import log_parts, totals
from runtime.errors import UserError

OVERALL, CONFIDENCE = "OA", "CF"
_JUDGED = re.compile(r"\b([A-Z]{2})\s*[=:]\s*(\d)\b")


@dataclass(frozen=True)
class Weights:
    alpha: float = 0.5  # of the overall judgement against the dimensions'
    k: float = 0.2  # of the gain over rounds
    eta: float = 0.5  # of exploring
    omega: float = 0.2  # share of a group that should look


# ---- formulas ------------------------------------------------------------------------------------------------------


def accuracy(said: Mapping[str, int], gold: Mapping[str, int], alpha: float = 0.5) -> float:
    """alpha [overall right] + (1 - alpha) share of dimensions right; a record without dimensions has only overall."""
    dimensions = [name for name in gold if name not in (OVERALL, CONFIDENCE)]
    overall = float(said.get(OVERALL) == gold[OVERALL])
    if not dimensions:
        return overall
    return alpha * overall + (1 - alpha) * sum(said.get(name) == gold[name] for name in dimensions) / len(dimensions)


def gain(rounds: Sequence[float | None], k: float = 0.2) -> float:
    """k times the sum of accuracy's steps from one judgement to the next, the last of which is the final one (None: it
    was not given, and is wrong)."""
    judged = [r for r in rounds[:-1] if r is not None] + [rounds[-1] or 0.0] if rounds else []
    return k * sum(after - before for before, after in zip(judged, judged[1:], strict=False))


def exploration(looked: Sequence[bool], omega: float = 0.2) -> list[float]:
    """max(omega - share that looked, 0) for those of a group that did."""
    lack = max(omega - sum(looked) / len(looked), 0.0) if looked else 0.0
    return [lack if one else 0.0 for one in looked]


# ---- reading -------------------------------------------------------------------------------------------------------


def judgement(turn: str, final: bool) -> dict[str, int] | None:
    """ "TA = 2, MQ = 0, OA = 2, CF = 1" inside the answer block (before the last round: the recommendation's)."""
    tag = "answer" if final else r"recommend[ _]answer"
    found = re.findall(rf"<{tag}>(.*?)</\s*{tag}>", turn, re.DOTALL | re.I)
    read = {name: int(value) for name, value in _JUDGED.findall(found[-1])} if found else {}
    return read or None


def well_formed(turns: Sequence[str], gold: Mapping[str, int]) -> bool:
    """Each turn: a snapshot, a thought, then a recommendation and a call, in the last one an answer; every judgement
    names all that the record judges, as 0 (tie), 1 or 2."""
    for index, turn in enumerate(turns):
        final = index == len(turns) - 1
        parts = ["snapshot", "think", *(["answer"] if final else [r"recommend[ _]answer", "tool_call"])]
        whole = r"\s*".join(rf"<{part}>(?:(?!</?{part}>).)*</\s*{part}>" for part in parts)
        if not re.fullmatch(rf"\s*{whole}\s*", turn, re.DOTALL | re.I):
            return False
        said = judgement(turn, final) or {}
        if not all(said.get(name) in (0, 1, 2) for name in gold if name != CONFIDENCE):
            return False
    return bool(turns)


# ---- the reward ------------------------------------------------------------------------------------------------------


def vr_thinker(
    trajectories: Sequence[Trajectory],
    context: Any = None,
    log_metric: Any = None,
    log_extra: Any = None,
    gold: str = "ground_truth",
    alpha: float = 0.5,
    k: float = 0.2,
    eta: float = 0.5,
    omega: float = 0.2,
    format: float = 1.0,
    **columns: Any,
) -> list[float | None]:
    """format + accuracy + gain over rounds + exploration; None without a reference. Reads whole groups.

    Args:
        gold: column {"OA": 2, "TA": 1, ...}: the preferred video (0: tie) overall and by dimension.
        alpha, k, eta, omega: at the top of this file.
        format: weight of the form.
    """
    for name, value in (("alpha", alpha), ("omega", omega)):
        if not 0 <= value <= 1:
            raise UserError(f"vr_thinker: {name} is {value}; it is a share, 0 to 1")
    if min(k, eta, format) < 0:
        raise UserError(f"vr_thinker: k is {k}, eta {eta} and format {format}; none may be negative")
    explored = _explored(trajectories, omega)
    rows: list[dict[str, float] | None] = []
    for t, curious in zip(trajectories, explored, strict=True):
        wanted = _gold(t, gold)
        if wanted is None:
            rows.append(None)
            continue
        turns = [without_chat_marks(turn) for turn in policy_turns(t)]
        judged = [judgement(turn, index == len(turns) - 1) for index, turn in enumerate(turns)]
        rounds = [None if said is None else accuracy(said, wanted, alpha) for said in judged]
        right, formed = (rounds[-1] or 0.0) if rounds else 0.0, float(well_formed(turns, wanted))
        gained = gain(rounds, k)
        rows.append(
            {
                "total": format * formed + right + gained + eta * curious,
                "format": formed,
                "accuracy": right,
                "gain": gained,
                "explore": eta * curious,
                "rounds": float(len(turns)),
            }
        )
    log_parts(rows, log_metric, log_extra)
    return totals(rows)


def _explored(trajectories: Sequence[Trajectory], omega: float) -> list[float]:
    values = [0.0] * len(trajectories)
    for rows in groups_of(trajectories):
        looked = [any(call.ok for call in tool_calls(trajectories[row])) for row in rows]
        for row, value in zip(rows, exploration(looked, omega), strict=True):
            values[row] = value
    return values


def _gold(t: Trajectory, column: str) -> dict[str, int] | None:
    value = t.record.get(column)
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.get(OVERALL) not in (0, 1, 2):
        raise RewardError(
            f"vr_thinker: the record of '{t.prompt}' has {value!r} in '{column}'; it must be "
            f'{{"{OVERALL}": 0, 1 or 2, and a dimension\'s two letters: likewise}}'
        )
    return {str(name): int(judged) for name, judged in value.items()}
