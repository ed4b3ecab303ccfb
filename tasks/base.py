"""What a task offers: prompts, demonstrations, and ground truth. sft/, rl/ and rewards/ ask only this.

Imports the record and nothing that holds weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from formats.base import Part
from record.trajectory import Media, Trajectory

Split = Literal["train", "heldout"]
# GenEval's schema: tag, prompt, include, exclude; JSON values. `media` names what the prompt shows (media.py)
Record = dict[str, Any]


@dataclass(frozen=True)
class Demonstration:
    """One thought that somebody wrote: formats/render.py makes a Trajectory of it."""

    prompt: str
    record: Record
    parts: tuple[Part, ...]
    mistakes: tuple[int, ...] = ()  # indices in `parts` of images that are wrong on purpose: a loss may skip them
    needless: tuple[int, ...] = ()  # of texts that go on where the thought could have ended: seen, never imitated
    media: tuple[Media, ...] = ()  # what the prompt shows


@dataclass(frozen=True)
class Critique:
    """What is true of an image, and how a thought goes on after it."""

    fine: bool  # whether the image is what it had to be
    parts: tuple[Part, ...]  # after the image, in the roles of the format; the first one says the verdict
    mistakes: tuple[int, ...] = ()  # indices in `parts` of images that are still wrong
    ends: bool = True  # the thought may end after them; False: more would have to follow, which is not written


@dataclass(frozen=True, eq=False)
class Detection:
    """One object that a detector sees in an image."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in px, half-open
    score: float  # in [0, 1]
    color: str | None = None  # None: the detector does not judge colors, or was not asked to
    mask: np.ndarray | None = None  # bool [height, width]; None: the detector draws boxes only
    cls: str = ""  # its class, where it does not stand in a mapping by class
    size: str | None = None  # by name; None: the detector does not tell sizes


@dataclass(frozen=True)
class VerdictSpan:
    """Where a text that inspects an image gives its verdict."""

    says: Literal["fine", "wrong"]
    start: int  # characters of the text, half-open: the verdict's word
    stop: int
    otherwise: str  # the word that says the other


class Evaluation(Protocol):
    """How held-out thoughts are scored. `geneval` and `reward` are the toolkit's (evals/measures.py)."""

    @property
    def name(self) -> str: ...

    @property
    def score(self) -> str:
        """The measure that stands for the whole."""
        ...

    def check(self, records: Sequence[Record]) -> None:
        """Raises UserError for a prompt that cannot be scored, before anything is sampled."""
        ...

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float | None]]:
        """A value for each trajectory by measure; None: it could not be judged.

        What it leaves in a trajectory's `rewards` is shown in reports.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """A task that can be seen offers two members more: `classes` and `detect` (see SeenTask).

    A task with measures of its own offers `evaluations()`: a sequence of Evaluations, or of the names of the toolkit's,
    the first of which gives the score. Without it, prompts with GenEval's ground truth are scored by GenEval's rule
    where something can detect, all others by the recipe's reward.

    A task whose inspections can be read offers `claims`, `requirement`, `holds` and `seen_in`
    (rewards/functions/critique_consistency.py), and `verdict(text) -> VerdictSpan | None`, by which evaluations tell
    how well critiques are calibrated (evals/critiques.py); None: no verdict, or both at once.
    """

    name: str
    # What a small tokenizer must know: every word of its prompts and demonstrations, but tags, and what calls of a tool
    # say (the tool's own `words`).
    words: list[str]

    def prompts(self, split: Split) -> Sequence[Record]:
        """Records of one split, always the same ones in the same order."""
        ...

    def demonstrations(self, format: str, count: int, seed: int) -> list[Demonstration]:
        """`count` thoughts in a named format over train prompts; a function of the seed.

        Raises:
            UserError: the task has no demonstrations in that format.
        """
        ...


@runtime_checkable
class SeenTask(Task, Protocol):
    """A task with a detector of its own."""

    classes: tuple[str, ...]  # what `detect` can see

    def detect(self, image: np.ndarray) -> list[Detection]:
        """Objects in an image, uint8 [height, width, 3], best score first."""
        ...


@runtime_checkable
class CriticTask(Task, Protocol):
    """A task that can say what is true of an image that it has not drawn itself."""

    def critique(self, format: str, record: Record, before: Sequence[Part], images: int, seed: int) -> Critique | None:
        """The true words on the last image of a thought, and the repair if it is wrong; a function of the arguments.

        Args:
            before: what was thought so far, without the prompt; the last part is the image.
            images: how many may still be drawn.

        Returns:
            None where the format's words cannot say what is wrong with the image.

        Raises:
            UserError: it writes no critiques in that format.
        """
        ...


@runtime_checkable
class QuestionTask(Task, Protocol):
    """A task that asks about images: each question is a Demonstration in the format `questions`."""

    question_kinds: tuple[str, ...]

    def questions(self, kind: str, count: int, seed: int) -> list[Demonstration]:
        """`count` questions of one kind; a function of the arguments. `media` is the image, the only part the answer.

        Raises:
            UserError: there is no such kind.
        """
        ...
