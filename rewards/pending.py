"""One step's judgement, which may begin while the step is still being rolled out: groups come in as they finish, the
calls that they complete run at once, and `finish` waits for the rest and fills the trajectories.

    judgement = judge.begin(step, [len(request.members) for request in requests])
    judgement.add(index, group)            # as groups finish, in any order
    report = judgement.finish(groups)      # all of them, in their order

Which trajectories make one call is settled by the sizes (workers.plan), so the order of arrival changes nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field

from record.trajectory import Trajectory
from rewards.contract import TrainerState, Value
from rewards.credit import mean_shares
from rewards.limits import mean_or_nan
from rewards.runtime.workers import CallFailure, Component, Outcome, RowSlice

logger = logging.getLogger(__name__)
Group = Sequence[Trajectory]


@dataclass
class RewardReport:
    """What a judgement says beside the filled trajectories."""

    metrics: dict[str, float]  # reward/mean, reward/<part>, reward/<part>/none, reward/<part>/<logged> ...
    failures: list[CallFailure]
    judged: int  # trajectories with a reward
    unjudged: int

    def sentences(self) -> list[str]:
        """The faults, for a person to read."""
        return [
            f"reward part '{f.part}'{f', attempt {f.attempt}' if f.attempt else ''}: {f.message}"
            + (f"; {f.rows} trajectories go unjudged" if f.rows else "")
            for f in self.failures
        ]


@dataclass
class _Call:
    """One call of a part: the rows it is for, and those groups of it that are still being sampled."""

    part: Component
    stretches: tuple[RowSlice, ...]
    missing: set[int]
    future: Future[Outcome] | None = None
    rows: list[Trajectory] = field(default_factory=list)

    def send(self, groups: Mapping[int, Group], state: TrainerState) -> None:
        for stretch in self.stretches:
            self.rows += groups.get(stretch.group, ())[stretch.start : stretch.stop]
        if self.rows:
            self.future = self.part.submit(self.rows, state)


@dataclass
class ComponentOutcome:
    """A part over all trajectories of the step."""

    values: dict[int, Value]  # by id() of the trajectory
    columns: dict[int, dict[str, object]]  # likewise: what it logged of it
    calls: list[Outcome]

    @property
    def failed_rows(self) -> int:
        return sum(call.failed_rows for call in self.calls)

    @property
    def failures(self) -> list[CallFailure]:
        return [fault for call in self.calls for fault in call.failures]


class PendingRewards:
    """See above. `complete` is the judge's: it makes the report of what the parts said."""

    def __init__(
        self,
        parts: Sequence[Component],
        state: TrainerState,
        sizes: Sequence[int],
        complete: Callable[[Sequence[Group], dict[str, ComponentOutcome], int], RewardReport],
        abandon: Callable[[], None],
    ) -> None:
        self.state, self._sizes, self._complete, self._abandon = state, list(sizes), complete, abandon
        self._groups: dict[int, Group] = {}
        self._calls = {
            part.name: [_Call(part, stretches, {s.group for s in stretches}) for stretches in part.plan(self._sizes)]
            for part in parts
        }
        for part in parts:
            part.begin()

    def add(self, index: int, group: Group) -> None:
        """Take in a finished group and start the calls that waited for it. Returns at once.

        Raises whatever a part that breaks the contract has raised meanwhile.
        """
        if not 0 <= index < len(self._sizes) or index in self._groups:
            raise ValueError(f"group {index} was not announced, or came twice")
        self._groups[index] = group
        for call in self._all():
            if index in call.missing:
                call.missing.discard(index)
                if not call.missing:
                    call.send(self._groups, self.state)
        self._raise_what_failed()

    def finish(self, groups: Sequence[Group]) -> RewardReport:
        """Wait until everything is judged. `groups`: all that came back, in order; those that were not added yet are
        now, and whatever waits for a group that never came goes without it.

        Raises:
            RewardFailed: a part failed, or nothing was judged, for `none_limit` steps in a row.
            UserError: a part breaks the contract, or the formula divides by zero.
        """
        finished = time.monotonic()
        self._add_the_rest(groups)
        for call in self._all():
            if call.missing:
                call.missing.clear()
                call.send(self._groups, self.state)
        try:
            wait([call.future for call in self._all() if call.future is not None], return_when=FIRST_EXCEPTION)
            self._raise_what_failed()
        except BaseException:  # Ctrl-C, or a part that breaks the contract: nobody waits for the others
            self._abandon()
            raise
        waited = time.monotonic() - finished
        report = self._complete(
            groups, {name: _gathered(calls) for name, calls in self._calls.items()}, self.state.global_step
        )
        if report.metrics:
            report.metrics["time/reward/waited"] = waited
            report.metrics["time/reward/hidden"] = self._busy_until(finished)
        return report

    def _all(self) -> list[_Call]:
        return [call for calls in self._calls.values() for call in calls]

    def _add_the_rest(self, groups: Sequence[Group]) -> None:
        known = {id(group[0]) for group in self._groups.values() if group}
        free = iter([index for index in range(len(self._sizes)) if index not in self._groups])
        for group in groups:
            if group and id(group[0]) not in known:
                index = next(free, None)
                if index is None:
                    raise ValueError(f"{len(groups)} groups came back of {len(self._sizes)} that were announced")
                self.add(index, group)

    def _raise_what_failed(self) -> None:
        for call in self._all():
            if call.future is not None and call.future.done():
                call.future.result()

    def _busy_until(self, moment: float) -> float:
        """Seconds before `moment` in which at least one call ran."""
        spans = sorted(
            (outcome.began, min(outcome.ended, moment))
            for call in self._all()
            if call.future is not None
            for outcome in [call.future.result()]
            if outcome.began < moment
        )
        total = end = 0.0
        for began, ended in spans:
            total += max(0.0, ended - max(began, end))
            end = max(end, ended)
        return total


def _gathered(calls: Sequence[_Call]) -> ComponentOutcome:
    gathered = ComponentOutcome({}, {}, [])
    for call in calls:
        if call.future is None:
            continue
        outcome = call.future.result()
        gathered.calls.append(outcome)
        for row, trajectory in enumerate(call.rows):
            gathered.values[id(trajectory)] = outcome.values[row]
            gathered.columns[id(trajectory)] = {
                column: values[row] for column, values in outcome.logs.columns.items() if len(values) == len(call.rows)
            }
    return gathered


# ---- the report --------------------------------------------------------------------------------------------------


def report_of(trajectories: Sequence[Trajectory], outcomes: Mapping[str, ComponentOutcome]) -> RewardReport:
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
        metrics[f"time/reward/{name}"] = math.fsum(call.ended - call.began for call in outcome.calls)
        metrics |= {f"reward/{name}/{metric}": value for metric, value in _logged(outcome.calls).items()}
    for name, shares in mean_shares(trajectories).items():
        metrics |= {f"reward/{name}/role/{role}": share for role, share in shares.items()}
    metrics |= _asked(outcomes)
    failures = [fault for outcome in outcomes.values() for fault in outcome.failures]
    return RewardReport(metrics, failures, len(rewards), total - len(rewards))


def _logged(calls: Sequence[Outcome]) -> dict[str, float]:
    """The mean of each metric over a part's calls, each weighted by the rows that it judged; NaN where they cannot be
    added up."""
    means: dict[str, list[tuple[int, float]]] = {}
    for call in calls:
        judged = sum(value is not None for value in call.values)
        for metric, values in call.logs.metrics.items():
            means.setdefault(metric, []).append((judged, mean_or_nan(values)))
    return {
        metric: mean_or_nan([mean for _, mean in weighted], [judged for judged, _ in weighted])
        for metric, weighted in means.items()
    }


def _asked(outcomes: Mapping[str, ComponentOutcome]) -> dict[str, float]:
    """What all parts asked of the judge: how many questions, attempts that were repeated, and shares of the rest."""
    counts: dict[str, int] = {}
    for outcome in outcomes.values():
        for call in outcome.calls:
            for name, count in call.logs.judge.items():
                counts[name] = counts.get(name, 0) + count
    asked = counts.pop("asked", 0)
    if not asked:
        return {}
    metrics = {"judge/asked": float(asked), "judge/retried": float(counts.pop("retried", 0)), "judge/unjudged": 0.0}
    return metrics | {f"judge/{name}": count / asked for name, count in counts.items()}
