"""The judge: runs every part over a step's groups, combines them by the recipe's formula, fills the trajectories.

The toolkit's own parts run here, in the driver; everybody else's run in processes of their own (isolate.py), all at
once. A part that fails is called again, then its rows are None, counted and shown; past the recipe's limit the run
stops. Only the part's fault is caught here: a UserError (a wrong length, a class the detector lacks) flies.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rewards.base import Logs, RewardFailed, Setting, TrainerState, Value, call, check_options, is_broken
from rewards.config import PartConfig, RewardsConfig
from rewards.detectors.base import Detector
from rewards.detectors.registry import DetectorConfig, build_detector
from rewards.detectors.shapes import TaskDetector
from rewards.geneval import check_record
from rewards.isolate import CallFailed, IsolatedReward, describe
from rewards.loader import load_object, load_reward, make
from rewards.registry import REWARDS
from rollout.errors import UserError
from rollout.formats.base import ThoughtFormat
from rollout.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One failed call of a part, for the log and the report."""

    part: str
    kind: str  # "raised", "timeout", "crash" or "nan"
    message: str
    attempt: int  # from 1
    rows: int  # left unjudged by it; 0 if a later attempt succeeded
    stack: str = ""  # where it hung or what it raised


@dataclass
class JudgeReport:
    """What a judgement says beside the filled trajectories."""

    metrics: dict[str, float]  # reward/mean, reward/<part>, reward/<part>/none, reward/<part>/<logged> ...
    faults: list[Fault]
    judged: int  # trajectories with a reward
    unjudged: int

    def sentences(self) -> list[str]:
        """The faults, for a person to read."""
        return [f"reward part '{f.part}', attempt {f.attempt}: {f.message}"
                + (f"; {f.rows} trajectories go unjudged" if f.rows else "") for f in self.faults]


@dataclass
class _Outcome:
    """One part over all trajectories."""

    values: list[Value]
    logs: Logs
    faults: list[Fault] = field(default_factory=list)
    failed_rows: int = 0  # None by the part's fault, unlike None by its choice
    seconds: float = 0.0


class Judge:
    """Scores groups of trajectories. Use as a context manager, or close it: it may own processes."""

    def __init__(self, config: RewardsConfig, task: Any = None, fmt: ThoughtFormat | None = None,
                 detector: Detector | None = None, max_steps: int = 0) -> None:
        """Load every part and start the processes of those that have one.

        Raises:
            UserError: a part that cannot be loaded, a detector that is missing or lacks a class of the task's prompts.
        """
        self.config, self.max_steps = config, max_steps
        self.expression = config.expression()
        self.setting = Setting.of(task, fmt, detector if detector is not None else detector_of(config, task))
        self._own: dict[str, Any] = {}
        self._isolated: dict[str, IsolatedReward] = {}
        self._bad_steps: dict[str, int] = dict.fromkeys(config.parts, 0)  # in a row, over half of the rows failed
        self._closed = False
        self._bare_steps = 0  # in a row, no trajectory had a reward
        self._check_detector(task)
        try:
            for name, part in config.parts.items():
                if part.isolated:
                    self._isolated[name] = IsolatedReward(name, part.function, part.options, part.factory,
                                                          part.completions, part.timeout_s, part.load_timeout_s)
                else:
                    self._own[name] = self._load(name, part)
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the parts' processes. Idempotent."""
        self._closed = True
        for isolated in self._isolated.values():
            isolated.close()

    def judge(self, groups: Sequence[Sequence[Trajectory]], step: int = 0) -> JudgeReport:
        """Fill `rewards`, `segment_rewards` and `reward` of every trajectory.

        A part's row of {segment: value} becomes `segment_rewards[part]`, and its mean stands in the formula. What
        parts log by row is kept in `info["rewards"][part]`.

        Raises:
            RewardFailed: a part failed, or nothing was judged, for `none_limit` steps in a row.
            UserError: a part breaks the contract, or the formula divides by zero.
        """
        trajectories = [trajectory for group in groups for trajectory in group]
        if not trajectories:
            return JudgeReport({}, [], 0, 0)
        outcomes = self._outcomes(trajectories, TrainerState(step, self.max_steps))
        for index, trajectory in enumerate(trajectories):
            self._fill(trajectory, {name: outcome.values[index] for name, outcome in outcomes.items()})
            logged = {name: {column: values[index] for column, values in outcome.logs.columns.items()
                             if len(values) == len(trajectories)} for name, outcome in outcomes.items()}
            trajectory.info["rewards"] = {name: row for name, row in logged.items() if row}
        report = _report(trajectories, outcomes)
        for sentence in report.sentences():
            logger.warning(sentence)
        for fault in report.faults:
            if fault.stack and fault.rows:
                logger.warning("reward part '%s' stood at:\n%s", fault.part, fault.stack)
        self._check_limits(trajectories, outcomes, step)
        return report

    def _fill(self, trajectory: Trajectory, values: dict[str, Value]) -> None:
        trajectory.segment_rewards = {name: dict(value) for name, value in values.items() if isinstance(value, dict)}
        trajectory.rewards = {name: math.fsum(value.values()) / len(value) if isinstance(value, dict) else value
                              for name, value in values.items()}
        trajectory.reward = self.expression(trajectory.rewards, trajectory.key)

    def _outcomes(self, trajectories: list[Trajectory], state: TrainerState) -> dict[str, _Outcome]:
        """All parts; those with a process run beside the driver's own."""
        if self.setting.detector is not None:
            self.setting.detector.clear()
        pool = ThreadPoolExecutor(max(1, len(self._isolated)), thread_name_prefix="reward")
        try:
            running = {name: pool.submit(self._attempts, name, trajectories, state) for name in self._isolated}
            done = {name: self._attempts(name, trajectories, state) for name in self._own}
            done |= {name: future.result() for name, future in running.items()}
        except BaseException:  # Ctrl-C, or a part that breaks the contract: nobody waits for the others
            self.close()
            raise
        finally:
            pool.shutdown()
        return {name: done[name] for name in self.config.parts}

    def _attempts(self, name: str, trajectories: list[Trajectory], state: TrainerState) -> _Outcome:
        """Call a part until it answers whole, at most 1 + retries times."""
        part, faults, started = self.config.parts[name], [], time.monotonic()
        values: list[Value] = [None] * len(trajectories)
        logs, broken = Logs(), len(trajectories)
        for attempt in range(1, part.retries + 2):
            if attempt > 1:
                time.sleep(part.retry_wait_s * 2 ** (attempt - 2))
            try:
                values, logs = self._call(name, part, trajectories, state)
                broken = sum(is_broken(value) for value in values)
                if not broken:
                    break
                faults.append(Fault(name, "nan", f"NaN or infinity for {broken} of {len(values)} trajectories",
                                    attempt, 0))
            except CallFailed as failure:
                values, logs, broken = [None] * len(trajectories), Logs(), len(trajectories)
                faults.append(Fault(name, failure.kind, failure.message, attempt, 0, failure.stack))
                if self._closed:
                    break
        if broken:
            last = faults[-1]
            faults[-1] = Fault(last.part, last.kind, last.message, last.attempt, broken, last.stack)
        values = [None if is_broken(value) else value for value in values]
        return _Outcome(values, logs, faults, broken, time.monotonic() - started)

    def _call(self, name: str, part: PartConfig, trajectories: list[Trajectory],
              state: TrainerState) -> tuple[list[Value], Logs]:
        if name in self._isolated:
            return self._isolated[name](trajectories, state)
        options = {} if part.factory else part.options
        setting = self.setting if part.function in REWARDS else None
        try:
            return call(self._own[name], name, trajectories, options=options, state=state, view=part.completions,
                        setting=setting)
        except UserError:
            raise
        except Exception as error:
            raise CallFailed("raised", *describe(error)) from error

    def _load(self, name: str, part: PartConfig) -> Any:
        function, own = load_reward(part.function, part.options, part.factory), part.function in REWARDS
        check_options(function, name, {} if part.factory else part.options, own)
        if own:  # over no trajectories one of ours says only whether its options make sense
            call(function, name, [], options=part.options, state=TrainerState(), view="auto", setting=self.setting)
        return function

    def _start(self) -> None:
        """Start all processes at once: each imports its function, which can take long."""
        if not self._isolated:
            return
        with ThreadPoolExecutor(len(self._isolated)) as pool:
            starting = {name: pool.submit(isolated.start) for name, isolated in self._isolated.items()}
        for name, future in starting.items():
            try:
                future.result()
            except CallFailed as failure:
                raise RewardFailed(f"rewards.parts.{name}: {failure.message}\n{failure.stack}".rstrip()) from None

    def _check_detector(self, task: Any) -> None:
        needing = [name for name, part in self.config.parts.items()
                   if part.function in REWARDS and REWARDS[part.function].needs_detector]
        if not needing:
            return
        detector = self.setting.detector_for(needing[0])
        for split in ("train", "heldout") if task is not None else ():
            for record in task.prompts(split):
                check_record(detector, record, f"prompt '{record.get('prompt', '')}' ({split})")

    def _check_limits(self, trajectories: list[Trajectory], outcomes: dict[str, _Outcome], step: int) -> None:
        limit = self.config.none_limit
        for name, outcome in outcomes.items():
            failed = outcome.failed_rows * 2 > len(trajectories)
            self._bad_steps[name] = self._bad_steps[name] + 1 if failed else 0
            if self._bad_steps[name] >= limit:
                raise RewardFailed(f"reward part '{name}' ({self.config.parts[name].function}) failed in {limit} "
                                   f"step(s) in a row, up to step {step}: {outcome.faults[-1].message}. Mend it, or "
                                   f"raise rewards.none_limit")
        self._bare_steps = 0 if any(t.reward is not None for t in trajectories) else self._bare_steps + 1
        if self._bare_steps >= limit:
            empty = [name for name in self.expression.names if all(v is None for v in outcomes[name].values)]
            what = " and ".join(f"'{name}'" for name in empty) or "some part of every one"
            raise RewardFailed(f"no trajectory had a reward in {limit} step(s) in a row, up to step {step}: {what} "
                               f"gave None for all. If that is meant, write coalesce(part, 0) into rewards.total")


def detector_of(config: RewardsConfig, task: Any) -> Detector | None:
    if isinstance(config.detector, DetectorConfig):
        return build_detector(config.detector)
    if config.detector is not None:
        made = make(load_object(config.detector), config.detector)
        if not hasattr(made, "detect") or not hasattr(made, "classes"):
            raise UserError(f"rewards.detector: {config.detector} made {type(made).__name__}, which has no `detect` "
                            f"and `classes`")
        return made
    return None if task is None else TaskDetector.of(task)


def _report(trajectories: list[Trajectory], outcomes: dict[str, _Outcome]) -> JudgeReport:
    """Means over what was judged; a part that judged nothing has no mean."""
    total = len(trajectories)
    rewards = [t.reward for t in trajectories if t.reward is not None]
    metrics = {"reward/none": 1 - len(rewards) / total}
    if rewards:
        mean = math.fsum(rewards) / len(rewards)
        metrics["reward/mean"] = mean
        metrics["reward/std"] = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    for name, outcome in outcomes.items():
        judged = [value for t in trajectories if (value := t.rewards[name]) is not None]
        if judged:
            metrics[f"reward/{name}"] = math.fsum(judged) / len(judged)
        metrics[f"reward/{name}/none"] = 1 - len(judged) / total
        metrics[f"reward/{name}/failed"] = outcome.failed_rows / total
        metrics[f"time/reward/{name}"] = outcome.seconds
        for metric, values in outcome.logs.metrics.items():
            metrics[f"reward/{name}/{metric}"] = math.fsum(values) / len(values)
    faults = [fault for outcome in outcomes.values() for fault in outcome.faults]
    return JudgeReport(metrics, faults, len(rewards), total - len(rewards))
