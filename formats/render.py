"""Demonstrations to trajectories: the parts that somebody wrote, as the ids that the policy would have sampled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from formats.base import Codes, Format, Latent, Part, SeenOnly, Span, Vocabulary
from formats.grammar import END
from formats.segments import prompt_segments
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
        parts: the segments in order; text with its tags, or an image.
        codes: one for each image in order, ids of its codes, int32 [count]. None: images get their ids later, from the
            family (Policy.perceive).
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
    given = iter(codes or ())
    for number, part in enumerate(parts):
        if part.image is not None:
            where = f"demonstration '{prompt}': part {number} ({part.role})"
            ids = _with_codes(vocabulary, next(given), where) if codes is not None else []
            modality = drawn_modality(vocabulary)
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
    _end(fmt, segments, vocabulary)
    trajectory = Trajectory(prompt, record, fmt.name, segments, stop=StopReason.DEMONSTRATION)
    wrong = fmt.violations(trajectory)
    if wrong:
        raise RecordError(f"demonstration '{prompt}': segment {wrong[0].segment}: {wrong[0].message}")
    return trajectory


def _with_codes(vocabulary: Vocabulary, codes: np.ndarray, where: str) -> list[int]:
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
        parts: text with its tags, and images, in order; `role` is not read.
        trained: one a part; False: a segment that lies in it is seen and not imitated.
        media: what is shown in the prompt.

    Raises:
        RecordError: the parts are no sentence of the format; the sentence names the segment.
    """
    ids: list[int] = []
    imitated: list[bool] = []  # by id
    imaging = vocabulary.imaging
    # The format divides ids; codes that are not known yet stand as the first one.
    blank = imaging.ids[:1].tolist() * imaging.count if isinstance(imaging, Codes) else []
    for part, learned in zip(parts, trained, strict=True):
        new = encode(fmt, part.text, vocabulary) if part.image is None else image_ids(vocabulary, blank)
        ids += new
        imitated += [learned] * len(new)
    if vocabulary.eos is not None:
        ids.append(vocabulary.eos)
        imitated.append(True)
    segments = prompt_segments(fmt, prompt, media, vocabulary)
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
                np.empty(0, np.int32) if drawn else own,
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
