"""The proof that what arrived is what samples: a few recorded decisions that trainer and writer score alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from record.trajectory import Trajectory
from rollout.weights.wire import WeightSyncError


@dataclass(frozen=True)
class Probe:
    """What the trainer's weights say of a few recorded decisions, for a worker to say the same."""

    version: int
    trajectories: tuple[Trajectory, ...]
    expected_N: np.ndarray  # float32, the trainer's log-probs
    tolerance: float  # of the largest difference
    moved: bool  # the trainer's log-probs of these decisions differ from the last version's
    exact: bool = True  # False: the writers' log-probs are another engine's; the mean difference is held to it

    def check(self, worker: str, before_N: np.ndarray | None, after_N: np.ndarray) -> float:
        """The largest difference between the worker's log-probs after loading and the trainer's; the mean one where the
        writers are not exact.

        Args:
            before_N: of the worker's last version; None where it had none.

        Raises:
            WeightSyncError: it is past the tolerance, or the trainer's moved and the worker's did not.
        """
        if after_N.shape != self.expected_N.shape:
            raise WeightSyncError(
                f"version {self.version} on {worker}: it scored {len(after_N)} decisions of the "
                f"probe where the trainer scored {len(self.expected_N)}"
            )
        gap_N = np.nan_to_num(np.abs(after_N.astype(np.float64) - self.expected_N), nan=np.inf)
        gap = float(gap_N.max(initial=0.0) if self.exact else gap_N.mean() if len(gap_N) else 0.0)
        if gap > self.tolerance:
            n = int(gap_N.argmax())
            by = f"up to {gap:.3g}" if self.exact else f"{gap:.3g} on average"
            raise WeightSyncError(
                f"version {self.version} on {worker}: its log-probs differ from the trainer's by {by} (decision {n} of "
                f"the probe: {after_N[n]:.6f}, trainer {self.expected_N[n]:.6f}), over the tolerance of "
                f"{self.tolerance:g}: other weights than the published ones are sampling there"
            )
        if self.moved and before_N is not None and len(after_N) and np.array_equal(before_N, after_N):
            raise WeightSyncError(
                f"version {self.version} on {worker}: the weights changed, and the trainer's log-probs with them, but "
                f"the worker's are still those of its last version (largest difference to the trainer's: {gap:.3g}): "
                f"it did not take them up"
            )
        return gap
