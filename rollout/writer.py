"""What writes trajectories: an engine, and the end of the line by which it is brought new weights.

Letters: N decisions of a probe's trajectories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from record.trajectory import Trajectory
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from rollout.weights.receive import UNPUBLISHED, WeightReceiver
from rollout.weights.wire import Manifest


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

    def receive(
        self, manifest: Manifest, trajectories: Sequence[Trajectory], *chunks: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Load a publication. Returns the probe's log-probs before (None: no version before) and after it.

        The engine's next call prefills every row anew, so no keys or values of the old weights live on.
        """
        before_N = self.probe(trajectories) if trajectories and self.receiver.version != UNPUBLISHED else None
        self.receiver.receive(manifest, chunks)
        self.engine.version = manifest.version
        return before_N, self.probe(trajectories) if trajectories else None

    def probe(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        policy = self.engine.policy
        with torch.no_grad():
            return policy.score(policy.passes(trajectories)).logprob_N.float().cpu().numpy().copy()

    def close(self) -> None:
        self.engine.close()

    def stats(self) -> dict[str, float]:
        """The engine's counts of its last call."""
        return self.engine.stats.counts()
