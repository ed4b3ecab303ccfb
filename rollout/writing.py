"""One trajectory in the making, as its format's cursor sees it: what the cursor closed becomes segments with decisions.

Every writer shares this: the native engine (engine/active.py adds what a row's cache holds), and one that asks another
engine for words. No tensor is touched here.

Letters: T ids of a segment, N its decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from formats.base import Codes, Cursor, Format, Span
from policy.base import Policy
from policy.context import Resolved, resolve
from record.trajectory import (
    ARM,
    PARENT_GROUP,
    Author,
    Context,
    DecisionKind,
    Decisions,
    Guidance,
    Modality,
    SamplingParams,
    Segment,
    StopReason,
    Trajectory,
)
from rollout.forks import NOTHING, follow
from rollout.requests import RolloutRequest
from rollout.sampling_table import SamplingTable
from runtime.errors import UserError

FORCED = -1  # in SampledIds.number_T: an id that nobody chose


class FormatContractError(UserError):
    """A format whose contexts or spans contradict how its segments are sampled."""


@dataclass(frozen=True)
class SampledIds:
    """The ids of one row since the prompt, and how each was chosen."""

    ids_T: np.ndarray  # int64
    logprob_T: np.ndarray  # float32
    number_T: np.ndarray  # int32, in the SamplingTable; FORCED


class SequenceWriter:
    """A trajectory, its cursor and the state of its open segment (always the last of `trajectory.segments`)."""

    def __init__(
        self,
        request: RolloutRequest,
        order: tuple[int, int],
        fmt: Format,
        policy: Policy,
        prompt: Sequence[Segment],
        constrain: str,
    ):
        self.order = order  # (request, member) as they were asked for
        self.siblings = len(request.members)
        self.fmt, self.policy, self.vocabulary = fmt, policy, policy.vocabulary
        self.cursor: Cursor = fmt.cursor(self.vocabulary, constrain)
        self.trajectory = Trajectory(
            request.prompt,
            request.record,
            fmt.name,
            # A fork's segments are its own: what follows an image may tell which role it has.
            list(prompt) if request.parent is None else [replace(segment) for segment in prompt],
            request.group,
            request.members[order[1]],
            request.seed,
            parent=request.parent,
        )
        self.inherited = NOTHING
        if request.parent is not None:
            self.inherited = follow(self.cursor, fmt, request)
            if request.parent_group is not None:
                self.trajectory.info[PARENT_GROUP] = request.parent_group
            if request.arm:
                self.trajectory.info[ARM] = request.arm
        self.closed = len(self.cursor.spans)  # spans that have become segments
        self.start = len(self.inherited.ids)  # index of the open segment's first id among the policy's ids
        self.contexts: tuple[Context, ...] = ()
        self.slots = 0  # of the cache, that the open segment's full context takes
        self.guidance: Guidance | None = None  # of the open segment
        self.limit: StopReason | None = None  # an image was kept from beginning, for want of room
        self.cuts: dict[int, np.ndarray] = {}  # index among the policy's ids -> what top-p or top-k left
        self._open: Segment | None = None

    @property
    def full(self) -> Context:
        return self.contexts[0]

    def open_segment(self, modality: Modality, guided: bool) -> None:
        """Open the next segment at id `start` (or open it anew, now that it turned out to be an image)."""
        if self._open is None:
            self._open = Segment(self.cursor.role, Author.POLICY, modality, trained=False)
            self.trajectory.segments.append(self._open)
        else:
            self._open.role, self._open.modality = self.cursor.role, modality
        index = len(self.trajectory.segments) - 1
        specs = self.fmt.contexts(self.trajectory, index)
        self.guidance = None
        if guided and modality is not Modality.TEXT and len(specs) > 1:
            self.guidance = self.fmt.guidance(self.trajectory, index)
        resolved: tuple[Resolved, ...] = resolve(
            self.policy, self.trajectory, specs if self.guidance is not None else specs[:1]
        )
        self.contexts, self.slots = tuple(each.context for each in resolved), resolved[0].slots

    def close(self, sampled: SampledIds, table: SamplingTable, version: int) -> list[Segment]:
        """Turn the spans that the cursor has closed since last time into segments, and return them.

        Raises:
            FormatContractError: a span that does not follow the one before it, or a context that its first ids were
                not sampled from.
        """
        done = []
        for span in self.cursor.spans[self.closed :]:
            if span.start != self.start:
                raise FormatContractError(
                    f"format '{self.fmt.name}': the segment '{span.role}' begins at id "
                    f"{span.start}, but the one before it ended at {self.start}"
                )
            if self._open is None:  # two closed at once: nothing was sampled between them
                self.open_unsampled(span)
            done.append(self._segment(span, sampled, table, version))
            self.trajectory.segments[-1] = done[-1]
            self.on_closed(span)
            self._open, self.start = None, span.stop
            self.closed += 1
        return done

    def open_unsampled(self, span: Span) -> None:
        """Open a segment that closed together with the one before it."""
        self.open_segment(span.modality, guided=False)

    def on_closed(self, span: Span) -> None:
        """The open segment is finished: for whoever keeps account of what it left behind."""

    def contradiction(self, role: str) -> FormatContractError:
        return FormatContractError(
            f"format '{self.fmt.name}': the context of the segment '{role}' is not what its first ids were sampled "
            f"from. Where a context drops something, close the segment before it with its own last id, or force "
            f"the first ids of the new one"
        )

    def _segment(self, span: Span, sampled: SampledIds, table: SamplingTable, version: int) -> Segment:
        ids_T = sampled.ids_T[span.start : span.stop].astype(np.int32)
        segment = Segment(
            span.role,
            self.fmt.author(span.role),
            span.modality,
            self.fmt.trained(span.role),
            ids_T,
            contexts=self.contexts,
            version=version,
        )
        if span.modality is Modality.TEXT:
            segment.text = self.vocabulary.decode(ids_T)
        segment.decisions = self._decisions(span, sampled, table)
        return segment

    def _decisions(self, span: Span, sampled: SampledIds, table: SamplingTable) -> Decisions:
        # Python over a few dozen small integers: numpy's unique would cost more than the rest of the segment.
        stretch = slice(span.start, span.stop)
        number_of = sampled.number_T[stretch].tolist()
        positions = [t for t, number in enumerate(number_of) if number != FORCED]
        sets: list[np.ndarray] = []
        set_number: dict[Any, int] = {}
        allowed: list[int] = []
        for position in positions:
            entry = table.entries[number_of[position]]
            cut = self.cuts.pop(span.start + position, None) if self.cuts else None
            if cut is None and entry.whole:
                allowed.append(-1)
                continue
            name = entry.mask if cut is None else cut.tobytes()
            if name not in set_number:
                set_number[name] = len(sets)
                sets.append(entry.allowed.ranges if cut is None else cut)
            allowed.append(set_number[name])
        position_N = np.array(positions, np.int32)
        kind_N = np.full(len(positions), DecisionKind.WORD, np.int8)
        if span.modality is Modality.IMAGE_TOKENS:
            imaging = self.vocabulary.imaging
            marked = isinstance(imaging, Codes) and imaging.open is not None
            kind_N[position_N >= int(marked)] = DecisionKind.CODE  # the opening marker is a word's choice
        temperature_N = table.temperature_L[sampled.number_T[stretch][position_N]].astype(np.float32)
        sampling = SamplingParams(temperature_N, np.array(allowed, np.int32), tuple(sets), self.guidance)
        return Decisions(kind_N, position_N, sampled.logprob_T[stretch][position_N].astype(np.float32), sampling)

    def environment(self, segments: Sequence[Segment]) -> None:
        """Add what the environment said, between two segments of the policy."""
        assert self._open is None
        self.trajectory.segments += segments

    def drop_environment(self) -> None:
        """Take back what the environment said last: there is no room for it."""
        segments = self.trajectory.segments
        while segments[-2].author is Author.ENVIRONMENT:
            del segments[-2]

    def finish(self, stop: StopReason) -> Trajectory:
        if self._open is not None:
            self.trajectory.segments.pop()
            self._open = None
        own = [segment for segment in self.trajectory.segments if segment.author is Author.POLICY]
        for segment, span in zip(own, self.cursor.spans, strict=True):
            segment.role = span.role  # what followed an image may have told which one it was
        self.trajectory.stop = stop
        return self.trajectory
