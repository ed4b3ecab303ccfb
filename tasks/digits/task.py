"""The digits world as a Task: this is the file that the registry builds."""

from __future__ import annotations

import numpy as np
from pydantic import Field, ValidationError

from runtime.errors import UserError, nearest
from runtime.section import Section
from tasks.base import Demonstration, Detection, Record, Split, VerdictSpan
from tasks.digits import demonstrations, detector, prompts
from tasks.digits.scans import DIGITS
from tasks.digits.world import COLORS
from tasks.shapes import language
from tasks.shapes.language import Claim, Clause, Mistake
from tasks.shapes.world import CANVAS


class DigitsOptions(Section):
    mistake_rate: float = Field(0.5, ge=0, le=1, description="share of demonstrations with a mistake to be repaired")


class DigitsTask:
    """Scans of handwritten digits on a canvas of 32 x 32 px. Options: see DigitsOptions."""

    name = "digits"
    classes = DIGITS
    colors = tuple(COLORS)
    image_size = CANVAS  # px, both sides

    def __init__(self, **options: object) -> None:
        try:
            self.options = DigitsOptions.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            known = DigitsOptions.model_fields
            hint = nearest(key, known) if key not in known else f"it is {first['input']!r}"
            raise UserError(f"task.options.{key}: {first['msg']}; {hint}") from error
        self.words = sorted(prompts.prompt_words() | language.vocabulary(DIGITS, tuple(COLORS)))

    def prompts(self, split: Split) -> list[Record]:
        if split not in ("train", "heldout"):
            raise UserError(f"task 'digits' has no split '{split}'; {nearest(split, ('train', 'heldout'))}")
        return prompts.prompts(split)

    def demonstrations(self, format: str, count: int, seed: int) -> list[Demonstration]:
        return demonstrations.demonstrations(format, count, seed, self.options.mistake_rate)

    def detect(self, image: np.ndarray) -> list[Detection]:
        """The exact detector's: see tasks/digits/detector.py."""
        return detector.detect(image)

    # What rewards/functions/critique_consistency.py asks of a task whose inspections can be read.

    def claims(self, text: str) -> Claim:
        return language.claims(text, DIGITS)

    def verdict(self, text: str) -> VerdictSpan | None:
        return language.verdict(text, self.claims)

    def requirement(self, record: Record, plan_text: str) -> Record:
        return language.requirement(record, plan_text, DIGITS)

    def holds(self, mistake: Mistake, record: Record, detections: list[Detection]) -> bool:
        return language.holds(mistake, record, detections)

    def seen_in(self, detections: list[Detection]) -> list[Clause]:
        return language.seen_in(detections)
