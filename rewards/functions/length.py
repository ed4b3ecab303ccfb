"""What a thought's length and repetitions cost. All three look at the policy's words only: an image has the length
that its tokenizer gives it, and codes repeat by nature.

As parts they are added to an expression (`result + 0.5 * overlong`) or watched; `length_penalty` is the one that looks
at the group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from record.trajectory import Author, Segment, Trajectory
from rewards.contract import groups_of
from runtime.errors import UserError

Unit = Literal["tokens", "words", "characters"]
UNITS = ("tokens", "words", "characters")
_TAG = re.compile(r"</?[A-Za-z][\w ]*/?>")


# ---- formulas ------------------------------------------------------------------------------------------------------


def repeated_share(stretches: Sequence[Sequence[Hashable]], n: int) -> float:
    """1 - distinct n-grams / n-grams, over all stretches; no n-gram runs from one into the next. 0 where there is
    none."""
    grams = [tuple(s[i : i + n]) for s in stretches for i in range(len(s) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def soft_overlong(length: int, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment, in [-1, 0] (arXiv:2503.14476, equation 13):

    0                                      up to max_length - cache
    ((max_length - cache) - length)/cache  from there to max_length
    -1                                     above
    """
    free = max_length - cache
    if length <= free:
        return 0.0
    return -1.0 if length > max_length else (free - length) / cache


def group_length(lengths: Sequence[int | None]) -> list[float | None]:
    """0.5 - (length - shortest) / (longest - shortest), in [-0.5, 0.5]; 0 where all are equally long (Kimi k1.5,
    arXiv:2501.12599, section 2.3.3). None stays None and is left out of shortest and longest."""
    known = [length for length in lengths if length is not None]
    if not known or min(known) == max(known):
        return [None if length is None else 0.0 for length in lengths]
    low, high = min(known), max(known)
    return [None if length is None else 0.5 - (length - low) / (high - low) for length in lengths]


# ---- rewards -------------------------------------------------------------------------------------------------------


def repetition_penalty(
    trajectories: Sequence[Trajectory],
    n: int = 3,
    penalty: float = 1.0,
    unit: Literal["words", "tokens"] = "words",
    tags: bool = False,
    **columns: Any,
) -> list[float | None]:
    """-penalty * (1 - distinct n-grams / n-grams) over the policy's words, in [-penalty, 0].

    Args:
        n: length of the n-grams.
        penalty: what a thought of nothing but one n-gram would cost, nearly.
        unit: "words" (lower case) or the sampled "tokens".
        tags: count tags of the format as words too. By default they are left out, and where one stood no n-gram runs
            across: a format that plans, looks and plans again repeats its own tags by rule. Only for words.
    """
    if n < 1 or penalty < 0:
        raise UserError(f"repetition_penalty: n is {n} and penalty is {penalty}; n is 1 or more, penalty 0 or more")
    if unit not in ("words", "tokens"):
        raise UserError(f"repetition_penalty: no unit '{unit}'. Known: words, tokens")
    values: list[float | None] = []
    for trajectory in trajectories:
        own = _own_text(trajectory)
        if unit == "tokens":
            if not _has_ids(own):
                values.append(None)
                continue
            stretches: list[Sequence[Hashable]] = [[int(id) for id in s.ids] for s in own]
        else:
            parts = [part for s in own for part in ([s.text] if tags else _TAG.split(s.text))]
            stretches = [part.lower().split() for part in parts]
        share = repeated_share(stretches, n)
        values.append(-penalty * share if share else 0.0)
    return values


def overlong_penalty(
    trajectories: Sequence[Trajectory],
    max_length: int = 20480,
    cache: int = 4096,
    unit: Unit = "tokens",
    **columns: Any,
) -> list[float | None]:
    """DAPO's soft overlong punishment (`soft_overlong`) of the policy's words, in [-1, 0]; None where tokens are to be
    counted and none were recorded. Defaults are the paper's."""
    if not 0 < cache <= max_length:
        raise UserError(
            f"overlong_penalty: cache is {cache} and max_length {max_length}; cache is above 0 and at most max_length"
        )
    _check_unit("overlong_penalty", unit)
    lengths = [length_of(t, unit) for t in trajectories]
    return [None if length is None else soft_overlong(length, max_length, cache) for length in lengths]


def length_penalty(
    trajectories: Sequence[Trajectory], log_metric: Any = None, unit: Unit = "tokens", **columns: Any
) -> list[float | None]:
    """Kimi k1.5's length reward (`group_length`), the shortest of a group 0.5 and the longest -0.5.

    The paper pays it in full to right answers and only its negative part to wrong ones, which the recipe says:
    `right + w * (length if right > 0.5 else min(0, length))`. Logs the mean length.
    """
    _check_unit("length_penalty", unit)
    lengths = [length_of(t, unit) for t in trajectories]
    values: list[float | None] = [None] * len(trajectories)
    for rows in groups_of(trajectories):
        for row, value in zip(rows, group_length([lengths[row] for row in rows]), strict=True):
            values[row] = value
    known = [length for length in lengths if length is not None]
    if log_metric is not None and known:
        log_metric("length", math.fsum(known) / len(known))
    return values


def length_of(trajectory: Trajectory, unit: Unit) -> int | None:
    """Length of the policy's words; None where tokens are to be counted and none were recorded with the words."""
    own = _own_text(trajectory)
    if unit == "tokens":
        return sum(len(s.ids) for s in own) if _has_ids(own) else None
    return sum(len(s.text.split()) if unit == "words" else len(s.text) for s in own)


def _check_unit(reward: str, unit: str) -> None:
    if unit not in UNITS:
        raise UserError(f"{reward}: no unit '{unit}'. Known: {', '.join(UNITS)}")


def _own_text(trajectory: Trajectory) -> list[Segment]:
    return [s for s in trajectory.segments if s.author is Author.POLICY and s.image is None]


def _has_ids(segments: Sequence[Segment]) -> bool:
    return all(len(s.ids) or not s.text for s in segments)
