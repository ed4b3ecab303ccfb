"""What a policy family must keep, whoever wrote it. Run it on your own: `check_policy(my_policy, trajectories)`.

It takes trajectories that were sampled already, since a policy knows no engine; rollout/contract.py samples them in
several layouts of rows first. A failure is an AssertionError whose first words are the family and the promise.

Letters: N decisions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from formats.base import Codes, Latent, SeenOnly
from formats.segments import image_content
from policy.base import Pass, Policy, Scored, forwarded, score_trajectories
from policy.context import extent_of
from policy.contract_cache import CacheCheck
from record.trajectory import Author, DecisionKind, Modality, Piece, Segment, Trajectory

TOLERANCE = 1e-4  # nats; what sampling and scoring of the same weights may differ by in float32


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


LogProbs = dict[tuple[int, int], list[float]]  # (trajectory, segment) -> of its scored decisions


class _Check(CacheCheck):
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
        contents = [image_content(segment, self.policy.vocabulary) for _, _, segment in drawn]
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
            slots = forwarded([one])
            if budget is None or slots <= budget or len(one.segments) == 1:
                continue
            dearest = self._dearest(t)
            self.require(
                slots <= dearest,
                "passes",
                f"{name}: one takes {slots} slots and could be divided, for it scores {len(one.segments)} segments, "
                f"and the dearest one of the trajectory takes {dearest} alone",
            )
        missing, twice = set(wanted) - set(held), [key for key, count in held.items() if count > 1 and key in wanted]
        for (t, n), what in [(key, "in none") for key in sorted(missing)] + [(key, "in several") for key in twice]:
            self.require(
                False, "passes", f"{name}: the decisions of segment {n} of {self.trajectories[t].key} are {what}"
            )

    def _dearest(self, t: int) -> int:
        """Slots of the segment that takes most when it is scored alone: no division can go below it."""
        trajectory = self.trajectories[t]

        def alone(n: int) -> Trajectory:
            segments = [replace(s, trained=s.trained and m == n) for m, s in enumerate(trajectory.segments)]
            return replace(trajectory, segments=segments)

        scored = [n for number, n, segment in self.written if number == t and _scored(segment)]
        return max(forwarded(self.policy.passes([alone(n)])) for n in scored)

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
