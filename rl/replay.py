"""A kept step computed again, from what was stored: rewards, advantages, the loss of the kept decisions, and with the
weights before the step the whole update.

Each stage takes the one before as it comes out here, so that what differs first is what explains the rest. On the CPU,
with the run's number of threads and versions, everything comes out equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from policy.scoring.changed import changed_codes
from record.trajectory import DecisionKind, Trajectory
from rewards.manager import RewardManager
from rewards.replayed import clear
from rl.advantages import compute_advantages
from rl.batches import drop_untrainable, segment_weights, trainable
from rl.config import GrpoConfig
from rl.forks import fork_metrics
from rl.kept_forwards import KeptForward, KeptUpdate, by_step, first_difference
from rl.kept_steps import KeptRound, KeptStep
from rl.ledger import Group, Ledger
from rl.losses import SUMS, ScoredDecisions, policy_loss, summarise
from rl.rounds import merged, with_added
from rl.trainer import Trainer, kind_weights, loss_settings, split_groups

Stage = Literal["rewards", "advantages", "loss", "update"]
_LOSS = ("loss/", "kl", "entropy", "clip/", "importance/", "trained/", "log_ratio/", "on_policy_gap")
# The beginnings of the names of a stage's metrics. The update gives those of the loss too, by new log-probs.
OF_STAGE: dict[Stage, tuple[str, ...]] = {
    "rewards": ("reward/", "forks/reward/", "forks/in", "forks/candidates"),
    "advantages": ("groups/", "trajectories/", "forks/trained"),
    "loss": _LOSS,
    "update": (*_LOSS, "grad_norm", "learning_rate", "optimizer_steps", "sampling/"),
}


@dataclass(frozen=True)
class ReplayedMetric:
    """A metric as the run logged it and as it comes out here; None: it is not a finite number, or is missing."""

    stage: Stage
    name: str
    stored: float | None
    replayed: float | None

    @property
    def equal(self) -> bool:
        return self.stored == self.replayed

    @property
    def difference(self) -> float | None:
        """Replayed less stored."""
        if self.stored is None or self.replayed is None:
            return None
        return self.replayed - self.stored


@dataclass(frozen=True)
class ValueDifference:
    """A value of one trajectory that comes out another than it was stored."""

    trajectory: str  # its key
    what: str  # 'detect', 'reward', 'the advantage of segment 2 (sketch)', 'the log-prob ...'
    stored: Any
    replayed: Any

    def __str__(self) -> str:
        return f"trajectory {self.trajectory}, {self.what}: {shown(self.stored)} stored, {shown(self.replayed)} here"


@dataclass
class Replay:
    """What came out."""

    metrics: list[ReplayedMetric] = field(default_factory=list)
    values: dict[Stage, list[ValueDifference]] = field(default_factory=dict)  # of the stages that were computed

    @property
    def equal(self) -> bool:
        return all(metric.equal for metric in self.metrics) and not any(self.values.values())

    @property
    def first(self) -> ReplayedMetric | None:
        """The first metric that differs."""
        return next((metric for metric in self.metrics if not metric.equal), None)

    def compare(self, stage: Stage, kept: KeptStep, found: Mapping[str, float], excused: Sequence[str] = ()) -> None:
        """Add a stage's metrics: each that either side has, but for the names that begin with one of `excused`."""
        for name in dict.fromkeys([*kept.metrics, *found]):
            if name.startswith(OF_STAGE[stage]) and not (excused and name.startswith(tuple(excused))):
                self.metrics.append(
                    ReplayedMetric(stage, name, _finite(kept.metrics.get(name)), _finite(found.get(name)))
                )


# ---- rewards -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What a trajectory was given when the step was made."""

    rewards: dict[str, float | None]
    segment_rewards: dict[str, dict[int, float | None]]
    reward: float | None
    advantage_S: np.ndarray | None

    @classmethod
    def of(cls, trajectory: Trajectory) -> Judged:
        return cls(
            dict(trajectory.rewards),
            {part: dict(values) for part, values in trajectory.segment_rewards.items()},
            trajectory.reward,
            trajectory.advantage_S,
        )


def restore(groups: Sequence[Group], judged: Mapping[str, Judged]) -> None:
    """Give the trajectories what they were given, by their keys."""
    for trajectory in (t for group in groups for t in group):
        was = judged[trajectory.key]
        trajectory.rewards, trajectory.segment_rewards = dict(was.rewards), dict(was.segment_rewards)
        trajectory.reward, trajectory.advantage_S = was.reward, was.advantage_S


def judge_again(kept: KeptStep, manager: RewardManager) -> dict[str, float]:
    """Judge the step's trajectories anew, call by call as they were. Returns the step's reward metrics.

    Raises UserError where a part breaks the contract, or the formula divides by zero.
    """
    for group in kept.groups:
        for trajectory in group:
            clear(trajectory)
    rounds = [(sum(map(len, one.groups)), _judged(one, kept.step, manager)) for one in kept.rounds]
    metrics = merged(rounds)
    metrics.pop("rollout/rounds", None)
    if kept.forks is not None:
        of_forks = _judged(kept.forks, kept.step, manager) if kept.forks.asked else {}
        metrics = with_added(metrics, fork_metrics(len(kept.forks.asked), kept.forks.groups, of_forks))
    return metrics


def _judged(one: KeptRound, step: int, manager: RewardManager) -> dict[str, float]:
    pending = manager.begin(step, one.asked, counted=False)  # failures in a row are those of steps in a row
    for number, group in zip(one.came, one.groups, strict=True):
        pending.add(number, group)
    return pending.finish(one.groups).metrics


def reward_differences(groups: Sequence[Group], stored: Mapping[str, Judged]) -> list[ValueDifference]:
    """Every part, credit and reward that is not what was stored, by trajectory."""
    found = []
    for trajectory in (t for group in groups for t in group):
        was = stored[trajectory.key]
        for part in dict.fromkeys([*was.rewards, *trajectory.rewards]):
            pair = was.rewards.get(part), trajectory.rewards.get(part)
            credits = was.segment_rewards.get(part), trajectory.segment_rewards.get(part)
            if pair[0] != pair[1]:
                found.append(ValueDifference(trajectory.key, part, *pair))
            elif credits[0] != credits[1]:
                found.append(ValueDifference(trajectory.key, part, *credits))
        if was.reward != trajectory.reward:
            found.append(ValueDifference(trajectory.key, "reward", was.reward, trajectory.reward))
    return found


# ---- advantages --------------------------------------------------------------------------------------------------


def credit_again(kept: KeptStep, config: GrpoConfig) -> tuple[Ledger, dict[str, float]]:
    """Advantages of the judged groups, and the ledger's metrics. Returns both."""
    replaced: dict[str, int] = {}
    if len(kept.rounds) > 1:  # what all rounds but the last one left to be replaced
        earlier = replace(kept, rounds=kept.rounds[:-1], forks=None)
        before = compute_advantages([list(group) for group in earlier.groups], config, earlier.failed)
        drop_untrainable(before, config)
        replaced = dict(before.dropped)
    ledger = compute_advantages([list(group) for group in kept.groups], config, kept.failed)
    drop_untrainable(ledger, config)
    if config.max_rollout_rounds > 1:
        ledger.replaced = replaced
        ledger.check()
    metrics = ledger.metrics()
    if kept.forks is not None:
        metrics["forks/trained"] = float(sum(group[0].parent is not None for group in ledger.trained))
    return ledger, metrics


def advantage_differences(groups: Sequence[Group], stored: Mapping[str, Judged]) -> list[ValueDifference]:
    """The first segment of each trajectory whose advantage is not what was stored."""
    found = []
    for trajectory in (t for group in groups for t in group):
        was_S, here_S = stored[trajectory.key].advantage_S, trajectory.advantage_S
        if was_S is None or here_S is None:
            if was_S is not here_S:
                found.append(ValueDifference(trajectory.key, "its advantages", was_S, here_S))
            continue
        differs = np.flatnonzero(was_S != here_S)
        if len(differs):
            at = int(differs[0])
            what = f"the advantage of segment {at} ({trajectory.segments[at].role})"
            found.append(ValueDifference(trajectory.key, what, float(was_S[at]), float(here_S[at])))
    return found


# ---- the loss, from the kept decisions ----------------------------------------------------------------------------


def loss_again(kept: KeptStep, ledger: Ledger, config: GrpoConfig) -> dict[str, float]:
    """The loss and its metrics from the kept log-ratios and divergences, with the weights and advantages of now.

    Empty where nothing was trained.
    """
    steps = by_step(kept.forwards)
    if not steps:
        return {}
    settings = loss_settings(config)
    parts = [part for part in (trainable(p, config) for p in split_groups(ledger.trained, config.num_minibatches))
             if part]  # fmt: skip
    # Each process adds up its own forwards before they are added together: sums are rounded by their order.
    sums: dict[int, Tensor] = {}
    losses: list[Tensor] = []
    for number, processes in enumerate(steps):
        by_key = {(t.group, t.member): t for t in parts[number % len(parts)]} if parts else {}
        weight_of = _weights(by_key, [one for mine in processes.values() for one in mine], config)
        loss_2 = torch.zeros(2, dtype=torch.float64)
        for process, forwards in processes.items():
            mine_2 = torch.zeros(2, dtype=torch.float64)
            mine_KM = torch.zeros(len(DecisionKind), len(SUMS), dtype=torch.float64)
            for forward in forwards:
                loss = policy_loss(_decisions(forward, by_key, weight_of, config), settings)
                mine_2 += torch.stack([loss.loss, loss.policy]).double()
                mine_KM = mine_KM + loss.sums_KM
            loss_2 = loss_2 + mine_2
            sums[process] = sums[process] + mine_KM if process in sums else mine_KM
        losses.append(loss_2)
    total, policy = torch.stack(losses).mean(0).tolist()
    metrics = summarise(sum(sums.values(), torch.zeros(()))) | {
        "loss/total": total,
        "loss/policy": policy,
        "loss/kl": total - policy,
    }
    trained = [t for part in parts for t in part]
    metrics |= {
        "trained/trajectories": float(len(trained)),
        "trained/tokens": float(sum(t.num_tokens() for t in trained)),
    }
    ratios = _ratios([[one for mine in processes.values() for one in mine] for processes in steps])
    untold = needing_weights(kept)
    if "on_policy_gap" not in kept.metrics:  # older weights sampled, or another engine: then it is no gap
        untold += ("on_policy_gap",)
    return metrics | {name: value for name, value in ratios.items() if name not in untold}


def _weights(
    by_key: Mapping[tuple[int, int], Trajectory], forwards: Sequence[KeptForward], config: GrpoConfig
) -> dict[tuple[int, int], np.ndarray]:
    """weight_S of each trajectory of an optimiser step."""
    local = {key: np.full(len(trajectory.segments), -1) for key, trajectory in by_key.items()}
    for number, forward in enumerate(forwards):
        if not bool(forward.padding):
            for row, segment in zip(forward.pass_N.tolist(), forward.segment_N.tolist(), strict=True):
                if (key := forward.keys[row]) in local:
                    local[key][segment] = number
    weights = segment_weights(list(by_key.values()), list(local.values()), config) if by_key else []
    return dict(zip(by_key, weights, strict=True))


def _decisions(
    forward: KeptForward,
    by_key: Mapping[tuple[int, int], Trajectory],
    weight_of: Mapping[tuple[int, int], np.ndarray],
    config: GrpoConfig,
) -> ScoredDecisions:
    """What the loss took, with the advantages and weights of now. A trajectory that is not trained any more counts for
    nothing."""
    keys = forward.keys
    segments = 1 + int(forward.segment_N.max()) if len(forward.segment_N) else 1
    shape = (len(keys), max([segments, *(len(by_key[key].segments) for key in keys if key in by_key)]))
    weight_PS, advantage_PS = torch.zeros(shape), torch.zeros(shape)
    for row, key in enumerate(keys):
        if key in by_key and not bool(forward.padding):
            weight_PS[row, : len(weight_of[key])] = torch.from_numpy(weight_of[key])
        if key in by_key and (advantage_S := by_key[key].advantage_S) is not None:
            advantage_PS[row, : len(advantage_S)] = torch.from_numpy(advantage_S)
    at = (forward.pass_N, forward.segment_N)
    weight_N = weight_PS[at] * kind_weights(config)[forward.kind_N]
    if config.changed_weight != 1 and not bool(forward.padding):
        weight_N = weight_N * _changed_weights(forward, by_key, config.changed_weight)
    if config.flow.ratio == "guard":  # which weighs a denoising step by its size, known to the policy alone
        weight_N = torch.where(forward.kind_N == DecisionKind.FLOW, forward.weight_N, weight_N)
    return ScoredDecisions(
        forward.log_ratio_N,
        advantage_PS[at],
        forward.kind_N,
        weight_N,
        forward.trajectory_P[forward.pass_N],
        forward.divergence_N,
        forward.behaviour_log_ratio_N,
        forward.entropy_N,
    )


def _changed_weights(forward: KeptForward, by_key: Mapping[tuple[int, int], Trajectory], weight: float) -> torch.Tensor:
    """policy.scoring.changed.changed_weights, of kept decisions."""
    weight_N = torch.ones(len(forward.pass_N))
    for row, key in enumerate(forward.keys):
        if key not in by_key:
            continue
        for segment in forward.segment_N[forward.pass_N == row].unique().tolist():
            changed_C = changed_codes(by_key[key], segment)
            if changed_C is not None:
                at_C = torch.nonzero((forward.pass_N == row) & (forward.segment_N == segment))[:, 0]
                weight_N[at_C[torch.from_numpy(changed_C)]] = weight
    return weight_N


def needing_weights(kept: KeptStep) -> tuple[str, ...]:
    """The loss's metrics that the kept decisions do not tell: of denoising steps they are of log-probs, and what is
    kept are ratios of means."""
    flow = any(bool((one.kind_N == DecisionKind.FLOW).any()) for one in kept.forwards.values())
    return ("log_ratio/max", "on_policy_gap") if flow else ()


def _ratios(steps: Sequence[Sequence[KeptForward]]) -> dict[str, float]:
    """log_ratio/max and on_policy_gap."""
    everything = [forward for step in steps for forward in step]
    # Against the weights at the start of the update, which were scored if they had not sampled, or not alone.
    gaps = [one.log_ratio_N if one.behaviour_log_ratio_N is None else one.behaviour_log_ratio_N for one in everything]
    first = gaps[: len(steps[0])] if everything[0].behaviour_log_ratio_N is None else gaps
    return {
        "log_ratio/max": max(float(one.log_ratio_N.abs().max()) for one in everything),
        "on_policy_gap": max(float(gap_N.abs().max()) for gap_N in first),
    }


# ---- the whole update ----------------------------------------------------------------------------------------------


def update_again(kept: KeptStep, ledger: Ledger, trainer: Trainer) -> tuple[dict[str, float], list[ValueDifference]]:
    """The step's update by a trainer that holds the weights before it, which this moves. Returns its metrics, and the
    first decision whose log-prob is not the kept one.

    Raises TrainingError as Trainer.update.
    """
    made = KeptUpdate()
    metrics = trainer.update(ledger.trained, made)
    found = first_difference(kept.forwards, made.forwards)
    if found is None:
        return metrics, []
    key, segment, stored, here = found
    by_key = {(t.group, t.member): t for group in kept.groups for t in group}
    what = f"a log-prob in segment {segment} ({by_key[key].segments[segment].role})"
    return metrics, [ValueDifference(f"{key[0]}-{key[1]}", what, stored, here)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def shown(value: Any) -> str:
    """A trajectory's value as a person reads it."""
    return f"{value:.9g}" if isinstance(value, float) else "none" if value is None else str(value)
