"""The judge: runs every part over a step's groups, combines them by the recipe's formula, fills the trajectories.

The toolkit's quick parts run in one thread of the driver, beside the rollout; all others in workers of their own, in
processes or Ray actors (workers.py). A part that fails is called again, then its rows are None, counted and shown; past
the recipe's limit the run stops. judgement.py is one step of it. A part's UserError (a wrong length, a class that the
detector lacks) flies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from formats.base import Format
from record.trajectory import Trajectory
from rewards.config import ComponentConfig, RewardsConfig, WorkersConfig
from rewards.contract import RewardContext, RewardFailed, TrainerState, Value, columns_of
from rewards.detectors.base import CachedDetector, Detector
from rewards.pending import ComponentOutcome, Group, PendingRewards, RewardReport, report_of
from rewards.registry import REWARDS
from rewards.runtime.served_detector import ServedDetector
from rewards.runtime.serving import CallFailed, ComponentSpec, DetectorSpec, RewardContextSpec, check_prompts
from rewards.runtime.workers import CallFailure, Component, Executor, Worker, workers_of
from runtime.ray_cluster import Cluster, start_ray
from tasks.base import Split

__all__ = ["CallFailure", "RewardManager", "RewardReport", "detector_of"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
logger = logging.getLogger(__name__)


class RewardManager:
    """Scores groups of trajectories. Use as a context manager, or close it: it may own processes."""

    def __init__(
        self,
        config: RewardsConfig,
        task: Any = None,
        fmt: Format | None = None,
        detector: Detector | None = None,
        max_steps: int = 0,
        columns: Sequence[str] | None = None,
    ) -> None:
        """Load every part and start the workers of those that have some.

        Args:
            columns: of the records that will be judged; None: those of the task's prompts, where there is a task.

        Raises:
            UserError: a part that cannot be loaded, or that asks for a column that no record has; a detector that is
                missing or lacks a class of the task's prompts; a judge's endpoint that is down.
        """
        self.config, self.max_steps = config, max_steps
        self.expression = config.expression()
        if columns is None and task is not None:
            columns = columns_of(record for split in SPLITS for record in task.prompts(split))
        self._columns = None if columns is None else tuple(columns)
        self._spec = RewardContextSpec(task, fmt, detector if detector is not None else config.detector, config.judge)
        self.parts: dict[str, Component] = {}
        self._served: ServedDetector | None = None
        self._cluster: Cluster | None = None
        self._driver = Executor("driver")
        self.context = RewardContext()  # until it is built
        self._bad_steps: dict[str, int] = dict.fromkeys(config.parts, 0)  # in a row, over half of the rows failed
        self._bare_steps = 0  # in a row, no trajectory had a reward
        try:
            if config.ray_cpus is not None:
                self._cluster = start_ray(config.ray_cpus)
            self.context = self._setting(task)
            self._check_judge()
            self.parts = {name: self._part(name, part) for name, part in config.parts.items()}
            self._start([(name, worker) for name, part in self.parts.items() for worker in part.workers])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the parts' workers and threads. Idempotent."""
        # What the driver's thread may be waiting for ends first: workers, detector, the judge's answers.
        for part in self.parts.values():
            part.stop()
        if self._served is not None:
            self._served.close()
        self._close_judge()
        for part in self.parts.values():
            part.close()
        self._driver.close()
        self._close_judge()  # a call that was cut short may have asked it once more
        if self._cluster is not None:
            self._cluster.stop()

    def _close_judge(self) -> None:
        client: Any = self.context.judge
        if hasattr(client, "close"):
            client.close()

    # ---- judging ----

    def score(self, groups: Sequence[Group], step: int = 0, counted: bool = True) -> RewardReport:
        """Fill `rewards`, `segment_rewards` and `reward` of every trajectory.

        A part's row of {segment: value} becomes `segment_rewards[part]`, and its mean stands in the formula; of a
        log-only component it is kept in `info["rewards"][part]["segments"]`, where no advantage reads it. What parts
        log by row is kept in `info["rewards"][part]`.

        Raises:
            RewardFailed: a part failed, or nothing was judged, for `none_limit` steps in a row.
            UserError: a part breaks the contract, or the formula divides by zero.
        """
        return self.begin(step, [len(group) for group in groups], counted).finish(groups)

    def begin(self, step: int, sizes: Sequence[int], counted: bool = True) -> PendingRewards:
        """Begin a step in which groups of these sizes are being sampled; they are judged as they come in.

        `counted`: whether it counts towards none_limit: a step's first rollout does, further ones and held-out prompts
        do not.
        """
        if self.context.detector is not None:
            self.context.detector.clear()
        complete = partial(self._complete, counted=counted)
        return PendingRewards(
            list(self.parts.values()), TrainerState(step, self.max_steps), sizes, complete, self.close
        )

    def _complete(
        self, groups: Sequence[Group], outcomes: dict[str, ComponentOutcome], step: int, counted: bool = True
    ) -> RewardReport:
        trajectories = [trajectory for group in groups for trajectory in group]
        if not trajectories:
            return RewardReport({}, [], 0, 0)
        for trajectory in trajectories:
            self._fill(trajectory, outcomes)
        schedules = {name: schedule.value(step) for name, schedule in self.config.schedules.items()}
        self._pay(groups, trajectories, schedules)
        report = report_of(trajectories, outcomes)
        report.metrics |= {f"reward/schedule/{name}": value for name, value in schedules.items()}
        for sentence in report.sentences():
            logger.warning(sentence)
        for fault in report.failures:
            if fault.stack and fault.rows:
                logger.warning("reward part '%s' stood at:\n%s", fault.part, fault.stack)
        if counted:
            self._check_limits(trajectories, outcomes, step)
        return report

    def _fill(self, trajectory: Trajectory, outcomes: Mapping[str, ComponentOutcome]) -> None:
        values = {name: outcome.values[id(trajectory)] for name, outcome in outcomes.items()}
        trajectory.rewards = {name: _mean(value) for name, value in values.items()}
        trajectory.segment_rewards, logged = {}, {}
        for name, value in values.items():
            row = dict(outcomes[name].columns[id(trajectory)])
            if isinstance(value, dict):
                if self.config.parts[name].log_only:
                    row["segments"] = {str(segment): credit for segment, credit in value.items()}
                else:
                    trajectory.segment_rewards[name] = dict(value)
            if row:
                logged[name] = row
        trajectory.info["rewards"] = logged

    def _pay(self, groups: Sequence[Group], trajectories: Sequence[Trajectory], schedules: dict[str, float]) -> None:
        rows, at = [], 0
        for group in groups:
            rows.append(list(range(at, at + len(group))))
            at += len(group)
        rewards = self.expression.rows(
            [{**t.rewards, **schedules} for t in trajectories], rows, [t.key for t in trajectories]
        )
        for trajectory, reward in zip(trajectories, rewards, strict=True):
            trajectory.reward = reward

    def _check_limits(
        self, trajectories: Sequence[Trajectory], outcomes: Mapping[str, ComponentOutcome], step: int
    ) -> None:
        limit = self.config.none_limit
        for name, outcome in outcomes.items():
            failed = outcome.failed_rows * 2 > len(trajectories)
            self._bad_steps[name] = self._bad_steps[name] + 1 if failed else 0
            if self._bad_steps[name] >= limit:
                raise RewardFailed(
                    f"reward part '{name}' ({self.config.parts[name].function}) failed in {limit} "
                    f"step(s) in a row, up to step {step}: {_first_message(outcome)}. Mend it, or raise "
                    f"rewards.none_limit"
                )
        self._bare_steps = 0 if any(t.reward is not None for t in trajectories) else self._bare_steps + 1
        if self._bare_steps >= limit:
            empty = [
                name
                for name in self.expression.names
                if name in outcomes and all(value is None for value in outcomes[name].values.values())
            ]
            what = " and ".join(f"'{name}'" for name in empty) or "some part of every one"
            raise RewardFailed(
                f"no trajectory had a reward in {limit} step(s) in a row, up to step {step}: {what} "
                f"gave None for all. If that is meant, write coalesce(part, 0) into rewards.total"
            )

    # ---- building ----

    def _setting(self, task: Any) -> RewardContext:
        """What the parts in the driver share. The detector is looked for only where one of them needs it."""
        needing = [
            REWARDS[part.function]
            for part in self.config.parts.values()
            if part.runs_on == "driver" and part.function in REWARDS and REWARDS[part.function].needs_detector
        ]
        if not needing:
            return self._spec.build(detector=self._spec.detector is None)  # the task's own costs nothing
        if self.config.detector_workers is None:
            context = self._spec.build()
        else:
            workers = workers_of(
                DetectorSpec(self._spec),
                self.config.detector_workers,
                self.config.detector_timeout_s,
                ComponentConfig.model_fields["load_timeout_s"].default,
            )
            self._served = ServedDetector(workers, self.config.detector_workers.batch_size)
            self._start([("detector", worker) for worker in workers])
            self._served.introduce()
            context = self._spec.build(detector=False)
            context.detector = CachedDetector(self._served)
        check_prompts(context.detector_for(needing[0].name), task, any(reward.by_geneval for reward in needing))
        return context

    def _check_judge(self) -> None:
        """Raises UserError where the endpoint is down."""
        if self.config.judge is not None and self.config.judge.check_at_start:
            check = getattr(self.context.judge, "check", None)
            if check is not None:
                check({need for part in self.config.parts.values() for need in _judge_needs(part)})

    def _part(self, name: str, part: ComponentConfig) -> Component:
        own = part.function in REWARDS
        spec = ComponentSpec(
            name,
            part.function,
            part.options,
            part.factory,
            part.completions,
            self._spec if own else None,
            self.config.judge,
            self._columns,
            _conversational(self._spec.task, self._spec.fmt),
        )
        if part.runs_on == "driver":
            return Component(name, part, self._driver, spec.load(self.context if own else None))
        workers = workers_of(spec, part.workers or WorkersConfig(), part.timeout_s, part.load_timeout_s)
        return Component(name, part, Executor(name, workers), None, workers)

    def _start(self, workers: Sequence[tuple[str, Worker]]) -> None:
        """Start all workers at once: each imports its function, which can take long."""
        if not workers:
            return
        with ThreadPoolExecutor(len(workers)) as pool:
            starting = [(name, pool.submit(worker.start)) for name, worker in workers]
            try:
                wait([future for _, future in starting])
            except BaseException:  # Ctrl-C: nobody waits until they have loaded
                for _, worker in workers:
                    worker.close()
                raise
        for name, future in starting:
            where = "detector" if name == "detector" and name not in self.config.parts else f"parts.{name}"
            try:
                future.result()
            except OSError as error:  # no more processes, files or memory
                raise RewardFailed(
                    f"rewards.{where}: its worker cannot be started ({error.strerror or error}); ask for fewer workers"
                ) from None
            except CallFailed as failure:
                raise RewardFailed(f"rewards.{where}: {failure.message}\n{failure.stack}".rstrip()) from None


def _judge_needs(part: ComponentConfig) -> tuple[str, ...]:
    """What a part of the toolkit's own asks of the judge beside words."""
    return REWARDS[part.function].judge_needs if part.function in REWARDS else ()


def _conversational(task: Any, fmt: Format | None) -> bool:
    """Whether TRL would call the run's prompts conversations: it must where a prompt or a thought holds images."""
    if fmt is None or fmt.max_images > 0:
        return True
    records = task.prompts("train") if task is not None else ()
    return any(not isinstance(r.get("prompt", ""), str) or r.get("image") or r.get("images") for r in records)


def detector_of(config: RewardsConfig, task: Any) -> Detector | None:
    """The recipe's detector, else the task's own. Raises UserError where it cannot be made."""
    return RewardContextSpec(task=task, detector=config.detector).detector_or_none()


def _mean(value: Value) -> float | None:
    return math.fsum(value.values()) / len(value) if isinstance(value, dict) else value


def _first_message(outcome: ComponentOutcome) -> str:
    """Of the last fault that says what happened."""
    told = [fault for fault in outcome.failures if fault.kind != "given up"] or outcome.failures
    return told[-1].message
