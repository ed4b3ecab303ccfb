"""A Grammar and a recipe's options, as the Format that engine, parser, loss and report ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formats.base import Codes, ContextSpec, PieceSpec, Span, Violation, Vocabulary
from formats.check import bodies, violations
from formats.constrained import Automaton, FullCursor
from formats.cursor import ImagesCursor
from formats.grammar import END, NEGATIVE, OTHER, PROMPT, Grammar, Role, RoleDisplay
from formats.lexicon import Lexicon
from formats.segments import frame_of, media_segment, text_segment
from record.trajectory import Author, Guidance, Media, Modality, RecordError, Segment, Trajectory
from runtime.errors import UserError, nearest

CONSTRAINTS = ("images", "full")
# The kinds and scales that Thinking with Generated Images ships (arXiv:2505.22525, section 3 and its released code).
BRANCHES = {
    "normal": ("unconditional", "image"),
    "obj": ("unconditional", "negative"),
    "full": ("unconditional", "image", "negative", "original"),
    "cfg": ("unconditional",),
}
# What another branch is measured from, whatever its own scale: `full` pulls from the image branch to the full one.
SUBTRAHENDS = {"full": ("image",)}
SCALES = {"full": 2.0, "image": 1.2, "negative": 0.0, "original": 5.0}


class DeclaredFormat:
    """formats.base.ThoughtFormat of a declaration.

    Args:
        grammar: roles and their order.
        max_images: at most so many images a turn; None: the declaration's.
        min_images: the policy cannot end its turn before it has drawn so many; None: the declaration's.
        max_tokens: by text role, the longest body under full constraint; one number: of every text role.
        instruction: put before every prompt.
        guidance: the kind of the first image, the second, ...; the last one holds for all further images. Empty: none.
        scales: of the guidance's terms; those left out keep their defaults.
        negative_prompt: what the branch "negative" is conditioned on. It stands in the trajectory as an untrained
            user segment that no other context holds. Empty: there is no such branch, and its scale must be 0.

    Raises:
        UserError: naming the option and what would be right.
    """

    def __init__(
        self,
        grammar: Grammar,
        *,
        max_images: int | None = None,
        min_images: int | None = None,
        max_tokens: Mapping[str, int] | int | None = None,
        instruction: str = "",
        guidance: Sequence[str] | str = (),
        scales: Mapping[str, float] | None = None,
        negative_prompt: str = "",
    ) -> None:
        self.grammar = grammar.with_limits(max_images, max_tokens, min_images)
        self.name = grammar.name
        self.max_images, self.min_images = self.grammar.max_images, self.grammar.min_images
        self.instruction = instruction
        self.guidance_kinds = (guidance,) if isinstance(guidance, str) else tuple(guidance)
        self.scales = {**SCALES, **(scales or {})}
        self.negative_prompt = negative_prompt
        for role in self.grammar.roles:
            if role.author is Author.USER:
                raise UserError(
                    f"format '{self.name}': role '{role.name}' is written by the user, who speaks in the prompt alone"
                )
        for kind in self.guidance_kinds:
            if kind not in BRANCHES:
                raise UserError(f"format '{self.name}': no guidance '{kind}'; {nearest(kind, BRANCHES)}")
        for name in self.scales:
            if name not in SCALES:
                raise UserError(f"format '{self.name}': no guidance scale '{name}'; {nearest(name, SCALES)}")
        if self.scales["negative"] and not negative_prompt:
            raise UserError(
                f"format '{self.name}': scales.negative is {self.scales['negative']} but "
                "negative_prompt is empty; give a prompt or set the scale to 0"
            )
        self._lexicons: dict[int, tuple[Lexicon, Automaton]] = {}

    @property
    def roles(self) -> tuple[str, ...]:
        """The names of its roles, in the order of declaration."""
        return tuple(role.name for role in self.grammar.roles)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lexicons": {}}  # rebuilt by whoever receives it

    def __repr__(self) -> str:
        return f"{self.name}(max_images={self.max_images})"

    def _tables(self, vocabulary: Vocabulary) -> tuple[Lexicon, Automaton]:
        # The lexicon holds the vocabulary, so its id() stays taken for as long as the entry lives.
        if id(vocabulary) not in self._lexicons:
            lexicon = Lexicon(self.grammar, vocabulary)
            self._lexicons[id(vocabulary)] = (lexicon, Automaton(lexicon))
        return self._lexicons[id(vocabulary)]

    # ---- the prompt ----

    def prompt_ids(self, prompt: str, vocabulary: Vocabulary) -> list[int]:
        opening, closing = frame_of(vocabulary)
        return [*opening, *self._words(prompt, vocabulary), *closing]

    def prompt(self, prompt: str, media: Sequence[Media], vocabulary: Vocabulary) -> list[Segment]:
        """What is shown stands before what is said, inside the frame of the user's turn."""
        if not media:
            return [text_segment(PROMPT, self.prompt_ids(prompt, vocabulary), prompt)]
        opening, closing = frame_of(vocabulary)
        said = [*self._words(prompt, vocabulary), *closing]
        framed = [text_segment(PROMPT, opening, "")] if opening else []
        shown = [media_segment(PROMPT, item, Author.USER) for item in media]
        return [*framed, *shown, *([text_segment(PROMPT, said, prompt)] if said else [])]

    def _words(self, prompt: str, vocabulary: Vocabulary) -> list[int]:
        text = f"{self.instruction} {prompt}" if self.instruction else prompt
        return [int(i) for i in vocabulary.encode(text)] if text else []

    def beside_prompt(self, vocabulary: Vocabulary) -> list[Segment]:
        """The negative prompt, for the one guidance branch that sees it; nothing without one."""
        if not self.negative_prompt:
            return []
        ids = np.asarray(self.prompt_ids(self.negative_prompt, vocabulary), np.int32)
        return [Segment(NEGATIVE, Author.USER, Modality.TEXT, False, ids, self.negative_prompt)]

    # ---- decoding and reading ----

    def cursor(self, vocabulary: Vocabulary, constrain: str = "images") -> ImagesCursor:
        if constrain not in CONSTRAINTS:
            raise UserError(f"format.constrain: no '{constrain}'; {nearest(constrain, CONSTRAINTS)}")
        lexicon, automaton = self._tables(vocabulary)
        return FullCursor(automaton) if constrain == "full" else ImagesCursor(lexicon)

    def always_well_formed(self, constrain: str) -> bool:
        """Whether decoding leaves nothing to learn about the form: a reward for it would pay a constant."""
        return constrain == "full"

    def parse(self, ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> list[Span]:
        """The segments in ids that stand after the prompt; spans tile them. What the environment says is left out, and
        the cursor is told of the first role that it may have.

        Raises:
            RecordError: an image that is not exactly its codes between its markers, or ids after the end.
        """
        cursor = self.cursor(vocabulary)
        lexicon, _ = self._tables(vocabulary)
        codes = {int(i) for i in lexicon.code_ids}
        for position, id in enumerate(int(i) for i in ids):
            forced = cursor.forced() if cursor.in_image else None
            if cursor.stopped:
                raise RecordError(f"format '{self.name}': id {id} at position {position} follows the end of the turn")
            if cursor.in_image and (id != forced if forced is not None else id not in codes):
                right = f"the end marker {forced}" if forced is not None else "a visual code"
                raise RecordError(
                    f"format '{self.name}': id {id} at position {position} inside the image of "
                    f"'{cursor.role}'; expected {right}"
                )
            if not cursor.in_image and (id in codes or id == lexicon.close):
                raise RecordError(
                    f"format '{self.name}': id {id} at position {position} belongs inside an image; "
                    f"expected the begin marker {lexicon.open} before it"
                )
            cursor.advance(id)
            if cursor.awaits:
                cursor.observe(self.answers(cursor.spans[-1].role)[0])
        if cursor.in_image and cursor.open_span is not None and cursor.open_span.start < len(ids):
            count = lexicon.imaging.count if isinstance(lexicon.imaging, Codes) else 0
            raise RecordError(
                f"format '{self.name}': the image of '{cursor.role}' is cut off at position "
                f"{len(ids)}; it has {count} codes and an end marker"
            )
        cursor.stop()
        return cursor.spans

    def answers(self, role: str) -> list[str]:
        """The roles in which the environment may answer a role of the policy."""
        return [name for name in self.grammar.follow.get(role, ()) if name in self.environment_roles]

    @property
    def calls(self) -> tuple[str, ...]:
        """The roles after which the environment speaks, in the order of declaration."""
        return tuple(role.name for role in self.grammar.roles if role.name in self.grammar.calls)

    @property
    def environment_roles(self) -> list[str]:
        return [role.name for role in self.grammar.roles if not role.by_policy]

    def violations(self, trajectory: Trajectory) -> list[Violation]:
        return violations(self.grammar, trajectory)

    def bodies(self, segment: Segment) -> dict[str, str]:
        """What a segment says, by tag name ("ins", "des", "inspect", "refine"); empty for roles without text."""
        role = self.grammar.by_name.get(segment.role)
        return {} if role is None or role.is_image else bodies(role, segment.text)

    # ---- the loss ----

    def author(self, role: str) -> Author:
        return Author.USER if role in (PROMPT, NEGATIVE) else self._role(role).author

    def trained(self, role: str) -> bool:
        return role not in (PROMPT, NEGATIVE) and self._role(role).trained and self._role(role).by_policy

    def _role(self, name: str) -> Role:
        return self.grammar.by_name.get(name) or Role(name)  # "other" and "end" are the policy's, and trained

    # ---- guidance ----

    def _images_before(self, trajectory: Trajectory, segment: int) -> list[int]:
        return [i for i, s in enumerate(trajectory.segments[:segment]) if s.modality is not Modality.TEXT]

    def guidance(self, trajectory: Trajectory, segment: int) -> Guidance | None:
        """By the number of the image, for its role may not be known before it is drawn. None for text."""
        if not self.guidance_kinds or trajectory.segments[segment].modality is Modality.TEXT:
            return None
        before = self._images_before(trajectory, segment)
        number = sum(trajectory.segments[i].author is Author.POLICY for i in before)
        kind = self.guidance_kinds[min(number, len(self.guidance_kinds) - 1)]
        branches = BRANCHES[kind]
        scales = {name: scale for name, scale in self.scales.items() if name == "full" or name in branches}
        return Guidance(kind, scales)

    def contexts(self, trajectory: Trajectory, segment: int) -> tuple[ContextSpec, ...]:
        """Full history; for guided images also the branches whose terms have a scale other than 0."""
        before = range(segment)
        full = _context("full", [i for i in before if trajectory.segments[i].role != NEGATIVE])
        guidance = self.guidance(trajectory, segment)
        if guidance is None:
            return (full,)
        kept = {
            "unconditional": [],
            "image": self._images_before(trajectory, segment),
            "negative": [i for i in before if trajectory.segments[i].role == NEGATIVE],
            "original": [i for i in before if trajectory.segments[i].role == PROMPT],
        }
        return (
            full,
            *(
                _context(branch, kept[branch])
                for branch in BRANCHES[guidance.kind]
                if guidance.scales.get(branch, 1.0) or branch in SUBTRAHENDS.get(guidance.kind, ())
            ),
        )

    # ---- the report ----

    def layout(self) -> tuple[RoleDisplay, ...]:
        """How each role is shown, in the order of declaration; after them what may stand beside the roles."""
        shown = [RoleDisplay(PROMPT, "prompt", "prompt"), RoleDisplay(NEGATIVE, "negative prompt", "prompt")]
        shown += [RoleDisplay(role.name, role.label or role.name, role.color) for role in self.grammar.roles]
        return (*shown, RoleDisplay(OTHER, "outside any role", "fault"), RoleDisplay(END, "end of turn", "end"))

    def display(self, role: str) -> RoleDisplay:
        return next((shown for shown in self.layout() if shown.role == role), RoleDisplay(role, role, "fault"))


def _context(branch: str, segments: Sequence[int]) -> ContextSpec:
    return ContextSpec(branch, tuple(PieceSpec(index) for index in segments))
