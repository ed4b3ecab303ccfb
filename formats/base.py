"""What a way of thinking must offer: the engine, the parser, the loss and the report ask only this.

A Format is declared once and used five times: to render demonstrations, to constrain decoding, to parse
and check, to mask the loss, and to lay out the report. This file imports none of our packages but the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from record.trajectory import Author, Guidance, Modality, Trajectory


@dataclass(frozen=True, eq=False)
class Codes:
    """Images are drawn as visual codes: `count` of `ids`, between markers or without.

    Without an opening marker an image begins where the format has it begin, and no word can stand in its place.
    """

    ids: np.ndarray  # int32 [K]: id of visual code k
    count: int
    open: int | None = None  # id of the marker that begins an image; it is sampled like a word
    close: int | None = None  # id of the marker that ends one; it is forced


@dataclass(frozen=True)
class Latent:
    """Images are denoised as latents: no ids but their markers."""

    open: int | None = None
    close: int | None = None


@dataclass(frozen=True)
class SeenOnly:
    """Images are seen and never drawn."""


Imaging = Codes | Latent | SeenOnly


class Vocabulary(Protocol):
    """A policy's ids. `piece` is the text of one id alone: concatenated pieces contain every tag verbatim."""

    size: int
    pad: int

    @property
    def bos(self) -> int | None: ...

    @property
    def eos(self) -> int | None:
        """Ends the policy's turn. None: a family without words, whose turns end by the format."""
        ...

    @property
    def sep(self) -> int | None:
        """Anole's end-of-turn token after the prompt; None where the family has none."""
        ...

    @property
    def imaging(self) -> Imaging:
        """How the family makes an image."""
        ...

    @property
    def never(self) -> np.ndarray:
        """Ids that may never be sampled, int32: placeholders of seen images, ids without a meaning."""
        ...

    def encode(self, text: str) -> list[int]:
        """Raises UserError for words that no ids can say, and for text that spells a marker."""
        ...

    def decode(self, ids: list[int] | np.ndarray) -> str: ...
    def piece(self, id: int) -> str: ...


@dataclass(frozen=True, eq=False)
class AllowedSet:
    """Ids that may come next. Interned by the cursor's grammar: the engine keeps one mask per object."""

    name: str
    ranges: np.ndarray  # int32 [R, 2]


@dataclass
class Span:
    """A stretch of the policy's ids that the cursor recognised as one segment (half-open, from the turn's start)."""

    role: str  # of an image it may change while the turn goes on: what follows may tell which image it was
    modality: Modality
    start: int
    stop: int


@dataclass(frozen=True)
class Violation:
    """Where a trajectory departs from its format, and what would be right."""

    segment: int | None  # index into Trajectory.segments; None: the trajectory as a whole
    message: str  # names the role or tag, and what would be right


@dataclass(frozen=True)
class Part:
    """One segment of a demonstration before it has ids: text with its tags, or an image.

    `author`: read where the role is not known yet (formats/render.py: render_parts); else the role says it.
    """

    role: str
    text: str = ""
    image: np.ndarray | None = None
    author: Author = Author.POLICY


class Cursor(Protocol):
    """One row's position in the grammar. It is told every id and says what may come next.

    The engine asks `forced` first: an id there is appended without being a decision. Otherwise it samples from
    `allowed` at the temperature of `role`. `spans` grows as segments close; `open_span` is the one being written.

    Where `awaits` is true the environment must speak before anything else: the engine asks it, and tells the cursor by
    `observe`. In a format without environment it is never true.
    """

    def forced(self) -> int | None: ...
    def allowed(self) -> AllowedSet: ...
    def advance(self, id: int) -> None: ...

    @property
    def role(self) -> str: ...  # by whose parameters the next id is sampled: a role's name, or "between"
    @property
    def in_image(self) -> bool: ...  # the next id is a code or the forced closing marker, or a latent is denoised
    @property
    def stopped(self) -> bool: ...  # the end-of-turn token was taken, or nothing may follow
    @property
    def images(self) -> int: ...  # images begun so far
    @property
    def spans(self) -> list[Span]: ...  # closed segments; the last one is closed by stop()
    def stop(self) -> None: ...  # closes the open span, wherever it is
    def end_image(self) -> None: ...  # a latent without a closing marker is done

    @property
    def awaits(self) -> bool: ...
    def observe(self, role: str) -> None: ...  # the environment has spoken; `role` is that of its last segment


@dataclass(frozen=True)
class PieceSpec:
    """A segment that a later one sees."""

    segment: int  # index into Trajectory.segments
    keep: tuple[int, int] | None = None  # half-open range of its ids or frames; None: all of it
    form: str | None = None  # None: every form in which the family shows it again


@dataclass(frozen=True)
class ContextSpec:
    """What a segment is conditioned on under one guidance branch, in order. The family gives slots and positions."""

    branch: str
    pieces: tuple[PieceSpec, ...]


def whole_history(segment: int) -> ContextSpec:
    """The plain causal context: every earlier segment, whole."""
    return ContextSpec("full", tuple(PieceSpec(index) for index in range(segment)))


@runtime_checkable
class Format(Protocol):
    """Besides what is listed here a format may offer

    prompt(prompt, media, vocabulary) -> list[Segment]: what the user says and shows, as untrained segments; those that
        hold media have no ids yet, which the family gives (Policy.perceive). Without it the prompt is words alone.
    beside_prompt(vocabulary) -> list[Segment]: untrained user segments that stand after the prompt's and that only some
        guidance branches see (a negative prompt).
    roles: the names of its roles, to which a recipe's maps by role are held.
    calls: the roles after which the environment speaks, to which a recipe's tools are held.
    answers(role) -> list[str]: the roles in which the environment may answer one of these.
    """

    name: str
    max_images: int

    def prompt_ids(self, prompt: str, vocabulary: Vocabulary) -> list[int]:
        """The prompt's words exactly as the policy sees them (BOS, instruction, separator)."""
        ...

    def cursor(self, vocabulary: Vocabulary, constrain: str = "images") -> Cursor:
        """A fresh cursor after the prompt. constrain: "images" (the default) or "full"."""
        ...

    def author(self, role: str) -> Author: ...
    def trained(self, role: str) -> bool: ...

    def contexts(self, trajectory: Trajectory, segment: int) -> tuple[ContextSpec, ...]:
        """What segment `segment` is conditioned on: "full" first, then guidance branches. Pure."""
        ...

    def guidance(self, trajectory: Trajectory, segment: int) -> Guidance | None:
        """How this segment's branches combine when guidance is on."""
        ...

    def violations(self, trajectory: Trajectory) -> list[Violation]:
        """Empty if and only if the trajectory is a well-formed sentence of this format."""
        ...
