"""One trajectory in the making: what its cursor closed becomes segments, what its row holds is compared with what
the next segment must be conditioned on. engine.py owns one of these for each active row; no tensor is touched here.

Letters: T ids of a segment, N its decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from rollout.denoising import Denoising
from rollout.errors import UserError
from rollout.formats.base import Cursor, ThoughtFormat, Vocabulary
from rollout.requests import RolloutRequest
from rollout.sampling import Laws, noise_key
from rollout.trajectory import (
    Author,
    Context,
    DecisionKind,
    Decisions,
    Guidance,
    Law,
    Modality,
    Piece,
    Segment,
    StopReason,
    Trajectory,
)

FORCED = -1  # in Written.law_T: an id that nobody chose


class RolloutError(UserError):
    """A request that the engine cannot serve; the sentence names the prompt or the key."""


class FormatContractError(UserError):
    """A format whose contexts or spans contradict how its segments are sampled."""


@dataclass(frozen=True)
class Written:
    """The ids of one row since the prompt, and how each was chosen."""

    ids_T: np.ndarray  # int64
    logprob_T: np.ndarray  # float32
    law_T: np.ndarray  # int32, number in Laws; FORCED


@dataclass(frozen=True)
class Held:
    """What the row's cache holds where the open segment begins, once every id before it was fed."""

    pieces: tuple[Piece, ...] = ()
    end: int = 0  # position of the next id


class Need(Enum):
    """What the row's cache wants before the open segment can be sampled."""

    NOTHING = "nothing"  # it holds the context
    MORE = "more"  # pieces after those that it holds
    ANEW = "anew"  # something else than it holds


class Live:
    """A trajectory, its cursor and the state of its open segment (always the last of `trajectory.segments`)."""

    def __init__(self, request: RolloutRequest, order: tuple[int, int], fmt: ThoughtFormat, vocabulary: Vocabulary,
                 prompt: Sequence[Segment], constrain: str):
        self.order = order  # (request, member) as they were asked for
        self.siblings = len(request.members)
        self.fmt, self.vocabulary = fmt, vocabulary
        self.cursor: Cursor = fmt.cursor(vocabulary, constrain)
        self.trajectory = Trajectory(request.prompt, request.record, fmt.name, list(prompt), request.group,
                                     request.members[order[1]], request.seed)
        self.noise = noise_key(request.seed, request.group, self.trajectory.member)
        self.closed = 0  # spans that have become segments
        self.start = 0  # index of the open segment's first id among the policy's ids
        self.contexts: tuple[Context, ...] = ()
        self.guidance: Guidance | None = None  # of the open segment
        self.limit: StopReason | None = None  # an image was kept from beginning, for want of room
        self.cuts: dict[int, np.ndarray] = {}  # index among the policy's ids -> what top-p or top-k left
        self.denoising: Denoising | None = None
        self.undrawn = 0  # pictures that are not pixels yet
        self.base = Held()
        self._open: Segment | None = None

    @property
    def full(self) -> Context:
        return self.contexts[0]

    def position(self, written: int) -> int:
        """Position id of the next token, when `written` ids stand after the prompt."""
        return self.full.start + written - self.start

    def begin(self, modality: Modality, guided: bool) -> Need:
        """Open the next segment at id `start` (or open it anew, now that it turned out to be an image)."""
        if self._open is None:
            self._open = Segment(self.cursor.role, Author.POLICY, modality, trained=False)
            self.trajectory.segments.append(self._open)
        else:
            self._open.role, self._open.modality = self.cursor.role, modality
        index = len(self.trajectory.segments) - 1
        contexts = tuple(self.fmt.contexts(self.trajectory, index))
        self.guidance = None
        if guided and modality is not Modality.TEXT and len(contexts) > 1:
            self.guidance = self.fmt.guidance(self.trajectory, index)
        self.contexts = contexts if self.guidance is not None else contexts[:1]
        return self._need()

    def _need(self) -> Need:
        pieces, held = self.full.pieces, self.base.pieces
        if pieces[:len(held)] != held:
            return Need.ANEW
        if len(pieces) == len(held):
            return Need.NOTHING if self.full.start == self.base.end else Need.ANEW
        return Need.MORE if pieces[len(held)].start == self.base.end else Need.ANEW

    def missing(self) -> tuple[Piece, ...]:
        """The pieces of the open segment's context that the row lacks (Need.MORE)."""
        return self.full.pieces[len(self.base.pieces):]

    def provided(self) -> None:
        """The row now holds the open segment's context."""
        self.base = Held(self.full.pieces, self.full.start)

    def close(self, written: Written, laws: Laws, version: int) -> list[Segment]:
        """Turn the spans that the cursor has closed since last time into segments, and return them."""
        done = []
        for span in self.cursor.spans[self.closed:]:
            if span.start != self.start:
                raise FormatContractError(f"format '{self.fmt.name}': the segment '{span.role}' begins at id "
                                          f"{span.start}, but the one before it ended at {self.start}")
            if self._open is None:  # two closed at once: nothing was sampled between them
                if self.begin(span.modality, guided=False) is not Need.NOTHING:
                    raise self.contradiction(span.role)
            done.append(self._segment(span.role, span.modality, span.stop, written, laws, version))
            self.trajectory.segments[-1] = done[-1]
            if span.modality is Modality.IMAGE_LATENT:  # denoising leaves the cache as it was
                self.base = Held(self.full.pieces, self.full.start)
            else:
                piece = Piece(len(self.trajectory.segments) - 1, "ids", self.full.start)
                self.base = Held((*self.full.pieces, piece), self.full.start + span.stop - span.start)
            self._open, self.start = None, span.stop
            self.closed += 1
        return done

    def contradiction(self, role: str) -> FormatContractError:
        return FormatContractError(
            f"format '{self.fmt.name}': the context of the segment '{role}' is not what its first ids were sampled "
            f"from. Where a context drops something, close the segment before it with its own last id, or force "
            f"the first ids of the new one")

    def _segment(self, role: str, modality: Modality, stop: int, written: Written, laws: Laws,
                 version: int) -> Segment:
        span = slice(self.start, stop)
        ids_T = written.ids_T[span].astype(np.int32)
        segment = Segment(role, self.fmt.author(role), modality, self.fmt.trained(role), ids_T,
                          contexts=self.contexts, version=version)
        if modality is Modality.TEXT:
            segment.text = self.vocabulary.decode(ids_T)
        segment.decisions = self._decisions(modality, span, written, laws)
        if self.denoising is not None:
            self._add_flow(segment, self.denoising)
            self.denoising = None
        return segment

    def _decisions(self, modality: Modality, span: slice, written: Written, laws: Laws) -> Decisions:
        # Python over a few dozen small integers: numpy's unique would cost more than the rest of the segment.
        law_of = written.law_T[span].tolist()
        positions = [t for t, law in enumerate(law_of) if law != FORCED]
        sets: list[np.ndarray] = []
        number: dict[Any, int] = {}
        allowed: list[int] = []
        for position in positions:
            entry = laws.entries[law_of[position]]
            cut = self.cuts.pop(span.start + position, None) if self.cuts else None
            if cut is None and entry.whole:
                allowed.append(-1)
                continue
            name = entry.mask if cut is None else cut.tobytes()
            if name not in number:
                number[name] = len(sets)
                sets.append(entry.allowed.ranges if cut is None else cut)
            allowed.append(number[name])
        position_N = np.array(positions, np.int32)
        kind_N = np.full(len(positions), DecisionKind.WORD, np.int8)
        if modality is Modality.IMAGE_TOKENS:
            kind_N[position_N > 0] = DecisionKind.CODE  # the opening marker is a word's choice
        temperature_N = laws.temperature_L[written.law_T[span][position_N]].astype(np.float32)
        law = Law(temperature_N, np.array(allowed, np.int32), tuple(sets), self.guidance)
        return Decisions(kind_N, position_N, written.logprob_T[span][position_N].astype(np.float32), law)

    def _add_flow(self, segment: Segment, flow: Denoising) -> None:
        """Append the stochastic denoising steps to the segment's decisions."""
        before, count = segment.decisions, len(flow.position)
        assert before is not None
        segment.flow, segment.latent = flow.steps(), flow.latent()
        law = Law(np.concatenate([before.law.temperature_N, np.ones(count, np.float32)]),
                  np.concatenate([before.law.allowed_N, np.full(count, -1, np.int32)]),
                  before.law.sets, self.guidance)
        segment.decisions = Decisions(
            np.concatenate([before.kind_N, np.full(count, DecisionKind.FLOW, np.int8)]),
            np.concatenate([before.position_N, np.array(flow.position, np.int32)]),
            np.concatenate([before.logprob_N, np.array(flow.logprob, np.float32)]), law)

    def environment(self, segment: Segment) -> None:
        """Add what the environment said, between two segments of the policy."""
        assert self._open is None
        self.trajectory.segments.append(segment)

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
            segment.role = span.role  # what followed a picture may have told which one it was
        self.trajectory.stop = stop
        return self.trajectory
