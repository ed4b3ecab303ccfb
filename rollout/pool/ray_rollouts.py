"""Rollout workers as Ray actors: each call is bounded, a lost worker is replaced, its groups are rolled out again.

One loop waits on everything: workers that start (build their engine, take up the published weights, answer the probe)
and workers that write (each streams its groups as they finish). A worker that dies, raises or is silent for too long
is killed, and another takes its place. Sampling noise depends on (seed, group, member), so a second attempt writes
what the first would have.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policy.base import Policy
from record.trajectory import Trajectory
from rollout.config import RolloutConfig
from rollout.pool.actor import ActorWorker
from rollout.pool.assignment import Assignment, Call
from rollout.pool.contract import (
    NOT_REPEATABLE,
    Each,
    FailedGroup,
    FinishedGroup,
    GenerateResult,
    WorkerHealth,
    WorkersError,
    check_requests,
    rollout_metrics,
)
from rollout.requests import RolloutRequest
from rollout.spec import EngineSpec
from rollout.weights.probe import Probe
from rollout.weights.receive import UNPUBLISHED
from rollout.weights.wire import WeightSyncError, WeightUpdate
from runtime.actor_process import ActorProcess, end_actors
from runtime.errors import UserError
from runtime.ray_cluster import check_alive, start_ray

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0  # waiting for resources, building the engine, taking up weights
LOG_AFTER_S = 10.0  # how long to wait for resources before saying so, and between sayings
TICK_S = 1.0  # how often timeouts are looked at


@dataclass
class _Slot:
    """One worker's place in the pool, and the actor that holds it now."""

    number: int
    actor: Any = None  # None: vacant
    starting: list[Any] = field(default_factory=list)  # references that must come before it is idle, in order
    probe: Probe | None = None  # to check what the last of them answers
    call: Call | None = None
    stream: Any = None  # of the call
    last_seen: float = 0.0  # when it last gave a sign
    last_logged: float = 0.0  # when its waiting was last logged
    process: ActorProcess | None = None  # None: it has not begun to run
    version: int = UNPUBLISHED
    restarts: int = -1

    @property
    def name(self) -> str:
        return f"worker {self.number}"

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def waitable(self) -> Any:
        return self.starting[0] if self.starting else self.stream


class RayRollouts:
    """`config.workers` actors, each with a writer of its own.

    Args:
        spec: builds a writer in each actor.
        start_timeout_s: bounds building a writer, waiting for resources included, and taking up weights.
        object_store_bytes: shared memory of a local Ray; None: Ray's default.

    Raises:
        ClusterError: Ray cannot be had.
        WorkersError: the cluster is too small, or the actors die while they are built; it quotes the first crash.
    """

    def __init__(
        self,
        spec: EngineSpec,
        config: RolloutConfig,
        start_timeout_s: float = START_TIMEOUT_S,
        object_store_bytes: int | None = None,
    ) -> None:
        if config.workers < 1:
            raise WorkersError("rollout.workers: Ray rollouts want at least 1; 0 rolls out in this process")
        self.spec, self.config, self.start_timeout_s = spec, config, start_timeout_s
        self.version, self.exact = UNPUBLISHED, True  # the writers say whether they are, once they are built
        self._published: list[tuple[WeightUpdate, Probe | None]] = []  # what a fresh worker must take up, in order
        self._carried: dict[int, WeightUpdate] = {}  # by version: those in Ray's memory, while somebody starts
        self._crashes: list[str] = []  # since the last finished group or publication
        self._replaced: dict[str, int] = {}  # restarts by reason, since the last generation reported them
        self._counts: list[dict[str, float]] = []
        self.cluster = start_ray(config.workers * config.actor_threads, object_store_bytes)
        self._slots = [_Slot(number) for number in range(config.workers)]
        try:
            self._check_size()
            self._settle()
        except BaseException:
            self.close()
            raise

    # ---- the interface ----

    def generate(
        self, requests: Sequence[RolloutRequest], timeout_s: float | None = None, each: Each | None = None
    ) -> GenerateResult:
        """See Rollouts. Raises WorkersError if not one group came back; it quotes the first crash."""
        began = time.perf_counter()
        finished: dict[int, list[Trajectory]] = {}
        failed: list[FailedGroup] = []
        for done in self.stream(requests, timeout_s):
            if isinstance(done, FinishedGroup):
                finished[done.index] = done.group
                if each is not None:
                    each(done.index, done.group)
            else:
                failed.append(done)
        if failed and not finished:
            raise WorkersError(
                f"not one of {len(requests)} groups could be rolled out. The first failure: {failed[0].detail}"
            )
        metrics = rollout_metrics(self._counts, time.perf_counter() - began, len(finished))
        metrics["rollout/groups_failed"] = float(len(failed))
        metrics |= {f"rollout/restarts/{reason}": float(count) for reason, count in self._replaced.items()}
        self._replaced = {}
        failed.sort(key=lambda group: group.index)
        return GenerateResult([finished[index] for index in sorted(finished)], failed, metrics)

    def stream(
        self, requests: Sequence[RolloutRequest], timeout_s: float | None = None
    ) -> Iterator[FinishedGroup | FailedGroup]:
        check_requests(requests)
        timeout_s = self.config.timeout_s if timeout_s is None else timeout_s
        members = max((len(request.members) for request in requests), default=1)
        index = {request.key: i for i, request in enumerate(requests)}
        assignment = Assignment(
            len(requests), len(self._slots), self.config.rows // members, self.config.retries, self.config.reproducible
        )
        self._counts = []
        self._reap()
        try:
            while assignment.left:
                self._dispatch(assignment, requests)
                for slot in self._wait():
                    for done in self._poll(slot, assignment, requests):
                        if isinstance(done, FailedGroup):
                            yield done
                        elif assignment.finished(index[done[0]]):
                            self._crashes.clear()
                            yield FinishedGroup(index[done[0]], pickle.loads(done[1]))
                for slot, reason, crash in self._timed_out(timeout_s):
                    yield from self._on_worker_lost(slot, reason, crash, assignment, requests)
            while any(slot.call for slot in self._slots):  # their last word is the engine's counts
                for slot in self._wait():
                    list(self._poll(slot, assignment, requests))
                for slot, reason, crash in self._timed_out(timeout_s):
                    self._on_worker_lost(slot, reason, crash, assignment, requests)
        finally:
            self._kill(*(slot for slot in self._slots if slot.call is not None))  # nobody will read what they write

    def sync_weights(self, update: WeightUpdate, probe: Probe | None = None) -> float:
        if update.version <= self.version:
            raise WeightSyncError(f"version {update.version} comes after version {self.version}: versions only grow")
        if any(slot.call is not None for slot in self._slots):
            raise WeightSyncError(f"version {update.version} was published while groups are being written")
        check_alive()
        if update.manifest.kind == "full":
            self._published = []
        else:
            self._published = [(p, None) for p, _ in self._published if p.manifest.kind == "full"]
        self._published.append((update, probe))
        self.version = update.version
        self._crashes.clear()
        for slot in self._slots:
            if slot.actor is not None:
                self._send(slot, update, probe)
        gap = self._settle()
        self._crashes.clear()
        return gap

    def shares_weights(self, policy: Policy) -> bool:
        return False

    def set_version(self, version: int) -> None:
        raise WeightSyncError("actors have weights of their own: publish to them")

    def probe(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        import ray

        self._settle()
        check_alive()
        answers = [slot.actor.probe.remote(list(trajectories)) for slot in self._slots]
        return [np.array(answer) for answer in ray.get(answers, timeout=self.start_timeout_s)]

    def health(self) -> list[WorkerHealth]:
        """Idle workers are asked; those that start or write are believed. Takes TICK_S at most."""
        import ray

        asked = {
            slot.number: slot.actor.about.remote()
            for slot in self._slots
            if slot.actor is not None and not slot.starting and slot.call is None
        }
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=TICK_S) if asked else None
        return [
            WorkerHealth(
                slot.name, self._state(slot, asked.get(slot.number)), slot.version, slot.pid, max(slot.restarts, 0)
            )
            for slot in self._slots
        ]

    def close(self) -> None:
        self._kill(*self._slots)
        self._published, self._carried = [], {}
        self.cluster.stop()

    # ---- places ----

    def _check_size(self) -> None:
        """Say at once what would otherwise be waited for in vain."""
        import ray

        there = ray.cluster_resources()
        for name, each in (("CPU", float(self.config.actor_threads)), ("GPU", self.config.gpus)):
            if each and there.get(name, 0.0) < each:
                raise WorkersError(
                    f"rollout.workers: each asks for {each:g} {name}, and the whole cluster has "
                    f"{there.get(name, 0.0):g}. Give it more, or set rollout.workers: 0"
                )

    def _fill(self, slot: _Slot) -> None:
        """Put a fresh actor into a vacant place; it is idle once `starting` is empty."""
        import ray

        threads = self.config.actor_threads
        actor_class = ray.remote(num_cpus=threads, num_gpus=self.config.gpus, max_restarts=0)(ActorWorker)
        slot.actor = actor_class.remote(slot.name, threads, self.config.sleep)
        slot.starting = [slot.actor.about.remote(), slot.actor.build.remote(self.spec)]
        slot.probe, slot.version = None, UNPUBLISHED
        slot.process = None
        slot.last_seen = slot.last_logged = time.monotonic()
        slot.restarts += 1
        for update, probe in self._published:
            self._send(slot, update, probe)

    def _send(self, slot: _Slot, update: WeightUpdate, probe: Probe | None) -> None:
        import ray

        # Not for longer than it is taken up: where a node ends, Ray ends a program whose objects lay there.
        if update.version not in self._carried:
            chunks = tuple(ray.put(chunk) for chunk in update.chunks)
            self._carried[update.version] = WeightUpdate(update.manifest, chunks)
        carried = self._carried[update.version]
        trajectories = probe.trajectories if probe is not None else ()
        slot.starting.append(slot.actor.take.remote((carried.manifest, trajectories), *carried.chunks))
        slot.probe, slot.last_seen = probe, time.monotonic()

    def _settle(self) -> float:
        """Wait until every place has a worker that is idle and has the weights. Returns the largest gap."""
        gap = 0.0
        while any(slot.actor is None or slot.starting for slot in self._slots):
            for slot in self._slots:
                if slot.actor is None:
                    self._fill(slot)
            for slot in self._wait():
                gap = max(gap, self._started(slot))
            for slot, reason, crash in self._timed_out(self.start_timeout_s):
                self._replace(slot, reason, crash)
        return gap

    def _started(self, slot: _Slot) -> float:
        """One of the things that a starting worker had to do is done. Returns its gap on the probe."""
        import ray

        try:
            answer = ray.get(slot.starting[0])
        except ray.exceptions.RayError as error:
            self._raise_if_users(error)
            self._replace(slot, "crash", self._quote(slot, error))
            return 0.0
        slot.starting.pop(0)
        slot.last_seen = time.monotonic()
        if slot.process is None:
            slot.process = ActorProcess(*answer)
        elif isinstance(answer, bool):  # of `build`
            self.exact = answer
        if slot.starting:
            return 0.0
        if not any(each.starting for each in self._slots):
            self._carried.clear()
        slot.version = self.version
        return slot.probe.check(slot.name, *answer) if slot.probe is not None else 0.0

    def _replace(self, slot: _Slot, reason: str, crash: str) -> None:
        """Note a crash and vacate the place.

        Raises WorkersError if it never began to run, or once more workers died in a row than a few bad groups could
        explain, or ClusterError where it is Ray that is gone.
        """
        check_alive(lost=True)
        if reason == "timeout" and slot.process is None:
            raise WorkersError(
                f"{crash}: Ray gave it no process. It asks for {self.config.actor_threads} CPU and "
                f"{self.config.gpus:g} GPU; free them, ask for fewer rollout.workers, or set it to 0"
            )
        self._crashes.append(crash)
        self._replaced[reason] = self._replaced.get(reason, 0) + 1
        logger.warning("%s is replaced (%s): %s", slot.name, reason, crash)
        self._kill(slot)
        if len(self._crashes) >= (self.config.retries + 1) * (len(self._slots) + 1):
            raise WorkersError(
                f"rollout workers keep dying: {len(self._crashes)} in a row. The first one: {self._crashes[0]}"
            )

    def _kill(self, *slots: _Slot) -> None:
        end_actors((slot.actor, slot.process) for slot in slots)
        for slot in slots:
            slot.actor, slot.starting, slot.call, slot.stream, slot.probe = None, [], None, None, None

    def _reap(self) -> None:
        """Vacate the places of idle workers that died since the last call, which costs no group an attempt."""
        import ray

        check_alive()
        asked = {
            slot.actor.about.remote(): slot for slot in self._slots if slot.actor is not None and not slot.starting
        }
        if asked:
            for answer in ray.wait(list(asked), num_returns=len(asked), timeout=TICK_S)[0]:
                try:
                    ray.get(answer)
                except ray.exceptions.RayError as error:
                    self._replace(asked[answer], "crash", self._quote(asked[answer], error))

    def _state(self, slot: _Slot, answer: Any) -> str:
        import ray

        if slot.actor is None:
            return "dead"
        if slot.starting:
            return "starting"
        if slot.call is not None:
            return "writing"
        if not ray.wait([answer], timeout=0)[0]:
            return "silent"
        try:
            ray.get(answer)
        except ray.exceptions.RayError:
            return "dead"
        return "idle"

    # ---- calls ----

    def _dispatch(self, assignment: Assignment, requests: Sequence[RolloutRequest]) -> None:
        """Fill vacant places, and give idle workers something to write."""
        for slot in self._slots:
            if slot.actor is None:
                self._fill(slot)
            if slot.starting or slot.call is not None:
                continue
            call = assignment.next(slot.number)
            if call is not None:
                slot.call, slot.last_seen = call, time.monotonic()
                slot.stream = slot.actor.roll.options(num_returns="streaming").remote(
                    [requests[group] for group in call.groups], self.version
                )

    def _wait(self) -> list[_Slot]:
        """Places that have something to say, after TICK_S at most. Raises ClusterError where Ray is gone."""
        import ray

        check_alive()
        self._log_what_is_waited_for()
        by_waitable = {slot.waitable(): slot for slot in self._slots if slot.waitable() is not None}
        if not by_waitable:
            return []
        ready, _ = ray.wait(list(by_waitable), num_returns=1, timeout=TICK_S)
        return [by_waitable[waitable] for waitable in ready]

    def _poll(self, slot: _Slot, assignment: Assignment, requests: Sequence[RolloutRequest]) -> Iterator[Any]:
        """What a worker says: a finished (group, bytes); its failures as FailedGroup."""
        import ray

        check_alive()  # an answer that lies in the memory of a node that is gone would end this process
        if slot.starting:
            self._started(slot)
            return
        try:
            last_logged = ray.get(next(slot.stream))
        except StopIteration:
            slot.call = slot.stream = None
            return
        except ray.exceptions.RayError as error:
            self._raise_if_users(error)
            raised = isinstance(error, ray.exceptions.RayTaskError)
            yield from self._on_worker_lost(
                slot, "error" if raised else "crash", self._quote(slot, error), assignment, requests
            )
            return
        slot.last_seen = time.monotonic()
        if isinstance(last_logged, dict):
            self._counts.append(last_logged)
        else:
            yield last_logged

    def _on_worker_lost(
        self, slot: _Slot, reason: str, crash: str, assignment: Assignment, requests: Sequence[RolloutRequest]
    ) -> list[FailedGroup]:
        """Replace a worker and queue its groups again. Returns those that have had their last attempt."""
        call = slot.call
        self._replace(slot, reason, crash)
        if call is None:
            return []
        if not self.spec.repeatable:
            dropped, reason = assignment.given_up(call), NOT_REPEATABLE
            if dropped:
                logger.warning(
                    "dropped, for a tool of theirs is not repeatable: group %s",
                    ", ".join(str(requests[i].group) for i in dropped),
                )
            return [FailedGroup(i, requests[i].group, reason, crash) for i in dropped]
        dropped = assignment.failed(slot.number, call)
        if dropped:
            logger.warning(
                "dropped after %d attempts: group %s",
                self.config.retries + 1,
                ", ".join(str(requests[i].group) for i in dropped),
            )
        return [FailedGroup(i, requests[i].group, reason, crash) for i in dropped]

    def _timed_out(self, timeout_s: float) -> list[tuple[_Slot, str, str]]:
        """Workers that have given no sign for too long, and what they were doing."""
        now, found = time.monotonic(), []
        for slot in self._slots:
            limit = self.start_timeout_s if slot.starting else timeout_s
            if slot.waitable() is not None and now - slot.last_seen > limit:
                doing = "starting" if slot.starting else "writing"
                stack = slot.process.stack() if slot.process is not None else ""
                found.append(
                    (
                        slot,
                        "timeout",
                        f"{slot.name} was silent for {limit:g} s while {doing}"
                        + (f". Its stack:\n{stack}" if stack else ""),
                    )
                )
        return found

    def _log_what_is_waited_for(self) -> None:
        import ray

        now = time.monotonic()
        for slot in self._slots:
            if slot.starting and slot.process is None and now - slot.last_logged > LOG_AFTER_S:
                slot.last_logged = now
                free = ray.available_resources()
                logger.warning(
                    "%s has waited %.0f s to start; it asks for %d CPU and %g GPU, and %g and %g are free",
                    slot.name,
                    now - slot.last_seen,
                    self.config.actor_threads,
                    self.config.gpus,
                    free.get("CPU", 0.0),
                    free.get("GPU", 0.0),
                )

    def _raise_if_users(self, error: Exception) -> None:
        """A mistake of the user's is no crash, and trying again would not mend it."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise cause from error

    def _quote(self, slot: _Slot, error: Exception) -> str:
        """A crash in a reader's words: the exception with its traceback, or how the process ended."""
        cause = getattr(error, "cause", None)
        if cause is not None:
            return f"{slot.name}: {type(cause).__name__}: {cause}\n{error}"
        last_logged = str(error)
        ended = next((line for line in last_logged.splitlines() if "because" in line), last_logged)
        ended = ended.split("Worker exit detail: ")[-1].split(" Some common causes")[0]
        tail = self.cluster.log_tail(slot.pid) if slot.pid else ""
        return f"{slot.name} (process {slot.pid}) died: {ended}" + (f"\nIts last words:\n{tail}" if tail else "")
