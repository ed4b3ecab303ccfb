"""Alarms: the signs of a policy that games its reward, or collapses, read from the metrics of the steps so far.

Each alarm is a number computed over windows of steps, and a threshold. What it says is logged as alarm/<name> (1 while
it is raised, else 0) and alarm/<name>/value; the first time it is raised it is told in a sentence. One that the recipe
calls fatal ends the run once the step is logged and saved. The history is metrics.jsonl itself, so a resumed run raises
what it would have raised. rl/run.py asks after every step.

    divergence       a watched part falls while the trained reward rises: Goodhart's law, as measured for reward models
                     in arXiv:2210.10760
    tool_rate        the policy stops calling its tools (DeepEyes' issue 78: within 20 steps, silently)
    rubber_stamp     its critiques approve of nearly every image while some of them are wrong
    zero_variance    groups in which every member earns the same, which train nothing (DAPO, arXiv:2503.14476)
    diversity        the images of a group become the same image
    unjudged         trajectories without a reward
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from record.trajectory import Trajectory
from rewards.functions.tool_use import asked
from runtime.errors import UserError
from runtime.section import Section

Name = Literal["divergence", "tool_rate", "rubber_stamp", "zero_variance", "diversity", "unjudged"]
NAMES: tuple[Name, ...] = get_args(Name)
THUMB = 32  # pixels: images are compared at this size, so that a group of large ones costs little
LEAST_TOOL_RATE = 0.05  # a rate that was never above it has nothing to fall from
LEAST_WRONG = 0.05  # share of wrong images from which a critic that always approves is at fault


class AlarmRaised(UserError):
    """A fatal alarm: the step was finished and saved, and the run stops here."""


class AlarmsConfig(Section):
    """Signs of reward hacking and collapse. A threshold of None turns its alarm off."""

    window: int = Field(
        20,
        ge=2,
        description="Steps that a mean is taken over; nothing is raised before so many, and "
        "nothing that compares with earlier steps before twice as many.",
    )
    fatal: bool | list[Name] = Field(
        False, description="Alarms that stop the run, once the step is saved: true for all, or a list of names."
    )
    divergence: float | None = Field(
        5.0,
        gt=0,
        description="Standard errors by which a watched metric must have "
        "fallen from its best window while the trained reward rose by as many.",
    )
    watch: list[str] = Field(["heldout/score"], description="Metrics watched beside the parts that are not paid.")
    tool_rate: float | None = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of its best window under which the rate of thoughts that call a tool raises the alarm.",
    )
    rubber_stamp: float | None = Field(
        0.95, gt=0, le=1, description="Share of critiques that approve, over steps with at least 5% wrong images."
    )
    zero_variance: float | None = Field(0.8, gt=0, le=1, description="Share of groups without variance.")
    diversity: float | None = Field(
        0.25,
        gt=0,
        le=1,
        description="Share of its best window under which the distance between the images of a group raises the alarm.",
    )
    unjudged: float | None = Field(0.25, gt=0, le=1, description="Share of trajectories without a reward.")

    def is_fatal(self, name: str) -> bool:
        return name in self.fatal if isinstance(self.fatal, list) else self.fatal


@dataclass(frozen=True)
class Reading:
    """What one alarm says of the history."""

    name: Name
    value: float
    raised: bool
    sentence: str  # what happened, in numbers; empty where nothing is raised


class Alarms:
    """The alarms of one run. Holds the history of what they read; `recall` fills it when a run is resumed."""

    def __init__(self, config: AlarmsConfig, log_only: Iterable[str] = ()) -> None:
        """`watched`: reward parts that the formula does not pay."""
        self.config = config
        self.log_only = (*(f"reward/{part}" for part in log_only), *config.watch)
        self.history: list[dict[str, float]] = []
        self._told: set[str] = set()
        self._tools_seen = False

    def measure(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        """What only the trajectories tell, as metrics of the step: rollout/tool_rate (share of thoughts that ask a
        tool; only once any did), rollout/diversity and rollout/duplicates (see `diversity_of`)."""
        trajectories = [trajectory for group in groups for trajectory in group]
        metrics: dict[str, float] = {}
        if not trajectories:
            return metrics
        rate = sum(map(asked, trajectories)) / len(trajectories)
        self._tools_seen = self._tools_seen or rate > 0
        if self._tools_seen:
            metrics["rollout/tool_rate"] = rate
        found = [pair for pair in (diversity_of(group) for group in groups) if pair is not None]
        if found:
            metrics["rollout/diversity"] = math.fsum(distance for distance, _ in found) / len(found)
            metrics["rollout/duplicates"] = math.fsum(same for _, same in found) / len(found)
        return metrics

    def recall(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take up the lines of metrics.jsonl of the steps that are done."""
        for row in rows:
            self._add(row)
            self._told |= {name for name in NAMES if row.get(f"alarm/{name}")}

    def check(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str], str | None]:
        """After a step: (alarm/* metrics, sentences of those raised for the first time, the fatal ones' sentence).

        The last is None where nothing fatal is raised.
        """
        self._add(metrics)
        readings = self.readings()
        logged = {f"alarm/{r.name}": float(r.raised) for r in readings}
        logged |= {f"alarm/{r.name}/value": r.value for r in readings}
        raised = [r for r in readings if r.raised]
        new_alarms = [*self._never_seen(metrics), *(_told(r) for r in raised if r.name not in self._told)]
        self._told |= {r.name for r in raised}
        fatal = [r for r in raised if self.config.is_fatal(r.name)]
        if not fatal:
            return logged, new_alarms, None
        return logged, new_alarms, "; ".join(_told(r) for r in fatal)

    def readings(self) -> list[Reading]:
        """Every alarm that is on and has steps enough to say something."""
        config, rows = self.config, self.history
        found = [
            divergence(rows, self.log_only, config.divergence, config.window),
            fallen(
                rows,
                "tool_rate",
                "rollout/tool_rate",
                config.tool_rate,
                config.window,
                "thoughts that call a tool became rare",
                LEAST_TOOL_RATE,
            ),
            rubber_stamp(rows, config.rubber_stamp, config.window),
            above(
                rows,
                "zero_variance",
                "groups/no_variance",
                config.zero_variance,
                config.window,
                "of the groups had members that all earned the same, which teaches nothing",
            ),
            fallen(
                rows,
                "diversity",
                "rollout/diversity",
                config.diversity,
                config.window,
                "the images of a group became alike (root mean square distance)",
            ),
            above(rows, "unjudged", "reward/none", config.unjudged, config.window, "of the trajectories had no reward"),
        ]
        return [reading for reading in found if reading is not None]

    def _never_seen(self, metrics: Mapping[str, float]) -> list[str]:
        """Once a window is full: what the recipe watches and no step has had, most likely for a slip of the pen."""
        if len(self.history) != self.config.window or "watch" not in self.config.model_fields_set:
            return []
        seen = {name for row in self.history for name in row}
        unseen = [name for name in self.config.watch if name not in seen and not name.startswith("heldout/")]
        sentences = []
        for name in unseen:  # evaluations may come later
            close = difflib.get_close_matches(name, metrics, n=1, cutoff=0.5)
            sentences.append(
                f"rewards.alarms.watch: '{name}' is not among the metrics of the first {self.config.window} steps"
                + (f"; did you mean '{close[0]}'?" if close else "; metrics.jsonl has their names")
            )
        return sentences

    def _add(self, row: Mapping[str, Any]) -> None:
        kept = {
            name: float(value)
            for name, value in row.items()
            if self._is_read(name) and value is not None and math.isfinite(value)
        }
        groups = row.get("groups/in")
        if groups:
            kept["groups/no_variance"] = float(row.get("groups/dropped/zero_variance") or 0) / groups
        self._tools_seen = self._tools_seen or "rollout/tool_rate" in kept
        self.history.append(kept)

    def _is_read(self, name: str) -> bool:
        return (
            name in ("reward/mean", "reward/none", "rollout/tool_rate", "rollout/diversity", *self.log_only)
            or _CRITIQUE.fullmatch(name) is not None
        )


_CRITIQUE = re.compile(r"reward/([^/]+)/(rubber_stamp_rate|wrong_images)")


def _told(reading: Reading) -> str:
    return f"alarm '{reading.name}': {reading.sentence}"


# ---- what each one computes -------------------------------------------------------------------------------------


def diversity_of(group: Sequence[Trajectory]) -> tuple[float, float] | None:
    """Over the pairs of a group's final images: the mean of their root mean square distance in [0, 1], at
    THUMB x THUMB pixels, and the share of pairs that are equal pixel by pixel. None under two images."""
    images = [drawn[-1] for t in group if (drawn := t.images())]
    if len(images) < 2:
        return None
    thumbs_ND = np.stack([_thumb(image) for image in images])
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab, for all pairs at once
    norms_N = (thumbs_ND**2).sum(1)
    squares_NN = norms_N[:, None] + norms_N[None] - 2 * thumbs_ND @ thumbs_ND.T
    upper = np.triu_indices(len(images), 1)
    distances = np.sqrt(np.maximum(squares_NN[upper], 0) / thumbs_ND.shape[1])
    same = [
        images[i].shape == images[j].shape and np.array_equal(images[i], images[j]) for i, j in zip(*upper, strict=True)
    ]
    return float(distances.mean()), sum(same) / len(same)


def _thumb(image: np.ndarray) -> np.ndarray:
    """float64 [THUMB * THUMB * 3] in [0, 1]: the mean color of each cell of a grid."""
    height, width = image.shape[:2]
    if (height, width) != (THUMB, THUMB):
        rows, columns = (np.arange(THUMB) * side // THUMB for side in (height, width))
        counts = [np.maximum(np.diff(np.append(edges, side)), 1) for edges, side in ((rows, height), (columns, width))]
        summed = np.add.reduceat(np.add.reduceat(image.astype(np.float64), rows, 0), columns, 1)
        image = summed / (counts[0][:, None, None] * counts[1][None, :, None])
    return image.astype(np.float64).ravel() / 255


def above(
    rows: Sequence[Mapping[str, float]], name: Name, metric: str, threshold: float | None, window: int, what: str
) -> Reading | None:
    """The mean over the last `window` steps that have the metric, against a threshold. None: off, or too few steps."""
    values = [row[metric] for row in rows if metric in row][-window:]
    if threshold is None or len(values) < window:
        return None
    mean = math.fsum(values) / window
    raised = mean >= threshold
    return Reading(name, mean, raised, f"{mean:.0%} {what}, over the last {window} steps" if raised else "")


def fallen(
    rows: Sequence[Mapping[str, float]],
    name: Name,
    metric: str,
    threshold: float | None,
    window: int,
    what: str,
    least: float = 0.0,
) -> Reading | None:
    """The mean over the last `window` steps as a share of the best window before them. None: off, too few steps, or a
    best that is not over `least`."""
    values = np.array([row[metric] for row in rows if metric in row])
    if threshold is None or len(values) < 2 * window:
        return None
    means = _window_means(values, window)
    best, now = float(means[:-window].max()), float(means[-1])
    if best <= least:
        return None
    share = now / best
    raised = share < threshold
    return Reading(
        name,
        share,
        raised,
        f"{what}: {best:.3g} in their best {window} steps, {now:.3g} in the last {window}" if raised else "",
    )


def rubber_stamp(rows: Sequence[Mapping[str, float]], threshold: float | None, window: int) -> Reading | None:
    """The largest mean, over the critique parts, of the share of critiques that approve; steps in which fewer than
    LEAST_WRONG of the images were wrong are left out, as approving is right there."""
    parts = sorted({match[1] for row in rows[-1:] for key in row if (match := _CRITIQUE.fullmatch(key))})
    found: list[Reading] = []
    for part in parts:
        rate, wrong = f"reward/{part}/rubber_stamp_rate", f"reward/{part}/wrong_images"
        faulty = [row for row in rows if row.get(wrong, 1.0) >= LEAST_WRONG]
        reading = above(
            faulty,
            "rubber_stamp",
            rate,
            threshold,
            window,
            f"of the critiques that '{part}' reads approve, though some of the images are wrong",
        )
        if reading is not None:
            found.append(reading)
    return max(found, key=lambda reading: reading.value, default=None)


def divergence(
    rows: Sequence[Mapping[str, float]],
    log_only: Sequence[str],
    threshold: float | None,
    window: int,
    trained: str = "reward/mean",
) -> Reading | None:
    """How far a watched metric fell while the trained reward rose, in standard errors; the largest over the metrics.

    The last `window` steps are compared with the earlier window in which the watched metric was best:
    min(rise of the trained, fall of the watched), each a difference of means over sqrt(s1^2 / n + s2^2 / n). Positive
    only where both happened.
    """
    found: list[Reading] = []
    for metric in log_only if threshold is not None else ():
        both = [row for row in rows if metric in row and trained in row]
        if len(both) < 2 * window:
            continue
        watched_N, trained_N = (np.array([row[name] for row in both]) for name in (metric, trained))
        best = int(_window_means(watched_N, window)[:-window].argmax())
        then, now = slice(best, best + window), slice(len(both) - window, None)
        value = min(_rise(trained_N[then], trained_N[now]), -_rise(watched_N[then], watched_N[now]))
        raised = threshold is not None and value >= threshold
        found.append(
            Reading(
                "divergence",
                value,
                raised,
                ""
                if not raised
                else (
                    f"the trained reward rose from {trained_N[then].mean():.3g} to {trained_N[now].mean():.3g} while "
                    f"{metric} fell from {watched_N[then].mean():.3g} to {watched_N[now].mean():.3g} (its best "
                    f"{window} steps against the last {window}); the policy may have found what the reward overlooks"
                ),
            )
        )
    return max(found, key=lambda reading: reading.value, default=None)


def _rise(before: np.ndarray, after: np.ndarray) -> float:
    """Difference of the means in standard errors, within +-99 (where nothing varies, any difference is certain)."""
    difference = float(after.mean() - before.mean())
    error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / len(before))
    if abs(difference) < 1e-12:
        return 0.0
    return float(np.clip(difference / error, -99, 99)) if error > 0 else math.copysign(99.0, difference)


def _window_means(values_N: np.ndarray, window: int) -> np.ndarray:
    """Means of every `window` values in a row; the last one is the newest."""
    return np.convolve(values_N, np.full(window, 1 / window), "valid")
