"""What is asked of a judge and what it says: the plain data between a reward and the judge's client (client.py).

A judge is a model behind an OpenAI-compatible endpoint. Whatever goes wrong with it, the answer is None ("not judged"),
never 0: `Reply.cause` says why, and the client counts by it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

ImageLike = np.ndarray | Image.Image  # uint8 [height, width, 3], or PIL

# Why a question went unjudged. The first five are the endpoint's fault and are tried again; the others are not.
CAUSES: dict[str, str] = {
    "timeout": "no whole reply within the time limit",
    "connection": "the connection was refused or dropped",
    "busy": "429: too many requests",
    "server": "a 5xx status",
    "malformed": "a reply that is no chat completion",
    "refused": "another 4xx status: the request itself is wrong",
    "empty": "a completion without text",
    "cut": "cut at max_tokens before the verdict",
    "no_logprobs": "a reply without the log-probabilities that were asked for",
    "unparsed": "a reply in which no verdict can be read",
}
TRIED_AGAIN = ("timeout", "connection", "busy", "server", "malformed")


@dataclass(frozen=True)
class AnswerCheck:
    """Does this answer say the same as the reference?"""

    question: str
    answer: str  # what the policy answered
    ground_truth: str
    images: tuple[ImageLike, ...] = ()


@dataclass(frozen=True)
class Question:
    """One request. `messages` are OpenAI chat messages, of which a content is a string or a list of
    ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": <image>}``."""

    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int | None = None  # None: the configuration's
    temperature: float | None = None  # None: the configuration's

    @staticmethod
    def of(
        text: str,
        images: Sequence[ImageLike] = (),
        system: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> Question:
        """A user's turn: the images, then the text."""
        content: Any = text
        if len(images):
            content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
        messages: list[Mapping[str, Any]] = [{"role": "system", "content": system}] if system else []
        return Question((*messages, {"role": "user", "content": content}), max_tokens, temperature)


@dataclass(frozen=True)
class Reply:
    """What came back. `text` is None exactly where `cause` is given."""

    text: str | None
    cause: str | None = None  # a key of CAUSES
    error: str | None = None  # the same in a sentence, with what the endpoint said
    first: tuple[tuple[str, float], ...] = ()  # candidates for the first word's token and their log-probs
    attempts: int = 1
    seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True)
class Comparison:
    """Which of two candidates answers the task better? Each is words, images, or both."""

    task: str
    first: str = ""
    second: str = ""
    first_images: tuple[ImageLike, ...] = ()
    second_images: tuple[ImageLike, ...] = ()
    images: tuple[ImageLike, ...] = ()  # that belong to the task


class JudgeLike(Protocol):
    """What rewards use of a judge. client.JudgeClient is one; a test's is another."""

    def ask(self, questions: Sequence[Question]) -> list[Reply]: ...
    def agrees(self, checks: Sequence[AnswerCheck]) -> list[bool | None]: ...
    def yes_probability(self, questions: Sequence[Question]) -> list[float | None]: ...
    def rubric(
        self, questions: Sequence[Question], criteria: Sequence[str], top: int = 2
    ) -> list[dict[str, int] | None]: ...
    def checklist(
        self, questions: Sequence[Question], items: Sequence[Sequence[str]]
    ) -> list[list[bool | None] | None]: ...
    def compare(self, comparisons: Sequence[Comparison]) -> list[float | None]: ...


class StandIn:
    """A judge without an endpoint, for trying a reward out: its verdicts are made up from the words that it is asked,
    the same for the same words, and a third of the questions goes unjudged."""

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        return [
            Reply(None, "timeout", "a stand-in's timeout") if lot is None else Reply("yes" if lot % 2 else "no")
            for lot in map(_lot, questions)
        ]

    def agrees(self, checks: Sequence[AnswerCheck]) -> list[bool | None]:
        return [None if lot is None else bool(lot % 2) for lot in map(_lot, checks)]

    def yes_probability(self, questions: Sequence[Question]) -> list[float | None]:
        return [None if lot is None else lot % 101 / 100 for lot in map(_lot, questions)]

    def rubric(
        self, questions: Sequence[Question], criteria: Sequence[str], top: int = 2
    ) -> list[dict[str, int] | None]:
        return [
            None if lot is None else {name: (lot + at) % (top + 1) for at, name in enumerate(criteria)}
            for lot in map(_lot, questions)
        ]

    def checklist(
        self, questions: Sequence[Question], items: Sequence[Sequence[str]]
    ) -> list[list[bool | None] | None]:
        return [
            None if lot is None else [bool((lot + at) % 2) for at, _ in enumerate(statements)]
            for lot, statements in zip(map(_lot, questions), items, strict=True)
        ]

    def compare(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        return [None if lot is None else lot % 3 / 2 for lot in map(_lot, comparisons)]


def _lot(asked: Any) -> int | None:
    """A number drawn by what is asked, images counting by their sizes; None: it goes unjudged."""
    number = zlib.crc32(_words_of(asked).encode("utf-8", "replace"))
    return number // 3 if number % 3 else None


def _words_of(asked: Any) -> str:
    if isinstance(asked, np.ndarray):
        return str(asked.shape)
    if isinstance(asked, Image.Image):
        return str(asked.size)
    if isinstance(asked, Mapping):
        return " ".join(_words_of(value) for value in asked.values())
    if isinstance(asked, list | tuple):
        return " ".join(map(_words_of, asked))
    if hasattr(asked, "__dataclass_fields__"):
        return _words_of(vars(asked))
    return str(asked)
