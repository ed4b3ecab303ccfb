"""T2I-R1's rewards by a detector and by a captioner: what a prompt names, how many, and in which place.

Source: Jiang et al., arXiv:2505.00703; CaraJ7/T2I-R1, src/t2i-r1/src/utils/reward_gdino.py and reward_git.py. Boxes are
centre x, centre y, width, height as shares of the image.

    spatial   0.2 for each of the two objects that was found, and half of the relation of the first to the second, each
              by its most certain box; nothing where both have the same name
    relation  left, right, above, below: 1 if the centres lie that way, further apart along that axis than along the
              other, and the boxes overlap (IoU) less than 0.1; 0.1 / IoU where they overlap more; else 0
              near: 1 if the centres are less than 150 px apart along either axis, else 150 / the larger distance
    numeracy  mean over the counted objects of 1 for the exact count, 0.2 for another, 0 for none, after suppression of
              boxes that overlap a more certain one by more than 0.5
    objects   share of the named objects that was found; 1 where none is named
    yes       mean over the phrases of yes / (yes + no), as a captioner answers whether the image shows them

`release` keeps three faults: "above", "on top of" and whatever other wording it lacks reach no branch and are never
paid; near compares shares of the image with 150, so that it is always paid in full; and suppression measures overlap
on centre and size as if they were corners. `repaired`, the default, has none of them, knows a few wordings more, and
is None for a relation that boxes cannot show ("behind"). The release also pays 0 for the yes part where the prompt is
about places or counts; there the part does not apply, which is None here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torchvision.ops import box_convert, nms

from record.trajectory import Trajectory
from rewards.contract import RewardContext, RewardError, policy_images
from rewards.detectors.base import Detection
from rewards.functions.overlap import box_iou, corners
from rewards.judge.base import Question
from rewards.published.judge_helpers import one_of
from runtime.errors import nearest

Variant = Literal["repaired", "release"]
Kind = Literal["spatial", "numeracy", "objects"]
Box = Sequence[float]  # centre x, centre y, width, height as shares of the image
Boxes = Mapping[str, tuple[Sequence[Box], Sequence[float]]]  # by phrase: boxes and their scores

FOUND, RELATION = 0.2, 0.5  # weights: of each object of a pair, and of their relation
OTHER_COUNT = 0.2
OVERLAP = 0.1  # IoU up to which a pair counts as apart
NEAR_PX = 150.0
SUPPRESSION = 0.5  # IoU

NEAR = ("near", "next to", "on side of", "beside", "side of")
LEFT = ("on the left of", "left of", "to the left of", "left")
RIGHT = ("on the right of", "right of", "to the right of", "right")
BELOW = ("on the bottom of", "below", "bottom of", "under", "beneath")
ABOVE = ("on the top of", "top of", "above", "on top of", "over")
RELATIONS = (*NEAR, *LEFT, *RIGHT, *BELOW, *ABOVE)
# The wordings that reach a branch of the release; it pays no other.
_RELEASED = (
    "near",
    "next to",
    "on side of",
    "on the left of",
    "left of",
    "on the right of",
    "right of",
    "on the bottom of",
    "below",
    "on the top of",
    "top of",
)


# ---- the formulas ---------------------------------------------------------------------------------------------


def relation(first: Box, second: Box, name: str, image_size: Sequence[float], variant: Variant = "repaired") -> float:
    """How well `first` stands in the relation to `second`, in [0, 1].

    Args:
        image_size: (width, height) in px.

    Raises:
        RewardError: no such relation (repaired).
    """
    words = name.strip().lower()
    if variant == "release" and words not in _RELEASED:
        return 0.0
    if words not in RELATIONS:
        raise RewardError(f"t2i_r1: no relation '{name}'; {nearest(words, RELATIONS)}")
    dx, dy = first[0] - second[0], first[1] - second[1]
    if words in NEAR:
        width, height = image_size if variant == "repaired" else (1.0, 1.0)
        apart_x, apart_y = abs(dx) * width, abs(dy) * height
        if apart_x < NEAR_PX or apart_y < NEAR_PX:
            return 1.0
        return NEAR_PX / max(apart_x, apart_y)
    along, across = (abs(dx), abs(dy)) if words in LEFT + RIGHT else (abs(dy), abs(dx))
    holds = {LEFT: dx < 0, RIGHT: dx > 0, ABOVE: dy < 0, BELOW: dy > 0}
    if along <= across or not next(true for names, true in holds.items() if words in names):
        return 0.0
    overlap = box_iou(corners(first, "center_size"), corners(second, "center_size"))
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def spatial(
    found: Boxes, object_1: str, object_2: str, name: str, image_size: Sequence[float], variant: Variant = "repaired"
) -> float:
    """In [0, 0.9]: both objects and their relation."""
    if object_1 == object_2:
        return 0.0
    best = [_most_certain(found, phrase) for phrase in (object_1, object_2)]
    score = FOUND * sum(box is not None for box in best)
    if best[0] is not None and best[1] is not None:
        score += RELATION * relation(best[0], best[1], name, image_size, variant)
    return score


def _most_certain(found: Boxes, phrase: str) -> Box | None:
    boxes, scores = found.get(phrase, ((), ()))
    return boxes[max(range(len(boxes)), key=lambda at: scores[at])] if len(boxes) else None


def numeracy(found: Boxes, counts: Sequence[tuple[str, int]], variant: Variant = "repaired") -> float:
    """In [0, 1]: the mean over (object, count); 1 where nothing is counted."""
    paid = []
    for phrase, wanted in counts:
        number = kept(*found.get(phrase, ((), ())), variant)
        paid.append(0.0 if number == 0 else 1.0 if number == wanted else OTHER_COUNT)
    return sum(paid) / len(paid) if paid else 1.0


def kept(boxes: Sequence[Box], scores: Sequence[float], variant: Variant = "repaired") -> int:
    """How many boxes suppression leaves."""
    if not len(boxes):
        return 0
    box_N4 = torch.tensor([list(box) for box in boxes], dtype=torch.float32)
    if variant == "repaired":
        box_N4 = box_convert(box_N4, "cxcywh", "xyxy")
    return len(nms(box_N4, torch.tensor(list(scores), dtype=torch.float32), SUPPRESSION))


def objects_share(found: Boxes, objects: Sequence[str]) -> float:
    """In [0, 1]; 1 where nothing is named."""
    return sum(len(found.get(name, ((), ()))[0]) > 0 for name in objects) / len(objects) if objects else 1.0


def yes_share(
    logits: Mapping[str, Mapping[str, float]],
    task: str,
    phrases: Sequence[str] | None,
    objects: Sequence[str],
    variant: Variant = "repaired",
) -> float | None:
    """In [0, 1]: mean of yes / (yes + no) over the phrases, or over the objects where there are none; 1 of nothing.

    Args:
        logits: by phrase, of the captioner's first word: "yes" and "no".
        task: of the prompt; about places and counts the part says nothing (release: 0).
    """
    if task in ("spatial", "numeracy"):
        return 0.0 if variant == "release" else None
    asked = phrases if phrases is not None else objects
    if not asked:
        return 1.0
    shares = [torch.tensor([logits[name]["yes"], logits[name]["no"]]).double().softmax(0)[0].item() for name in asked]
    return sum(shares) / len(shares)


# ---- the rewards ----------------------------------------------------------------------------------------------


def t2i_r1_detector(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    variant: Variant = "repaired",
    threshold: float = 0.3,
    **columns: Any,
) -> list[float | None]:
    """The detector's part on the final image: spatial, numeracy or objects, as the record says; 0 without an image.

    A record names `object_1`, `object_2` and `relation`, or `counts` [{object, count}], or `objects`; one in GenEval's
    schema (`include`) is read as the same: a clause with a position, a record tagged counting, or any other. None where
    it has neither, or a relation that boxes cannot show.

    Args:
        threshold: what the detector is less sure of than this is not there.
    """
    one_of("t2i_r1_detector", "variant", variant, get_args(Variant))
    asked = [wanted(t.record) for t in trajectories]
    if variant == "repaired":
        asked = [
            want if want is None or want.get("relation", "near").strip().lower() in RELATIONS else None
            for want in asked
        ]
    drawn = [policy_images(t) for t in trajectories]
    rows = [row for row, want in enumerate(asked) if want is not None and drawn[row]]
    detector = context.detector_for("t2i_r1_detector")
    phrases = [named(asked[row] or {}) for row in rows]
    for row, some in zip(rows, phrases, strict=True):
        detector.require(some, f"prompt '{trajectories[row].prompt}'")
    images = [drawn[row][-1][1] for row in rows]
    values: list[float | None] = [None if want is None else 0.0 for want in asked]
    seen = detector.detect(images, phrases, [{} for _ in rows])
    for row, image, found in zip(rows, images, seen, strict=True):
        values[row] = _judged(
            asked[row] or {}, _shares(found, image.shape, threshold), (image.shape[1], image.shape[0]), variant
        )
    return values


def _judged(want: Mapping[str, Any], found: Boxes, size: tuple[int, int], variant: Variant) -> float:
    if "relation" in want:
        return spatial(found, want["object_1"], want["object_2"], want["relation"], size, variant)
    if "counts" in want:
        return numeracy(found, want["counts"], variant)
    return objects_share(found, want["objects"])


def wanted(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the record asks of the detector: {object_1, object_2, relation}, {counts} or {objects}; None: nothing."""
    if record.get("relation") is not None:
        return {key: record[key] for key in ("object_1", "object_2", "relation")}
    if record.get("counts") is not None:
        return {"counts": [(row["object"], row["count"]) for row in record["counts"]]}
    if record.get("objects") is not None:
        return {"objects": list(record["objects"])}
    clauses = record.get("include")
    if not clauses:
        return None
    placed = next((clause for clause in clauses if clause.get("position") is not None), None)
    if placed is not None:
        name, of = placed["position"]
        return {"object_1": placed["class"], "object_2": clauses[of]["class"], "relation": name}
    if record.get("tag") == "counting":
        return {"counts": [(clause["class"], clause["count"]) for clause in clauses]}
    return {"objects": [clause["class"] for clause in clauses]}


def named(want: Mapping[str, Any]) -> list[str]:
    """The phrases that the detector is asked for."""
    if "relation" in want:
        return [want["object_1"], want["object_2"]]
    return [name for name, _ in want["counts"]] if "counts" in want else list(want["objects"])


def _shares(found: Mapping[str, Sequence[Detection]], shape: Sequence[int], threshold: float) -> Boxes:
    """A detector's output as shares of the image, centre and size."""
    height, width = shape[:2]
    boxes = {}
    for name, items in found.items():
        sure = [item for item in items if item.score > threshold]
        boxes[name] = (
            [
                ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
                for x0, y0, x1, y1 in (item.box for item in sure)
            ],
            [item.score for item in sure],
        )
    return boxes


def t2i_r1_yes(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    variant: Variant = "repaired",
    question: str = "Does the picture show {phrase}? Answer with yes or no.",
    **columns: Any,
) -> list[float | None]:
    """The captioner's part on the final image, asked of the recipe's judge; 0 without an image.

    A record names `task`, `phrases` (with their attributes) and `objects`; None where the task is spatial or numeracy
    (release: 0), where the record names nothing, and where the judge gave no probability for a phrase.
    """
    one_of("t2i_r1_yes", "variant", variant, get_args(Variant))
    values: list[float | None] = []
    asking: list[tuple[int, Question]] = []
    for row, t in enumerate(trajectories):
        task, phrases = t.record.get("task", ""), t.record.get("phrases")
        asked = phrases if phrases is not None else t.record.get("objects")
        drawn = policy_images(t)
        if task in ("spatial", "numeracy"):
            values.append(0.0 if variant == "release" else None)
        elif asked is None:
            values.append(None)
        elif not drawn:
            values.append(0.0)
        else:
            values.append(None if asked else 1.0)
            asking += [(row, Question.of(question.format(phrase=phrase), (drawn[-1][1],))) for phrase in asked]
    if not asking:
        return values
    said = context.judge_for("t2i_r1_yes").yes_probability([asked for _, asked in asking])
    for row in {row for row, _ in asking}:
        shares = [share for (owner, _), share in zip(asking, said, strict=True) if owner == row]
        known = [share for share in shares if share is not None]
        values[row] = sum(known) / len(known) if len(known) == len(shares) else None
    return values
