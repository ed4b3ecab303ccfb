"""The built-in tasks and detectors keep their contracts; a fault in one's own is named."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
from PIL import Image

from formats.base import Part
from formats.registry import get_format
from rewards.detectors.base import Detection
from rewards.detectors.colors import Colored, ColorNamer
from rewards.detectors.contract import check_detector
from rewards.detectors.encoders import OpenClipConfig
from rewards.detectors.registry import DetectorConfig, build_detector
from rewards.detectors.shapes import TaskDetector, shapes_detector
from rollout.tools.look import Look
from runtime.errors import UserError
from tasks import dataset
from tasks.config import DatasetConfig
from tasks.contract import check_task
from tasks.registry import get_task
from tasks.shapes import demonstrations
from tasks.shapes.task import ShapesTask

LOOK = Look(Look.Options()).words


def test_the_shapes_keep_the_contract():
    with pytest.raises(AssertionError, match="task 'shapes': words: .* which is none of them"):
        check_task(get_task("shapes"), [get_format("look")], demonstrations=6)  # its boxes are in the tool's words
    check_task(get_task("shapes"), [get_format(name) for name in demonstrations.FORMATS], words=LOOK, demonstrations=6)


def test_a_data_set_of_pictures_keeps_the_contract(tmp_path):
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    rows = [{"prompt": f"what is {n}, plus one?", "pic": "a.png", "answer": n + 1} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_task(dataset.build(DatasetConfig(path=str(tmp_path / "rows.jsonl"), images=["pic"], show=["pic"])))


def _shapes(**changes):
    """The shapes with another method."""
    return type("Mine", (ShapesTask,), {"name": "mine", **changes})()


def _train(*records, heldout=()):
    return lambda self, split: (
        {"train": list(records), "heldout": list(heldout)}[split] if split in ("train", "heldout") else _no(split)
    )


def _no(split):
    raise UserError(f"no split '{split}'")


def _demonstrations(change):
    def changed(self, format, count, seed):
        return change(ShapesTask.demonstrations(self, format, count, seed))

    return changed


def _critique(change):
    def changed(self, format, record, before, images, seed):
        return change(ShapesTask.critique(self, format, record, before, images, seed))

    return changed


def _with_part(one, index, **changes):
    parts = list(one.parts)
    parts[index] = replace(parts[index], **changes)
    return replace(one, parts=tuple(parts))


GOOD = {"prompt": "a red circle"}
SEEN = Detection((1.0, 1.0, 9.0, 9.0), 0.5, "red", None, "circle")
tick = itertools.count()

TASKS = {
    "words: 'red circle' is no single word": {"__init__": lambda self: setattr(self, "words", ["red circle"])},
    "prompts: prompt 0 of train has no text in 'prompt'": {"prompts": _train({"text": "x"})},
    "prompts: prompt 1 of train is not made of JSON": {"prompts": _train(GOOD, {**GOOD, "x": np.float32(1)})},
    "prompts: prompt 0 of train comes back otherwise .*'x' is .1, 2.": {"prompts": _train({**GOOD, "x": (1, 2)})},
    "prompts: prompt 0 of train is empty, and shows nothing": {"prompts": _train({"prompt": " "})},
    "words: prompt 0 of train says 'zebra'": {"prompts": _train({"prompt": "a red zebra"})},
    "media: prompt 0 of train: media, item 1: the image": {
        "prompts": _train({**GOOD, "media": [{"image": "none.png"}]})
    },
    "prompts: asked twice, train is not the same": {
        "prompts": lambda self, split: _no(split) if split == "neither" else [{**GOOD, "n": next(tick)}]
    },
    "prompts: there is nothing to train on": {"prompts": _train()},
    "prompts: 'a red circle' is held out and trained on": {"prompts": _train(GOOD, heldout=[GOOD])},
    "prompts: a split that is none is a UserError": {
        "prompts": lambda self, split: [{**GOOD, "n": int(split == "heldout")}]
    },
    "demonstrations: in the format 'strokes': 3 for 4": {"demonstrations": _demonstrations(lambda d: d[1:])},
    "demonstrations: .* with one seed they are not the same": {
        "demonstrations": lambda self, f, count, seed: ShapesTask.demonstrations(self, f, count, next(tick))
    },
    "demonstrations: number 0 .* is no sentence of it: ": {
        "demonstrations": _demonstrations(lambda d: [replace(d[0], parts=d[0].parts[:-1]), *d[1:]])
    },
    "words: number 0 .* says 'zebra'": {
        "demonstrations": _demonstrations(
            lambda d: [_with_part(d[0], 0, text="<ins> zebra</ins><des> red</des>"), *d[1:]]
        )
    },
    "demonstrations: number 1 .* mistakes name part 0, which is no image": {
        "demonstrations": _demonstrations(lambda d: [d[0], replace(d[1], mistakes=(0,)), *d[2:]])
    },
    "demonstrations: number 1 .* needless names part 99": {
        "demonstrations": _demonstrations(lambda d: [d[0], replace(d[1], needless=(99,)), *d[2:]])
    },
    "detect: image 0: 'cube' is none of its classes": {"detect": lambda self, image: [replace(SEEN, cls="cube")]},
    "detect: image 0: a box .* of an image of 32 x 32 px": {
        "detect": lambda self, image: [replace(SEEN, box=(1.0, 1.0, 1.0, 40.0))]
    },
    "detect: image 0: a score of 1.5": {"detect": lambda self, image: [replace(SEEN, score=1.5)]},
    "detect: image 0: a mask of float64": {"detect": lambda self, image: [replace(SEEN, mask=np.ones((32, 32)))]},
    "detect: image 0: the best does not come first": {"detect": lambda self, image: [SEEN, replace(SEEN, score=0.9)]},
    "critique: number 0 .* image 1: it is called (right|wrong), and is not": {
        "critique": _critique(lambda found: replace(found, fine=not found.fine))
    },
    "words: number 0 .* its critique says 'zebra'": {
        "critique": _critique(
            lambda found: replace(found, parts=(Part("inspect", "<inspect> zebra </inspect>"), *found.parts[1:]))
        )
    },
    "critique: number 0 .* image 1: ": {"critique": _critique(lambda found: replace(found, parts=found.parts[1:]))},
    "questions: 4 for 5 of the kind 'count'": {
        "questions": lambda self, kind, count, seed: ShapesTask.questions(self, kind, count - 1, seed)
    },
    "questions: '.* =' of the kind 'count': want one image": {
        "questions": lambda self, kind, count, seed: [
            replace(one, media=()) for one in ShapesTask.questions(self, kind, count, seed)
        ]
    },
    "evaluations: .* has no 'score'": {"evaluations": lambda self: [type("Own", (), {"name": "own"})()]},
}


@pytest.mark.parametrize("words", TASKS)
def test_a_fault_of_a_task_is_named(words):
    with pytest.raises(AssertionError, match=f"task 'mine': {words}"):
        check_task(_shapes(**TASKS[words]), [get_format("strokes")], demonstrations=4)


# ---- detectors ----


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [
        np.kron(rng.integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        for h, w in ((64, 64), (40, 72), (64, 64))
    ]


def test_the_shapes_detector_keeps_the_contract():
    shown = get_task("shapes").demonstrations("strokes", 6, 0)
    check_detector(shapes_detector(), [part.image for one in shown for part in one.parts if part.image is not None])


PHRASES = [["dog", "cup"], ["bus"], ["red car", "dog"]]


@pytest.mark.parametrize("backend", ["mask2former", "grounding_dino", "owlv2"])
def test_detectors_for_photographs_keep_the_contract(backend, pictures, tmp_path):
    path = getattr(tiny_models, backend)(tmp_path / backend)
    config = {"backend": backend, "path": str(path), "min_score": 0.0, "colors": None}
    check_detector(build_detector(DetectorConfig(**config)), pictures, None if backend == "mask2former" else PHRASES)


def test_colors_that_are_named_afterwards_keep_the_contract(pictures, tmp_path):
    namer = ColorNamer(OpenClipConfig(path=str(tiny_models.open_clip_model(tmp_path / "clip"))))
    check_detector(Colored(TaskDetector(_two_circles()), namer), pictures)


def _two_circles():
    found = [replace(SEEN, color=None, score=0.9), replace(SEEN, color=None)]
    return _shapes(detect=lambda self, image: found)


class Mine:
    """Sees a dog and two cups; a fault is put in by name."""

    classes = ("dog", "cup")

    def __init__(self, **faults):
        self.faults, self.looks = faults, 0

    def detect(self, images):
        self.looks += 1
        dog = Detection((0, 0, 4, 4), 0.9, self.faults.get("color"))
        cups = [Detection((0, 0, 8, 8), 0.8), Detection((4, 4, 8, 8), 0.2)]
        found = [{self.faults.get("name", "dog"): [dog], "cup": cups[:: self.faults.get("order", 1)]} for _ in images]
        if "write" in self.faults:
            images[0][0] = 1
        if "neighbours" in self.faults:
            found = [{"dog": [replace(dog, score=1 / (1 + len(images)))]} for _ in images]
        if "drift" in self.faults:
            found = [{"dog": [replace(dog, score=1 / (1 + self.looks))]} for _ in images]
        if "box" in self.faults:
            found = [{"dog": [replace(dog, box=(0, 0, 1, 1000))]} for _ in images]
        return found[: self.faults.get("most")]


DETECTORS = [
    ({"name": "cat"}, "detect: image 0: 'cat' is nothing that it was to look for"),
    ({"order": -1}, "detect: image 0, 'cup': the best does not come first"),
    ({"write": True}, "detect: it wrote to an image"),
    ({"most": 1}, "detect: 1 answers for 3 images"),
    ({"neighbours": True}, "detect: image 0, 'dog': an image alone is seen otherwise than among others"),
    ({"drift": True}, "detect: image 0, 'dog': looking twice gives two answers"),
    ({"box": True}, r"detect: image 0, 'dog': a box \(0, 0, 1, 1000\) of an image of 64 x 64 px"),
    ({"color": "mauve"}, "colors: image 0, 'dog': the color 'mauve' is none that it names"),
]


@pytest.mark.parametrize("faults, words", DETECTORS, ids=lambda value: next(iter(value)) if value else "")
def test_a_fault_of_a_detector_is_named(faults, words, pictures):
    check_detector(Mine(), pictures)
    with pytest.raises(AssertionError, match=f"Mine: {words}"):
        check_detector(Mine(**faults), [picture.copy() for picture in pictures])


def test_an_open_vocabulary_must_be_asked_for_something(pictures):
    class Open:
        classes, open_vocabulary = (), True

        def detect_phrases(self, images, phrases):
            return [{"dog": [Detection((0, 0, 1, 1), 0.9)]} for _ in images]

    with pytest.raises(AssertionError, match="Open: phrases: an open vocabulary is asked for some"):
        check_detector(Open(), pictures)
    with pytest.raises(AssertionError, match="Open: detect: image 1: 'dog' is nothing that it was to look for"):
        check_detector(Open(), pictures, PHRASES)
