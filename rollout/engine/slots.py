"""The rows of one call of the engine: what each holds, and the policy's verbs over them. loop.py decides what they do.

Active trajectories occupy the rows 0 .. B-1 of the cache without gaps; guidance branches have rows of their own behind
them, and the last row keeps a prompt while members of its group are queued.

Letters: A rows for trajectories, L ids that a trajectory may hold, V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from formats.segments import image_content
from policy.base import Categorical, FlowStep, TokenStep
from record.trajectory import Context, Segment, Trajectory
from rollout.engine.active import ActiveSequence
from rollout.engine.state import EngineState
from rollout.requests import RolloutError

DRAW_BATCH = 64  # images are drawn when so many wait, when a group waits for nothing else, or at the end


class Rows:
    """Buffers by row, and what moves, fills and feeds them."""

    def __init__(self, engine: EngineState, rows: int, longest: int):
        """rows: trajectories written at once; longest: ids of a prompt and of what may follow it."""
        self.engine, self.policy, self.stats = engine, engine.policy, engine.stats
        self.sequences: list[ActiveSequence] = []
        self.waiting: list[ActiveSequence] = []  # finished, their images not drawn yet
        self.undrawn: list[tuple[ActiveSequence, Segment]] = []
        self.written: Counter[int] = Counter()  # finished trajectories by request
        self.awaited = False  # a group is written but for its images: whoever judges it could begin
        self.ready: set[int] = set()  # rows whose logits are there without a step
        self.reprefill: list[int] = []  # rows to prefill with the open segment's context
        self.more: list[int] = []  # rows to extend by what they lack of it
        self.device = next(self.policy.model.parameters()).device
        with torch.inference_mode():
            self.cache = engine.cache(longest)
        self.spare = engine.active_rows * (1 + engine.branches)
        length = engine.config.max_tokens
        self.logits_AV = torch.empty((rows, self.policy.vocabulary.size), device=self.device)
        self.ids_AL = np.zeros((rows, length), np.int64)
        self.logprob_AL = np.zeros((rows, length), np.float32)
        self.number_AL = np.zeros((rows, length), np.int32)
        self.count_A = np.zeros(rows, np.int64)  # ids written after the prompt
        self.chosen_A = np.zeros(rows, np.int64)  # decisions taken
        self.room_A = np.zeros(rows, np.int64)  # ids that may still be written
        self.noise_A = np.zeros(rows, np.uint64)

    def branch_rows(self, i: int) -> range:
        """The rows of the open segment's guidance branches."""
        first = self.engine.active_rows + i * self.engine.branches
        return range(first, first + len(self.sequences[i].contexts) - 1)

    def move(self, source: int, to: int) -> None:
        """Close ranks: the last row takes the place of a finished one."""
        self.policy.copy(self.cache, source, [to])
        self.sequences[to] = self.sequences[source]
        for branch, into in zip(self.branch_rows(source), self.branch_rows(to), strict=True):
            self.policy.copy(self.cache, branch, [into])
        for array in (
            self.ids_AL,
            self.logprob_AL,
            self.number_AL,
            self.count_A,
            self.chosen_A,
            self.room_A,
            self.noise_A,
        ):
            array[to] = array[source]
        self.logits_AV[to] = self.logits_AV[source].clone()
        self.reprefill = [to if i == source else i for i in self.reprefill]
        self.more = [to if i == source else i for i in self.more]
        (self.ready.add if source in self.ready else self.ready.discard)(to)

    def prefill(self, rows: list[int], contexts: list[tuple[Trajectory, Context]]) -> Tensor:
        if self.undrawn and any(piece.form != "ids" for _, context in contexts for piece in context.pieces):
            self.draw()
        return self.policy.prefill(self.cache, rows, contexts)

    def prefill_again(self) -> None:
        rows = self.reprefill
        if not rows:
            return
        self.logits_AV[rows] = self.prefill(
            rows, [(self.sequences[i].trajectory, self.sequences[i].full) for i in rows]
        )
        self.stats.reprefills += len(rows)
        for i in rows:
            sequence = self.sequences[i]
            sequence.provided()
            pending = self.ids_AL[i, sequence.start : self.count_A[i]]
            for id in pending[:-1]:  # forced ids before the last one, which goes with everybody's step
                self.policy.step(self.cache, [i], TokenStep(torch.tensor([int(id)], device=self.device)))
            if not len(pending):
                self.ready.add(i)

    def prefill_branches(self, i: int, sequence: ActiveSequence) -> None:
        count = len(sequence.contexts) - 1
        if count > self.engine.branches:
            raise RolloutError(
                f"rollout.branches: format '{self.engine.fmt.name}' guides by {count} branches, but "
                f"{self.engine.branches} rows are kept for them"
            )
        self.prefill(list(self.branch_rows(i)), [(sequence.trajectory, context) for context in sequence.contexts[1:]])

    def step(self) -> None:
        """Feed the last id of every row in ids, to the row and to its guidance branches, and guide the codes."""
        rows = [i for i, sequence in enumerate(self.sequences) if i not in self.ready and sequence.denoising is None]
        self.stats.ticks += 1
        if not rows:
            return
        # An image may close later than it ends, where what follows tells its role: words are never guided.
        guided = [i for i in rows if self.sequences[i].guidance is not None and self.sequences[i].cursor.in_image]
        all_rows = rows + [row for i in guided for row in self.branch_rows(i)]
        of = rows + [i for i in guided for _ in self.branch_rows(i)]
        ids = torch.from_numpy(self.ids_AL[of, self.count_A[of] - 1]).to(self.device)
        self.stats.row_ticks += len(rows)
        self.stats.branch_ticks += len(all_rows) - len(rows)
        answer = self.policy.step(self.cache, all_rows, TokenStep(ids))
        assert isinstance(answer, Categorical)
        logits = answer.logits_BV
        if len(rows) == len(self.sequences) == len(logits):
            self.logits_AV[: len(rows)] = logits
        else:
            self.logits_AV[rows] = logits[: len(rows)]
        if guided:
            self.logits_AV[guided] = self.guide(
                guided, logits[: len(rows)][[rows.index(i) for i in guided]], logits[len(rows) :]
            )

    def guide(self, guided: list[int], full: Tensor, branches: Tensor, at_step: FlowStep | None = None) -> Tensor:
        """Combine full [G, ...] with the branches' rows (in the order of `guided`), one call a kind of guidance.

        `at_step`: where velocities were asked for.
        """
        together: dict[tuple, list[tuple[int, int]]] = {}
        first = 0
        for g, i in enumerate(guided):
            sequence = self.sequences[i]
            assert sequence.guidance is not None
            names = tuple(context.branch for context in sequence.contexts[1:])
            kind = (sequence.guidance.kind, tuple(sorted(sequence.guidance.scales.items())), names)
            together.setdefault(kind, []).append((g, first))
            first += len(names)
        out = torch.empty_like(full)
        for (_, _, names), members in together.items():
            at = [g for g, _ in members]
            rows = {"full": full[at]}
            for n, name in enumerate(names):
                rows[name] = branches[[first + n for _, first in members]]
            guidance = self.sequences[guided[at[0]]].guidance
            assert guidance is not None
            where = None if at_step is None else FlowStep(at_step.x_B[at], at_step.time_B[at])
            out[at] = self.policy.guide(rows, guidance, where)
        return out

    def append(self) -> None:
        """Extend rows by what they lack of the open segment's context: the environment's words, a drawn latent."""
        rows = self.more
        if not rows:
            return
        pieces = {i: self.sequences[i].missing() for i in rows}
        if self.undrawn and any(piece.form != "ids" for i in rows for piece in pieces[i]):
            self.draw()
        for depth in range(max(len(p) for p in pieces.values())):
            now = [i for i in rows if depth < len(pieces[i])]
            self.logits_AV[now] = self.policy.append(
                self.cache,
                now,
                [(self.sequences[i].trajectory, pieces[i][depth]) for i in now],
            )
        for i in rows:
            self.sequences[i].provided()

    # ---- images ----

    def draw(self) -> None:
        """Turn all collected codes and latents into uint8, once."""
        began = time.perf_counter()
        waiting, self.undrawn = self.undrawn, []
        contents = [image_content(segment, self.policy.vocabulary) for _, segment in waiting]
        for (sequence, segment), image in zip(waiting, self.policy.decode_images(contents), strict=True):
            segment.image = image
            sequence.undrawn -= 1
        self.stats.images += len(waiting)
        self.stats.draw_seconds += time.perf_counter() - began

    def wait(self, sequence: ActiveSequence) -> None:
        """A trajectory is finished, but for images that are not drawn."""
        self.waiting.append(sequence)
        request, _ = sequence.order
        self.written[request] += 1
        self.awaited |= self.written[request] == sequence.siblings

    def drawn(self, all_of_them: bool) -> list[ActiveSequence]:
        """Finished trajectories whose images are drawn."""
        if self.undrawn and (all_of_them or self.awaited or len(self.undrawn) >= DRAW_BATCH):
            self.draw()
        self.awaited = False
        done = [sequence for sequence in self.waiting if not sequence.undrawn]
        if done:
            self.waiting = [sequence for sequence in self.waiting if sequence.undrawn]
        return done
