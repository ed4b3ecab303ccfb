"""GenEval's rules over any detector's output, and the reward that applies them to a thought's image.

Source: GenEval (arXiv:2310.11513, section 3.2) and its released scorer, whose thresholds, comparisons and reasons
are reproduced: `evaluate` gives its `correct` and `reason` for equal detections. Coordinates are float32, as there.
Relation names inside a reason are sorted, where the scorer's order is that of a set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np

from record.trajectory import Trajectory
from rewards.contract import RewardContext, policy_images
from rewards.detectors.base import COLORS, CachedDetector, Detection, Detections
from rewards.detectors.registry import BACKENDS, DetectorConfig, build_detector
from runtime.errors import UserError, nearest

Mode = Literal["standard", "strict", "graded", "graded_strict", "flow_grpo"]
MODES = ("standard", "strict", "graded", "graded_strict", "flow_grpo")
RELATIONS = ("left of", "right of", "above", "below")
SCORE_THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
THRESHOLDS = (SCORE_THRESHOLD, COUNTING_THRESHOLD)
MAX_OBJECTS = 16  # of one class
OVERLAP_SLACK = 0.1  # share of both sizes by which two centres must be apart before a relation holds


class RecordColumnError(UserError):
    """A record that GenEval's schema does not allow."""


def evaluate(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Sequence[Any]],
    mode: Mode = "standard",
    thresholds: tuple[float, float] = THRESHOLDS,
) -> tuple[bool | float, str]:
    """Judge one image against one record.

    Args:
        metadata: `tag`, `include` [{class, count, color?, size?, position? [relation, index]}] and `exclude`. `size` is
            ours: it is judged as a color is, by what the detector says of the same objects.
        detections: by class, Detection or mappings with `box`, `score`, `color`, `size`; in any order.
        mode: "standard" is the released scorer. "strict" wants the exact count of every included class and ignores
            `exclude`. "graded" gives a float in [0, 1] (see `grade`) that is 1 exactly where "standard" is correct,
            "graded_strict" one that is 1 exactly where "strict" is. "flow_grpo" is the graded score of the reward
            server that flow_grpo trains against, quirks included (see `flow_grpo_score`): at most 1, unbounded below.
        thresholds: scores that an object must exceed, and one in a record tagged counting. GenEval's are Mask2Former's;
            a detector with other scores needs others.

    Returns:
        (correct, reason): the reason is empty where nothing is wrong, else one line a fault.
    """
    check_mode(mode)
    objects = kept(metadata, detections, thresholds)
    strict = mode.endswith("strict") or mode == "flow_grpo"
    correct, reasons = _judge(metadata, objects, strict)
    verdict: bool | float = correct
    if mode == "flow_grpo":
        verdict = flow_grpo_score(metadata, objects)
    elif mode.startswith("graded"):
        verdict = grade(metadata, objects, strict)
    return verdict, "\n".join(reasons)


def check_mode(mode: str, reward: str = "geneval") -> None:
    if mode not in MODES:
        raise UserError(f"{reward}: no mode '{mode}'. Known: {', '.join(MODES)}")


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box (x0, y0, x1, y1) lies, seen from another: none, one, or two names on a diagonal."""
    corners, corners_other = (np.asarray(b, np.float32).reshape(2, 2) for b in (box, other))
    offset = corners.mean(0) - corners_other.mean(0)
    sizes = np.abs(np.diff(corners, axis=0))[0] + np.abs(np.diff(corners_other, axis=0))[0]
    apart = np.maximum(np.abs(offset) - OVERLAP_SLACK * sizes, 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    dx, dy = apart / np.linalg.norm(offset)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def kept(
    metadata: Mapping[str, Any], detections: Mapping[str, Sequence[Any]], thresholds: tuple[float, float] = THRESHOLDS
) -> Detections:
    """Above the threshold, best first, at most MAX_OBJECTS a class."""
    threshold = thresholds[metadata.get("tag") == "counting"]
    best: Detections = {}
    for name, found in detections.items():
        objects = [
            o
            if isinstance(o, Detection)
            else Detection(tuple(o["box"]), o["score"], o.get("color"), size=o.get("size"))
            for o in found
        ]
        above = [o for o in objects if o.score > threshold]
        best[name] = sorted(above, key=lambda o: -o.score)[:MAX_OBJECTS]
    return best


def _judge(metadata: Mapping[str, Any], objects: Detections, strict: bool) -> tuple[bool, list[str]]:
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # by include clause; None: it was not satisfied
    for clause in metadata.get("include") or ():
        name, count = clause["class"], clause["count"]
        every = objects.get(name, [])
        found = every[:count]
        fault = None
        if strict and len(every) != count:
            fault = f"expected {name}={count}, found {len(every)}"
        elif len(found) < count:
            fault = f"expected {name}>={count}, found {len(found)}"
        else:
            fault = _color_fault(clause, found) or _size_fault(clause, found) or _position_fault(clause, found, groups)
        if fault:
            reasons.append(fault)
        groups.append(None if fault else found)
    if not strict:
        for clause in metadata.get("exclude") or ():
            found = objects.get(clause["class"], [])
            if len(found) >= clause["count"]:
                reasons.append(f"expected {clause['class']}<{clause['count']}, found {len(found)}")
    return not reasons, reasons


def _color_fault(clause: Mapping[str, Any], found: Sequence[Detection]) -> str | None:
    wanted, count = clause.get("color"), clause["count"]
    if wanted is None:
        return None
    colors = [o.color for o in found]
    hits = colors.count(wanted)
    if hits >= count:
        return None
    seen = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
    return f"expected {wanted} {clause['class']}>={count}, found {hits} {wanted}; and {seen}"


def _size_fault(clause: Mapping[str, Any], found: Sequence[Detection]) -> str | None:
    wanted, count = clause.get("size"), clause["count"]
    if wanted is None:
        return None
    sizes = [o.size for o in found]
    hits = sizes.count(wanted)
    if hits >= count:
        return None
    seen = ", ".join(f"{number} {size}" for size, number in Counter(s for s in sizes if s is not None).items())
    return f"expected {wanted} {clause['class']}>={count}, found {hits} {wanted}; and {seen}"


def _position_fault(
    clause: Mapping[str, Any], found: Sequence[Detection], groups: Sequence[list[Detection] | None]
) -> str | None:
    if clause.get("position") is None:
        return None
    wanted, name = clause["position"][0], clause["class"]
    targets = _targets(clause, groups)
    if targets is None:
        return f"no target for {name} to be {wanted}"
    for one in found:
        for target in targets:
            held = relations(one.box, target.box)
            if wanted not in held:
                return f"expected {name} {wanted} target, found {' and '.join(sorted(held))} target"
    return None


def _targets(clause: Mapping[str, Any], groups: Sequence[Any]) -> Any:
    index = clause["position"][1]
    if not 0 <= index < len(groups):
        raise RecordColumnError(
            f"a record's include clause '{clause['class']}' is placed relative to clause {index}; "
            f"it must name an earlier one (0 to {len(groups) - 1})"
        )
    return groups[index]


def grade(metadata: Mapping[str, Any], objects: Detections, strict: bool = False) -> float:
    """How much of the record the image meets, in [0, 1]: the mean over all that its clauses ask for.

    An include clause, with n wanted, f found (best n of them looked at) and k the smallest count from which `exclude`
    refuses the class, asks for
        count     f / n below n; 1 from n to k - 1; max(0, 1 - (f - k + 1) / n) from k on
        color    share of the n that have the color; what is missing counts as wrong
        size      share of the n that have the size, likewise
        position  share of the n x targets pairs in which the relation holds; 0 where either side is missing
    An exclude clause of a class that is not included asks for one thing: 1 below its count, else 0. With `strict` an
    include clause refuses its class from n + 1 on, and `exclude` is ignored. Several clauses of one class ask each for
    its own. Nothing is negative, unlike in the graded score of RL forks of GenEval, where five found for one wanted
    gives -3.
    """
    include = metadata.get("include") or ()
    exclude = () if strict else metadata.get("exclude") or ()
    refused: dict[str, int] = {}
    for clause in exclude:
        refused[clause["class"]] = min(clause["count"], refused.get(clause["class"], clause["count"]))
    included = {clause["class"] for clause in include}
    parts: list[float] = []
    groups: list[list[Detection]] = []
    for clause in include:
        name, count = clause["class"], clause["count"]
        every = objects.get(name, [])
        found = every[:count]
        limit = count + 1 if strict else refused.get(name)
        if limit is not None and len(every) >= limit:
            parts.append(max(0.0, 1 - (len(every) - limit + 1) / count))
        else:
            parts.append(len(found) / count)
        if clause.get("color") is not None:
            parts.append(sum(o.color == clause["color"] for o in found) / count)
        if clause.get("size") is not None:
            parts.append(sum(o.size == clause["size"] for o in found) / count)
        if clause.get("position") is not None:
            targets = _targets(clause, groups)
            wanted_targets = include[clause["position"][1]]["count"]
            held = sum(clause["position"][0] in relations(o.box, t.box) for o in found for t in targets)
            parts.append(held / (count * wanted_targets))
        groups.append(found)
    parts += [float(len(objects.get(c["class"], [])) < c["count"]) for c in exclude if c["class"] not in included]
    return sum(parts) / len(parts) if parts else 1.0


def flow_grpo_score(metadata: Mapping[str, Any], objects: Detections) -> float:
    """The graded score of the reward server behind flow_grpo (yifan123/reward-server, gen_eval.py), for comparison.

    The mean over the include clauses' entries; `exclude` is ignored. With n wanted and f found:
        count     1 - |n - f| / n, so five found for one wanted give -3
        f != n    one 0 more if the clause names a color or a place
        color    1 - |n - hits| / n
        position  only where count and color are right: 0 without a target; else 1, and beside it a 0 where some pair
                  is in another relation, so that a wrong place costs half of what a missing one does

    Raises:
        RecordColumnError: a clause asks for a size, of which that server knows nothing.
    """
    entries: list[float] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include") or ():
        count, found = clause["count"], objects.get(clause["class"], [])
        color, place = clause.get("color"), clause.get("position")
        if clause.get("size") is not None:
            raise RecordColumnError(
                f"the prompt '{metadata.get('prompt', '')}' asks for the size '{clause['size']}', which the mode "
                "flow_grpo does not grade; take graded or graded_strict"
            )
        entries.append(1 - abs(count - len(found)) / count)
        matched = len(found) == count
        if not matched and (color is not None or place is not None):
            entries.append(0.0)
        if matched and color is not None:
            hits = sum(o.color == color for o in found)
            entries.append(1 - abs(count - hits) / count)
            matched = hits == count
        if matched and place is not None:
            targets = _targets(clause, groups)
            if targets is None:
                entries.append(0.0)
                matched = False
            else:
                matched = all(place[0] in relations(o.box, t.box) for o in found for t in targets)
                entries += [1.0] if matched else [0.0, 1.0]
        groups.append(found if matched else None)
    return sum(entries) / len(entries) if entries else 0.0


def classes_of(metadata: Mapping[str, Any]) -> list[str]:
    """Every class that a record names."""
    return [c["class"] for key in ("include", "exclude") for c in metadata.get(key) or ()]


def colored_of(record: Mapping[str, Any]) -> dict[str, int]:
    """Of which classes how many of the best objects are judged by color: as many as the clause that asks for most."""
    counts: dict[str, int] = {}
    for clause in record.get("include") or ():
        if clause.get("color") is not None:
            counts[clause["class"]] = max(counts.get(clause["class"], 0), clause["count"])
    return counts


def check_record(detector: CachedDetector, record: Mapping[str, Any], where: str) -> None:
    """Raises RecordColumnError as `check_form`, UnknownClass for a class that the detector cannot see, UserError where
    a color is asked for and nothing can name it, RecordColumnError as `check_clauses` and for a size that the detector
    does not tell."""
    check_form(record, where)
    detector.require(classes_of(record), where)
    check_clauses(record, where, detector.colors or COLORS)
    for clause in record.get("include") or ():
        size = clause.get("size")
        if size is not None and size not in detector.sizes:
            known = nearest(size, detector.sizes) if detector.sizes else "it tells none"
            raise RecordColumnError(f"{where} asks for the size '{size}', which the detector does not tell; {known}")
    if colored_of(record):
        detector.require_colors(where)


def check_form(record: Mapping[str, Any], where: str) -> None:
    """Raises RecordColumnError for an `include` or `exclude` that is no list of {class, count, color?, size?,
    position?}, and for more of a class than GenEval's rule looks at."""
    for key in ("include", "exclude"):
        clauses = record.get(key) or ()
        for clause in clauses if isinstance(clauses, list | tuple) else (clauses,):
            fields = clause if isinstance(clause, Mapping) else {}
            name, count = fields.get("class"), fields.get("count")
            if (
                not isinstance(name, str)
                or not isinstance(count, int)
                or isinstance(count, bool)
                or count < 1
                or not isinstance(fields.get("color"), str | None)
                or not isinstance(fields.get("size"), str | None)
            ):
                raise RecordColumnError(
                    f"{where}: {key} has {clause!r}; it is a list of {{class, count from 1, color?, size?, position?}}"
                )
            if key == "include" and count > MAX_OBJECTS:
                raise RecordColumnError(
                    f"{where} asks for {count} of '{name}'; GenEval's rule looks at {MAX_OBJECTS} of a class at most"
                )


def check_clauses(record: Mapping[str, Any], where: str, colors: Sequence[str] = COLORS) -> None:
    """Raises RecordColumnError for a clause that no image can meet, and that would be paid 0 for ever: a count that is
    no number from 1 on, or more than are kept of a class; a color that is none of `colors`; a relation that `relations`
    never gives; a place by no earlier clause."""
    check_form(record, where)
    for index, clause in enumerate(record.get("include") or ()):
        color, position = clause.get("color"), clause.get("position")
        if color is not None and color not in colors:
            raise RecordColumnError(
                f"{where} asks for the color '{color}', which no object is ever said to have; "
                f"{nearest(str(color), colors)}"
            )
        if position is None:
            continue
        if not isinstance(position, list | tuple) or len(position) != 2 or position[1] not in range(index):
            raise RecordColumnError(
                f"{where}: '{clause['class']}' has the position {position!r}; it is [relation, "
                f"index of an earlier clause]"
            )
        if position[0] not in RELATIONS:
            raise RecordColumnError(
                f"{where} asks for the relation '{position[0]}', which GenEval's rule does not "
                f"know; it knows {', '.join(RELATIONS)}"
            )


def score_images(
    images: Sequence[np.ndarray],
    records: Sequence[Mapping[str, Any]],
    context: RewardContext,
    mode: Mode,
    reward: str = "geneval",
    thresholds: tuple[float, float] = THRESHOLDS,
) -> list[tuple[bool | float, str]]:
    """`evaluate` for each image and its record, through the shared detector.

    Raises UserError as `check_record`.
    """
    detector = context.detector_for(reward)
    for record in records:
        check_record(detector, record, f"prompt '{record.get('prompt', '')}'")
    found = detector.detect(
        images, [classes_of(record) for record in records], [colored_of(record) for record in records]
    )
    return [evaluate(record, objects, mode, thresholds) for record, objects in zip(records, found, strict=True)]


def geneval(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_extra: Any = None,
    image: Literal["final", "first", "each"] = "final",
    mode: Mode = "standard",
    threshold: float = SCORE_THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
    detector: str | None = None,
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """Whether the final (or first) image shows what the prompt asks for: 1 or 0, or a share of it when graded.

    A thought without an image earns 0: the task was to draw. A record without `include` has no ground truth: None.
    With image "each", every image is scored and its own segment is credited: {segment: score}. An object counts
    above `threshold`, and in a record tagged counting above `counting_threshold`: the values are GenEval's, for
    Mask2Former; another detector's scores mean something else. `detector` names a backend that looks for this part
    alone, with its defaults, in place of the recipe's `rewards.detector`: so one detector is paid and another watched.
    """
    check_mode(mode)
    if detector is not None:
        context = replace(context, detector=CachedDetector(_backend(detector)))
    thresholds = (threshold, counting_threshold)
    if not all(0 <= score < 1 for score in thresholds):
        raise UserError(
            f"geneval: thresholds are {threshold} and {counting_threshold}; they are scores, from 0 to below 1"
        )
    if image == "each":
        return _each(trajectories, context, mode, thresholds)
    if image not in ("final", "first"):
        raise UserError(f"geneval: no image '{image}'. Known: final, first, each")
    drawn = [[p for _, p in policy_images(t)] for t in trajectories]
    rows = [i for i, t in enumerate(trajectories) if t.record.get("include") and drawn[i]]
    chosen = [drawn[i][-1 if image == "final" else 0] for i in rows]
    verdicts = dict(
        zip(
            rows,
            score_images(chosen, [trajectories[i].record for i in rows], context, mode, thresholds=thresholds),
            strict=True,
        )
    )
    reasons = [verdicts[i][1] if i in verdicts else "no image" for i in range(len(trajectories))]
    if log_extra is not None:
        log_extra("reason", reasons)
    return [
        float(verdicts[i][0]) if i in verdicts else 0.0 if t.record.get("include") else None
        for i, t in enumerate(trajectories)
    ]


@cache
def _backend(name: str) -> Any:
    """A detector by its backend's name, loaded once. Raises UserError where there is none, or its weights are not."""
    if name not in BACKENDS:
        raise UserError(f"geneval: detector: no backend '{name}'; {nearest(name, BACKENDS)}")
    return build_detector(DetectorConfig(backend=name), "geneval: detector")


def _each(
    trajectories: Sequence[Trajectory], context: RewardContext, mode: Mode, thresholds: tuple[float, float]
) -> list[float | dict[int, float] | None]:
    places = [
        (row, segment, drawn)
        for row, t in enumerate(trajectories)
        if t.record.get("include")
        for segment, drawn in policy_images(t)
    ]
    verdicts = score_images(
        [drawn for _, _, drawn in places],
        [trajectories[row].record for row, _, _ in places],
        context,
        mode,
        thresholds=thresholds,
    )
    credits: dict[int, dict[int, float]] = {}
    for (row, segment, _), (score, _reason) in zip(places, verdicts, strict=True):
        credits.setdefault(row, {})[segment] = float(score)
    return [credits.get(row, 0.0 if t.record.get("include") else None) for row, t in enumerate(trajectories)]
