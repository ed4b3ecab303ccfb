"""Rollout workers behind one interface: requests in, complete groups out, weights replaced in between.

`LocalRollouts` writes in this process, `RayRollouts` (ray_workers.py) with any number of actors; both hold
RolloutWorkers, each an engine with its own policy, cache and format. The driver and rl/publish.py see `Rollouts`.

Letters: N decisions of a probe's trajectories.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from policy.base import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.errors import UserError
from rollout.requests import RolloutRequest
from rollout.trajectory import Trajectory
from rollout.weights import Manifest, Probe, Publication, WeightReceiver

UNPUBLISHED = -1
Each = Callable[[int, list[Trajectory]], None]  # (index of the request, its members), as groups finish


class WorkersError(UserError):
    """Rollout workers that cannot be had, or that keep dying."""


@dataclass(frozen=True)
class EngineSpec:
    """How a worker builds its engine: plain data, so that nothing heavy travels.

    `factory` is the dotted path of a function that takes `options` by keyword and returns an engine.
    """

    options: dict[str, Any] = field(default_factory=dict)
    factory: str = "rollout.workers.build_engine"

    def build(self) -> Engine:
        module, _, name = self.factory.rpartition(".")
        return getattr(importlib.import_module(module), name)(**self.options)


def engine_spec(policy: Any, fmt: Any, rollout: RolloutConfig, words: Sequence[str] = ()) -> EngineSpec:
    """The spec of a recipe's sections `policy`, `format` and `rollout`. `words`: of the task's language."""
    return EngineSpec({"policy": policy.model_dump(mode="json"), "format": fmt.model_dump(mode="json"),
                       "rollout": rollout.model_dump(mode="json"), "words": list(words)})


def build_engine(policy: dict[str, Any], format: dict[str, Any], rollout: dict[str, Any],
                 words: Sequence[str]) -> Engine:
    """The engine of a recipe's sections, as plain data."""
    from policy.config import PolicyConfig
    from policy.registry import load_policy
    from rollout.formats.config import FormatConfig

    fmt = FormatConfig(**format)
    return Engine(load_policy(PolicyConfig(**policy), words), fmt.build(), RolloutConfig(**rollout), fmt.constrain)


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
    reason: str  # "crash" (the worker died), "timeout" or "error" (the engine raised)
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

    def generate(self, requests: Sequence[RolloutRequest], timeout_s: float | None = None,
                 each: Each | None = None) -> GenerateResult:
        """Roll every request out.

        Args:
            timeout_s: how long a worker may be silent; None: the recipe's.
            each: is told of every group that finishes, while the others are being written.
        """
        ...

    def stream(self, requests: Sequence[RolloutRequest],
               timeout_s: float | None = None) -> Iterator[FinishedGroup | FailedGroup]:
        """The same, as groups finish."""
        ...

    def publish(self, publication: Publication, probe: Probe | None = None) -> float:
        """Bring all workers to a newer version. Returns the largest gap on the probe (0 without one).

        Raises PublicationError if a worker refuses the weights or fails the probe. Not while a stream is read.
        """
        ...

    def shares(self, policy: Policy) -> bool:
        """Whether the engines sample with this very policy, so that nothing need be published."""
        ...

    def adopt(self, version: int) -> None:
        """Where weights are shared: stamp this version from now on."""
        ...

    def probe(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Each worker's log-probs of the trajectories' decisions, float32 [N]."""
        ...

    def health(self) -> list[WorkerHealth]: ...
    def close(self) -> None: ...


class RolloutWorker:
    """One engine and its end of the publications. An actor is a process around one of these."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine
        engine.policy.model.eval()
        self.receiver = WeightReceiver(engine.policy.model, name)

    def groups(self, requests: Sequence[RolloutRequest]) -> Iterator[tuple[int, list[Trajectory]]]:
        """(RolloutRequest.group, its members in order), as groups become complete."""
        wanted = {request.group: request.members for request in requests}
        found: dict[int, dict[int, Trajectory]] = {group: {} for group in wanted}
        for trajectory in self.engine.stream(requests):
            members = found[trajectory.group]
            members[trajectory.member] = trajectory
            if len(members) == len(wanted[trajectory.group]):
                yield trajectory.group, [members[member] for member in wanted[trajectory.group]]

    def receive(self, manifest: Manifest, trajectories: Sequence[Trajectory],
                *chunks: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Load a publication. Returns the probe's log-probs before (None: no version before) and after it.

        The engine's next call prefills every row anew, so no keys or values of the old weights live on.
        """
        before_N = self.probe(trajectories) if trajectories and self.receiver.version != UNPUBLISHED else None
        self.receiver.receive(manifest, chunks)
        self.engine.version = manifest.version
        return before_N, self.probe(trajectories) if trajectories else None

    def probe(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        with torch.no_grad():
            return self.engine.policy.score(trajectories).logprob_N.float().cpu().numpy().copy()

    def stats(self) -> dict[str, float]:
        """The engine's counts of its last call."""
        return {name: float(value) for name, value in asdict(self.engine.stats).items()}


def rollout_metrics(counts: Sequence[dict[str, float]], seconds: float, groups: int) -> dict[str, float]:
    """One generation's metrics from the counts of its calls. Rates are of the whole pool, by the wall clock."""
    total = {name: sum(count.get(name, 0.0) for count in counts) for name in {key for count in counts for key in count}}
    metrics = {f"rollout/{name}": total[name] for name in ("trajectories", "tokens", "decisions", "pictures", "prompts",
                                                          "refills", "anew") if name in total}
    if total.get("ticks"):
        metrics["rollout/mean_rows"] = total["row_ticks"] / total["ticks"]
    return metrics | {"rollout/groups": float(groups), "time/rollout": seconds,
                      "rollout/tokens_per_s": total.get("tokens", 0.0) / seconds if seconds else 0.0}


def open_rollouts(policy: Policy, policy_config: Any, format_config: Any, config: RolloutConfig,
                  words: Sequence[str] = ()) -> Rollouts:
    """The pool that the recipe asks for: actors that load a policy of their own, or, with `workers: 0`, an engine in
    this process that samples with `policy` itself."""
    if config.workers == 0:
        return LocalRollouts(Engine(policy, format_config.build(), config, format_config.constrain))
    from rollout.ray_workers import RayRollouts

    return RayRollouts(engine_spec(policy_config, format_config, config, words), config)


def check_requests(requests: Sequence[RolloutRequest]) -> None:
    """Every request is a group of its own, with members."""
    seen: set[int] = set()
    for request in requests:
        if request.group in seen:
            raise WorkersError(f"group {request.group} is asked for twice in one generation; groups are told apart by "
                               "their number")
        if not request.members or len(set(request.members)) < len(request.members):
            raise WorkersError(f"group {request.group}: its members are {list(request.members)}; name each one once")
        seen.add(request.group)


class LocalRollouts:
    """The engine in this process: for debugging, and for `workers: 0`. Errors fly; nothing is retried.

    Args:
        engine: whose policy may be the trainer's own; then publishing only counts versions.
    """

    def __init__(self, engine: Engine) -> None:
        self._worker = RolloutWorker("the worker in this process", engine)

    @property
    def version(self) -> int:
        return self._worker.receiver.version

    def generate(self, requests: Sequence[RolloutRequest], timeout_s: float | None = None,
                 each: Each | None = None) -> GenerateResult:
        began = time.perf_counter()
        finished: list[FinishedGroup] = []
        for done in self.stream(requests, timeout_s):
            finished.append(done)
            if each is not None:
                each(done.index, done.group)
        finished.sort(key=lambda done: done.index)
        seconds = time.perf_counter() - began
        return GenerateResult([done.group for done in finished], [],
                              rollout_metrics([self._worker.stats()] if requests else [], seconds, len(finished)))

    def stream(self, requests: Sequence[RolloutRequest], timeout_s: float | None = None) -> Iterator[FinishedGroup]:
        check_requests(requests)
        index = {request.group: i for i, request in enumerate(requests)}
        for group, trajectories in self._worker.groups(requests) if requests else ():
            yield FinishedGroup(index[group], trajectories)

    def publish(self, publication: Publication, probe: Probe | None = None) -> float:
        trajectories = probe.trajectories if probe is not None else ()
        before_N, after_N = self._worker.receive(publication.manifest, trajectories, *publication.chunks)
        return probe.check(self._worker.name, before_N, after_N) if probe is not None and after_N is not None else 0.0

    def shares(self, policy: Policy) -> bool:
        return self._worker.engine.policy is policy

    def adopt(self, version: int) -> None:
        self._worker.receiver.version = self._worker.engine.version = version

    def probe(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        return [self._worker.probe(trajectories)]

    def health(self) -> list[WorkerHealth]:
        return [WorkerHealth(self._worker.name, "idle", self.version, os.getpid())]

    def close(self) -> None:
        """Nothing is held but memory."""
