"""What a rollout actor does in its own process: build an engine, take up weights, write groups."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from record.trajectory import Trajectory
from rollout.requests import RolloutRequest
from rollout.spec import EngineSpec
from rollout.weights.wire import Manifest, WeightSyncError
from rollout.writer import RolloutWorker
from runtime.actor_process import TraceableActor


class ActorWorker(TraceableActor):
    """A RolloutWorker with a process to itself."""

    def __init__(self, name: str, threads: int) -> None:
        import torch

        super().__init__()
        torch.set_num_threads(threads)
        self.name = name

    def build(self, spec: EngineSpec) -> None:
        """Not in the constructor, whose errors Ray reports as text only."""
        self.worker = RolloutWorker(self.name, spec.build())

    def take(
        self, update: tuple[Manifest, Sequence[Trajectory]], *chunks: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        return self.worker.receive(*update, *chunks)

    def probe(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        return self.worker.probe(trajectories)

    def roll(self, requests: Sequence[RolloutRequest], version: int) -> Iterator[Any]:
        """Streams (a request's key, its pickled trajectories), then the engine's counts.

        Pickled here, because arrays that Ray unpacks are read-only and hold on to its shared memory.
        """
        if self.worker.receiver.version != version:
            raise WeightSyncError(f"{self.name} has version {self.worker.receiver.version} of {version}")
        for key, trajectories in self.worker.groups(requests):
            yield key, pickle.dumps(trajectories, protocol=5)
        yield self.worker.stats()
