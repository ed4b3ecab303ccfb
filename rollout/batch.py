"""The engine's loop: one call's queue, rows and buffers. engine.py makes one of these for each call.

Every tick, each active row takes one id, by force of the grammar or by sampling; segments that this closes or begins
are settled; finished rows are refilled or closed up; then one `policy.step` feeds all rows their ids. Rows in an image
latent take a denoising step instead.

Letters: A rows for trajectories, B active now, L ids that a trajectory may hold, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from policy.base import Categorical, FlowStep, Gaussian, TokenStep
from rollout.denoising import FlowPolicy, advance, begin, stack
from rollout.formats.render import prompt_segment
from rollout.live import FORCED, Live, Need, RolloutError, Written
from rollout.requests import RolloutRequest
from rollout.sampling import Laws, sample, uniforms
from rollout.trajectory import Author, Context, Modality, Segment, StopReason, Trajectory, ranges_of

if TYPE_CHECKING:
    from rollout.engine import Engine

DRAW_BATCH = 64  # pictures are drawn when so many wait, or when nothing else is to be done


class Batch:
    """Active trajectories occupy the rows 0 .. B-1 of the cache without gaps."""

    def __init__(self, engine: Engine, requests: Sequence[RolloutRequest]):
        self.engine, self.policy, self.fmt, self.config = engine, engine.policy, engine.fmt, engine.config
        self.vocabulary = self.policy.vocabulary
        self.version = engine.version
        self.stats = engine.stats
        self.requests = list(requests)
        self.prompts = [self._prompt(request) for request in self.requests]
        self.queue = deque((r, m) for r, request in enumerate(self.requests) for m in range(len(request.members)))
        self.lives: list[Live] = []
        self.waiting: list[Live] = []  # finished, their pictures not drawn yet
        self.undrawn: list[tuple[Live, Segment]] = []
        self.kept_prompt: tuple[int, Tensor] | None = None  # request whose prompt the last row holds, and its logits

        config, size = self.config, self.vocabulary.size
        self.image_ids = self.vocabulary.codes_per_image + 2
        rows = min(engine.active_rows, len(self.queue))
        longest = max((len(prompt[0].ids) for prompt in self.prompts), default=0) + config.max_tokens
        whole = engine.environment is not None or hasattr(self.policy, "flow_times")  # contexts hold more than ids
        self.max_length = self.policy.max_length
        with torch.inference_mode():
            self.cache = engine.cache(self.max_length if whole else min(self.max_length, longest))
        parameter = next(self.policy.model.parameters())
        self.device = parameter.device
        self.laws = Laws(size, config.temperature, self.device)
        self.logits_AV = torch.empty((rows, size), device=self.device)
        self.ids_AL = np.zeros((rows, config.max_tokens), np.int64)
        self.logprob_AL = np.zeros((rows, config.max_tokens), np.float32)
        self.law_AL = np.zeros((rows, config.max_tokens), np.int32)
        self.count_A = np.zeros(rows, np.int64)  # ids written after the prompt
        self.chosen_A = np.zeros(rows, np.int64)  # decisions taken
        self.room_A = np.zeros(rows, np.int64)  # ids that may still be written
        self.noise_A = np.zeros(rows, np.uint64)
        self.capacity = rows

    def _prompt(self, request: RolloutRequest) -> list[Segment]:
        """The prompt's segment, and those that guidance sees beside it (a negative prompt)."""
        segment = prompt_segment(self.fmt, request.prompt, self.vocabulary)
        ids = segment.ids
        if len(ids) >= self.policy.max_length:
            shown = request.prompt if len(request.prompt) <= 60 else request.prompt[:57] + "..."
            raise RolloutError(f"prompt '{shown}' (group {request.group}) has {len(ids)} ids, but the policy's context "
                               f"holds {self.policy.max_length}, the answer included; shorten the prompt")
        beside = getattr(self.fmt, "beside_prompt", None)
        return [segment, *(beside(self.vocabulary) if beside and self.config.guidance else [])]

    # ---- the loop ----

    def ticks(self) -> Iterator[list[Live]]:
        """Work until everything is written; yields finished trajectories. inference_mode never spans a yield."""
        try:
            while True:
                began = time.perf_counter()
                if self.version != self.engine.version:
                    raise RuntimeError("new weights were published while rows of the old version were live; publish "
                                       "between calls of the engine")
                with torch.inference_mode():
                    more = self._tick()
                    done = self._drawn(all_of_them=not more)
                self.stats.seconds += time.perf_counter() - began
                if done:
                    yield done
                if not more:
                    return
        finally:
            self.cache = None

    def _tick(self) -> bool:
        """One id for every active row. False when nothing is left to do."""
        self.ready: set[int] = set()  # rows whose logits are there without a step
        self.anew: list[int] = []  # rows to prefill with the open segment's context
        self.more: list[int] = []  # rows to extend by what they lack of it
        if not self.lives:
            self._refill([])
            self.ready.clear()
            if not self.lives:
                return False
        finished: set[int] = set()
        self._choose(finished)
        self._denoise(finished)
        self._refill(sorted(finished))
        self._prefill_anew()
        self._step()
        self._append()
        return bool(self.lives)

    def _choose(self, finished: set[int]) -> None:
        """Take the next id of every row that is in ids, and tell its cursor."""
        lives, laws, config = self.lives, self.laws, self.config
        B = len(lives)
        law_list = [FORCED] * B
        forced_list = [0] * B
        tight = (self.room_A[:B] < self.image_ids).tolist() if self.room_A[:B].min() < self.image_ids else None
        boi = self.vocabulary.boi
        number = laws.number
        skip: set[int] = set()
        for i, live in enumerate(lives):
            if live.denoising is not None:
                skip.add(i)
                continue
            cursor = live.cursor
            forced = cursor.forced()
            if forced is not None:
                if tight and tight[i] and forced == boi:
                    self._stop(i, live, self._limit(i, live))
                    finished.add(i)
                    skip.add(i)
                    continue
                forced_list[i] = forced
                continue
            allowed = cursor.allowed()
            if tight and tight[i] and not cursor.in_image:
                fitting = laws.without(allowed, boi)
                if not len(fitting.ranges):
                    self._stop(i, live, self._limit(i, live))
                    finished.add(i)
                    skip.add(i)
                    continue
                if fitting is not allowed:
                    live.limit = self._limit(i, live)
                    allowed = fitting
            law_list[i] = number(allowed, cursor.role)

        law_B = np.array(law_list, np.int32)
        id_B = np.array(forced_list, np.int64)
        logprob_B = np.zeros(B, np.float32)
        chosen_B = law_B != FORCED
        if chosen_B.any():
            # Rows that choose nothing are sampled under some law too, and the result dropped: cheaper than a gather.
            some_B = np.where(chosen_B, law_B, law_B.max())
            sampled = sample(self.logits_AV[:B], torch.from_numpy(laws.temperature_L[some_B]).to(self.device),
                             laws.mask_MV[torch.from_numpy(laws.mask_L[some_B]).to(self.device)],
                             torch.from_numpy(uniforms(self.noise_A[:B], self.chosen_A[:B])).to(self.device),
                             config.top_p, config.top_k)
            id_B = np.where(chosen_B, sampled.id_B.cpu().numpy(), id_B)
            logprob_B = np.where(chosen_B, sampled.logprob_B.cpu().numpy(), 0)
            if sampled.kept_BV is not None:
                self._note_cuts(sampled.kept_BV, law_B)
        rows = np.arange(B)
        if skip:
            rows = np.delete(rows, sorted(skip))
        at = self.count_A[rows]
        self.ids_AL[rows, at] = id_B[rows]
        self.logprob_AL[rows, at] = logprob_B[rows]
        self.law_AL[rows, at] = law_B[rows]
        self.count_A[rows] += 1
        self.chosen_A[:B] += chosen_B
        self.room_A[rows] -= 1
        ids = id_B.tolist()
        for i in rows.tolist():
            live, id = lives[i], ids[i]
            cursor = live.cursor
            cursor.advance(id)
            if id == boi or cursor.stopped or len(cursor.spans) > live.closed:
                self._boundary(i, live, id, finished)
        for i in np.flatnonzero(self.room_A[:B] <= 0).tolist():
            if i not in finished and lives[i].denoising is None:
                self._stop(i, lives[i], self._limit(i, lives[i]))
                finished.add(i)

    def _note_cuts(self, kept_BV: Tensor, law_B: np.ndarray) -> None:
        """Remember what top-p or top-k left of each row's allowed set, where that is less."""
        kept = kept_BV.cpu().numpy()
        allowed = self.laws.mask_MV.sum(1).cpu().numpy()
        for i in np.flatnonzero(law_B != FORCED).tolist():
            if kept[i].sum() < allowed[self.laws.mask_L[law_B[i]]]:
                self.lives[i].cuts[int(self.count_A[i])] = ranges_of(np.flatnonzero(kept[i]))

    # ---- segments ----

    def _boundary(self, i: int, live: Live, id: int, finished: set[int]) -> None:
        """After an id that closed a segment, began an image, or ended the turn."""
        closed = self._close(i, live)
        cursor = live.cursor
        written = int(self.count_A[i])
        if self.engine.environment is not None and closed and live.start == written:
            last, may_resume = closed[-1], not cursor.stopped or hasattr(cursor, "observe")
            if last.modality is Modality.TEXT and last.author is Author.POLICY and may_resume:
                self._ask(live)
        if cursor.stopped:
            self._stop(i, live, self._end(live, id))
            finished.add(i)
            return
        modality = Modality.TEXT
        if id == self.vocabulary.boi:
            span = getattr(cursor, "open_span", None)
            modality = Modality.IMAGE_TOKENS if span is None else span.modality
        start = live.start
        need = live.begin(modality, self.config.guidance)
        self._count_room(i, live)
        if self.room_A[i] <= 0:
            if need is Need.MORE:  # what the environment said does not fit
                live.drop_environment()
            self._stop(i, live, self._limit(i, live))
            finished.add(i)
            return
        if modality is Modality.IMAGE_LATENT:
            self._begin_latent(i, live)
        if need is Need.ANEW:
            if (self.law_AL[i, start:written] != FORCED).any():
                raise live.contradiction(cursor.role)
            self.anew.append(i)
        elif need is Need.MORE:
            if written > start:
                raise live.contradiction(cursor.role)
            self.more.append(i)
        if live.guidance is not None:
            self._prefill_branches(i, live)

    def _close(self, i: int, live: Live) -> list[Segment]:
        count = int(self.count_A[i])
        written = Written(self.ids_AL[i, :count], self.logprob_AL[i, :count], self.law_AL[i, :count])
        closed = live.close(written, self.laws, self.version)
        for segment in closed:
            if segment.modality in (Modality.IMAGE_TOKENS, Modality.IMAGE_LATENT):
                self.undrawn.append((live, segment))
                live.undrawn += 1
        return closed

    def _ask(self, live: Live) -> None:
        if live.undrawn:
            self._draw()
        assert self.engine.environment is not None
        segment = self.engine.environment(live.trajectory)
        if segment is None:
            return
        live.environment(segment)
        observe = getattr(live.cursor, "observe", None)
        if observe is not None:
            observe(segment)

    def _end(self, live: Live, id: int) -> StopReason:
        if live.limit is not None:
            return live.limit
        full = live.cursor.images >= self.fmt.max_images
        return StopReason.MAX_IMAGES if full and id != self.vocabulary.eos else StopReason.END

    def _limit(self, i: int, live: Live) -> StopReason:
        """Which limit is the nearer one."""
        tokens = self.config.max_tokens - int(self.count_A[i])
        return StopReason.MAX_TOKENS if tokens <= self.room_A[i] else StopReason.MAX_CONTEXT

    def _count_room(self, i: int, live: Live) -> None:
        written = int(self.count_A[i])
        self.room_A[i] = min(self.config.max_tokens - written, self.max_length - live.position(written))

    def _stop(self, i: int, live: Live, reason: StopReason) -> None:
        live.cursor.stop()
        self._close(i, live)
        trajectory = live.finish(reason)
        self.waiting.append(live)
        self.stats.trajectories += 1
        self.stats.tokens += int(self.count_A[i])
        self.stats.decisions += trajectory.num_decisions()
        if int(self.count_A[i]) != live.start:
            raise RuntimeError(f"format '{self.fmt.name}': {int(self.count_A[i]) - live.start} ids at the end belong "
                               f"to no segment")

    # ---- rows ----

    def _branch_rows(self, i: int) -> range:
        """The rows of the open segment's guidance branches."""
        first = self.engine.active_rows + i * self.engine.branches
        return range(first, first + len(self.lives[i].contexts) - 1)

    def _refill(self, holes: list[int]) -> None:
        """Give finished rows to the queue; where it is empty, close ranks."""
        holes = [*holes, *range(len(self.lives), self.capacity)] if self.queue else holes
        self.stats.refills += min(len(self.queue), len(holes)) if self.stats.ticks else 0
        fresh: dict[int, list[int]] = {}  # request -> rows
        for i in list(holes):
            if not self.queue:
                break
            r, m = self.queue.popleft()
            live = Live(self.requests[r], (r, m), self.fmt, self.vocabulary, self.prompts[r], self.engine.constrain)
            if i < len(self.lives):
                self.lives[i] = live
            else:
                self.lives.append(live)
            fresh.setdefault(r, []).append(i)
            holes.remove(i)
            self.count_A[i] = self.chosen_A[i] = 0
            self.noise_A[i] = live.noise
            live.begin(Modality.TEXT, False)
            live.provided()
            self._count_room(i, live)
        if fresh:
            self._fill_prompts(fresh)
        for i in reversed([i for i in holes if i < len(self.lives)]):
            last = len(self.lives) - 1
            if i != last:
                self._move(last, i)
            self.lives.pop()

    def _fill_prompts(self, fresh: dict[int, list[int]]) -> None:
        """Compute each new group's prompt once and copy it; keep the last one while members of it are queued."""
        spare = self.engine.active_rows * (1 + self.engine.branches)
        new = [r for r in fresh if self.kept_prompt is None or self.kept_prompt[0] != r]
        for r in set(fresh) - set(new):
            assert self.kept_prompt is not None
            self.policy.copy(self.cache, spare, fresh[r])
            self.logits_AV[fresh[r]] = self.kept_prompt[1]
        if new:
            first = [fresh[r][0] for r in new]
            self.logits_AV[first] = self.policy.prefill(
                self.cache, first, [(self.lives[i].trajectory, self.lives[i].full) for i in first])
            self.stats.prompts += len(new)
        for r in new:
            source, *others = fresh[r]
            if others:
                self.policy.copy(self.cache, source, others)
                self.logits_AV[others] = self.logits_AV[source].clone()
            if self.queue and self.queue[0][0] == r:
                self.policy.copy(self.cache, source, [spare])
                self.kept_prompt = (r, self.logits_AV[source].clone())
        self.ready.update(i for rows in fresh.values() for i in rows)

    def _move(self, source: int, to: int) -> None:
        """Close ranks: the last row takes the place of a finished one."""
        self.policy.copy(self.cache, source, [to])
        self.lives[to] = self.lives[source]
        for branch, into in zip(self._branch_rows(source), self._branch_rows(to), strict=True):
            self.policy.copy(self.cache, branch, [into])
        for array in (self.ids_AL, self.logprob_AL, self.law_AL, self.count_A, self.chosen_A, self.room_A,
                      self.noise_A):
            array[to] = array[source]
        self.logits_AV[to] = self.logits_AV[source].clone()
        self.anew = [to if i == source else i for i in self.anew]
        self.more = [to if i == source else i for i in self.more]
        (self.ready.add if source in self.ready else self.ready.discard)(to)

    def _prefill(self, rows: list[int], contexts: list[tuple[Trajectory, Context]]) -> Tensor:
        if self.undrawn and any(piece.form != "ids" for _, context in contexts for piece in context.pieces):
            self._draw()
        return self.policy.prefill(self.cache, rows, contexts)

    def _prefill_anew(self) -> None:
        rows = self.anew
        if not rows:
            return
        self.logits_AV[rows] = self._prefill(rows, [(self.lives[i].trajectory, self.lives[i].full) for i in rows])
        self.stats.anew += len(rows)
        for i in rows:
            live = self.lives[i]
            live.provided()
            pending = self.ids_AL[i, live.start:self.count_A[i]]
            for id in pending[:-1]:  # forced ids before the last one, which goes with everybody's step
                self.policy.step(self.cache, [i], TokenStep(torch.tensor([int(id)], device=self.device)))
            if not len(pending):
                self.ready.add(i)

    def _prefill_branches(self, i: int, live: Live) -> None:
        count = len(live.contexts) - 1
        if count > self.engine.branches:
            raise RolloutError(f"rollout.branches: format '{self.fmt.name}' guides by {count} branches, but "
                               f"{self.engine.branches} rows are kept for them")
        self._prefill(list(self._branch_rows(i)), [(live.trajectory, context) for context in live.contexts[1:]])

    def _step(self) -> None:
        """Feed the last id of every row in ids, to the row and to its guidance branches, and guide the codes."""
        rows = [i for i, live in enumerate(self.lives) if i not in self.ready and live.denoising is None]
        self.stats.ticks += 1
        if not rows:
            return
        guided = [i for i in rows if self.lives[i].guidance is not None]
        all_rows = rows + [row for i in guided for row in self._branch_rows(i)]
        of = rows + [i for i in guided for _ in self._branch_rows(i)]
        ids = torch.from_numpy(self.ids_AL[of, self.count_A[of] - 1]).to(self.device)
        self.stats.row_ticks += len(rows)
        self.stats.branch_ticks += len(all_rows) - len(rows)
        answer = self.policy.step(self.cache, all_rows, TokenStep(ids))
        assert isinstance(answer, Categorical)
        logits = answer.logits_BV
        if len(rows) == len(self.lives) == len(logits):
            self.logits_AV[:len(rows)] = logits
        else:
            self.logits_AV[rows] = logits[:len(rows)]
        if guided:
            self.logits_AV[guided] = self._guide(guided, logits[:len(rows)][[rows.index(i) for i in guided]],
                                                 logits[len(rows):])

    def _guide(self, guided: list[int], full: Tensor, branches: Tensor) -> Tensor:
        """Combine full [G, ...] with the branches' rows (in the order of `guided`), one call a kind of guidance."""
        together: dict[tuple, list[tuple[int, int]]] = {}
        first = 0
        for g, i in enumerate(guided):
            live = self.lives[i]
            assert live.guidance is not None
            names = tuple(context.branch for context in live.contexts[1:])
            kind = (live.guidance.kind, tuple(sorted(live.guidance.scales.items())), names)
            together.setdefault(kind, []).append((g, first))
            first += len(names)
        out = torch.empty_like(full)
        for (_, _, names), members in together.items():
            at = [g for g, _ in members]
            rows = {"full": full[at]}
            for n, name in enumerate(names):
                rows[name] = branches[[first + n for _, first in members]]
            guidance = self.lives[guided[at[0]]].guidance
            assert guidance is not None
            out[at] = self.policy.guide(rows, guidance)
        return out

    def _append(self) -> None:
        """Extend rows by what they lack of the open segment's context: the environment's words, a drawn latent."""
        rows = self.more
        if not rows:
            return
        pieces = {i: self.lives[i].missing() for i in rows}
        if self.undrawn and any(piece.form != "ids" for i in rows for piece in pieces[i]):
            self._draw()
        for depth in range(max(len(p) for p in pieces.values())):
            now = [i for i in rows if depth < len(pieces[i])]
            self.logits_AV[now] = self.policy.append(
                self.cache, now, [(self.lives[i].trajectory, pieces[i][depth].segment, pieces[i][depth].form)
                                  for i in now])
        for i in rows:
            self.lives[i].provided()

    # ---- latents and pictures ----

    def _begin_latent(self, i: int, live: Live) -> None:
        if not isinstance(self.policy, FlowPolicy):
            raise RolloutError(f"format '{self.fmt.name}' wants an image latent, but the policy family "
                               f"'{self.policy.family}' has no flow_times and latent_shape")
        live.denoising = begin(live.noise, int(self.chosen_A[i]), self.policy.latent_shape, self.device)

    def _denoise(self, finished: set[int]) -> None:
        """One denoising step of every row in a latent (those that lack their context wait for it)."""
        waiting = {*self.anew, *self.more, *finished}
        rows = [i for i, live in enumerate(self.lives) if live.denoising is not None and i not in waiting]
        if not rows:
            return
        assert isinstance(self.policy, FlowPolicy)
        times = self.policy.flow_times
        flows = [flow for i in rows if (flow := self.lives[i].denoising) is not None]
        branch_rows = [row for i in rows for row in self._branch_rows(i)]
        of = [*range(len(rows)), *(n for n, i in enumerate(rows) for _ in self._branch_rows(i))]
        x_B, time_B, next_B = stack(flows, times, self.device)
        answer = self.policy.step(self.cache, rows + branch_rows, FlowStep(x_B[of], time_B[of], next_B[of]))
        assert isinstance(answer, Gaussian)
        mean_B = answer.mean_B[:len(rows)]
        guided = [n for n, i in enumerate(rows) if self.lives[i].guidance is not None]
        if guided:  # the mean is affine in the velocity, so what combines the one combines the other
            mean_B = mean_B.clone()
            mean_B[guided] = self._guide([rows[n] for n in guided], mean_B[guided], answer.mean_B[len(rows):])
        for n, i in enumerate(rows):
            self.chosen_A[i] += advance(flows[n], mean_B[n], float(answer.sigma_B[n]), times, self.lives[i].noise,
                                        int(self.chosen_A[i]))
            if flows[n].step == len(times) - 1:
                self._end_latent(i, finished)

    def _end_latent(self, i: int, finished: set[int]) -> None:
        """The closing marker is forced and enters the cache with the latent, as the next context says."""
        live = self.lives[i]
        self.ready.add(i)
        while (id := live.cursor.forced()) is not None:
            at = self.count_A[i]
            self.ids_AL[i, at], self.law_AL[i, at] = id, FORCED
            self.count_A[i] += 1
            self.room_A[i] -= 1
            live.cursor.advance(id)
            if live.cursor.stopped or len(live.cursor.spans) > live.closed:
                self._boundary(i, live, id, finished)
                break

    def _draw(self) -> None:
        """Turn all collected codes and latents into uint8, once."""
        began = time.perf_counter()
        waiting, self.undrawn = self.undrawn, []
        contents = [segment.ids[1:-1] if segment.latent is None else segment.latent for _, segment in waiting]
        for (live, segment), picture in zip(waiting, self.policy.draw(contents), strict=True):
            segment.picture = picture
            live.undrawn -= 1
        self.stats.pictures += len(waiting)
        self.stats.draw_seconds += time.perf_counter() - began

    def _drawn(self, all_of_them: bool) -> list[Live]:
        """Finished trajectories whose pictures are drawn."""
        if self.undrawn and (all_of_them or len(self.undrawn) >= DRAW_BATCH):
            self._draw()
        done = [live for live in self.waiting if not live.undrawn]
        if done:
            self.waiting = [live for live in self.waiting if live.undrawn]
        return done
