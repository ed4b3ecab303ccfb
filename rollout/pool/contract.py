"""What the driver sees of those who write trajectories: requests in, complete groups out, weights renewed in between.

`LocalRollouts` (local.py) writes in this process, `RayRollouts` (ray_rollouts.py) with any number of actors.

Letters: N decisions of a probe's trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from policy.base import Policy
from record.trajectory import Trajectory
from rollout.requests import RequestKey, RolloutRequest
from rollout.weights.probe import Probe
from rollout.weights.wire import WeightUpdate
from runtime.errors import UserError

Each = Callable[[int, list[Trajectory]], None]  # (index of the request, its members), as groups finish


NOT_REPEATABLE = "not_repeatable"  # the worker was lost, and its tools do not let calls be made again


class WorkersError(UserError):
    """Rollout workers that cannot be had, or that keep dying."""


@dataclass(frozen=True)
class FinishedGroup:
    """All members of one request, in order."""

    index: int  # of the request
    group: list[Trajectory]


@dataclass(frozen=True)
class FailedGroup:
    """A request that nobody could serve: it is dropped whole, and counted."""

    index: int  # of the request
    group: int
    reason: str  # "crash" (the worker died), "timeout", "error" (the engine raised) or NOT_REPEATABLE
    detail: str  # the crash itself


@dataclass(frozen=True)
class GenerateResult:
    """Groups in: as many as `groups` and `failed` hold together."""

    groups: list[list[Trajectory]]  # complete ones, in the order of the requests
    failed: list[FailedGroup]
    metrics: dict[str, float]


@dataclass(frozen=True)
class WorkerHealth:
    name: str
    state: str  # "idle", "writing", "starting", "silent" or "dead"
    version: int  # of its weights; UNPUBLISHED: those that it was built with
    pid: int
    restarts: int = 0  # of this worker's place


class Rollouts(Protocol):
    """What the driver sees of the workers, wherever they are."""

    @property
    def version(self) -> int:
        """Of the weights that sample; UNPUBLISHED: those that the workers were built with."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the writers' log-probs are the scorer's (rollout/writer.py)."""
        ...

    def generate(
        self, requests: Sequence[RolloutRequest], timeout_s: float | None = None, each: Each | None = None
    ) -> GenerateResult:
        """Roll every request out.

        Args:
            timeout_s: how long a worker may be silent; None: the recipe's.
            each: is told of every group that finishes, while the others are being written.
        """
        ...

    def stream(
        self, requests: Sequence[RolloutRequest], timeout_s: float | None = None
    ) -> Iterator[FinishedGroup | FailedGroup]:
        """The same, as groups finish."""
        ...

    def sync_weights(self, update: WeightUpdate, probe: Probe | None = None) -> float:
        """Bring all workers to a newer version. Returns the largest gap on the probe (0 without one).

        Raises WeightSyncError if a worker refuses the weights or fails the probe. Not while a stream is read.
        """
        ...

    def shares_weights(self, policy: Policy) -> bool:
        """Whether the engines sample with this very policy, so that nothing need be published."""
        ...

    def set_version(self, version: int) -> None:
        """Where weights are shared: stamp this version from now on."""
        ...

    def probe(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Each worker's log-probs of the trajectories' decisions, float32 [N]."""
        ...

    def health(self) -> list[WorkerHealth]: ...
    def close(self) -> None: ...


def rollout_metrics(counts: Sequence[dict[str, float]], seconds: float, groups: int) -> dict[str, float]:
    """One generation's metrics from the counts of its calls. Rates are of the whole pool, by the wall clock."""
    total = {name: sum(count.get(name, 0.0) for count in counts) for name in {key for count in counts for key in count}}
    metrics = {
        f"rollout/{name}": total[name]
        for name in ("trajectories", "tokens", "decisions", "images", "prompts", "refills", "reprefills")
        if name in total
    }
    metrics |= {f"rollout/{name}": value for name, value in total.items() if name.startswith("tools/")}
    if total.get("ticks"):
        metrics["rollout/mean_rows"] = total["row_ticks"] / total["ticks"]
    return metrics | {
        "rollout/groups": float(groups),
        "time/rollout": seconds,
        "rollout/tokens_per_s": total.get("tokens", 0.0) / seconds if seconds else 0.0,
    }


def check_requests(requests: Sequence[RolloutRequest]) -> None:
    """Every request is a group of its own, or the members of one that continue from one state; and has members."""
    seen: set[RequestKey] = set()
    numbers: dict[int, set[int]] = {}
    for request in requests:
        if request.key in seen:
            state = "" if request.parent is None else f", continuing member {request.parent[0]},"
            raise WorkersError(
                f"group {request.group}{state} is asked for twice in one generation; groups are told apart by their "
                "number, and by the state that they continue from"
            )
        if not request.members or len(set(request.members)) < len(request.members):
            raise WorkersError(f"group {request.group}: its members are {list(request.members)}; name each one once")
        if request.arm:  # the arms of one state share their members' noise: that is what they are compared by
            seen.add(request.key)
            continue
        taken = numbers.setdefault(request.group, set())
        if again := taken & set(request.members):
            raise WorkersError(
                f"group {request.group}: member {min(again)} is asked for from two states; its number is its noise"
            )
        taken |= set(request.members)
        seen.add(request.key)
