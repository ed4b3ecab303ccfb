"""The shapes world as a Task: this is the file that the registry builds.

At the level easy it is made of world.py, prompts.py, language.py and demonstrations.py, at middle and hard of the
grid's files of those names.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from formats.base import Part
from runtime.errors import UserError, nearest
from runtime.section import Section
from tasks.base import Critique, Demonstration, Detection, Record, Split, VerdictSpan
from tasks.shapes import (
    critic,
    demonstrations,
    detector,
    grid_critic,
    grid_demonstrations,
    grid_detector,
    grid_language,
    grid_prompts,
    grid_questions,
    language,
    prompts,
    questions,
)
from tasks.shapes.grid import SIZES
from tasks.shapes.language import Claim, Clause, Mistake
from tasks.shapes.world import CANVAS, SHAPES


class ShapesOptions(Section):
    level: Literal["easy", "middle", "hard"] = Field(
        "easy",
        description="easy: GenEval's six tags, up to 4 objects. middle: 3 to 5 objects, two sizes, relations of three. "
        "hard: 6 to 8 objects",
    )
    mistake_rate: float = Field(0.5, ge=0, le=1, description="share of demonstrations with a mistake to be repaired")


class ShapesTask:
    """Colored shapes on a canvas of 32 x 32 px. Options: see ShapesOptions.

    Attributes:
        sizes: the names of sizes that `detect` tells apart; empty at the level easy, where all objects are alike.
    """

    name = "shapes"
    classes = SHAPES
    image_size = CANVAS  # px, both sides

    def __init__(self, **options: object) -> None:
        try:
            self.options = ShapesOptions.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            known = ShapesOptions.model_fields
            hint = nearest(key, known) if key not in known else f"it is {first['input']!r}"
            raise UserError(f"task.options.{key}: {first['msg']}; {hint}") from error
        grid = self.options.level != "easy"
        self.question_kinds = tuple(grid_questions.KINDS if grid else questions.KINDS)
        self.sizes: tuple[str, ...] = tuple(SIZES) if grid else ()
        self._critique = grid_critic.critique if grid else critic.critique
        self._detect = grid_detector.detect if grid else detector.detect
        self.words = sorted(grid_language.vocabulary() if grid else prompts.prompt_words() | language.vocabulary())

    @property
    def _language(self) -> ModuleType:  # no attribute: the task travels to other processes, and modules do not
        return language if self.options.level == "easy" else grid_language

    def prompts(self, split: Split) -> list[Record]:
        if split not in ("train", "heldout"):
            raise UserError(f"task 'shapes' has no split '{split}'; {nearest(split, ('train', 'heldout'))}")
        level = self.options.level
        return prompts.prompts(split) if level == "easy" else grid_prompts.prompts(level, split)

    def demonstrations(self, format: str, count: int, seed: int) -> list[Demonstration]:
        level, rate = self.options.level, self.options.mistake_rate
        if level == "easy":
            return demonstrations.demonstrations(format, count, seed, rate)
        return grid_demonstrations.demonstrations(level, format, count, seed, rate)

    def detect(self, image: np.ndarray) -> list[Detection]:
        return self._detect(image)

    # What the warm start's perception rows, critiques and corrupted images ask (docs/perception.md).

    def questions(self, kind: str, count: int, seed: int) -> list[Demonstration]:
        level = self.options.level
        if level == "easy":
            return questions.questions(kind, count, seed)
        return grid_questions.questions(level, kind, count, seed)

    def critique(self, format: str, record: Record, before: Sequence[Part], images: int, seed: int) -> Critique | None:
        image = before[-1].image
        assert image is not None
        return self._critique(format, record, before, self._detect(image), images, seed)

    # What rewards/functions/critique_consistency.py asks of a task whose inspections can be read.

    def claims(self, text: str) -> Claim:
        return self._language.claims(text)

    def verdict(self, text: str) -> VerdictSpan | None:
        return language.verdict(text, self._language.claims)

    def requirement(self, record: Record, plan_text: str) -> Record:
        return self._language.requirement(record, plan_text)

    def holds(self, mistake: Mistake, record: Record, detections: list[Detection]) -> bool:
        return self._language.holds(mistake, record, detections)

    def seen_in(self, detections: list[Detection]) -> list[Clause]:
        return self._language.seen_in(detections)
