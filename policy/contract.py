"""What a policy family must keep, whoever wrote it. Run it on your own: `check_policy(my_policy, trajectories)`.

It takes trajectories that were sampled already, since a policy knows no engine; rollout/contract.py samples them in
several layouts of rows first. A failure is an AssertionError whose first words are the family and the promise.

Letters: B rows of a call, V vocabulary, N decisions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.base import Codes, Latent, SeenOnly
from policy.base import Categorical, FlowStep, Pass, Policy, Scored, TokenStep, Velocity, score_trajectories
from policy.context import extent_of, slots_of
from record.trajectory import Author, Context, DecisionKind, Modality, Piece, Segment, Trajectory

TOLERANCE = 1e-4  # nats; what sampling and scoring of the same weights may differ by in float32
PLACES = 2  # contexts tried of each role and modality


def check_policy(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    *,
    load: Callable[[Path], Policy] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Check a family's promises on trajectories that it has sampled with these weights.

    Extents are checked against caches that are exactly as long as they say, so run it where a cache that is too short
    is an error like any other: on the CPU.

    Args:
        trajectories: with all that the family can do in them: words, images, guidance, pictures in the prompt.
        load: makes the policy of a folder that `save` wrote; None: saving is not checked.
        tolerance: largest difference of two log-probs, in nats.

    Raises:
        AssertionError: a promise is broken; the message names the family, the promise and where.
        UserError: a context that the family cannot feed.
    """
    check = _Check(policy, list(trajectories), tolerance)
    check.vocabulary()
    with torch.inference_mode():
        for place in check.places():
            check.extent(place)
            check.append(place)
            check.step(place)
            check.copy(place)
            check.denoising(place)
        check.rows()
        check.images()
        check.perceived()
    whole = check.score()
    check.passes(whole)
    check.reference(whole)
    if load is not None:
        check.saved(load, whole)


@dataclass(frozen=True)
class _Place:
    """A segment that the policy wrote, and what it was conditioned on under one branch."""

    trajectory: Trajectory
    segment: int
    context: Context

    def __str__(self) -> str:
        role = self.trajectory.segments[self.segment].role
        return f"trajectory {self.trajectory.key}, segment {self.segment} ('{role}', branch '{self.context.branch}')"


LogProbs = dict[tuple[int, int], list[float]]  # (trajectory, segment) -> of its scored decisions


class _Check:
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

    def require(self, holds: bool, promise: str, sentence: str) -> None:
        assert holds, f"{self.policy.family}: {promise}: {sentence}"

    def equal(self, got: Tensor, expected: Tensor, promise: str, sentence: str) -> None:
        """Logits, as log-probs; or velocities, relative to the largest."""
        same = got.shape == expected.shape and bool(torch.isfinite(got).all())
        self.require(same, promise, f"{sentence}; {list(got.shape)} against {list(expected.shape)}, or not finite")
        off = float((got - expected).abs().max()) if got.numel() else 0.0
        self.require(off <= self.tolerance, promise, f"{sentence}; they differ by {off:.2g}")

    # ---- places to try ----

    def places(self) -> Iterator[_Place]:
        """A few of each role, modality and branch: those with the most before them come first."""
        tried: dict[tuple[str, str, str], int] = {}
        for t, n, segment in sorted(self.written, key=lambda found: -len(found[2].contexts[0].pieces)):
            for context in segment.contexts:
                kind = (segment.role, str(segment.modality), context.branch)
                if context.pieces and tried.get(kind, 0) < PLACES:
                    tried[kind] = tried.get(kind, 0) + 1
                    yield _Place(self.trajectories[t], n, context)

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

    def extent(self, place: _Place) -> None:
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

    def append(self, place: _Place) -> None:
        """A row that is extended holds what a row does that was prefilled with all of it; its position is the same."""
        trajectory, context = place.trajectory, place.context
        for count in range(len(context.pieces)):
            # From nothing, the first piece is appended: a row may begin empty.
            before, last = context.pieces[:count], context.pieces[count]
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

    def step(self, place: _Place) -> None:
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

    def copy(self, place: _Place) -> None:
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

    def denoising(self, place: _Place) -> None:
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

    # ---- words and images ----

    def vocabulary(self) -> None:
        vocabulary = self.policy.vocabulary
        imaging, never = vocabulary.imaging, {int(id) for id in vocabulary.never}
        if isinstance(imaging, Codes):
            inside = bool(((imaging.ids >= 0) & (imaging.ids < vocabulary.size)).all())
            self.require(inside, "vocabulary", f"a code's id lies outside of its {vocabulary.size} ids")
        if not isinstance(imaging, Latent):
            self.require(self.policy.latent_shape == (), "latent_shape", "it is empty where nothing is denoised")
        if isinstance(imaging, SeenOnly):
            self.require(self.policy.image_slots == 0, "image_slots", "they are 0 where nothing is drawn")
        for t, n, segment in self.written:
            where = f"trajectory {self.trajectories[t].key}, segment {n} ('{segment.role}')"
            chosen = set() if segment.decisions is None else _chosen(segment)
            self.require(not chosen & never, "vocabulary", f"{where} holds an id that may never be sampled")

    def images(self) -> None:
        """Pixels to content and back, in the shapes that policy/base.py gives; and the slots of a drawn image."""
        imaging, policy = self.policy.vocabulary.imaging, self.policy
        drawn = [(t, n, s) for t, n, s in self.written if s.image is not None and s.modality is not Modality.TEXT]
        if not drawn or isinstance(imaging, SeenOnly):
            return
        contents = [self._content(segment) for _, _, segment in drawn]
        images = policy.decode_images(contents)
        self.require(len(images) == len(contents), "decode_images", f"{len(images)} images of {len(contents)} contents")
        for (t, n, segment), image in zip(drawn, images, strict=True):
            where = f"trajectory {self.trajectories[t].key}, segment {n} ('{segment.role}')"
            shaped = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            shape = f"{image.dtype} {list(image.shape)}"
            self.require(shaped, "decode_images", f"{where}: {shape} is no uint8 [height, width, 3]")
            same = segment.image is not None and np.array_equal(image, segment.image)
            self.require(same, "decode_images", f"{where}: its content is drawn otherwise than it was recorded")
            taken = sum(extent_of(policy, self.trajectories[t], Piece(n, f, 0)).slots for f in policy.forms(segment))
            self.require(
                taken == policy.image_slots,
                "image_slots",
                f"{where}: seen again it takes {taken} slots, and image_slots is {policy.image_slots}",
            )
        encoded = policy.encode_images(images)
        self.require(len(encoded) == len(images), "encode_images", f"{len(encoded)} contents of {len(images)} images")
        for content in encoded:
            shape = f"{content.dtype} {list(content.shape)}"
            if isinstance(imaging, Codes):
                known = content.dtype.kind == "i" and content.shape == (imaging.count,)
                known = known and bool(np.isin(content, imaging.ids).all())
                self.require(known, "encode_images", f"{shape} is no {imaging.count} ids of codes")
            else:
                shaped = content.dtype == np.float32 and content.shape == tuple(policy.latent_shape)
                self.require(shaped, "encode_images", f"{shape} is no float32 {list(policy.latent_shape)}")
        for name in ("encode_images", "decode_images"):
            self.require(len(getattr(policy, name)([])) == 0, name, "nothing of nothing")

    def _content(self, segment: Segment) -> np.ndarray:
        if segment.latent is not None:
            return segment.latent
        imaging = self.policy.vocabulary.imaging
        assert isinstance(imaging, Codes)
        first = int(imaging.open is not None)
        return segment.ids[first : first + imaging.count]

    def perceived(self) -> None:
        """Media that others show are taken in alike every time, and have an extent in each of their forms."""
        for trajectory in self.trajectories:
            for n, segment in enumerate(trajectory.segments):
                if segment.author is Author.POLICY or (segment.image is None and segment.frames is None):
                    continue
                where = f"trajectory {trajectory.key}, segment {n} ('{segment.role}')"
                raw = Modality.IMAGE if segment.frames is None else Modality.VIDEO_FRAMES
                fresh = Segment(segment.role, segment.author, raw, False, image=segment.image, frames=segment.frames)
                self.policy.perceive([fresh])
                same = fresh.modality is segment.modality and np.array_equal(fresh.ids, segment.ids)
                self.require(same, "perceive", f"{where}: the same media are taken in otherwise than they were")
                for form in self.policy.forms(fresh):
                    extent_of(self.policy, trajectory, Piece(n, form, 0))

    # ---- scoring ----

    def score(self) -> LogProbs:
        """Scoring says what sampling said, with a gradient. Returns the log-probs of all decisions."""
        scored = score_trajectories(self.policy, self.trajectories, entropy=True)
        wanted = {(t, n): _scored(segment) for t, n, segment in self.written}
        total = sum(map(len, wanted.values()))
        self.require(
            len(scored.logprob_N) == total,
            "score",
            f"{len(scored.logprob_N)} decisions for {total} that are trained and not greedy",
        )
        found = _by_segment(scored)
        for (t, n), numbers in wanted.items():
            segment = self.trajectories[t].segments[n]
            where = f"trajectory {self.trajectories[t].key}, segment {n} ('{segment.role}')"
            got = found.get((t, n), [])
            self.require(len(got) == len(numbers), "score", f"{where}: {len(got)} decisions for {len(numbers)}")
            assert segment.decisions is not None or not numbers
            for number, logprob in zip(numbers, got, strict=True):
                assert segment.decisions is not None
                sampled = float(segment.decisions.logprob_N[number])
                kind = DecisionKind(int(segment.decisions.kind_N[number])).name
                self.require(
                    abs(logprob - sampled) <= self.tolerance,
                    "score",
                    f"{where}: decision {number} ({kind}) was sampled at a log-prob of {sampled:.5f} and is scored at "
                    f"{logprob:.5f}",
                )
        entropy_N = scored.entropy_N
        known = entropy_N is not None and len(entropy_N) == total and not entropy_N.requires_grad
        self.require(known, "score", "entropies are asked for, and are one a decision, detached")
        if total:
            trained = [p for p in self.policy.model.parameters() if p.requires_grad]
            self.require(bool(trained), "model", "it has no weight that is trained")
            self.require(scored.logprob_N.requires_grad, "score", "log-probs carry no gradient")
            grads = torch.autograd.grad(scored.logprob_N.sum(), trained, allow_unused=True)
            moved = any(grad is not None and bool(grad.any()) for grad in grads)
            self.require(moved, "score", "no weight has a gradient")
        return found

    def passes(self, whole: LogProbs) -> None:
        """Passes hold each decision once, and score the same however they are divided and put together."""
        budgets: list[int | None] = [None]
        costs = [p.cost for p in self.policy.passes(self.trajectories)]
        budgets += sorted({1, *(max(1, cost // 2) for cost in costs)}, reverse=True)[:1] + [1]
        for budget in budgets:
            passes = self.policy.passes(self.trajectories, budget)
            name = "whole" if budget is None else f"of a budget of {budget}"
            self._covered(passes, budget, name)
            with torch.no_grad():
                together = self._table(passes, self.policy.score(passes))
                alone: LogProbs = {}
                for one in passes[::-1]:
                    alone |= self._table([one], self.policy.score([one]))
            for way, found in (("in one call", together), ("one by one", alone)):
                for key, logprobs in whole.items():
                    off = np.abs(np.array(found.get(key, [])) - np.array(logprobs)) if key in found else np.inf
                    self.require(
                        bool(np.all(off <= self.tolerance)),
                        "passes",
                        f"{name}, scored {way}: segment {key[1]} of trajectory {self.trajectories[key[0]].key} is not "
                        "scored as it is in whole trajectories",
                    )

    def _covered(self, passes: Sequence[Pass], budget: int | None, name: str) -> None:
        wanted = {(t, n): len(numbers) for t, n, s in self.written if (numbers := _scored(s))}
        held: dict[tuple[int, int], int] = {}
        number = {id(trajectory): t for t, trajectory in enumerate(self.trajectories)}
        for one in passes:
            self.require(id(one.trajectory) in number, "passes", f"{name}: one is of another trajectory")
            t = number[id(one.trajectory)]
            self.require(list(one.segments) == sorted(set(one.segments)), "passes", f"{name}: segments do not ascend")
            for n in one.segments:
                held[t, n] = held.get((t, n), 0) + 1
            decisions = sum(wanted.get((t, n), 0) for n in one.segments)
            self.require(
                one.decisions == decisions, "passes", f"{name}: one says {one.decisions} decisions and has {decisions}"
            )
            self.require(
                one.cost > 0 and bool(one.modules), "passes", f"{name}: one costs nothing or touches no module"
            )
            self.require(
                budget is None or one.cost <= budget or len(one.segments) == 1,
                "passes",
                f"{name}: one costs {one.cost} and could be divided, for it scores {len(one.segments)} segments",
            )
        missing, twice = set(wanted) - set(held), [key for key, count in held.items() if count > 1 and key in wanted]
        for (t, n), what in [(key, "in none") for key in sorted(missing)] + [(key, "in several") for key in twice]:
            self.require(
                False, "passes", f"{name}: the decisions of segment {n} of {self.trajectories[t].key} are {what}"
            )

    def _table(self, passes: Sequence[Pass], scored: Scored) -> LogProbs:
        number = {id(trajectory): t for t, trajectory in enumerate(self.trajectories)}
        owner = torch.tensor([number[id(one.trajectory)] for one in passes], dtype=torch.int64)
        return _by_segment(replace(scored, pass_N=owner[scored.pass_N.cpu()]))

    def reference(self, whole: LogProbs) -> None:
        """Asking for the reference leaves the weights as they were; of itself it diverges by nothing."""
        with torch.no_grad(), self.policy.reference():
            theirs = score_trajectories(self.policy, self.trajectories)
        with torch.no_grad():
            ours = score_trajectories(self.policy, self.trajectories, old=theirs, reference=theirs)
        after = _by_segment(ours)
        for key, logprobs in whole.items():
            same = bool(np.all(np.abs(np.array(after[key]) - np.array(logprobs)) <= self.tolerance))
            self.require(same, "reference", "within it the weights changed, and were not put back")
        divergence_N = ours.divergence_N
        known = divergence_N is not None and len(divergence_N) == len(ours.logprob_N)
        self.require(known, "reference", "a divergence of each decision is due where a reference is given")
        off = (
            float((ours.log_ratio_N - (ours.logprob_N - theirs.logprob_N)).abs().max()) if len(ours.logprob_N) else 0.0
        )
        self.require(off <= self.tolerance, "score", f"with `old` given, ratios are not against it: off by {off:.2g}")

    def saved(self, load: Callable[[Path], Policy], whole: LogProbs) -> None:
        """What is loaded again is the same policy."""
        with tempfile.TemporaryDirectory() as folder:
            self.policy.save(Path(folder) / "policy")
            loaded = load(Path(folder) / "policy")
        same = loaded.vocabulary.size == self.policy.vocabulary.size
        self.require(same, "save", "what is loaded has another vocabulary")
        with torch.no_grad():
            found = _by_segment(score_trajectories(loaded, self.trajectories))
        for key, logprobs in whole.items():
            off = np.abs(np.array(found.get(key, [np.inf] * len(logprobs))) - np.array(logprobs)).max(initial=0.0)
            self.require(
                off <= self.tolerance, "save", f"what is loaded scores otherwise than what was saved: off by {off:.2g}"
            )


def _scored(segment: Segment) -> list[int]:
    """The numbers of its decisions that are scored."""
    if segment.decisions is None or not segment.trained:
        return []
    return np.flatnonzero(~segment.decisions.sampling.greedy_N).tolist()


def _chosen(segment: Segment) -> set[int]:
    """The ids that were a choice."""
    decisions = segment.decisions
    assert decisions is not None
    words_N = decisions.position_N[decisions.kind_N != DecisionKind.FLOW]
    return {int(id) for id in segment.ids[words_N]}


def _by_segment(scored: Scored) -> LogProbs:
    found: LogProbs = {}
    for t, n, logprob in zip(
        scored.pass_N.tolist(), scored.segment_N.tolist(), scored.logprob_N.detach().tolist(), strict=True
    ):
        found.setdefault((t, n), []).append(logprob)
    return found
