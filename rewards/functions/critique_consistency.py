"""Whether an inspection says what is so: its verdict and the mistakes it names, against what the detector sees.

The truth of an image is GenEval's rule (geneval.py) on what the image owes: the prompt, or only what the plan before
it set out to draw. Reading the words is the task's affair: it has `claims(text)`, `requirement(record, plan)`,
`holds(mistake, record, detections)` and `seen_in(detections)`, as tasks/shapes/task.py does.

The formula. Of a step's inspections let f be the share made of images that are fine and w = 1 - f that of wrong ones,
and c = min(f, w). An inspection earns

    of a fine image:    +c/f for "fine",   -c/f for anything else
    of a wrong image:   +c/w for "wrong",  -c/w for anything else; the mistakes it names make up half of the +c/w

Whoever always says "fine" earns f * c/f - w * c/w = 0 a time, whatever the share of wrong images, and whoever always
says "wrong" earns at most that; always being right earns 2c. This is Youden's J = sensitivity + specificity - 1
(Cancer 3:32-35, 1950), shared out among the inspections and scaled by 2c so that no single one weighs more than 1:
where nearly all images are fine there is little to learn about inspecting, and little is paid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from record.trajectory import Author, Modality, Trajectory
from rewards.contract import RewardContext, RewardError
from rewards.detectors.base import Detections
from rewards.functions.geneval import check_record, classes_of, evaluate, kept
from runtime.errors import UserError

READERS = ("claims", "requirement", "holds", "seen_in")  # what a task that reads inspections has


@dataclass(frozen=True)
class Inspection:
    """One inspection, judged."""

    row: int  # of the call's trajectories
    segment: int
    said: Literal["fine", "wrong"] | None  # None: no verdict that could be read
    fine: bool  # whether the image before it is
    named: float  # share of the mistakes it names that are mistakes; 0 if it names none
    described: float  # F1 of the objects it says it sees

    @property
    def right(self) -> bool:
        return self.said == ("fine" if self.fine else "wrong")


def critique_consistency(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    roles: Sequence[str] = ("inspect", "critique"),
    named: float = 0.5,
    described: float = 0.0,
    credit: Literal["trajectory", "segments"] = "trajectory",
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """The mean over a thought's inspections of what each earns, in [-1, 1]; None where it made none.

    Logs rubber_stamp_rate (share of inspections that say "fine"), right_wrong and right_fine (share of wrong and of
    fine images that were called so), approves_wrong (share of wrong images called fine), wrong_images,
    unreadable, named and described.

    Args:
        roles: of the segments that inspect the last image before them.
        named: share of the pay for a right "wrong" that rests on the mistakes it names.
        described: share of all pay that is the F1 of the objects it says it sees, in place of the verdict's.
        credit: "segments" gives each inspection its own pay, instead of all the mean.
    """
    for name, share in (("named", named), ("described", described)):
        if not 0 <= share <= 1:
            raise UserError(f"critique_consistency: {name} is {share}; it is a share, 0 to 1")
    if credit not in ("trajectory", "segments"):
        raise UserError(f"critique_consistency: no credit '{credit}'. Known: trajectory, segments")
    inspections = inspect_all(trajectories, context, roles)
    if log_metric is not None:
        for metric, value in rates(inspections).items():
            log_metric(metric, value)
    rows: list[dict[int, float]] = [{} for _ in trajectories]
    for inspection, paid in zip(inspections, pay(inspections, named), strict=True):
        rows[inspection.row][inspection.segment] = (1 - described) * paid + described * inspection.described
    if credit == "segments":
        return [row or None for row in rows]
    return [sum(row.values()) / len(row) if row else None for row in rows]


def pay(inspections: Sequence[Inspection], named: float = 0.5) -> list[float]:
    """The formula at the top of this file, for each inspection of a step."""
    fine = sum(i.fine for i in inspections)
    of_truth = {True: fine, False: len(inspections) - fine}
    common = min(of_truth.values())
    values = []
    for i in inspections:
        full = common / of_truth[i.fine]
        share = 1.0 if i.fine else (1 - named) + named * i.named
        values.append(full * share if i.right else -full)
    return values


def rates(inspections: Sequence[Inspection]) -> dict[str, float]:
    """What is logged; a rate over nothing is left out."""
    wrong = [i for i in inspections if not i.fine]
    caught = [i for i in wrong if i.right]
    found: dict[str, list[bool] | list[float]] = {
        "rubber_stamp_rate": [i.said == "fine" for i in inspections],
        "unreadable": [i.said is None for i in inspections],
        "wrong_images": [not i.fine for i in inspections],
        "described": [i.described for i in inspections],
        "right_fine": [i.right for i in inspections if i.fine],
        "right_wrong": [i.right for i in wrong],
        "approves_wrong": [i.said == "fine" for i in wrong],
        "named": [i.named for i in caught],
    }
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def inspect_all(trajectories: Sequence[Trajectory], context: RewardContext, roles: Sequence[str]) -> list[Inspection]:
    """Every inspection that has an image before it, in order; trajectories without `include` have no truth."""
    detector, task = context.detector_for("critique_consistency"), _task_that_reads(context)
    positions: list[tuple[int, int, Any, str]] = []  # row, segment, image, plan
    for row, trajectory in enumerate(trajectories):
        if not trajectory.record.get("include"):
            continue
        check_record(detector, trajectory.record, f"prompt '{trajectory.prompt}'")
        image, plan, next_plan = None, "", ""
        for index, segment in enumerate(trajectory.segments):
            if segment.author is not Author.POLICY:
                continue
            if segment.image is not None:
                image, plan = segment.image, next_plan
            elif segment.role == "plan":
                next_plan = segment.text
            elif segment.role in roles and segment.modality is Modality.TEXT and image is not None:
                positions.append((row, index, image, plan))
    seen = detector.detect(
        [image for _, _, image, _ in positions], [classes_of(trajectories[row].record) for row, *_ in positions]
    )
    return [
        _inspection(row, index, trajectories[row], plan, objects, task)
        for (row, index, _, plan), objects in zip(positions, seen, strict=True)
    ]


def _inspection(row: int, index: int, trajectory: Trajectory, plan: str, objects: Detections, task: Any) -> Inspection:
    owed = task.requirement(trajectory.record, plan)
    fine, _ = evaluate(owed, objects)
    claim = task.claims(trajectory.segments[index].text)
    certain = [replace(o, cls=name) for name, found in kept(owed, objects).items() for o in found]
    true = [task.holds(mistake, owed, certain) for mistake in claim.mistakes]
    return Inspection(
        row,
        index,
        claim.verdict,
        bool(fine),
        sum(true) / len(true) if true else 0.0,
        _f1(claim.seen, task.seen_in(certain)),
    )


def _f1(said: Sequence[Any] | None, seen: Sequence[Any]) -> float:
    """Of the objects said and seen, each matched once; 1 where both are none, 0 where nothing readable is said."""
    if said is None:
        return 0.0
    left, hits = list(seen), 0
    for clause in said:
        match = next((other for other in left if clause.matches(other)), None)
        if match is not None:
            left.remove(match)
            hits += 1
    total = len(said) + len(seen)
    return 2 * hits / total if total else 1.0


def _task_that_reads(context: RewardContext) -> Any:
    lacking = [name for name in READERS if not hasattr(context.task, name)]
    if lacking:
        raise RewardError(
            f"critique_consistency needs a task that reads inspections; "
            f"'{getattr(context.task, 'name', 'none')}' has no function '{lacking[0]}'"
        )
    return context.task
