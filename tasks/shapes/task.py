"""The shapes world as a Task: this is the file that the registry builds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, ValidationError

from formats.base import Part
from runtime.errors import UserError, nearest
from runtime.section import Section
from tasks.base import Critique, Demonstration, Detection, Record, Split, VerdictSpan
from tasks.shapes import critic, demonstrations, detector, language, prompts, questions
from tasks.shapes.language import Claim, Clause, Mistake
from tasks.shapes.world import CANVAS, SHAPES


class ShapesOptions(Section):
    mistake_rate: float = Field(0.5, ge=0, le=1, description="share of demonstrations with a mistake to be repaired")


class ShapesTask:
    """Colored shapes on a canvas of 32 x 32 px. Options: see ShapesOptions."""

    name = "shapes"
    classes = SHAPES
    image_size = CANVAS  # px, both sides
    question_kinds = tuple(questions.KINDS)

    def __init__(self, **options: object) -> None:
        try:
            self.options = ShapesOptions.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            known = ShapesOptions.model_fields
            hint = nearest(key, known) if key not in known else f"it is {first['input']!r}"
            raise UserError(f"task.options.{key}: {first['msg']}; {hint}") from error
        self.words = sorted(prompts.prompt_words() | language.vocabulary())

    def prompts(self, split: Split) -> list[Record]:
        if split not in ("train", "heldout"):
            raise UserError(f"task 'shapes' has no split '{split}'; {nearest(split, ('train', 'heldout'))}")
        return prompts.prompts(split)

    def demonstrations(self, format: str, count: int, seed: int) -> list[Demonstration]:
        return demonstrations.demonstrations(format, count, seed, self.options.mistake_rate)

    def detect(self, image: np.ndarray) -> list[Detection]:
        return detector.detect(image)

    # What the warm start's perception rows, critiques and corrupted images ask (docs/perception.md).

    def questions(self, kind: str, count: int, seed: int) -> list[Demonstration]:
        return questions.questions(kind, count, seed)

    def critique(self, format: str, record: Record, before: Sequence[Part], images: int, seed: int) -> Critique | None:
        image = before[-1].image
        assert image is not None
        return critic.critique(format, record, before, detector.detect(image), images, seed)

    # What rewards/functions/critique_consistency.py asks of a task whose inspections can be read.

    def claims(self, text: str) -> Claim:
        return language.claims(text)

    def verdict(self, text: str) -> VerdictSpan | None:
        return language.verdict(text)

    def requirement(self, record: Record, plan_text: str) -> Record:
        return language.requirement(record, plan_text)

    def holds(self, mistake: Mistake, record: Record, detections: list[Detection]) -> bool:
        return language.holds(mistake, record, detections)

    def seen_in(self, detections: list[Detection]) -> list[Clause]:
        return language.seen_in(detections)
