"""Demonstrations to trajectories: the parts that somebody wrote, as the ids that the policy would have sampled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from formats.base import Codes, Cursor, Format, Latent, Part, SeenOnly, Span, Vocabulary
from formats.grammar import END
from formats.segments import media_segment, prompt_segments, text_segment
from record.trajectory import Author, Media, Modality, RecordError, Segment, StopReason, Trajectory


def tags_of(fmt: Format) -> list[str]:
    """The format's tags, in the order of declaration; a small tokenizer makes one token of each."""
    grammar = getattr(fmt, "grammar", None)
    return list(grammar.tags) if grammar is not None else list(getattr(fmt, "tags", ()))


def encode(fmt: Format, text: str, vocabulary: Vocabulary) -> list[int]:
    """Ids of a text whose tags are spelt canonically: each by itself, never merged with its neighbours."""
    tags = tags_of(fmt)
    parts = re.split("(" + "|".join(map(re.escape, tags)) + ")", text) if tags else [text]
    return [int(id) for part in parts if part for id in vocabulary.encode(part)]


def drawn_modality(vocabulary: Vocabulary) -> Modality:
    """As what an image is recorded that the policy draws, or that somebody drew in its place."""
    kinds = {Codes: Modality.IMAGE_TOKENS, Latent: Modality.IMAGE_LATENT}
    return kinds.get(type(vocabulary.imaging), Modality.IMAGE)


def image_ids(vocabulary: Vocabulary, codes: Sequence[int] = ()) -> list[int]:
    """An image as it stands among the ids: its markers, where there are any, around its codes."""
    imaging = vocabulary.imaging
    if isinstance(imaging, SeenOnly):
        return []
    return [*(i for i in (imaging.open,) if i is not None), *codes, *(i for i in (imaging.close,) if i is not None)]


def render(
    fmt: Format,
    prompt: str,
    record: dict[str, Any],
    parts: Sequence[Part],
    vocabulary: Vocabulary,
    codes: Sequence[np.ndarray] | None = None,
    media: Sequence[Media] = (),
) -> Trajectory:
    """A demonstration as a trajectory that nobody sampled: no decisions, stop reason "demonstration".

    Args:
        parts: the segments in order; text with its tags, or an image. What the environment says stands among them.
        codes: one for each image in order, ids of its codes, int32 [count]. None: images get their content later, from
            the family: those that the policy drew by Policy.encode_images, those that it was shown by Policy.perceive.
        media: what is shown in the prompt.

    Raises:
        RecordError: images and codes do not match, or the parts are no sentence of the format. Names the part.
    """
    images = [i for i, part in enumerate(parts) if part.image is not None]
    if codes is not None and len(images) != len(codes):
        raise RecordError(
            f"demonstration '{prompt}': {len(images)} images but codes of {len(codes)}; "
            "give one array of codes an image"
        )
    segments = prompt_segments(fmt, prompt, media, vocabulary)
    segments += _written(fmt, f"demonstration '{prompt}'", parts, vocabulary, codes)
    _end(fmt, segments, vocabulary)
    trajectory = Trajectory(prompt, record, fmt.name, segments, stop=StopReason.DEMONSTRATION)
    wrong = fmt.violations(trajectory)
    if wrong:
        raise RecordError(f"demonstration '{prompt}': segment {wrong[0].segment}: {wrong[0].message}")
    return trajectory


def render_after(
    fmt: Format, before: Trajectory, parts: Sequence[Part], vocabulary: Vocabulary, ends: bool = True
) -> Trajectory:
    """What was thought so far, and what somebody writes after it; images get their content later, as in `render`.

    Args:
        before: its segments stay as they are.
        ends: the thought ends with the parts. False: more would have to follow, so nothing ends it.

    Raises:
        RecordError: the whole is no sentence of the format, or, where it does not end, no beginning of one.
    """
    segments = [*before.segments, *_written(fmt, f"demonstration '{before.prompt}'", parts, vocabulary, None)]
    if ends:
        _end(fmt, segments, vocabulary)
    stop = StopReason.DEMONSTRATION if ends else StopReason.MAX_IMAGES
    trajectory = replace(before, segments=segments, stop=stop, rewards={}, segment_rewards={}, reward=None)
    # One that is cut off has one violation, which says so.
    wrong = fmt.violations(trajectory)[: None if ends else -1]
    if wrong:
        raise RecordError(f"demonstration '{before.prompt}': segment {wrong[0].segment}: {wrong[0].message}")
    trajectory.stop = StopReason.DEMONSTRATION
    return trajectory


def _written(
    fmt: Format, where: str, parts: Sequence[Part], vocabulary: Vocabulary, codes: Sequence[np.ndarray] | None
) -> list[Segment]:
    """Parts as segments. Raises RecordError for codes that are none."""
    segments = []
    given = iter(codes or ())
    for number, part in enumerate(parts):
        if part.image is not None:
            at = f"{where}: part {number} ({part.role})"
            ids = with_codes(vocabulary, next(given), at) if codes is not None else []
            drawn = fmt.author(part.role) is Author.POLICY
            modality = drawn_modality(vocabulary) if drawn else Modality.IMAGE
        else:
            ids, modality = encode(fmt, part.text, vocabulary), Modality.TEXT
            if _ends_turn(fmt, part.role) and vocabulary.eos is not None:
                ids.append(vocabulary.eos)
        segments.append(
            Segment(
                part.role,
                fmt.author(part.role),
                modality,
                fmt.trained(part.role),
                np.asarray(ids, np.int32),
                part.text,
                image=part.image,
            )
        )
    return segments


def _ends_turn(fmt: Format, role: str) -> bool:
    """Whether a role closes with the end-of-turn id, though the turn goes on after what the environment says."""
    grammar = getattr(fmt, "grammar", None)
    return grammar is not None and role in grammar.by_name and grammar.by_name[role].ends_turn


def with_codes(vocabulary: Vocabulary, codes: np.ndarray, where: str) -> list[int]:
    """An image's ids from those of its codes. Raises RecordError that begins with `where` for any others."""
    imaging = vocabulary.imaging
    body = [int(i) for i in codes]
    if not isinstance(imaging, Codes) or len(body) != imaging.count or not set(imaging.ids.tolist()).issuperset(body):
        count = imaging.count if isinstance(imaging, Codes) else 0
        raise RecordError(f"{where} has {len(body)} ids; an image is {count} ids, each of a visual code")
    return image_ids(vocabulary, body)


def _end(fmt: Format, segments: list[Segment], vocabulary: Vocabulary) -> None:
    """The policy ends its turn: with the last text, or in a segment by itself. Nothing, in a family without words."""
    if vocabulary.eos is None:
        return
    last = segments[-1]
    if last.author is Author.POLICY and last.modality is Modality.TEXT:
        last.ids = np.append(last.ids, np.int32(vocabulary.eos))
    else:
        segments.append(
            Segment(END, Author.POLICY, Modality.TEXT, fmt.trained(END), np.asarray([vocabulary.eos], np.int32))
        )


def render_parts(
    fmt: Format,
    prompt: str,
    record: dict[str, Any],
    parts: Sequence[Part],
    trained: Sequence[bool],
    vocabulary: Vocabulary,
    media: Sequence[Media] = (),
) -> Trajectory:
    """A demonstration whose parts have no roles yet: text may hold several segments, and the format divides it.

    Args:
        parts: text with its tags, and images, in order; `role` is not read. Where the environment is the author, the
            part is its answer to what the policy said last, and takes a role in which the format has it answer.
        trained: one a part; False: a segment that lies in it is seen and not imitated.
        media: what is shown in the prompt.

    Raises:
        RecordError: the parts are no sentence of the format; the sentence names the segment.
    """
    turn = _Turn(fmt, vocabulary)
    for part, learned in zip(parts, trained, strict=True):
        if part.author is Author.ENVIRONMENT:
            turn.answer(part)
        else:
            turn.say(part, learned)
    segments = prompt_segments(fmt, prompt, media, vocabulary)
    images = iter(part.image for part in parts if part.image is not None and part.author is Author.POLICY)
    for span in turn.spans():
        own = np.asarray(turn.ids[span.start : span.stop], np.int32)
        drawn = span.modality is not Modality.TEXT
        segments.append(
            Segment(
                span.role,
                fmt.author(span.role),
                span.modality,
                fmt.trained(span.role) and all(turn.imitated[span.start : span.stop]),
                np.empty(0, np.int32) if drawn else own,
                "" if drawn else vocabulary.decode(own),
                image=next(images) if drawn else None,
            )
        )
        segments += turn.answers.pop(span.stop, [])
    trajectory = Trajectory(prompt, record, fmt.name, segments, stop=StopReason.DEMONSTRATION)
    wrong = fmt.violations(trajectory)
    if wrong:
        where = "" if wrong[0].segment is None else f"segment {wrong[0].segment}: "
        raise RecordError(f"demonstration '{prompt}': {where}{wrong[0].message}")
    return trajectory


class _Turn:
    """The policy's ids of a demonstration as its format's cursor reads them, and what the environment said between."""

    def __init__(self, fmt: Format, vocabulary: Vocabulary) -> None:
        self.fmt, self.vocabulary = fmt, vocabulary
        self.cursor: Cursor = fmt.cursor(vocabulary)
        self.ids: list[int] = []
        self.imitated: list[bool] = []  # by id
        self.answers: dict[int, list[Segment]] = {}  # by the number of ids before them
        imaging = vocabulary.imaging
        # The format divides ids; codes that are not known yet stand as the first one.
        self._blank = imaging.ids[:1].tolist() * imaging.count if isinstance(imaging, Codes) else []

    def say(self, part: Part, learned: bool) -> None:
        if part.image is None:
            return self._take(encode(self.fmt, part.text, self.vocabulary), learned)
        self._take(image_ids(self.vocabulary, self._blank), learned)
        if self.cursor.in_image and isinstance(self.vocabulary.imaging, Latent):
            self.cursor.end_image()  # no marker says so
        return None

    def _take(self, ids: Sequence[int], learned: bool) -> None:
        self.ids += ids
        self.imitated += [learned] * len(ids)
        for id in ids:
            if self.cursor.awaits:
                raise RecordError(
                    f"format '{self.fmt.name}': '{self.cursor.spans[-1].role}' calls the environment, and the "
                    "demonstration goes on without its answer; put a message of 'tool' between"
                )
            if self.cursor.stopped:
                raise RecordError(f"format '{self.fmt.name}': the turn ends before the demonstration does")
            self.cursor.advance(id)

    def answer(self, part: Part) -> None:
        """Add what the environment says here. Several of its parts in a row are one answer."""
        given = self.answers.get(len(self.ids), [])
        if not given and not self.cursor.awaits and self.vocabulary.eos is not None and not self.cursor.in_image:
            self._take([self.vocabulary.eos], True)  # a call that closes with the end of the turn
            given = self.answers.get(len(self.ids), [])
        if not given and not self.cursor.awaits:
            raise RecordError(
                f"format '{self.fmt.name}': the environment speaks where nothing calls it; its messages follow a "
                "whole segment of a role that it answers"
            )
        role = self._role_of(part, given[-1].role if given else self.cursor.spans[-1].role)
        if part.image is not None:
            segment = media_segment(role, part.image, Author.ENVIRONMENT)
        else:
            ids = encode(self.fmt, part.text, self.vocabulary)
            segment = text_segment(role, ids, part.text, Author.ENVIRONMENT)
        self.answers.setdefault(len(self.ids), []).append(segment)
        if not given:
            self.cursor.observe(role)

    def _role_of(self, part: Part, after: str) -> str:
        grammar = getattr(self.fmt, "grammar", None)
        if grammar is None:
            raise RecordError(
                f"format '{self.fmt.name}': it has no grammar to say in which role the environment speaks"
            )
        # One call may be answered by several segments of the role.
        known = [role for role in grammar.roles if not role.by_policy and role.name in (*grammar.follow[after], after)]
        for role in known:
            if role.is_image == (part.image is not None):
                return role.name
        kind = "an image" if part.image is not None else "text"
        names = ", ".join(f"'{role.name}'" for role in known) or "nothing"
        raise RecordError(f"format '{self.fmt.name}': after '{after}' the environment says {names}, and not {kind}")

    def spans(self) -> list[Span]:
        """The whole turn's segments, once its end is there.

        Raises RecordError for ids that are no turn of the format.
        """
        if self.vocabulary.eos is not None and not self.cursor.stopped:
            self._take([self.vocabulary.eos], True)
        parse = getattr(self.fmt, "parse", None)
        if parse is not None:  # a format that says itself what is wrong with ids
            parse(self.ids, self.vocabulary)
        self.cursor.stop()
        return self.cursor.spans
