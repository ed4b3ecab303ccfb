"""The rollout engine: the only sampling loop. Requests in, trajectories out; formats say what may come, a policy
what is likely.

Continuous batching: every tick, each active row takes one id (rows in words and rows in pictures together), then
one `policy.step` feeds them all. A group's prompt is computed once and copied to its members; a finished row is
refilled from the queue at once; when the queue is empty the active rows close ranks, so that dead ones cost
nothing. The loop itself is batch.py, over rows.py; live.py is one trajectory in the making, sampling.py the law and
the noise, denoising.py a latent's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from policy.base import Policy
from rollout.batch import Batch
from rollout.config import RolloutConfig
from rollout.formats.base import ThoughtFormat
from rollout.live import RolloutError
from rollout.requests import RolloutRequest
from rollout.trajectory import Segment, Trajectory

Environment = Callable[[Trajectory], Segment | None]


@dataclass
class EngineStats:
    """What the last `run` or `stream` did. Tokens are ids after the prompt, the environment's left out."""

    trajectories: int = 0
    tokens: int = 0
    decisions: int = 0
    pictures: int = 0
    ticks: int = 0
    row_ticks: int = 0  # rows stepped, summed over ticks: guidance branches left out
    branch_ticks: int = 0
    prompts: int = 0  # prefilled; the other members of a group are copies
    refills: int = 0  # rows that took another trajectory
    anew: int = 0  # rows prefilled because a context did not extend the cache
    seconds: float = 0.0
    draw_seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_rows(self) -> float:
        return self.row_ticks / self.ticks if self.ticks else 0.0

    def metrics(self) -> dict[str, float]:
        values = {**asdict(self), "tokens_per_s": self.tokens_per_s, "mean_rows": self.mean_rows}
        return {f"rollout/{name}": float(value) for name, value in values.items()}


class Engine:
    """Writes trajectories with one policy in one format.

    `version` is stamped on every segment. Publish new weights between calls, never while `stream` is being read:
    rows that hold keys and values of the old weights are live then, and the engine refuses to go on.

    Args:
        constrain: what decoding is constrained to ("images", or "full": the whole grammar).
        environment: asked with the trajectory so far whenever a text segment of the policy closes; returns an
            untrained segment to add (a tool's answer), or None. A cursor that has a method `observe` is told, and may
            then go on after the end of a turn; others are not asked there.
    """

    def __init__(self, policy: Policy, fmt: ThoughtFormat, config: RolloutConfig, constrain: str = "images",
                 environment: Environment | None = None, version: int = 0):
        self.policy, self.fmt, self.config = policy, fmt, config
        self.constrain, self.environment, self.version = constrain, environment, version
        self.stats = EngineStats()
        self.branches = config.branches if config.guidance else 0
        self.active_rows = config.rows // (1 + self.branches)
        if self.active_rows < 1:
            raise RolloutError(f"rollout.rows: {config.rows} rows cannot hold one trajectory and its "
                               f"{self.branches} guidance branches; give at least {1 + self.branches}")
        self._cache: Any = None
        self._cache_length = 0

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """All trajectories, in the order of the requests and of the members in each."""
        finished = [live for done in self._batch(requests).ticks() for live in done]
        return [live.trajectory for live in sorted(finished, key=lambda live: live.order)]

    def stream(self, requests: Sequence[RolloutRequest]) -> Iterator[Trajectory]:
        """Trajectories as they finish."""
        for done in self._batch(requests).ticks():
            for live in done:
                yield live.trajectory

    def _batch(self, requests: Sequence[RolloutRequest]) -> Batch:
        self.stats = EngineStats()
        return Batch(self, requests)

    def cache(self, length: int) -> Any:
        """The cache, kept from run to run; allocated anew when rows must be longer than ever before."""
        if self._cache is None or self._cache_length < length:
            self._cache = None  # free the old one first
            rows = self.active_rows * (1 + self.branches) + 1
            self._cache = self.policy.allocate(rows, length)
            self._cache_length = length
        return self._cache


