"""Rewards of stored trajectories computed again: each part as the recipe has it, but for those that ask somebody
outside, whose stored values stand in for their answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from formats.base import Format
from record.trajectory import Trajectory
from rewards.config import ComponentConfig, RewardsConfig, WorkersConfig
from rewards.contract import Logs, TrainerState, Value, asks_judge
from rewards.loader import is_own, load_reward
from rewards.manager import RewardManager
from rewards.registry import REWARDS
from rewards.runtime.workers import Component


class StoredValues:
    """A part's function in a replay: what the part said when the trajectories were judged, and nothing logged."""

    judge = None

    def __init__(self, values: Mapping[str, Value]) -> None:
        """values: by a trajectory's key."""
        self.values = values

    def __call__(self, trajectories: Sequence[Trajectory], state: TrainerState) -> tuple[list[Value], Logs]:
        return [self.values[trajectory.key] for trajectory in trajectories], Logs()


class ReplayManager(RewardManager):
    """A RewardManager in which some parts are not called: what they said of each trajectory is given."""

    def __init__(
        self,
        config: RewardsConfig,
        task: Any = None,
        fmt: Format | None = None,
        max_steps: int = 0,
        stored: Mapping[str, Mapping[str, Value]] | None = None,
    ) -> None:
        """stored: by part, then by a trajectory's key.

        Raises UserError as RewardManager.
        """
        self._stored = dict(stored or {})
        if config.judge is not None and set(asking(config)) <= self._stored.keys():
            config = config.model_copy(update={"judge": config.judge.model_copy(update={"check_at_start": False})})
        super().__init__(config, task, fmt, max_steps=max_steps)

    def _part(self, name: str, part: ComponentConfig) -> Component:
        if name not in self._stored:
            return super()._part(name, part)
        here = part.model_copy(update={"workers": None, "isolate": False})
        return Component(name, here, self._driver, StoredValues(self._stored[name]))


def said(trajectories: Iterable[Trajectory], part: str) -> dict[str, Value]:
    """What a part said of judged trajectories, by their keys."""
    return {trajectory.key: _said(trajectory, part) for trajectory in trajectories}


def clear(trajectory: Trajectory) -> None:
    """Make it as it was before anybody judged it."""
    trajectory.rewards, trajectory.segment_rewards, trajectory.reward = {}, {}, None
    trajectory.advantage_S = None
    trajectory.info.pop("rewards", None)


def _said(trajectory: Trajectory, part: str) -> Value:
    credited: Mapping[Any, Any] | None = trajectory.segment_rewards.get(part)
    if credited is None:  # a log-only part's stand elsewhere
        credited = trajectory.info.get("rewards", {}).get(part, {}).get("segments")
    if credited is None:
        return trajectory.rewards.get(part)
    return {int(segment): value for segment, value in credited.items()}


def asking(config: RewardsConfig) -> list[str]:
    """The parts that ask a judge: the toolkit's own that need one, and functions that take the argument `judge`.

    Raises RewardError for a function that cannot be loaded.
    """
    found = []
    for name, part in config.parts.items():
        if is_own(part.function):
            asks = REWARDS[part.function].needs_judge
        else:
            asks = config.judge is not None and asks_judge(load_reward(part.function, part.options, part.factory))
        if asks:
            found.append(name)
    return found


def on_this_machine(config: RewardsConfig) -> RewardsConfig:
    """The same rewards with processes of this machine in place of Ray's actors. Calls are divided as they were."""

    def local(workers: WorkersConfig | None) -> WorkersConfig | None:
        if workers is None or workers.kind == "process":
            return workers
        return WorkersConfig(count=workers.count, batch_size=workers.batch_size)

    parts = {name: part.model_copy(update={"workers": local(part.workers)}) for name, part in config.parts.items()}
    return config.model_copy(update={"parts": parts, "detector_workers": local(config.detector_workers)})
