"""What a family's cache must keep: contract.py asks it of the contexts that trajectories were sampled under.

Letters: B rows of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.base import Categorical, FlowStep, Policy, TokenStep, Velocity
from policy.context import extent_of, slots_of
from record.trajectory import Author, Context, Piece, Trajectory

PLACES = 2  # contexts tried of each role, modality and branch


@dataclass(frozen=True)
class Place:
    """A segment that the policy wrote, and what it was conditioned on under one branch."""

    trajectory: Trajectory
    segment: int
    context: Context

    def __str__(self) -> str:
        role = self.trajectory.segments[self.segment].role
        return f"trajectory {self.trajectory.key}, segment {self.segment} ('{role}', branch '{self.context.branch}')"


class CacheCheck:
    """Promises of prefill, append, step and copy, and of the extents that the engine counts by."""

    def __init__(self, policy: Policy, trajectories: list[Trajectory], tolerance: float):
        self.policy, self.trajectories, self.tolerance = policy, trajectories, tolerance
        self.written = [
            (t, n, segment)
            for t, trajectory in enumerate(trajectories)
            for n, segment in enumerate(trajectory.segments)
            if segment.author is Author.POLICY and segment.contexts
        ]
        self.require(bool(self.written), "trajectories", "they hold no segment that the policy wrote")
        sampled = {int(id) for _, _, segment in self.written for id in segment.ids}
        self.ids = sorted(sampled)[:3] * 3  # to be fed; any that it knows
        self.appended: dict[tuple[str, str, str, bool, bool], int] = {}  # by kind of piece, how many were tried

    def require(self, holds: bool, promise: str, sentence: str) -> None:
        assert holds, f"{self.policy.family}: {promise}: {sentence}"

    def equal(self, got: Tensor, expected: Tensor, promise: str, sentence: str) -> None:
        """Logits, as log-probs; or velocities, relative to the largest."""
        same = got.shape == expected.shape and bool(torch.isfinite(got).all())
        self.require(same, promise, f"{sentence}; {list(got.shape)} against {list(expected.shape)}, or not finite")
        off = float((got - expected).abs().max()) if got.numel() else 0.0
        self.require(off <= self.tolerance, promise, f"{sentence}; they differ by {off:.2g}")

    # ---- places to try ----

    def places(self) -> Iterator[Place]:
        """A few of each role, modality and branch: those with the most before them come first."""
        tried: dict[tuple[str, str, str], int] = {}
        for t, n, segment in sorted(self.written, key=lambda found: -len(found[2].contexts[0].pieces)):
            for context in segment.contexts:
                kind = (segment.role, str(segment.modality), context.branch)
                if context.pieces and tried.get(kind, 0) < PLACES:
                    tried[kind] = tried.get(kind, 0) + 1
                    yield Place(self.trajectories[t], n, context)

    # ---- what the cache is told ----

    def prefill(self, cache: Any, row: int, trajectory: Trajectory, context: Context) -> Tensor:
        """Log-probs [V] of what follows."""
        return self.policy.prefill(cache, [row], [(trajectory, context)])[0].log_softmax(-1)

    def feed(self, cache: Any, rows: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Log-probs [B, V] after one id more in each row."""
        device = next(self.policy.model.parameters()).device
        answer = self.policy.step(cache, list(rows), TokenStep(torch.tensor(list(ids), device=device)))
        self.require(isinstance(answer, Categorical), "step", "a TokenStep is answered by a Categorical")
        assert isinstance(answer, Categorical)
        size = self.policy.vocabulary.size
        shape = list(answer.logits_BV.shape)
        self.require(shape == [len(rows), size], "step", f"logits are {shape}, not {[len(rows), size]}")
        return answer.logits_BV.log_softmax(-1)

    def extent(self, place: Place) -> None:
        """What pieces are said to take is what the cache takes, slot by slot."""
        trajectory, context = place.trajectory, place.context
        slots = slots_of(self.policy, trajectory, context)
        forms = ", ".join(f"{p.segment} as '{p.form}'" for p in context.pieces)
        said = f"{place}: the extents of its context ({forms}) add up to {slots} slots"
        if slots + 1 > self.policy.max_length:
            return
        cache = self.policy.allocate(1, slots + 1)
        try:
            self.prefill(cache, 0, trajectory, context)
            self.feed(cache, [0], self.ids[:1])
        except Exception as error:
            raise AssertionError(
                f"{self.policy.family}: extent: {said}, but a cache of one more does not hold it and one id: {error}"
            ) from error
        if getattr(cache, "length", None) != slots + 1:
            return  # it holds more than it was asked for, or nothing by slot
        try:
            self.feed(cache, [0], self.ids[:1])
        except Exception:
            return
        self.require(False, "extent", f"{said}, but it takes fewer: a cache of one more holds it and two ids")

    def append(self, place: Place) -> None:
        """A row that is extended holds what a row does that was prefilled with all of it; its position is the same."""
        trajectory, context = place.trajectory, place.context
        for count in range(len(context.pieces)):
            # From nothing, the first piece is appended: a row may begin empty.
            before, last = context.pieces[:count], context.pieces[count]
            segment = trajectory.segments[last.segment]
            kind = (segment.role, str(segment.modality), last.form, last.keep is None, count == 0)
            self.appended[kind] = self.appended.get(kind, 0) + 1
            if self.appended[kind] > PLACES:
                continue
            extent = extent_of(self.policy, trajectory, last)
            longer = Context(context.branch, context.pieces[: count + 1], last.start + extent.positions)
            slots = slots_of(self.policy, trajectory, longer)
            cache = self.policy.allocate(2, min(slots + 2, self.policy.max_length))
            self.policy.prefill(cache, [0], [(trajectory, Context(context.branch, before, last.start))])
            after = self.policy.append(cache, [0], [(trajectory, last)])[0].log_softmax(-1)
            where = f"{place}, piece {count} (segment {last.segment} as '{last.form}')"
            expected = self.prefill(cache, 1, trajectory, longer)
            if extent.slots:
                self.equal(after, expected, "append", f"{where}: appending is not prefilling with it")
            if slots + 1 <= self.policy.max_length:
                both = self.feed(cache, [0, 1], self.ids[:1] * 2)
                self.equal(
                    both[0],
                    both[1],
                    "extent",
                    f"{where}: the next id does not stand at its start {last.start} plus the {extent.positions} "
                    "positions of its extent",
                )

    def step(self, place: Place) -> None:
        """Ids that are fed one by one leave what a prefill with them leaves."""
        trajectory, context, n = place.trajectory, place.context, place.segment
        segment = trajectory.segments[n]
        count = min(len(segment.ids), 4)
        if not count or self.policy.extent(segment, "ids", (0, count)) is None:
            return
        slots = slots_of(self.policy, trajectory, context)
        if slots + count > self.policy.max_length:
            return
        cache = self.policy.allocate(2, slots + count)
        self.prefill(cache, 0, trajectory, context)
        for fed in range(1, count + 1):
            stepped = self.feed(cache, [0], segment.ids[fed - 1 : fed].tolist())[0]
            piece = Piece(n, "ids", context.start, (0, fed))
            extent = extent_of(self.policy, trajectory, piece)
            self.require(extent.slots == fed, "extent", f"{place}: {fed} ids take {extent.slots} slots, not one each")
            longer = Context(context.branch, (*context.pieces, piece), context.start + extent.positions)
            expected = self.prefill(cache, 1, trajectory, longer)
            self.equal(stepped, expected, "step", f"{place}: feeding id {fed} is not prefilling with it")

    def copy(self, place: Place) -> None:
        """A copied row is the row; copies go apart, and leave the one that they were made of as it was."""
        trajectory, context = place.trajectory, place.context
        slots = slots_of(self.policy, trajectory, context)
        if slots + 2 > self.policy.max_length:
            return
        cache = self.policy.allocate(6, slots + 2)
        a, b = self.ids[0], self.ids[-1 if len(set(self.ids)) == 1 else 1]
        for row in (0, 3, 4, 5):
            self.prefill(cache, row, trajectory, context)
        self.policy.copy(cache, 0, [1, 2])
        alone = [self.feed(cache, [row], [id])[0] for row, id in ((3, a), (4, b))]
        copied = self.feed(cache, [2, 1], [b, a])
        self.equal(copied[1], alone[0], "copy", f"{place}: a copied row is not what a prefilled one is")
        self.equal(copied[0], alone[1], "copy", f"{place}: a copied row is not what a prefilled one is")
        alone = [self.feed(cache, [row], [id])[0] for row, id in ((3, b), (4, a))]
        forked = self.feed(cache, [1, 2], [b, a])
        for row in range(2):
            self.equal(forked[row], alone[row], "fork", f"{place}: two rows copied from one do not go apart")
        source, untouched = self.feed(cache, [0], [a])[0], self.feed(cache, [5], [a])[0]
        self.equal(source, untouched, "fork", f"{place}: stepping the copies of a row changed it")
        again = self.prefill(cache, 1, trajectory, context)
        self.equal(
            again, self.prefill(cache, 5, trajectory, context), "prefill", f"{place}: a used row is not forgotten"
        )

    def rows(self) -> None:
        """Rows of unlike lengths in one call are what each is alone."""
        places = list(self.places())[:5]
        slots = max(slots_of(self.policy, place.trajectory, place.context) for place in places)
        if slots + 1 > self.policy.max_length:
            return
        cache = self.policy.allocate(2 * len(places), slots + 1)
        together = list(range(len(places)))
        logits_BV = self.policy.prefill(cache, together, [(p.trajectory, p.context) for p in places]).log_softmax(-1)
        shape, size = list(logits_BV.shape), [len(places), self.policy.vocabulary.size]
        self.require(shape == size, "prefill", f"logits are {shape}, not {size}")
        ids = (self.ids * len(places))[: len(places)]
        stepped = self.feed(cache, together, ids)
        for row, place in enumerate(places):
            alone = self.prefill(cache, len(places) + row, place.trajectory, place.context)
            self.equal(logits_BV[row], alone, "rows", f"{place}: a row's prefill depends on its neighbours")
            alone = self.feed(cache, [len(places) + row], [ids[row]])[0]
            self.equal(stepped[row], alone, "rows", f"{place}: a row's step depends on its neighbours")

    def denoising(self, place: Place) -> None:
        """Velocities are those of the row alone, at its time; and denoising leaves the cache as it was."""
        flow = place.trajectory.segments[place.segment].flow
        if flow is None or not len(flow.point_N):
            return
        trajectory, context = place.trajectory, place.context
        slots = slots_of(self.policy, trajectory, context)
        if slots + 1 > self.policy.max_length:
            return
        device = next(self.policy.model.parameters()).device
        cache = self.policy.allocate(3, slots + 1)
        for row in range(3):
            self.prefill(cache, row, trajectory, context)
        x = torch.from_numpy(np.stack([flow.x_N[0], flow.x_next_N[-1]])).to(device)
        time = torch.tensor([0.9, 0.3], device=device)
        both = self._velocity(cache, [0, 1], x, time)
        for row in range(2):
            alone = self._velocity(cache, [2], x[row : row + 1], time[row : row + 1])[0]
            self.equal(
                both[row], alone, "denoising", f"{place}: a row's velocity depends on its neighbours or its past"
            )
        after = self.feed(cache, [0], self.ids[:1])[0]
        self.prefill(cache, 1, trajectory, context)
        self.equal(after, self.feed(cache, [1], self.ids[:1])[0], "denoising", f"{place}: a FlowStep entered the cache")

    def _velocity(self, cache: Any, rows: list[int], x: Tensor, time: Tensor) -> Tensor:
        answer = self.policy.step(cache, rows, FlowStep(x, time))
        self.require(isinstance(answer, Velocity), "denoising", "a FlowStep is answered by a Velocity")
        assert isinstance(answer, Velocity)
        return answer.velocity_B
