"""The engine's loop: one call's queue, and what every row does in a tick. engine.py makes one of these a call.

Every tick, each active row takes one id, by force of the grammar or by sampling; segments that this closes or begins
are settled; finished rows are refilled or closed up; then one `policy.step` feeds all rows their ids. Rows in an image
latent take a denoising step instead.

Letters: A rows for trajectories, B active now, L ids that a trajectory may hold, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from formats.base import Latent, SeenOnly
from policy.base import FlowStep, Velocity
from record.trajectory import Modality, Segment, StopReason, ranges_of
from rollout.config import FlowConfig
from rollout.engine.active import ActiveSequence, Need
from rollout.engine.flow import FlowPlan, advance, begin, inputs
from rollout.engine.parking import Parking
from rollout.engine.prompts import image_room, lay_out_prompts
from rollout.engine.sampling import DeviceMasks, sample, uniforms
from rollout.engine.slots import Rows
from rollout.engine.state import EngineState
from rollout.requests import RolloutError, RolloutRequest
from rollout.sampling_table import SamplingTable
from rollout.tools.answers import answer_roles, answer_segments
from rollout.writing import FORCED, SampledIds


class Batch(Rows):
    """The queue, and the ticks that empty it."""

    def __init__(self, engine: EngineState, requests: Sequence[RolloutRequest]):
        self.fmt, self.config, self.vocabulary = engine.fmt, engine.config, engine.policy.vocabulary
        self.max_length, self.version = engine.policy.max_length, engine.version
        self.requests = list(requests)
        imaging = self.vocabulary.imaging
        self.open_id = None if isinstance(imaging, SeenOnly) else imaging.open
        self.image = image_room(engine.policy)
        self.imaging_latent = isinstance(imaging, Latent)
        self.plans: dict[str, FlowPlan] = {}  # by what they are made of
        for request in self.requests if self.imaging_latent else ():
            self._plan(request.flow or self.config.flow)  # what cannot be is told before anything is sampled
        self.prompts, slots = lay_out_prompts(engine, self.requests, self.image)
        self.queue = deque((r, m) for r, request in enumerate(self.requests) for m in range(len(request.members)))
        self.kept_prompt: tuple[int, Tensor] | None = None  # request whose prompt the spare row holds, and its logits
        longest = max(slots, default=0) + self.config.max_tokens
        if engine.tools is not None or self.image.slots > self.image.ids:  # contexts hold more than sampled ids
            longest = self.max_length
        self.capacity = min(engine.active_rows, len(self.queue))
        super().__init__(engine, self.capacity, min(longest, self.max_length))
        self.table = SamplingTable(self.vocabulary.size, self.config.temperature)
        self.masks = DeviceMasks(self.table, self.device)
        self.parking = Parking(engine)

    # ---- the loop ----

    def ticks(self) -> Iterator[list[ActiveSequence]]:
        """Work until everything is written; yields finished trajectories. inference_mode never spans a yield."""
        try:
            while True:
                began = time.perf_counter()
                if self.version != self.engine.version:
                    raise RuntimeError(
                        "new weights were published while rows of the old version were live; publish "
                        "between calls of the engine"
                    )
                with torch.inference_mode():
                    more = self._tick()
                    done = self.drawn(all_of_them=not more)
                self.stats.seconds += time.perf_counter() - began
                if done:
                    yield done
                if not more:
                    return
        finally:
            self.cache = None
            self.parking.close()

    def _tick(self) -> bool:
        """One id for every active row. False when nothing is left to do."""
        self.ready, self.reprefill, self.more = set(), [], []
        if not self.sequences:
            self._refill([])
            self.ready.clear()
            if not self.sequences:
                return False
        finished: set[int] = set()
        self._read_answers(finished)
        self._choose(finished)
        self._denoise(finished)
        self._refill(sorted(finished))
        self.prefill_again()
        self.step()
        self.append()
        return bool(self.sequences)

    def _choose(self, finished: set[int]) -> None:
        """Take the next id of every row that is in ids, and tell its cursor."""
        sequences, table, config = self.sequences, self.table, self.config
        B = len(sequences)
        number_list = [FORCED] * B
        forced_list = [0] * B
        image = max(self.image.ids, self.image.slots)
        tight = (self.room_A[:B] < image).tolist() if self.room_A[:B].min() < image else None
        boi = self.open_id
        number = table.number
        skip: set[int] = set()
        for i, sequence in enumerate(sequences):
            if sequence.denoising is not None or sequence.parked is not None or i in finished:
                skip.add(i)
                continue
            cursor = sequence.cursor
            forced = cursor.forced()
            if forced is not None:
                if tight and tight[i] and forced == boi and not self._image_fits(i, sequence):
                    self._stop(i, sequence, self._limit(i, sequence))
                    finished.add(i)
                    skip.add(i)
                    continue
                forced_list[i] = forced
                continue
            allowed = cursor.allowed()
            if tight and tight[i] and boi is not None and not (cursor.in_image or self._image_fits(i, sequence)):
                fitting = table.without(allowed, boi)
                if not len(fitting.ranges):
                    self._stop(i, sequence, self._limit(i, sequence))
                    finished.add(i)
                    skip.add(i)
                    continue
                if fitting is not allowed:
                    sequence.limit = self._limit(i, sequence)
                    allowed = fitting
            number_list[i] = number(allowed, cursor.role)

        number_B = np.array(number_list, np.int32)
        id_B = np.array(forced_list, np.int64)
        logprob_B = np.zeros(B, np.float32)
        chosen_B = number_B != FORCED
        if chosen_B.any():
            # Rows that choose nothing are sampled under some law too, and the result dropped: cheaper than a gather.
            some_B = np.where(chosen_B, number_B, number_B.max())
            sampled = sample(
                self.logits_AV[:B],
                torch.from_numpy(table.temperature_L[some_B]).to(self.device),
                self.masks.of(some_B),
                torch.from_numpy(uniforms(self.noise_A[:B], self.chosen_A[:B])).to(self.device),
                config.top_p,
                config.top_k,
            )
            id_B = np.where(chosen_B, sampled.id_B.cpu().numpy(), id_B)
            logprob_B = np.where(chosen_B, sampled.logprob_B.cpu().numpy(), 0)
            if sampled.kept_BV is not None:
                self._note_cuts(sampled.kept_BV, number_B)
        rows = np.arange(B)
        if skip:
            rows = np.delete(rows, sorted(skip))
        at = self.count_A[rows]
        self.ids_AL[rows, at] = id_B[rows]
        self.logprob_AL[rows, at] = logprob_B[rows]
        self.number_AL[rows, at] = number_B[rows]
        self.count_A[rows] += 1
        self.chosen_A[:B] += chosen_B
        self.room_A[rows] -= 1
        ids = id_B.tolist()
        for i in rows.tolist():
            sequence, id = sequences[i], ids[i]
            cursor = sequence.cursor
            cursor.advance(id)
            if id == boi or cursor.stopped or len(cursor.spans) > sequence.closed:
                self._boundary(i, sequence, id, finished)
        for i in np.flatnonzero(self.room_A[:B] <= 0).tolist():
            if i not in finished and sequences[i].denoising is None and sequences[i].parked is None:
                self._stop(i, sequences[i], self._limit(i, sequences[i]))
                finished.add(i)

    def _note_cuts(self, kept_BV: Tensor, number_B: np.ndarray) -> None:
        """Remember what top-p or top-k left of each row's allowed set, where that is less."""
        kept = kept_BV.cpu().numpy()
        allowed = np.array([mask_V.sum() for mask_V in self.table.masks])
        for i in np.flatnonzero(number_B != FORCED).tolist():
            if kept[i].sum() < allowed[self.table.mask_L[number_B[i]]]:
                self.sequences[i].cuts[int(self.count_A[i])] = ranges_of(np.flatnonzero(kept[i]))

    # ---- segments ----

    def _boundary(self, i: int, sequence: ActiveSequence, id: int, finished: set[int]) -> None:
        """After an id that closed a segment, began an image, or ended the turn. Images without a marker begin here."""
        closed = self._close(i, sequence)
        if closed and sequence.cursor.awaits:
            self._call(i, sequence, finished)
        else:
            self._go_on(i, sequence, id, finished)

    def _go_on(self, i: int, sequence: ActiveSequence, id: int, finished: set[int], answered: bool = False) -> None:
        """Begin what follows the segments that are closed, `answered` by the environment or not."""
        cursor = sequence.cursor
        if cursor.stopped:
            self._stop(i, sequence, self._end(sequence, id))
            finished.add(i)
            return
        written, start = int(self.count_A[i]), sequence.start
        need = self._begin(i, sequence)
        if self.room_A[i] <= 0 or not self._begins_with_room(i, sequence):
            if answered:  # what the environment said does not fit
                sequence.drop_environment()
            self._stop(i, sequence, self._limit(i, sequence))
            finished.add(i)
            return
        if cursor.in_image and self.imaging_latent:
            self._begin_latent(i, sequence)
        if need is Need.REPREFILL:
            if (self.number_AL[i, start:written] != FORCED).any():
                raise sequence.contradiction(cursor.role)
            self.reprefill.append(i)
        elif need is Need.MORE:
            if written > start:
                raise sequence.contradiction(cursor.role)
            self.more.append(i)
        if sequence.guidance is not None:
            self.prefill_branches(i, sequence)

    def _begin(self, i: int, sequence: ActiveSequence) -> Need:
        """Open the row's next segment. An image without a marker begins where the format has it begin."""
        modality = Modality.TEXT
        if sequence.cursor.in_image:
            modality = Modality.IMAGE_LATENT if self.imaging_latent else Modality.IMAGE_TOKENS
        need = sequence.begin(modality, self.config.guidance)
        if sequence.guidance is not None and self.open_id is None:
            raise RolloutError(
                f"rollout.guidance: the family '{self.policy.family}' begins images without a marker, and no branch "
                "could tell the first code from nothing; set it to false"
            )
        self._count_room(i, sequence)
        return need

    def _begins_with_room(self, i: int, sequence: ActiveSequence) -> bool:
        """Where no marker begins it, an image that has begun may not fit. With one it was not offered."""
        return self.open_id is not None or not sequence.cursor.in_image or self._image_fits(i, sequence)

    def _close(self, i: int, sequence: ActiveSequence) -> list[Segment]:
        count = int(self.count_A[i])
        sampled = SampledIds(self.ids_AL[i, :count], self.logprob_AL[i, :count], self.number_AL[i, :count])
        closed = sequence.close(sampled, self.table, self.version)
        for segment in closed:
            if segment.modality in (Modality.IMAGE_TOKENS, Modality.IMAGE_LATENT):
                self.undrawn.append((sequence, segment))
                sequence.undrawn += 1
        return closed

    def _call(self, i: int, sequence: ActiveSequence, finished: set[int]) -> None:
        """Park the row until its tool has answered. Where nothing could follow the answer, nothing is called."""
        if self.room_A[i] <= 0:
            self._stop(i, sequence, self._limit(i, sequence))
            finished.add(i)
            return
        if sequence.undrawn:
            self.draw()
        self.parking.park(sequence)

    def _read_answers(self, finished: set[int]) -> None:
        """Go on with the rows whose tools have answered: they choose in this very tick. The others stay parked."""
        for i in self.parking.answered(self.sequences):
            sequence = self.sequences[i]
            role, answer = self.parking.take(sequence)
            segments = answer_segments(answer, self.fmt, role, self.vocabulary)
            media = [segment for segment in segments if segment.modality is not Modality.TEXT]
            if media:
                self.policy.perceive(media)
            sequence.environment(segments)
            sequence.cursor.observe(segments[-1].role if segments else answer_roles(self.fmt, role)[0])
            self._go_on(i, sequence, FORCED, finished, answered=bool(segments))
        self.prefill_again()
        self.append()
        self.reprefill, self.more = [], []
        self.ready = {i for i, sequence in enumerate(self.sequences) if sequence.parked is not None}

    def _end(self, sequence: ActiveSequence, id: int) -> StopReason:
        if sequence.limit is not None:
            return sequence.limit
        full = sequence.cursor.images >= self.fmt.max_images
        unended = self.vocabulary.eos is not None and id != self.vocabulary.eos
        return StopReason.MAX_IMAGES if full and unended else StopReason.END

    def _limit(self, i: int, sequence: ActiveSequence) -> StopReason:
        """Which limit is the nearer one."""
        tokens = self.config.max_tokens - int(self.count_A[i])
        return StopReason.MAX_TOKENS if tokens <= self.room_A[i] else StopReason.MAX_CONTEXT

    def _count_room(self, i: int, sequence: ActiveSequence) -> None:
        written = int(self.count_A[i])
        self.room_A[i] = min(self.config.max_tokens - written, self.max_length - sequence.used(written))

    def _image_fits(self, i: int, sequence: ActiveSequence) -> bool:
        """Whether an image that begins with the next id fits: its ids, and what it takes once it is seen again."""
        written = int(self.count_A[i])
        ids, slots = self.config.max_tokens - written, self.max_length - sequence.used(written)
        return ids >= self.image.ids and slots >= self.image.slots

    def _stop(self, i: int, sequence: ActiveSequence, reason: StopReason) -> None:
        sequence.cursor.stop()
        self._close(i, sequence)
        trajectory = sequence.finish(reason)
        self.parking.release(sequence)
        self.wait(sequence)
        self.stats.trajectories += 1
        self.stats.tokens += int(self.count_A[i]) - len(sequence.inherited.ids)
        inherited = trajectory.segments[: trajectory.parent[1]] if trajectory.parent is not None else ()
        self.stats.decisions += trajectory.num_decisions() - sum(
            len(segment.decisions) for segment in inherited if segment.decisions is not None
        )
        if int(self.count_A[i]) != sequence.start:
            raise RuntimeError(
                f"format '{self.fmt.name}': {int(self.count_A[i]) - sequence.start} ids at the end belong to no segment"
            )

    # ---- rows ----

    def _refill(self, holes: list[int]) -> None:
        """Give finished rows to the queue; where it is empty, close ranks."""
        holes = [*holes, *range(len(self.sequences), self.capacity)] if self.queue else holes
        self.stats.refills += min(len(self.queue), len(holes)) if self.stats.ticks else 0
        fresh: dict[int, list[int]] = {}  # request -> rows
        for i in list(holes):
            if not self.queue:
                break
            r, m = self.queue.popleft()
            sequence = ActiveSequence(
                self.requests[r], (r, m), self.fmt, self.policy, self.prompts[r], self.engine.constrain
            )
            if i < len(self.sequences):
                self.sequences[i] = sequence
            else:
                self.sequences.append(sequence)
            fresh.setdefault(r, []).append(i)
            holes.remove(i)
            self.count_A[i], self.chosen_A[i] = sequence.start, sequence.inherited.decisions
            self.ids_AL[i, : sequence.start] = sequence.inherited.ids
            self.noise_A[i] = sequence.noise
            self._begin(i, sequence)
            sequence.provided()
            if sequence.cursor.in_image and self.imaging_latent:
                self._begin_latent(i, sequence)
        if fresh:
            self._fill_prompts(fresh)
        for i in reversed([i for i in holes if i < len(self.sequences)]):
            last = len(self.sequences) - 1
            if i != last:
                self.move(last, i)
            self.sequences.pop()

    def _fill_prompts(self, fresh: dict[int, list[int]]) -> None:
        """Compute each new group's prompt once and copy it; keep the last one while members of it are queued."""
        new = [r for r in fresh if self.kept_prompt is None or self.kept_prompt[0] != r]
        for r in set(fresh) - set(new):
            assert self.kept_prompt is not None
            self.policy.copy(self.cache, self.spare, fresh[r])
            self.logits_AV[fresh[r]] = self.kept_prompt[1]
        if new:
            first = [fresh[r][0] for r in new]
            self.logits_AV[first] = self.policy.prefill(
                self.cache, first, [(self.sequences[i].trajectory, self.sequences[i].full) for i in first]
            )
            self.stats.prompts += len(new)
        for r in new:
            source, *others = fresh[r]
            if others:
                self.policy.copy(self.cache, source, others)
                self.logits_AV[others] = self.logits_AV[source].clone()
            if self.queue and self.queue[0][0] == r:
                self.policy.copy(self.cache, source, [self.spare])
                self.kept_prompt = (r, self.logits_AV[source].clone())
        self.ready.update(i for rows in fresh.values() for i in rows)

    # ---- latents and images ----

    def _begin_latent(self, i: int, sequence: ActiveSequence) -> None:
        sequence.denoising = begin(
            self._plan(self.requests[sequence.order[0]].flow or self.config.flow),
            sequence.trajectory,
            sequence.cursor.images,
            int(self.chosen_A[i]),
            self.policy.latent_shape,
            self.device,
        )
        self.chosen_A[i] += int(sequence.denoising.stochastic_T.sum())

    def _plan(self, config: FlowConfig) -> FlowPlan:
        key = config.model_dump_json()
        if key not in self.plans:
            self.plans[key] = FlowPlan(config)
        return self.plans[key]

    def _denoise(self, finished: set[int]) -> None:
        """One denoising step of every row in a latent (those that lack their context wait for it)."""
        waiting = {*self.reprefill, *self.more, *finished}
        rows = [i for i, sequence in enumerate(self.sequences) if sequence.denoising is not None and i not in waiting]
        if not rows:
            return
        flows = [flow for i in rows if (flow := self.sequences[i].denoising) is not None]
        branch_rows = [row for i in rows for row in self.branch_rows(i)]
        of = [*range(len(rows)), *(n for n, i in enumerate(rows) for _ in self.branch_rows(i))]
        x_B, time_B = inputs(flows, self.device)
        answer = self.policy.step(self.cache, rows + branch_rows, FlowStep(x_B[of], time_B[of]))
        assert isinstance(answer, Velocity)
        velocity_B = answer.velocity_B[: len(rows)]
        guided = [n for n, i in enumerate(rows) if self.sequences[i].guidance is not None]
        if guided:
            velocity_B = velocity_B.clone()
            velocity_B[guided] = self.guide(
                [rows[n] for n in guided],
                velocity_B[guided],
                answer.velocity_B[len(rows) :],
                FlowStep(x_B[guided], time_B[guided]),
            )
        advance(flows, x_B, velocity_B)
        for n, i in enumerate(rows):
            if not flows[n].left:
                self._end_latent(i, finished)

    def _end_latent(self, i: int, finished: set[int]) -> None:
        """The closing marker is forced and enters the cache with the latent, as the next context says."""
        sequence = self.sequences[i]
        self.ready.add(i)
        while (id := sequence.cursor.forced()) is not None:
            at = self.count_A[i]
            self.ids_AL[i, at], self.number_AL[i, at] = id, FORCED
            self.count_A[i] += 1
            self.room_A[i] -= 1
            sequence.cursor.advance(id)
            if sequence.cursor.stopped or len(sequence.cursor.spans) > sequence.closed:
                self._boundary(i, sequence, id, finished)
                return
        sequence.cursor.end_image()  # no marker closes it
        self._boundary(i, sequence, FORCED, finished)
