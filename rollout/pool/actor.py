"""What a rollout actor does in its own process: build a writer, take up weights, write groups."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from record.trajectory import Trajectory
from rollout.requests import RolloutRequest
from rollout.spec import EngineSpec
from rollout.weights.wire import Manifest, WeightSyncError
from rollout.writer import take_up, write_groups
from runtime.actor_process import TraceableActor


class ActorWorker(TraceableActor):
    """A writer with a process to itself."""

    def __init__(self, name: str, threads: int, sleeps: bool = False) -> None:
        import torch

        super().__init__()
        torch.set_num_threads(threads)
        self.name, self.sleeps = name, sleeps

    def build(self, spec: EngineSpec) -> bool:
        """Returns whether the writer is exact. Not in the constructor, whose errors Ray reports as text only."""
        self.writer = spec.build()
        self.writer.name = self.name
        return self.writer.exact

    def take(
        self, update: tuple[Manifest, Sequence[Trajectory]], *chunks: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        return take_up(self.writer, *update, chunks)

    def probe(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        return self.writer.logprobs(trajectories)

    def roll(self, requests: Sequence[RolloutRequest], version: int) -> Iterator[Any]:
        """Streams (a request's key, its pickled trajectories), then the writer's counts.

        Pickled here, because arrays that Ray unpacks are read-only and hold on to its shared memory.
        """
        if self.writer.version != version:
            raise WeightSyncError(f"{self.name} has version {self.writer.version} of {version}")
        for key, trajectories in write_groups(self.writer, requests, self.sleeps):
            yield key, pickle.dumps(trajectories, protocol=5)
        yield self.writer.stats()
