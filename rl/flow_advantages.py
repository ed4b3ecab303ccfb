"""Advantages as the flow-matching trainers make them, over plain rewards: rl/advantages.py has ours, over groups.

Pure numpy, float64. `None` is a reward that nobody could give: it leaves every mean and deviation, and its advantage is
0. Equal rewards have advantages of exactly 0, however small the number that deviations are kept from 0 by.

Letters: B samples, T steps of one image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from policy.scoring.variants import is_release
from runtime.errors import UserError, nearest

Rewards = Sequence[float | None]
FLOW_GRPO_EPSILON = 1e-4  # added to the deviation, by flow_grpo and verl-omni
MIX_GRPO_EPSILON = 1e-8
KINDS = ("grpo", "rwr", "sft", "dpo")


# ---- flow_grpo: statistics by prompt, over successive calls ----


@dataclass(frozen=True)
class PromptStatistics:
    """The rewards of each prompt since the statistics were last cleared, float64 [rewards, T], and all prompts seen."""

    rewards: Mapping[str, np.ndarray] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()

    def cleared(self) -> PromptStatistics:
        """Without rewards; which prompts have been seen is kept."""
        return PromptStatistics({}, self.seen)

    @property
    def mean_group_size(self) -> float:
        """Rewards a prompt; 0 without prompts."""
        sizes = [len(values) for values in self.rewards.values()]
        return sum(sizes) / len(sizes) if sizes else 0.0

    @property
    def prompts_seen(self) -> int:
        return len(self.seen)


def prompt_advantages(
    prompts: Sequence[str],
    rewards: Rewards | Sequence[Sequence[float]],
    statistics: PromptStatistics | None = None,
    kind: str = "grpo",
    std_of_whole_batch: bool = False,
    variant: str = "repaired",
) -> tuple[np.ndarray, PromptStatistics]:
    """Flow-GRPO's tracker (arXiv:2505.05470): advantages [B] (or [B, T] for rewards by step), and what is known then.

    grpo: less the prompt's mean over all calls, divided by its population deviation, or that of this call's whole
    batch, plus 1e-4. rwr: the rewards. sft: 1 for the prompt's best in this call, else 0. dpo: 1 for the first best, -1
    for the first worst.
    Release: a prompt that returns before the statistics are cleared raises UserError, as the code stops there; dpo
    prefers the second of equal samples to the first, and raises for a lone one, where here both are 0.
    """
    if kind not in KINDS:
        raise UserError(f"no kind of advantage '{kind}'; {nearest(kind, KINDS)}")
    release = is_release(variant)
    statistics = statistics or PromptStatistics()
    reward_BT, by_step = _table(rewards)
    if kind == "dpo" and by_step:
        raise UserError("dpo prefers whole samples; it takes one reward a sample, not one a step")
    if len(prompts) != len(reward_BT):
        raise UserError(f"{len(prompts)} prompts, but {len(reward_BT)} rewards")
    known = dict(statistics.rewards)
    judged_B = ~np.isnan(reward_BT).any(-1)
    advantage_BT = np.zeros_like(reward_BT)
    batch = reward_BT[judged_B]
    for prompt in dict.fromkeys(prompts):
        if prompt in known and release:
            raise UserError(
                f"prompt '{prompt}' returns before the statistics are cleared; the release cannot add to it"
            )
        rows = np.flatnonzero(np.array([p == prompt for p in prompts]) & judged_B)
        here = reward_BT[rows]
        known[prompt] = np.concatenate([known[prompt], here]) if prompt in known else here
        if len(rows):
            advantage_BT[rows] = _by_kind(kind, here, known[prompt], batch if std_of_whole_batch else None, release)
    updated = PromptStatistics(known, statistics.seen | set(prompts))
    return (advantage_BT if by_step else advantage_BT[:, 0]), updated


def _by_kind(kind: str, here: np.ndarray, prompt: np.ndarray, batch: np.ndarray | None, release: bool) -> np.ndarray:
    if kind == "rwr":
        return here
    if kind == "sft":
        return (here == here.max()).astype(np.float64)
    if kind == "dpo":
        preference = np.zeros_like(here)
        best, worst = int(here.argmax()), int(here.argmin())
        if best == worst and release:
            if len(here) < 2:
                raise UserError("a lone sample has no pair to be preferred to")
            best, worst = 1, 0
        preference[best], preference[worst] = 1.0, -1.0
        return preference if best != worst else np.zeros_like(here)
    spread = prompt if batch is None else batch
    centred = np.where(prompt.max(0) == prompt.min(0), 0.0, here - prompt.mean(0))
    return centred / (spread.std(0) + FLOW_GRPO_EPSILON)


# ---- verl-omni: by group, within one call ----


def group_advantages(
    rewards: Rewards,
    groups: Sequence[Hashable],
    normalise: bool = True,
    std_of_whole_batch: bool = True,
    variant: str = "repaired",
) -> np.ndarray:
    """verl-omni's: less the group's mean, divided by the sample deviation of the batch or the group, plus 1e-4. [B].

    A lone sample of a group has 0. `normalise` False: not divided (Dr. GRPO, arXiv:2503.20783).
    Release: a lone sample of the batch has NaN, where here it has 0. Raises UserError for unequal lengths.
    """
    reward_B = _table(rewards)[0][:, 0]
    if len(groups) != len(reward_B):
        raise UserError(f"{len(groups)} groups named for {len(reward_B)} rewards")
    judged_B = ~np.isnan(reward_B)
    batch_std = _sample_std(reward_B[judged_B], is_release(variant))
    advantage_B = np.zeros_like(reward_B)
    for group in dict.fromkeys(groups):
        rows = np.flatnonzero(np.array([g == group for g in groups]) & judged_B)
        values = reward_B[rows]
        scale = 1.0
        if normalise and (std_of_whole_batch or len(values) > 1):
            scale = (batch_std if std_of_whole_batch else _sample_std(values)) + FLOW_GRPO_EPSILON
        advantage_B[rows] = _centred(values) / scale
    return advantage_B


# ---- MixGRPO: groups that lie one after another ----


def mix_advantages(
    rewards: Rewards | Mapping[str, Rewards],
    group_size: int,
    trimmed_ratio: float = 0.0,
    by_group: bool = True,
    weights: Mapping[str, float] | None = None,
    variant: str = "repaired",
) -> np.ndarray:
    """MixGRPO's (arXiv:2507.21802): less the mean, divided by the sample deviation plus 1e-8, of groups of
    `group_size` that lie one after another, or of the whole batch. [B].

    Where rewards are by model, each model's advantages are added with its weight; a sample that one model could not
    judge is unjudged. `trimmed_ratio`: this share of a group's rewards, the lowest, is left out of mean and deviation.
    Release: samples that are left over keep 0; trimming down to one reward makes the group NaN, where here two are
    kept. Raises UserError for left-over samples, missing weights, or rewards of unequal lengths.
    """
    release = is_release(variant)
    models = rewards if isinstance(rewards, Mapping) else {"": rewards}
    tables = {name: _table(values)[0][:, 0] for name, values in models.items()}
    weights = {"": 1.0} if not isinstance(rewards, Mapping) else (weights or {})
    missing = sorted(set(tables) - set(weights))
    if missing:
        raise UserError(f"no weight for the rewards of '{missing[0]}'")
    sizes = {len(table) for table in tables.values()}
    if len(sizes) != 1:
        raise UserError(f"rewards of unequal lengths: {', '.join(f'{name} {len(t)}' for name, t in tables.items())}")
    count = sizes.pop()
    if group_size < 1 or (by_group and count % group_size and not release):
        raise UserError(f"{count} samples do not make groups of {group_size}")
    if not 0 <= trimmed_ratio <= 1:
        raise UserError(f"the share of rewards that is trimmed is {trimmed_ratio}; it is between 0 and 1")

    judged_B = ~np.isnan(np.stack(list(tables.values()))).any(0)
    advantage_B = np.zeros(count)
    size, trimmed = (group_size, trimmed_ratio) if by_group else (max(count, 1), 0.0)
    for start in range(0, count - count % size, size):
        rows = start + np.flatnonzero(judged_B[start : start + size])
        for name, table in tables.items():
            advantage_B[rows] += weights[name] * _trimmed_advantages(table[rows], trimmed, release)
    return advantage_B


def _trimmed_advantages(values: np.ndarray, trimmed_ratio: float, release: bool) -> np.ndarray:
    least = 1 if release else min(2, len(values))
    trimmed = min(int(len(values) * trimmed_ratio), max(len(values) - least, 0))
    kept = np.sort(values)[trimmed:]
    return _centred(values, kept) / (_sample_std(kept, release) + MIX_GRPO_EPSILON)


# ---- what they share ----


def _table(rewards: Rewards | Sequence[Sequence[float]]) -> tuple[np.ndarray, bool]:
    """Rewards as float64 [B, T], NaN for None, and whether they were by step. Raises UserError for one that is neither
    a finite number nor None."""
    by_step = any(isinstance(reward, Sequence | np.ndarray) for reward in rewards)
    rows = [list(reward) if isinstance(reward, Sequence | np.ndarray) else [reward] for reward in rewards]
    if len({len(row) for row in rows}) > 1:
        raise UserError("rewards are one number a sample, or equally many for every sample")
    for number, row in enumerate(rows):
        if any(value is not None and not np.isfinite(value) for value in row):
            raise UserError(f"reward {number} is {row}; a reward is a finite number, or None where nobody could judge")
    table = np.array([[np.nan if value is None else value for value in row] for row in rows], np.float64)
    return table.reshape(len(rows), -1 if rows else 1), by_step


def _centred(values: np.ndarray, baseline: np.ndarray | None = None) -> np.ndarray:
    """Values less the mean of the baseline, exactly 0 where all are equal (a float mean may be off by its last bit)."""
    if not len(values) or values.min() == values.max():
        return np.zeros_like(values)
    return values - (values if baseline is None else baseline).mean()


def _sample_std(values: np.ndarray, release: bool = False) -> float:
    """With divisor n - 1; of fewer than two values 0, in the release NaN."""
    if len(values) < 2:
        return float("nan") if release else 0.0
    return float(np.std(values, ddof=1))
