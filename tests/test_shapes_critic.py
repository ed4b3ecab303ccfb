"""What is true of an image that nobody drew on purpose, and questions about scenes, in the shapes world's words."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.base import Part
from rewards.detectors.shapes import TaskDetector
from rewards.functions.geneval import evaluate, kept
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes.critic import certain, fault_of, satisfied
from tasks.shapes.language import claims, holds, requirement
from tasks.shapes.prompts import HELDOUT_COLORED, TAGS, pool, sample_scene_for
from tasks.shapes.questions import KINDS
from tasks.shapes.render import render
from tasks.shapes.world import PLACES, Object, Scene, sample_scene
from tests.properties import examples as tried

TASK = get_task("shapes")
DETECTOR = TaskDetector(TASK)


def judge(record, image) -> bool:
    """The reward's own judgement."""
    return bool(evaluate(record, DETECTOR.detect([image])[0])[0])


def thought(record, plan: str, image) -> list[Part]:
    return [*([Part("plan", plan)] if plan else []), Part("sketch", image=image)]


def torn(seed: int) -> tuple[dict, np.ndarray]:
    """A prompt of either split, and an image: right, another prompt's, or with a rectangle of another's."""
    rng = np.random.default_rng(seed)
    records = pool(("train", "heldout")[seed % 2], TAGS[seed % 6])
    record = records[rng.integers(len(records))]
    image = render(sample_scene_for(record, rng))
    if seed % 3:
        other = render(sample_scene(rng, int(rng.integers(1, 5))))
        y, x = rng.integers(0, 4, 2) * 8
        height, width = rng.integers(1, 5, 2) * 8
        image[y : y + height, x : x + width] = other[y : y + height, x : x + width]
    return record, image


@tried(0.5)
@given(seed=st.integers(0, 10**6))
def test_the_verdict_is_the_rewards_and_every_word_of_it_holds(seed):
    record, image = torn(seed)
    detections = TASK.detect(image)
    assert satisfied(record, certain(record, detections)) == judge(record, image)
    found = TASK.critique("strokes", record, thought(record, "", image), 3, seed)
    if found is None:
        return
    assert found.fine == judge(record, image)
    said = claims(found.parts[0].text)
    assert said.verdict == ("fine" if found.fine else "wrong")
    sure = [one for group in kept(record, DETECTOR.detect([image])[0]).values() for one in group]
    assert len(sure) == len(certain(record, detections))
    for mistake in said.mistakes:
        assert holds(mistake, record, certain(record, detections)), (record["prompt"], str(mistake))
    # Each image that is drawn again is wrong or right as it is said to be, and the last words are true of it.
    images = [(index, part.image) for index, part in enumerate(found.parts) if part.image is not None]
    assert len(images) <= 3
    for index, drawn in images:
        assert judge(record, drawn) == (index not in found.mistakes)
        assert claims(found.parts[index + 1].text).verdict == ("wrong" if index in found.mistakes else "fine")
    if found.ends:
        assert "fine" in found.parts[-1].text and judge(record, images[-1][1] if images else image)
    again = TASK.critique("strokes", record, thought(record, "", image), 3, seed)
    assert [part.text for part in again.parts] == [part.text for part in found.parts]


def test_it_says_of_the_demonstrations_images_what_they_say():
    counts: Counter = Counter()
    for shown in TASK.demonstrations("strokes", 40, 3):
        for index, part in enumerate(shown.parts):
            if part.image is None:
                continue
            found = TASK.critique("strokes", shown.record, shown.parts[: index + 1], 3, 0)
            assert found is not None and found.fine == (index not in shown.mistakes)
            counts["same" if found.parts[0].text == shown.parts[index + 1].text else "another"] += 1
            # A stroke that is not the last leaves more to draw.
            plan = next(p.text for p in reversed(shown.parts[:index]) if p.role == "plan")
            partial = requirement(shown.record, plan) is not shown.record
            assert found.ends == (not partial)
    assert counts["another"] < 0.1 * counts["same"]  # of two objects out of place, either may be named


COLORED = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"}
THREE = {
    "tag": "counting",
    "include": [{"class": "cross", "count": 2}],
    "exclude": [{"class": "cross", "count": 3}],
    "prompt": "two crosses",
}
LEFT = {
    "tag": "position",
    "include": [{"class": "cross", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
    "prompt": "a circle left of a cross",
}


def place(name: str) -> int:
    return PLACES.index(name)


@pytest.mark.parametrize(
    "record, objects, words",
    [
        (
            COLORED,
            [Object("square", "blue", place("top-left"))],
            [
                "red circle = blue square top-left no : wrong shape blue square top-left",
                "make blue square top-left circle",
                "red circle = blue circle top-left no : wrong color blue circle top-left",
                "make blue circle top-left red",
                "red circle = red circle top-left yes : fine",
            ],
        ),
        (
            THREE,
            [Object("cross", "red", place(name)) for name in ("top-left", "top-right", "bottom-left")],
            [
                "cross = red cross top-left yes , cross = red cross top-right yes , nothing = red cross bottom-left no "
                ": wrong extra red cross bottom-left",
                "remove red cross bottom-left",
                "cross = red cross top-left yes , cross = red cross top-right yes : fine",
            ],
        ),
        (
            LEFT,
            [Object("cross", "red", place("left")), Object("circle", "blue", place("top-right"))],
            [
                "cross = red cross left yes , left of circle = blue circle top-right no : "
                "wrong place blue circle top-right",
            ],
        ),
    ],
    ids=["two mistakes", "one too many", "no room to move"],
)
def test_critiques_by_hand(record, objects, words):
    found = TASK.critique("strokes", record, thought(record, "", render(Scene(tuple(objects)))), 3, 0)
    texts = [part.text.split("> ")[1].split(" <")[0] for part in found.parts if part.image is None]
    assert texts == words and not found.fine
    # A circle cannot stand left of a cross that stands at the left: its mistake is named, and that is all.
    assert found.ends == (len(words) > 1)


def test_what_is_missing_takes_color_and_place_of_the_plan():
    plan = "<ins> draw all </ins> <des> purple cross bottom-right , green circle top-left </des>"
    image = render(Scene((Object("cross", "purple", place("bottom-right")),)))
    found = TASK.critique("strokes", LEFT, thought(LEFT, plan, image), 3, 0)
    assert "wrong missing green circle top-left" in found.parts[0].text
    assert "add green circle top-left" in found.parts[1].text and found.ends


def test_without_images_left_the_verdict_is_all_that_is_said():
    image = render(Scene((Object("square", "blue", 0),)))
    found = TASK.critique("strokes", COLORED, thought(COLORED, "", image), 0, 0)
    assert [part.role for part in found.parts] == ["inspect"] and not found.ends
    found = TASK.critique("strokes", COLORED, thought(COLORED, "", image), 1, 0)
    assert [part.role for part in found.parts] == ["inspect", "refine", "redraw", "inspect"]
    assert found.mistakes == (2,) and not found.ends  # its shape is mended, its color is not yet


def test_a_critique_as_free_text_is_followed_by_an_image():
    right = render(Scene((Object("circle", "red", 0),)))
    found = TASK.critique("self_critique", COLORED, thought(COLORED, "", right), 2, 0)
    assert [part.role for part in found.parts] == ["critique", "redraw"]
    assert found.parts[0].text.endswith(": fine ; keep all") and found.parts[1].image is right
    assert TASK.critique("self_critique", COLORED, thought(COLORED, "", right), 0, 0) is None
    with pytest.raises(UserError, match="writes no critiques in the format 'look'"):
        TASK.critique("look", COLORED, thought(COLORED, "", right), 2, 0)


def test_where_slots_and_rule_disagree_nothing_is_said():
    """Two circles, one of the color: the slots see what was asked for, the rule looks at the first one."""
    both = render(Scene((Object("circle", "blue", place("top-left")), Object("circle", "red", place("bottom-right")))))
    assert not judge(COLORED, both)
    assert fault_of(COLORED, Scene((Object("circle", "red", 8), Object("circle", "blue", 0))), [], None) is None
    assert TASK.critique("strokes", COLORED, thought(COLORED, "", both), 3, 0) is None


# ---- questions ----


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_detector_sees(kind):
    known = set(TASK.words)
    answers: Counter = Counter()
    for asked in TASK.questions(kind, 40, 1):
        (image,), question = asked.media, asked.prompt
        (answer,) = (part.text for part in asked.parts)
        answers[answer] += 1
        assert set(question.split()) | set(answer.split()) <= known
        seen = TASK.seen_in(TASK.detect(image))
        words = question.removesuffix(" =").split()
        if kind == "count":
            shape = words[0].removesuffix("s").removesuffix("se") if words[0] != "crosses" else "cross"
            number = sum(one.shape == shape for one in seen)
            assert answer == ["nothing", "one", "two", "three", "four"][number]
        elif kind == "object":
            here = [f"{one.color} {one.shape}" for one in seen if one.place == words[0]]
            assert answer == (here[0] if here else "nothing")
        elif kind == "presence":
            color, shape = words
            assert (shape, color) not in HELDOUT_COLORED
            assert answer == ("yes" if any((one.shape, one.color) == (shape, color) for one in seen) else "no")
        else:
            box = {f"{d.color} {d.cls}": d.box for d in TASK.detect(image)}
            one, other, relation = " ".join(words[:2]), " ".join(words[-2:]), " ".join(words[2:-2])
            dx, dy = (box[one][i] + box[one][i + 2] - box[other][i] - box[other][i + 2] for i in (0, 1))
            along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
            assert (answer == "yes") == (along > 0 and 2 * along > abs(dx if along in (dy, -dy) else dy))
    assert len(answers) >= 2 and max(answers.values()) < 32
    with pytest.raises(UserError, match="no questions of the kind 'counts'; did you mean 'count'"):
        TASK.questions("counts", 1, 0)
