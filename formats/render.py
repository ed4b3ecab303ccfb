"""Demonstrations to trajectories: the parts that somebody wrote, as the ids that the policy would have sampled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from formats.base import Format, Part, Span, Vocabulary
from formats.grammar import END, PROMPT
from record.trajectory import Author, Modality, RecordError, Segment, StopReason, Trajectory


def tags_of(fmt: Format) -> list[str]:
    """The format's tags, in the order of declaration; a small tokenizer makes one token of each."""
    grammar = getattr(fmt, "grammar", None)
    return list(grammar.tags) if grammar is not None else list(getattr(fmt, "tags", ()))


def prompt_segment(fmt: Format, prompt: str, vocabulary: Vocabulary) -> Segment:
    """What the user said, as the policy sees it; nothing in it is trained."""
    ids = np.asarray(fmt.prompt_ids(prompt, vocabulary), np.int32)
    return Segment(PROMPT, Author.USER, Modality.TEXT, False, ids, prompt)


def encode(fmt: Format, text: str, vocabulary: Vocabulary) -> list[int]:
    """Ids of a text whose tags are spelt canonically: each by itself, never merged with its neighbours."""
    tags = tags_of(fmt)
    parts = re.split("(" + "|".join(map(re.escape, tags)) + ")", text) if tags else [text]
    return [int(id) for part in parts if part for id in vocabulary.encode(part)]


def render(
    fmt: Format,
    prompt: str,
    record: dict[str, Any],
    parts: Sequence[Part],
    vocabulary: Vocabulary,
    codes: Sequence[np.ndarray],
) -> Trajectory:
    """A demonstration as a trajectory that nobody sampled: no decisions, stop reason "demonstration".

    Args:
        parts: the segments in order; text with its tags, or an image.
        codes: one for each image in order, what `policy.see` gives: ids of its codes, int32 [codes_per_image].

    Raises:
        RecordError: images and codes do not match, or the parts are no sentence of the format. Names the part.
    """
    images = [i for i, part in enumerate(parts) if part.image is not None]
    if len(images) != len(codes):
        raise RecordError(
            f"demonstration '{prompt}': {len(images)} images but codes of {len(codes)}; "
            "give one array of codes an image"
        )
    segments = [prompt_segment(fmt, prompt, vocabulary)]
    known = {int(i) for i in vocabulary.code_ids}
    image = iter(codes)
    for number, part in enumerate(parts):
        if part.image is not None:
            body = [int(i) for i in next(image)]
            if len(body) != vocabulary.codes_per_image or not known.issuperset(body):
                raise RecordError(
                    f"demonstration '{prompt}': part {number} ({part.role}) has {len(body)} ids; "
                    f"an image is {vocabulary.codes_per_image} ids, each of a visual code"
                )
            ids, modality = [vocabulary.boi, *body, vocabulary.eoi], Modality.IMAGE_TOKENS
        else:
            ids, modality = encode(fmt, part.text, vocabulary), Modality.TEXT
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
    last = segments[-1]
    if last.author is Author.POLICY and last.modality is Modality.TEXT:
        last.ids = np.append(last.ids, np.int32(vocabulary.eos))
    else:
        segments.append(
            Segment(END, Author.POLICY, Modality.TEXT, fmt.trained(END), np.asarray([vocabulary.eos], np.int32))
        )
    trajectory = Trajectory(prompt, record, fmt.name, segments, stop=StopReason.DEMONSTRATION)
    wrong = fmt.violations(trajectory)
    if wrong:
        raise RecordError(f"demonstration '{prompt}': segment {wrong[0].segment}: {wrong[0].message}")
    return trajectory


def render_parts(
    fmt: Format,
    prompt: str,
    record: dict[str, Any],
    parts: Sequence[Part],
    trained: Sequence[bool],
    vocabulary: Vocabulary,
    codes: Sequence[np.ndarray],
) -> Trajectory:
    """A demonstration whose parts have no roles yet: text may hold several segments, and the format divides it.

    Args:
        parts: text with its tags, and images, in order; `role` is not read.
        trained: one a part; False: a segment that lies in it is seen and not imitated.
        codes: one for each image in order.

    Raises:
        RecordError: the parts are no sentence of the format; the sentence names the segment.
    """
    ids: list[int] = []
    imitated: list[bool] = []  # by id
    image_codes = iter(codes)
    for part, learned in zip(parts, trained, strict=True):
        if part.image is not None:
            new = [vocabulary.boi, *(int(i) for i in next(image_codes)), vocabulary.eoi]
        else:
            new = encode(fmt, part.text, vocabulary)
        ids += new
        imitated += [learned] * len(new)
    ids.append(vocabulary.eos)
    imitated.append(True)
    segments = [prompt_segment(fmt, prompt, vocabulary)]
    images = iter(part.image for part in parts if part.image is not None)
    for span in _spans(fmt, ids, vocabulary):
        own = np.asarray(ids[span.start : span.stop], np.int32)
        drawn = span.modality is not Modality.TEXT
        segments.append(
            Segment(
                span.role,
                fmt.author(span.role),
                span.modality,
                fmt.trained(span.role) and all(imitated[span.start : span.stop]),
                own,
                "" if drawn else vocabulary.decode(own),
                image=next(images) if drawn else None,
            )
        )
    trajectory = Trajectory(prompt, record, fmt.name, segments, stop=StopReason.DEMONSTRATION)
    wrong = fmt.violations(trajectory)
    if wrong:
        where = "" if wrong[0].segment is None else f"segment {wrong[0].segment}: "
        raise RecordError(f"demonstration '{prompt}': {where}{wrong[0].message}")
    return trajectory


def _spans(fmt: Format, ids: Sequence[int], vocabulary: Vocabulary) -> list[Span]:
    parse = getattr(fmt, "parse", None)
    if parse is not None:  # a format that says itself what is wrong with ids
        return parse(ids, vocabulary)
    cursor = fmt.cursor(vocabulary)
    for id in ids:
        if cursor.stopped:
            raise RecordError(f"format '{fmt.name}': the turn ends before the demonstration does")
        cursor.advance(id)
    cursor.stop()
    return cursor.spans
