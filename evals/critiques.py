"""A policy's verdicts on its own images, read and judged: what evals/calibration.py measures.

Reading the words is the task's affair, as for rewards/functions/critique_consistency.py, which judges. Where the
verdict stands in them is `task.verdict(text)`, a tasks.base.VerdictSpan; where it stands among the ids is found here,
for any tokenizer.

P("fine") is under the law by which the policy sampled: its weights, the recorded context, temperature and allowed set,
given what the critique had said before its verdict. Where "fine" was sampled the recorded log-prob says it. Where
another word was, it is known from the record alone only if the recorded set left just the two words; else the policy is
asked: a copy of the trajectory ends with "fine" in the verdict's place and is scored.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from evals.calibration import Critique
from formats.base import Format, Vocabulary
from policy.base import Pass, Policy, forwarded, score_trajectories
from record.trajectory import Author, DecisionKind, Decisions, SamplingParams, Segment, Trajectory, mask_of
from rewards.contract import RewardContext
from rewards.functions.critique_consistency import READERS, inspect_all
from rewards.functions.geneval import check_record
from runtime.errors import UserError
from tasks.base import VerdictSpan

ROLES = ("inspect", "critique")  # of the shipped formats, that criticise the image before them
SLOTS = 4096  # of one forward pass


class CalibrationError(UserError):
    """Critiques are to be measured where none can be."""


@dataclass(frozen=True)
class Place:
    """Where a verdict stands in its segment, and the ids that would say "fine" there."""

    start: int  # of the verdict's ids, half-open
    stop: int
    fine: tuple[int, ...]
    wrong: tuple[int, ...]


@dataclass(frozen=True)
class Critics:
    """Reads and judges the critiques of trajectories.

    Args:
        context: with a detector, and a task that reads inspections.
        policy: whose trajectories they are, at the weights that wrote them; it is asked for P("fine") where the record
            does not say it. None: it is left unknown.
        vocabulary: of the policy; None: P("fine") is never known.
        roles: of the segments that inspect the last image before them.
        forgets: the detector is this one's own, so what it saw is forgotten after each call.
    """

    context: RewardContext
    vocabulary: Vocabulary | None = None
    policy: Policy | None = None
    roles: Sequence[str] = ROLES
    forgets: bool = False

    def __call__(self, groups: Sequence[Sequence[Trajectory]]) -> list[Critique]:
        """In order; a group is a prompt, its members the samples.

        Raises UserError for a record that the detector cannot judge.
        """
        rows = [(number, t) for number, group in enumerate(groups) for t in group]
        judged = inspect_all([t for _, t in rows], self.context, self.roles)
        if self.forgets and self.context.detector is not None:
            self.context.detector.clear()
        known: list[float | None] = [None] * len(judged)
        unknown: list[tuple[int, Trajectory]] = []
        for number, inspection in enumerate(judged):
            trajectory = rows[inspection.row][1]
            place = self._place(trajectory.segments[inspection.segment])
            if inspection.said is None or place is None:
                continue
            known[number] = recorded(trajectory, inspection.segment, place, inspection.said)
            if known[number] is None and self.policy is not None:
                copy = rewritten(trajectory, inspection.segment, place)
                if isinstance(copy, Trajectory):
                    unknown.append((number, copy))
                else:
                    known[number] = copy
        if self.policy is not None:
            scored = chances(self.policy, [copy for _, copy in unknown])
            for (number, _), p_fine in zip(unknown, scored, strict=True):
                known[number] = p_fine
        return [
            Critique(rows[i.row][0], rows[i.row][1].member, i.segment, i.said, i.fine, p_fine)
            for i, p_fine in zip(judged, known, strict=True)
        ]

    def _place(self, segment: Segment) -> Place | None:
        if self.vocabulary is None:
            return None
        span = self.context.task.verdict(segment.text)
        return None if span is None else place_of(segment, span, self.vocabulary)


def open_critics(
    context: RewardContext,
    fmt: Format,
    records: Sequence[dict[str, Any]],
    policy: Policy | None,
    asked: bool,
    scores: bool = True,
) -> Critics | None:
    """What judges the critiques of a policy's trajectories over some prompts; None: nothing can, and nobody asked.

    Args:
        context: the task, and what detects.
        policy: None: it is only asked whether critiques can be judged.
        asked: a person wants them judged.
        scores: the policy may be scored for what the record does not say.

    Raises:
        CalibrationError: they are asked for, and something is missing; the sentence names it.
    """
    missing = _missing(context, fmt, records)
    if not missing:
        return Critics(context, None if policy is None else policy.vocabulary, policy if scores else None)
    if asked:
        raise CalibrationError(f"evaluate.calibration: {missing}; or leave evaluate.calibration out")
    return None


def _missing(context: RewardContext, fmt: Format, records: Sequence[dict[str, Any]]) -> str:
    """What keeps critiques from being judged, as a clause; empty: nothing."""
    task, detector = context.task, context.detector
    lacking = [name for name in (*READERS, "verdict") if not hasattr(task, name)]
    if lacking:
        return f"the task '{getattr(task, 'name', 'none')}' has no function '{lacking[0]}', by which critiques are read"
    known = getattr(fmt, "roles", None)
    if known is not None and not any(role in known and fmt.author(role) is Author.POLICY for role in ROLES):
        return f"the format '{fmt.name}' has no role in which the policy criticises ({' or '.join(ROLES)})"
    if detector is None:
        return "nothing detects what an image shows: give rewards.detector"
    judged = [record for record in records if record.get("include")]
    if not judged:
        return "no prompt has an `include`, by which an image is judged"
    try:
        for record in judged:
            check_record(detector, record, f"prompt '{record['prompt']}'")
    except UserError as error:
        return str(error)
    return ""


def place_of(segment: Segment, span: VerdictSpan, vocabulary: Vocabulary) -> Place | None:
    """The ids of a verdict. None: the text does not divide there, or one of the two words has no ids."""
    counts = range(len(segment.ids) + 1)

    def end(count: int) -> int:  # of the text of so many ids
        return len(vocabulary.decode(segment.ids[:count]).rstrip())

    start = bisect_right(counts, span.start, key=end) - 1
    stop = min(bisect_left(counts, span.stop, key=end), len(segment.ids))
    said = segment.text[span.start : span.stop]
    ids = segment.ids[start:stop]
    if vocabulary.decode(ids).strip() != said:
        return None
    lead = " " if "".join(vocabulary.piece(int(id)) for id in ids).startswith(" ") else ""
    try:
        other = vocabulary.encode(lead + span.otherwise)
    except UserError:
        return None
    if vocabulary.decode(other).strip() != span.otherwise:
        return None
    words = {span.says: tuple(map(int, ids)), "wrong" if span.says == "fine" else "fine": tuple(other)}
    return Place(start, stop, words["fine"], words["wrong"])


def recorded(trajectory: Trajectory, segment: int, place: Place, said: str) -> float | None:
    """P("fine") as far as the record tells it. None: it does not; always so for another engine's log-probs, and where
    the verdict was sampled at temperature 0, which has no density."""
    decisions = trajectory.segments[segment].decisions
    if decisions is None or not trajectory.exact:
        return None
    chosen = [np.flatnonzero(decisions.position_N == position) for position in range(place.start, place.stop)]
    if any(len(found) != 1 for found in chosen):
        return None
    picked_N = np.concatenate(chosen)
    if decisions.sampling.greedy_N[picked_N].any():
        return None
    p_said = min(1.0, math.exp(float(decisions.logprob_N[picked_N].sum())))
    if said == "fine":
        return p_said
    allowed = int(decisions.sampling.allowed_N[picked_N[0]])
    if allowed >= 0 and len(place.fine) == len(place.wrong) == len(picked_N) == 1:
        held = decisions.sampling.sets[allowed]
        ids = (
            {id for low, high in held.tolist() for id in range(low, high)}
            if (held[:, 1] - held[:, 0]).sum() == 2
            else ()
        )
        if set(ids) == {*place.fine, *place.wrong}:
            return 1.0 - p_said
    return None


def rewritten(trajectory: Trajectory, segment: int, place: Place) -> Trajectory | float | None:
    """A copy whose only trained segment ends with "fine" in the verdict's place, and has that word's ids for its only
    decisions: its log-prob is that of P("fine").

    All ids of the word are under the temperature and the allowed set that were recorded at the verdict's first. 0.0
    where that set leaves the word's first id out; None where it leaves out a later one, of which the record does not
    tell, or where the verdict was no decision or a greedy one.
    """
    this = trajectory.segments[segment]
    decisions = this.decisions
    if decisions is None:
        return None
    found = np.flatnonzero(decisions.position_N == place.start)
    if len(found) != 1 or decisions.sampling.greedy_N[found[0]]:
        return None
    sampling, first = decisions.sampling, int(found[0])
    if sampling.allowed_N[first] >= 0:
        size = 1 + max(int(sampling.sets[sampling.allowed_N[first]].max()), *place.fine)
        allowed = mask_of(sampling.sets[sampling.allowed_N[first]], size)[list(place.fine)]
        if not allowed.all():
            return 0.0 if not allowed[0] else None
    count = len(place.fine)
    asked = Decisions(
        np.full(count, DecisionKind.WORD, np.int8),
        np.arange(place.start, place.start + count, dtype=np.int32),
        np.zeros(count, np.float32),  # nobody sampled it: no ratio is read
        SamplingParams(
            np.repeat(sampling.temperature_N[first], count), np.repeat(sampling.allowed_N[first], count), sampling.sets
        ),
    )
    ids = np.concatenate([this.ids[: place.start], place.fine]).astype(np.int32)
    before = [replace(each, trained=False) for each in trajectory.segments[:segment]]
    return replace(trajectory, segments=[*before, replace(this, ids=ids, decisions=asked, trained=True)])


@torch.no_grad()
def chances(policy: Policy, trajectories: Sequence[Trajectory], slots: int = SLOTS) -> list[float]:
    """The probability that the policy gives to all decisions of each trajectory together.

    Args:
        slots: of one forward; a trajectory that takes more goes by itself.
    """
    found: list[float] = []
    batch: list[Trajectory] = []
    passes: list[Pass] = []

    def score() -> None:
        if batch:
            scored = score_trajectories(policy, batch)
            total = torch.zeros(len(batch), dtype=torch.float64, device=scored.logprob_N.device)
            total.index_add_(0, scored.pass_N, scored.logprob_N.double())
            found.extend(total.exp().clamp(max=1.0).tolist())

    for trajectory in trajectories:
        its = policy.passes([trajectory])
        if batch and forwarded([*passes, *its]) > slots:
            score()
            batch, passes = [], []
        batch.append(trajectory)
        passes += its
    score()
    return found
