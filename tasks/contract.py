"""What a task must keep, whoever wrote it. Run it on your own: `check_task(my_task, formats=[my_format])`.

A failure is an AssertionError whose first words are the task and the promise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from formats.base import Format, Part
from record.trajectory import Author, Modality, Segment, StopReason, Trajectory
from runtime.errors import UserError
from tasks.base import Demonstration, Detection, Record, Split, Task
from tasks.media import media_of

SPLITS: tuple[Split, ...] = ("train", "heldout")
SHOWN = 5  # prompts of each split whose media are read


def check_task(
    task: Task, formats: Sequence[Format] = (), *, words: Sequence[str] = (), demonstrations: int = 8, seed: int = 0
) -> None:
    """Check a task's prompts, its demonstrations in some formats, and what it detects in their images.

    Args:
        formats: those in which it has demonstrations; none: they are not checked.
        words: that demonstrations use beside the task's own (those of a tool that they call).
        demonstrations: how many are asked for in each format.

    Raises:
        AssertionError: a promise is broken; the message names the task and the promise.
    """
    check = _Check(task, words)
    check.members()
    records = {split: check.prompts(split) for split in SPLITS}
    check.splits(records["train"], records["heldout"])
    images: list[np.ndarray] = []
    for fmt in formats:
        images += check.demonstrations(fmt, demonstrations, seed, records)
    if hasattr(task, "detect"):
        check.detections(images or [np.full((32, 32, 3), 128, np.uint8)])
    check.questions(seed)
    check.evaluations()


class _Check:
    def __init__(self, task: Any, words: Sequence[str] = ()) -> None:
        self.task, self.besides = task, words
        self.name = str(getattr(task, "name", type(task).__name__))

    def require(self, holds: bool, promise: str, sentence: str) -> None:
        assert holds, f"task '{self.name}': {promise}: {sentence}"

    def members(self) -> None:
        for member in ("name", "words", "prompts", "demonstrations"):
            self.require(hasattr(self.task, member), member, "missing; tasks/base.py says what a task offers")
        self.require(isinstance(self.task.name, str) and bool(self.task.name), "name", "it is a text")
        for word in self.task.words:
            whole = isinstance(word, str) and bool(word) and word.split() == [word]
            self.require(whole, "words", f"{word!r} is no single word")

    # ---- prompts ----

    def prompts(self, split: Split) -> Sequence[Record]:
        records = self.task.prompts(split)
        for number, record in enumerate(records):
            where = f"prompt {number} of {split}"
            self.require(isinstance(record, dict), "prompts", f"{where} is {type(record).__name__}, not a record")
            self.require(isinstance(record.get("prompt"), str), "prompts", f"{where} has no text in 'prompt'")
            try:
                kept = json.loads(json.dumps(record, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise AssertionError(
                    f"task '{self.name}': prompts: {where} is not made of JSON values ({error})"
                ) from None
            self.require(
                kept == record, "prompts", f"{where} comes back otherwise from JSON: {_difference(record, kept)}"
            )
            asks = bool(record["prompt"].strip()) or bool(record.get("media"))
            self.require(asks, "prompts", f"{where} is empty, and shows nothing")
            unknown = self._unknown(record["prompt"])
            self.require(not unknown, "words", f"{where} says '{unknown}', which is none of them")
        for number, record in enumerate(records[:SHOWN]):
            try:
                media_of(record)
            except UserError as error:
                raise AssertionError(f"task '{self.name}': media: prompt {number} of {split}: {error}") from None
        again = self.task.prompts(split)
        same = len(again) == len(records) and all(a == b for a, b in zip(records, again, strict=True))
        self.require(same, "prompts", f"asked twice, {split} is not the same prompts in the same order")
        return records

    def _unknown(self, text: str, besides: Sequence[str] = ()) -> str:
        """A word that a tokenizer of `words` would not know, tags excluded."""
        known = {*self.task.words, *besides}
        for word in re.sub(r"</?\w+>", " ", text).split():
            if word not in known:
                for part in re.findall(r"\w+|[^\w\s]", word):
                    if part not in known:
                        return part
        return ""

    def splits(self, train: Sequence[Record], heldout: Sequence[Record]) -> None:
        self.require(bool(train), "prompts", "there is nothing to train on")
        known = {json.dumps(record, sort_keys=True) for record in train}
        leaked = [record["prompt"] for record in heldout if json.dumps(record, sort_keys=True) in known]
        self.require(not leaked, "prompts", f"'{(leaked or [''])[0]}' is held out and trained on")
        try:
            self.task.prompts("neither")
        except UserError:
            return
        self.require(False, "prompts", "a split that is none is a UserError, which names those there are")

    # ---- demonstrations ----

    def demonstrations(
        self, fmt: Format, count: int, seed: int, records: dict[Split, Sequence[Record]]
    ) -> list[np.ndarray]:
        """Their images."""
        found = self.task.demonstrations(fmt.name, count, seed)
        where = f"in the format '{fmt.name}'"
        self.require(len(found) == count, "demonstrations", f"{where}: {len(found)} for {count}")
        again = self.task.demonstrations(fmt.name, count, seed)
        same = all(_content(a) == _content(b) for a, b in zip(found, again, strict=True))
        self.require(same, "demonstrations", f"{where}: asked twice with one seed they are not the same")
        heldout = {record["prompt"] for record in records["heldout"]} - {r["prompt"] for r in records["train"]}
        for number, one in enumerate(found):
            self._demonstration(fmt, f"number {number} {where}", one, heldout)
            if hasattr(self.task, "critique"):
                self._critiques(fmt, f"number {number} {where}", one, seed)
        try:
            self.task.demonstrations("no such format", 1, seed)
        except UserError:
            return [part.image for one in found for part in one.parts if part.image is not None]
        self.require(False, "demonstrations", "a format that it has none in is a UserError")
        return []

    def _demonstration(self, fmt: Format, where: str, one: Demonstration, heldout: set[str]) -> None:
        self.require(one.prompt not in heldout, "demonstrations", f"{where}: its prompt is held out: '{one.prompt}'")
        segments = [Segment("prompt", Author.USER, Modality.TEXT, False, text=one.prompt)]
        for part in one.parts:
            image = part.image is not None
            unknown = "" if image else self._unknown(part.text, self.besides)
            self.require(not unknown, "words", f"{where} says '{unknown}', which is none of them")
            segments.append(
                Segment(
                    part.role,
                    fmt.author(part.role),
                    Modality.IMAGE if image else Modality.TEXT,
                    fmt.trained(part.role),
                    text=part.text,
                    image=part.image,
                )
            )
        trajectory = Trajectory(one.prompt, one.record, fmt.name, segments, stop=StopReason.DEMONSTRATION)
        wrong = fmt.violations(trajectory)
        self.require(not wrong, "demonstrations", f"{where} is no sentence of it: {wrong[0].message if wrong else ''}")
        for index in one.mistakes:
            image = 0 <= index < len(one.parts) and one.parts[index].image is not None
            self.require(image, "demonstrations", f"{where}: mistakes name part {index}, which is no image of it")
        for index in one.needless:
            text = 0 <= index < len(one.parts) and one.parts[index].image is None
            self.require(text, "demonstrations", f"{where}: needless names part {index}, which is no text of it")

    # ---- what is true of an image ----

    def _critiques(self, fmt: Format, where: str, one: Demonstration, seed: int) -> None:
        """What it says of the demonstration's own images, in a format in which it says anything."""
        drawn = 0
        for index, part in enumerate(one.parts[:-1]):
            if part.image is None or fmt.author(part.role) is not Author.POLICY:
                continue
            drawn += 1
            if one.parts[index + 1].image is not None:  # nobody speaks of it
                continue
            before, images = one.parts[: index + 1], max(fmt.max_images - drawn, 0)
            try:
                found = self.task.critique(fmt.name, one.record, before, images, seed)
                again = self.task.critique(fmt.name, one.record, before, images, seed)
            except UserError:
                return
            if found is None:
                continue
            at = f"{where}, image {index}"
            told = "right" if found.fine else "wrong"
            wrong_one = self._called_wrong(one, index)
            self.require(found.fine != wrong_one, "critique", f"{at}: it is called {told}, and is not")
            same = again is not None and _texts(again.parts) == _texts(found.parts)
            self.require(same, "critique", f"{at}: asked twice with one seed it is not the same")
            segments = [Segment("prompt", Author.USER, Modality.TEXT, False, text=one.prompt)]
            segments += [
                Segment(
                    part.role,
                    fmt.author(part.role),
                    Modality.TEXT if part.image is None else Modality.IMAGE,
                    fmt.trained(part.role),
                    text=part.text,
                    image=part.image,
                )
                for part in (*before, *found.parts)
            ]
            for said in found.parts:
                unknown = self._unknown(said.text, self.besides)
                self.require(not unknown, "words", f"{at}: its critique says '{unknown}', which is none of them")
            # One that is cut off has one violation, which says so.
            stop = StopReason.DEMONSTRATION if found.ends else StopReason.MAX_IMAGES
            trajectory = Trajectory(one.prompt, one.record, fmt.name, segments, stop=stop)
            wrong = fmt.violations(trajectory)[: None if found.ends else -1]
            self.require(not wrong, "critique", f"{at}: {wrong[0].message if wrong else ''}")

    def _called_wrong(self, one: Demonstration, index: int) -> bool:
        """What a demonstration's own words say of its image; without any that can be read, whether it is a mistake.

        An image that is not a mistake may still lack what the next one adds.
        """
        read = getattr(self.task, "verdict", None)
        span = read(one.parts[index + 1].text) if read is not None else None
        return index in one.mistakes if span is None else bool(span.says == "wrong")

    def questions(self, seed: int) -> None:
        for kind in getattr(self.task, "question_kinds", ()):
            found, again = (self.task.questions(kind, SHOWN, seed) for _ in range(2))
            where = f"of the kind '{kind}'"
            self.require(len(found) == SHOWN, "questions", f"{len(found)} for {SHOWN} {where}")
            same = all(_content(a) == _content(b) for a, b in zip(found, again, strict=True))
            self.require(same, "questions", f"asked twice with one seed, those {where} are not the same")
            for one in found:
                shape = len(one.media), [part.role for part in one.parts]
                self.require(
                    shape == (1, ["answer"]),
                    "questions",
                    f"'{one.prompt}' {where}: want one image in `media` and one part in the role 'answer'",
                )
                for text in (one.prompt, one.parts[0].text):
                    unknown = self._unknown(text)
                    self.require(not unknown, "words", f"a question {where} says '{unknown}', which is none of them")

    # ---- what it sees, and how it scores ----

    def detections(self, images: Sequence[np.ndarray]) -> None:
        classes = tuple(getattr(self.task, "classes", None) or ())
        named = bool(classes) and all(isinstance(name, str) for name in classes)
        self.require(named, "classes", "what `detect` can see, as texts")
        for number, image in enumerate(images):
            before = image.copy()
            found = self.task.detect(image)
            self.require(np.array_equal(image, before), "detect", f"image {number} was written to")
            for item in found:
                self.require(isinstance(item, Detection), "detect", f"image {number}: {item!r} is no Detection")
                fault = detection_fault(item, image)
                self.require(not fault, "detect", f"image {number}: {fault}")
                self.require(item.cls in classes, "detect", f"image {number}: '{item.cls}' is none of its classes")
            scores = [item.score for item in found]
            self.require(
                scores == sorted(scores, reverse=True), "detect", f"image {number}: the best does not come first"
            )

    def evaluations(self) -> None:
        if not hasattr(self.task, "evaluations"):
            return
        for one in self.task.evaluations():
            if isinstance(one, str):
                continue
            for member in ("name", "score", "check"):
                self.require(hasattr(one, member), "evaluations", f"{one!r} has no '{member}'")
            self.require(callable(one), "evaluations", f"'{one.name}' cannot be called with trajectories")


def detection_fault(item: Detection, image: np.ndarray) -> str:
    """What is wrong with an object that is seen in an image; empty: nothing."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = item.box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):  # empty where what it holds was cut off at an edge
        return f"a box {tuple(item.box)} of an image of {width} x {height} px; x0, y0, x1, y1 in px, half-open"
    if not 0 <= item.score <= 1:
        return f"a score of {item.score}; it lies between 0 and 1"
    if item.color is not None and not isinstance(item.color, str):
        return f"the color {item.color!r}; it is a text, or None"
    if item.mask is not None and (item.mask.dtype != bool or item.mask.shape != (height, width)):
        return f"a mask of {item.mask.dtype} {list(item.mask.shape)}; it is bool [{height}, {width}], or None"
    return ""


def _texts(parts: Sequence[Part]) -> list[Any]:
    return [(part.role, part.text, None if part.image is None else part.image.tobytes()) for part in parts]


def _content(one: Demonstration) -> Any:
    return one.prompt, one.record, _texts(one.parts), one.mistakes, one.needless


def _difference(record: Record, kept: Record) -> str:
    for name in record:
        if name not in kept or kept[name] != record[name]:
            return f"{name!r} is {record[name]!r}"
    return "its keys are no texts"
