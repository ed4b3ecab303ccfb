"""From the trainer's weights to the rollout workers', proven to have arrived. The driver calls `publish` after every
update; rollout/weights/wire.py packs and verifies, rollout/pool/contract.py carries.

One publisher, and versions only grow: each waits until every worker has answered, within bounds. Every process calls
`publish`, since gathering sharded weights and scoring the probe are collective; the first one alone talks to workers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from policy.base import Policy
from record.trajectory import Trajectory
from rollout.weights.probe import Probe
from rollout.weights.wire import CHUNK_BYTES, WeightSyncError, WeightUpdate, fingerprint, pack

PROBE_TRAJECTORIES = 2
TOLERANCE = 1e-4  # of log-probs in float32, as that of the on-policy check
HALF_TOLERANCE = 0.1  # in 16-bit types


class WeightSink(Protocol):
    """The side of rollout/pool/contract.py that a publisher sees."""

    @property
    def exact(self) -> bool: ...
    def shares_weights(self, policy: Policy) -> bool: ...
    def set_version(self, version: int) -> None: ...
    def sync_weights(self, update: WeightUpdate, probe: Probe | None = None) -> float: ...


@dataclass(frozen=True)
class SyncResult:
    """What one publication was. All zero where the workers share the trainer's weights."""

    version: int
    kind: str  # "full", "delta", or "shared"
    num_bytes: int = 0
    gap: float = 0.0  # largest |worker's - trainer's log-prob| of the probe
    probed: int = 0  # decisions of the probe
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        return {
            "weight_sync/version": float(self.version),
            "weight_sync/bytes": float(self.num_bytes),
            "weight_sync/gap": self.gap,
            "weight_sync/probed": float(self.probed),
            "time/weight_sync": self.seconds,
        }


class WeightSynchronizer:
    """Ships numbered versions of one policy's weights to one pool of workers.

    Only tensors that are trained travel (with adapters: the adapters), unless all are; the workers prove by a
    fingerprint that the others are the trainer's. The first non-empty `probe` is kept and used from then on.

    Args:
        rollouts: the pool; None on every process but the first.
        accelerator: None in a single process without one.
        prepared: what accelerate wraps, with policy.model inside; called with trajectories it scores them
            (Trainer.scorer). None: the policy itself.
        full: ship every tensor, whether trained or not.
        tolerance: of log-probs on the probe; None: 1e-4 in float32, 0.1 in 16-bit types.
        sampling_tolerance: of their mean difference, where the writers are not exact.
    """

    def __init__(
        self,
        policy: Policy,
        rollouts: WeightSink | None,
        accelerator: Any = None,
        prepared: nn.Module | None = None,
        full: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        tolerance: float | None = None,
        sampling_tolerance: float = HALF_TOLERANCE,
    ) -> None:
        self.policy, self.rollouts, self.accelerator = policy, rollouts, accelerator
        self.prepared, self.chunk_bytes = prepared, chunk_bytes
        self.version: int | None = None  # None: nothing published yet
        # With duplicates: tied weights go by both names in the state dict, too.
        parameters = dict(policy.model.named_parameters(remove_duplicate=False))
        mixed = accelerator is not None and accelerator.mixed_precision != "no"
        half = any(p.dtype != torch.float32 for p in parameters.values() if p.is_floating_point())
        self.sampling_tolerance = sampling_tolerance
        self.tolerance = tolerance if tolerance is not None else HALF_TOLERANCE if half or mixed else TOLERANCE
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self._trained = None if full or trained >= policy.model.state_dict().keys() else trained  # None: everything
        self._prefix = self._where() if prepared is not None else ""
        self._base: str | None = None  # fingerprint of the tensors that stay at home
        self._last: str | None = None  # fingerprint of the last version
        self._probe: tuple[Trajectory, ...] = ()
        self._expected_N: np.ndarray | None = None

    def sync_weights(self, version: int, probe: Sequence[Trajectory] = ()) -> SyncResult:
        """Bring every worker to `version`. Nothing is done if it was the last one published.

        Raises:
            WeightSyncError: on every process, if a worker refused the weights or does not score the probe as the
                trainer does, or versions went backwards.
        """
        began = time.perf_counter()
        if self.version is not None and version <= self.version:
            if version == self.version:
                return SyncResult(version, "shared" if self.shared() else self._kind)
            raise WeightSyncError(f"version {version} comes after version {self.version}: versions only grow")
        if self.shared():
            if self.rollouts is not None:
                self.rollouts.set_version(version)
            self.version = version
            return SyncResult(version, "shared", seconds=time.perf_counter() - began)

        fresh = not self._probe
        if fresh:
            self._probe = smallest(probe, PROBE_TRAJECTORIES)
        expected_N = self._expect()
        state = self._gather()
        failure, published = "", SyncResult(version, self._kind)
        if self.rollouts is not None:
            try:
                update = self._pack(state, version)
                changed = update.manifest.fingerprint != self._last
                moved = (
                    changed
                    and not fresh
                    and self._expected_N is not None
                    and not np.array_equal(self._expected_N, expected_N)
                )
                exact = self.rollouts.exact
                tolerance = self.tolerance if exact else self.sampling_tolerance
                check = Probe(version, self._probe, expected_N, tolerance, moved, exact) if len(expected_N) else None
                gap = self.rollouts.sync_weights(update, check)
                self._last = update.manifest.fingerprint
                published = SyncResult(
                    version,
                    self._kind,
                    update.manifest.num_bytes,
                    gap,
                    len(expected_N),
                    time.perf_counter() - began,
                )
            except Exception as error:
                if not self._distributed():
                    raise
                failure = f"{type(error).__name__}: {error}"  # told to the others first, who would wait for ever
        failure, published = self._agree(failure, published)
        if failure:
            raise WeightSyncError(failure)
        self.version, self._expected_N = version, expected_N
        return published

    def _where(self) -> str:
        """The prefix of policy.model's names in what accelerate wraps."""
        for name, module in self.accelerator.unwrap_model(self.prepared).named_modules():
            if module is self.policy.model:
                return f"{name}." if name else ""
        raise ValueError("`prepared` does not hold policy.model")

    @property
    def _kind(self) -> str:
        return "full" if self._trained is None else "delta"

    def _pack(self, state: dict[str, Tensor], version: int) -> WeightUpdate:
        if self._trained is None:
            return pack(state, version, "full", None, self.chunk_bytes)
        if self._base is None:
            self._base = fingerprint({name: t for name, t in state.items() if name not in self._trained})
        return pack({name: state[name] for name in self._trained}, version, "delta", self._base, self.chunk_bytes)

    def _gather(self) -> dict[str, Tensor]:
        """The whole state dict on the first process. Collective."""
        if self.accelerator is None:
            return self.policy.model.state_dict()
        if self.prepared is None:
            return self.accelerator.get_state_dict(self.policy.model)
        state = self.accelerator.get_state_dict(self.prepared)
        return {name.removeprefix(self._prefix): t for name, t in state.items() if name.startswith(self._prefix)}

    def _expect(self) -> np.ndarray:
        """expected_N of the kept probe under the trainer's weights. Collective where weights are sharded."""
        if not self._probe:
            return np.empty(0, np.float32)
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast() if self.accelerator is not None else nullcontext():
                scored = (self.prepared or self.policy.score)(self.policy.passes(self._probe))
                return scored.logprob_N.float().cpu().numpy().copy()
        finally:
            self.policy.model.train(training)

    def _distributed(self) -> bool:
        return self.accelerator is not None and self.accelerator.num_processes > 1

    def shared(self) -> bool:
        """Whether workers sample with the trainer's own weights. The first process knows."""
        shared = self.rollouts is not None and self.rollouts.shares_weights(self.policy)
        return self._broadcast([shared])[0]

    def _agree(self, failure: str, published: SyncResult) -> tuple[str, SyncResult]:
        return tuple(self._broadcast([failure, published]))  # type: ignore[return-value]

    def _broadcast(self, values: list[Any]) -> list[Any]:
        if not self._distributed():
            return values
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list(values)


def smallest(trajectories: Sequence[Trajectory], count: int) -> tuple[Trajectory, ...]:
    """The `count` shortest trajectories that have something to score."""
    scored = [
        t
        for t in trajectories
        if any(s.trained and s.decisions is not None and not s.decisions.sampling.greedy_N.all() for s in t.segments)
    ]
    return tuple(sorted(scored, key=lambda t: t.num_tokens())[:count])
