"""What writes trajectories, as everything above sees it: requests in, trajectories out, new weights in between.

The native writer is native.py; docs/writers.md says how another one is added. A pool (pool/) holds one writer in each
of its processes and speaks to nothing else of it.

Letters: N decisions of a call's trajectories, in the order of `Policy.score`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from policy.base import Policy
from record.trajectory import Trajectory
from rollout.capabilities import Capabilities, WriterError
from rollout.requests import RequestKey, RolloutRequest, key_of
from rollout.weights.receive import UNPUBLISHED
from rollout.weights.wire import Manifest, WeightSyncError, unpack


class Writer(Protocol):
    """Attributes:
    name: who it is, in messages; its pool gives it.
    version: of the weights that sample; UNPUBLISHED: those that it was built with. Its pool sets it where the weights
        are the trainer's own, else `take` does.
    exact: its log-probs are the scorer's to rounding, so that the trainer takes the recorded ones for those of its own
        weights. False: trajectories are scored anew before they are trained on, and corrected by importance sampling.
    capabilities: what it can do. A recipe that asks for more is refused before the run.
    """

    name: str
    version: int
    exact: bool
    capabilities: Capabilities

    def stream(self, requests: Sequence[RolloutRequest]) -> Iterator[Trajectory]:
        """Trajectories as they finish: each member of each request once, keyed by (group, member), with the segments,
        contexts, decisions and sampling parameters that record/trajectory.py asks for."""
        ...

    def take(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        """Sample with these weights from the next call of `stream` on. Bytes are verified; names and shapes are the
        writer's to check.

        Args:
            tensors: by the names of the trainer's state dict, each made when it is asked for; all of them
                (manifest.kind "full"), or those that are trained ("delta").

        Raises:
            WeightSyncError: it cannot; the weights are then what they were.
        """
        ...

    def logprobs(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """Float32 [N]: what the weights that sample say of recorded decisions, by the engine that samples."""
        ...

    def sleep(self) -> None:
        """Give the memory of caches back until `wake`. Not while a stream is read."""
        ...

    def wake(self) -> None: ...

    def stats(self) -> dict[str, float]:
        """Counts of the last call of `stream`, by the names of EngineStats where they are the same thing."""
        ...

    def shares(self, policy: Policy) -> bool:
        """Whether it samples with this very policy, so that nothing need be published."""
        ...

    def close(self) -> None:
        """End what works beside it; nothing is asked of it afterwards."""
        ...


def write_groups(
    writer: Writer, requests: Sequence[RolloutRequest], sleeps: bool = False
) -> Iterator[tuple[RequestKey, list[Trajectory]]]:
    """(RolloutRequest.key, its members in order), as groups become complete.

    Args:
        sleeps: the writer is woken before and sent to sleep after.

    Raises:
        WriterError: it wrote what it was not asked for, or something twice; or its stream ended before all was written.
    """
    wanted = {request.key: request.members for request in requests}
    found: dict[RequestKey, dict[int, Trajectory]] = {key: {} for key in wanted}
    if sleeps:
        writer.wake()
    stream = writer.stream(requests)
    try:
        for trajectory in stream:
            trajectory.exact = writer.exact
            key = key_of(trajectory)
            members = found.get(key)
            if members is None or trajectory.member not in wanted[key] or trajectory.member in members:
                raise WriterError(
                    f"{writer.name} wrote the trajectory {_named(trajectory.member, key)}, which was not asked for, or "
                    "has been written before: each member of each request is written once, with the request's group "
                    "and parent"
                )
            members[trajectory.member] = trajectory
            if len(members) == len(wanted[key]):
                yield key, [members[member] for member in wanted[key]]
        for key, members in found.items():
            lacking = [member for member in wanted[key] if member not in members]
            if lacking:
                raise WriterError(
                    f"{writer.name} ended its stream, and the trajectory {_named(lacking[0], key)} was never written: "
                    "each member of each request is written once"
                )
    finally:
        close = getattr(stream, "close", None)  # a reader that leaves ends the writing
        if close is not None:
            close()
        if sleeps:
            writer.sleep()


def _named(member: int, key: RequestKey) -> str:
    group, parent, _ = key
    return f"{group}-{member}" + ("" if parent is None else f" (continuing member {parent[0]})")


def take_up(
    writer: Writer, manifest: Manifest, probe: Sequence[Trajectory], chunks: Sequence[np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Bring a writer to a publication. Returns its log-probs of the probe before (None: it had no version before) and
    after it.

    Raises:
        WeightSyncError: the bytes are not those that were sent, or the writer did not take them.
    """
    before_N = writer.logprobs(probe) if probe and writer.version != UNPUBLISHED else None
    writer.take(manifest, unpack(manifest, chunks, writer.name))
    if writer.version != manifest.version:
        raise WeightSyncError(
            f"version {manifest.version} was given to {writer.name}, which says that it has version {writer.version}"
        )
    return before_N, writer.logprobs(probe) if probe else None
