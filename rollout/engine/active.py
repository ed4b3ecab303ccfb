"""One active row's trajectory: what its row holds is compared with what the next segment must be conditioned on.

loop.py owns one of these for each active row. The cursor's side, which every writer shares, is rollout/writing.py.

Letters: N decisions of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

import numpy as np

from formats.base import Format, Span
from policy.base import Policy
from record.trajectory import DecisionKind, Decisions, Modality, Piece, SamplingParams, Segment
from rollout.engine.flow import Denoising
from rollout.engine.sampling import noise_key
from rollout.requests import RolloutRequest
from rollout.sampling_table import SamplingTable
from rollout.tools.answers import Answer
from rollout.tools.runner import Sessions
from rollout.writing import SampledIds, SequenceWriter


@dataclass(frozen=True)
class CachedContext:
    """What the row's cache holds where the open segment begins, once every id before it was fed."""

    pieces: tuple[Piece, ...] = ()
    end: int = 0  # position of the next id


@dataclass
class ParkedCall:
    """A call that a row waits for."""

    future: Future[Answer]
    role: str  # that called
    due: int  # the tick in which its answer is read
    since: float  # seconds of the process's clock


class Need(Enum):
    """What the row's cache wants before the open segment can be sampled."""

    NOTHING = "nothing"  # it holds the context
    MORE = "more"  # pieces after those that it holds
    REPREFILL = "reprefill"  # something else than it holds


class ActiveSequence(SequenceWriter):
    """A trajectory that is being written in a row of the cache."""

    def __init__(
        self,
        request: RolloutRequest,
        order: tuple[int, int],
        fmt: Format,
        policy: Policy,
        prompt: Sequence[Segment],
        constrain: str,
    ):
        super().__init__(request, order, fmt, policy, prompt, constrain)
        self.rehearsal = request.rehearsal
        self.noise = noise_key(request.seed, request.group, self.trajectory.member)
        self.denoising: Denoising | None = None
        self.undrawn = 0  # images that are not pixels yet
        self.cached = CachedContext()
        self.parked: ParkedCall | None = None  # a tool is at work, and the row waits for it
        self.sessions: Sessions | None = None  # of tools; None: none was called

    def used(self, written: int) -> int:
        """Slots that the row takes, when `written` ids stand after the prompt and all of them are fed."""
        return self.slots + written - self.start

    def begin(self, modality: Modality, guided: bool) -> Need:
        """Open the next segment, or open it anew, and say what the row lacks for it."""
        self.open_segment(modality, guided)
        return self._need()

    def _need(self) -> Need:
        pieces, held = self.full.pieces, self.cached.pieces
        if pieces[: len(held)] != held:
            return Need.REPREFILL
        if len(pieces) == len(held):
            return Need.NOTHING if self.full.start == self.cached.end else Need.REPREFILL
        return Need.MORE if pieces[len(held)].start == self.cached.end else Need.REPREFILL

    def missing(self) -> tuple[Piece, ...]:
        """The pieces of the open segment's context that the row lacks (Need.MORE)."""
        return self.full.pieces[len(self.cached.pieces) :]

    def provided(self) -> None:
        """The row now holds the open segment's context."""
        self.cached = CachedContext(self.full.pieces, self.full.start)

    def open_unsampled(self, span: Span) -> None:
        if self.begin(span.modality, guided=False) is not Need.NOTHING:
            raise self.contradiction(span.role)

    def on_closed(self, span: Span) -> None:
        if span.modality is Modality.IMAGE_LATENT:  # denoising leaves the cache as it was
            self.provided()
        else:
            piece = Piece(len(self.trajectory.segments) - 1, "ids", self.full.start)
            self.cached = CachedContext((*self.full.pieces, piece), self.full.start + span.stop - span.start)

    def _segment(self, span: Span, sampled: SampledIds, table: SamplingTable, version: int) -> Segment:
        segment = super()._segment(span, sampled, table, version)
        if self.denoising is not None:
            if not self.denoising.left:
                self._add_flow(segment, self.denoising)
            self.denoising = None
        return segment

    def _add_flow(self, segment: Segment, flow: Denoising) -> None:
        """Append the stochastic denoising steps to the segment's decisions."""
        before, position_N = segment.decisions, flow.position_N
        count = len(position_N)
        assert before is not None
        segment.latent, logprob_N, segment.flow = flow.fetch()
        sampling = SamplingParams(
            np.concatenate([before.sampling.temperature_N, np.ones(count, np.float32)]),
            np.concatenate([before.sampling.allowed_N, np.full(count, -1, np.int32)]),
            before.sampling.sets,
            self.guidance,
        )
        segment.decisions = Decisions(
            np.concatenate([before.kind_N, np.full(count, DecisionKind.FLOW, np.int8)]),
            np.concatenate([before.position_N, position_N]),
            np.concatenate([before.logprob_N, logprob_N]),
            sampling,
        )
