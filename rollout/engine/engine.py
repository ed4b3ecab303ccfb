"""The rollout engine: the only sampling loop. Requests in, trajectories out; formats say what may come, a policy
what is likely.

Continuous batching: every tick, each active row takes one id (rows in words and rows in images together), then
one `policy.step` feeds them all. A group's prompt is computed once and copied to its members; a finished row is
refilled from the queue at once; when the queue is empty the active rows close ranks, so that dead ones cost
nothing. Rows whose tool is at work are parked (parking.py). The loop itself is loop.py, over slots.py; active.py is
one trajectory in the making, sampling.py what is drawn and the noise, flow.py a latent's steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from record.trajectory import Trajectory
from rollout.engine.loop import Batch
from rollout.engine.state import EngineState, EngineStats
from rollout.requests import RolloutRequest


class Engine(EngineState):
    """Writes trajectories with one policy in one format."""

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """All trajectories, in the order of the requests and of the members in each."""
        finished = [sequence for done in self._batch(requests).ticks() for sequence in done]
        return [sequence.trajectory for sequence in sorted(finished, key=lambda sequence: sequence.order)]

    def stream(self, requests: Sequence[RolloutRequest]) -> Iterator[Trajectory]:
        """Trajectories as they finish."""
        for done in self._batch(requests).ticks():
            for sequence in done:
                yield sequence.trajectory

    def _batch(self, requests: Sequence[RolloutRequest]) -> Batch:
        self.stats = EngineStats()
        return Batch(self, requests)
