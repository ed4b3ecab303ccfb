"""The writer in this process: for debugging, and for `rollout.workers: 0`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from policy.base import Policy
from record.trajectory import Trajectory
from rollout.engine.engine import Engine
from rollout.native import as_writer
from rollout.pool.contract import (
    Each,
    FinishedGroup,
    GenerateResult,
    WorkerHealth,
    check_requests,
    rollout_metrics,
)
from rollout.requests import RolloutRequest
from rollout.weights.probe import Probe
from rollout.weights.wire import WeightUpdate
from rollout.writer import Writer, take_up, write_groups


class LocalRollouts:
    """A writer in this process: for debugging, and for `workers: 0`. Errors fly; nothing is retried.

    Args:
        writer: whose policy may be the trainer's own; then publishing only counts versions. An engine: the native one.
        threads: CPU threads while it samples or scores a probe; the trainer has its own before and after. None: those.
        sleeps: its cache is freed between generations.
    """

    def __init__(self, writer: Writer | Engine, threads: int | None = None, sleeps: bool = False) -> None:
        self._writer, self._threads, self._sleeps = as_writer(writer), threads, sleeps
        self._writer.name = "the worker in this process"

    @property
    def version(self) -> int:
        return self._writer.version

    @property
    def exact(self) -> bool:
        return self._writer.exact

    def generate(
        self, requests: Sequence[RolloutRequest], timeout_s: float | None = None, each: Each | None = None
    ) -> GenerateResult:
        began = time.perf_counter()
        finished: list[FinishedGroup] = []
        for done in self.stream(requests, timeout_s):
            finished.append(done)
            if each is not None:
                each(done.index, done.group)
        finished.sort(key=lambda done: done.index)
        seconds = time.perf_counter() - began
        return GenerateResult(
            [done.group for done in finished],
            [],
            rollout_metrics([self._writer.stats()] if requests else [], seconds, len(finished)),
        )

    def stream(self, requests: Sequence[RolloutRequest], timeout_s: float | None = None) -> Iterator[FinishedGroup]:
        check_requests(requests)
        index = {request.key: i for i, request in enumerate(requests)}
        groups = iter(write_groups(self._writer, requests, self._sleeps) if requests else ())
        while True:
            with cpu_threads(self._threads):
                finished = next(groups, None)
            if finished is None:
                return
            yield FinishedGroup(index[finished[0]], finished[1])

    def sync_weights(self, update: WeightUpdate, probe: Probe | None = None) -> float:
        trajectories = probe.trajectories if probe is not None else ()
        with cpu_threads(self._threads):
            before_N, after_N = take_up(self._writer, update.manifest, trajectories, update.chunks)
        return probe.check(self._writer.name, before_N, after_N) if probe is not None and after_N is not None else 0.0

    def shares_weights(self, policy: Policy) -> bool:
        return self._writer.shares(policy)

    def set_version(self, version: int) -> None:
        self._writer.version = version

    def probe(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        with cpu_threads(self._threads):
            return [self._writer.logprobs(trajectories)]

    def health(self) -> list[WorkerHealth]:
        return [WorkerHealth(self._writer.name, "idle", self.version, os.getpid())]

    def close(self) -> None:
        """End what works beside the writer: its tools."""
        self._writer.close()


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within it torch computes with `count` CPU threads, and afterwards with as many as before. None: no change."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
