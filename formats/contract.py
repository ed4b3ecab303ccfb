"""What a format must keep, whoever wrote it. Run it on your own: `check_format(my_format, vocabulary, demonstrations)`.

The built-in formats are held to it in the tests; a failure is an AssertionError that says which promise broke.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from formats.base import AllowedSet, Codes, Format, Part, SeenOnly, Span, Vocabulary
from formats.render import render, tags_of
from record.trajectory import Author, Modality, Segment, StopReason, Trajectory, mask_of


def check_format(
    fmt: Format,
    vocabulary: Vocabulary,
    demonstrations: Sequence[Sequence[Part]],
    *,
    walks: int = 20,
    limit: int = 400,
    seed: int = 0,
) -> None:
    """Check a format's promises by demonstrations and by random walks under each constraint.

    Args:
        demonstrations: well-formed turns, each a list of parts; images may show anything.
        walks: random turns under each constraint, of at most `limit` ids.

    Raises:
        AssertionError: a promise is broken; the message says which.
        UserError: the vocabulary cannot spell the format, or a demonstration is no sentence of it.
    """
    _check_tags(fmt, vocabulary)
    for parts in demonstrations:
        _check_demonstration(fmt, vocabulary, parts)
    rng = np.random.default_rng(seed)
    for constrain in ("images", "full"):
        for _ in range(walks):
            _check_walk(fmt, vocabulary, constrain, limit, rng)


def spans_to_trajectory(
    fmt: Format,
    vocabulary: Vocabulary,
    ids: Sequence[int],
    spans: Sequence[Span],
    stop: StopReason = StopReason.END,
    prompt: str = "",
    answers: Mapping[int, str] | None = None,
) -> Trajectory:
    """The record of ids that a cursor has divided, without decisions or images; the prompt has no ids.

    Args:
        answers: in which role the environment spoke, by how many spans there were then.
    """
    segments = [Segment("prompt", Author.USER, Modality.TEXT, False, text=prompt)]
    for number, span in enumerate([*spans, None]):
        if (role := (answers or {}).get(number)) is not None:
            segments.append(Segment(role, Author.ENVIRONMENT, Modality.TEXT, False, text="."))
        if span is None:
            break
        ids_T = np.asarray(ids[span.start : span.stop], np.int32)
        text = vocabulary.decode(ids_T) if span.modality is Modality.TEXT else ""
        segments.append(Segment(span.role, fmt.author(span.role), span.modality, fmt.trained(span.role), ids_T, text))
    return Trajectory(prompt, {}, fmt.name, segments, stop=stop)


def _check_tags(fmt: Format, vocabulary: Vocabulary) -> None:
    for tag in tags_of(fmt):
        ids = vocabulary.encode(tag)
        assert tag in "".join(vocabulary.piece(id) for id in ids), f"{fmt.name}: the pieces of '{tag}' do not spell it"
        assert tag in vocabulary.decode(ids), f"{fmt.name}: the vocabulary does not decode '{tag}' verbatim"


def _check_demonstration(fmt: Format, vocabulary: Vocabulary, parts: Sequence[Part]) -> None:
    imaging = vocabulary.imaging
    image = np.resize(imaging.ids, imaging.count) if isinstance(imaging, Codes) else np.empty(0, np.int32)
    codes = [image for part in parts if part.image is not None] if isinstance(imaging, Codes) else None
    trajectory = render(fmt, "", {}, parts, vocabulary, codes)
    turn = trajectory.segments[1:]
    own = [segment for segment in turn if segment.author is Author.POLICY]
    assert [s.role for s in turn[: len(parts)]] == [part.role for part in parts], f"{fmt.name}: rendering changed roles"
    cursor = fmt.cursor(vocabulary)
    for number, segment in enumerate(turn):
        if segment.author is Author.ENVIRONMENT:
            last = number + 1 == len(turn) or turn[number + 1].author is Author.POLICY
            assert cursor.awaits, f"{fmt.name}: its cursor awaits nobody where the demonstration has '{segment.role}'"
            if last:
                cursor.observe(segment.role)
            continue
        for id in segment.ids.tolist():
            forced = cursor.forced()
            if forced is None:
                assert _holds(cursor.allowed(), id), f"{fmt.name}: the demonstration's id {id} is not allowed"
            else:
                assert forced == id, f"{fmt.name}: id {forced} is forced where the demonstration has {id}"
            cursor.advance(id)
    assert cursor.stopped, f"{fmt.name}: the demonstration's end does not end the turn"
    found = [(span.role, span.modality, span.stop - span.start) for span in cursor.spans]
    expected = [(segment.role, segment.modality, len(segment.ids)) for segment in own]
    assert found == expected, f"{fmt.name}: parsed {found}, rendered {expected}"
    for index, segment in enumerate(trajectory.segments):
        if segment.author is Author.POLICY:
            _check_contexts(fmt, trajectory, index)


def _check_contexts(fmt: Format, trajectory: Trajectory, index: int) -> None:
    contexts = fmt.contexts(trajectory, index)
    assert contexts and contexts[0].branch == "full", f"{fmt.name}: the first context of a segment is 'full'"
    names = [context.branch for context in contexts]
    assert len(set(names)) == len(names), f"{fmt.name}: two contexts are named alike: {names}"
    for context in contexts:
        assert all(piece.segment < index for piece in context.pieces), f"{fmt.name}: segment {index} sees a later one"
    assert fmt.contexts(trajectory, index) == contexts, f"{fmt.name}: contexts is not pure"
    if len(contexts) > 1:
        assert fmt.guidance(trajectory, index) is not None, f"{fmt.name}: guidance branches but no guidance"


def _check_walk(fmt: Format, vocabulary: Vocabulary, constrain: str, limit: int, rng: np.random.Generator) -> None:
    cursor, ids = fmt.cursor(vocabulary, constrain), list[int]()
    imaging = vocabulary.imaging
    codes = {int(id) for id in imaging.ids} if isinstance(imaging, Codes) else set[int]()
    count = imaging.count if isinstance(imaging, Codes) else 0
    opening, closing = (None, None) if isinstance(imaging, SeenOnly) else (imaging.open, imaging.close)
    never = {int(id) for id in vocabulary.never}
    images, answers = 0, dict[int, str]()
    left: int | None = None  # codes that the open image still needs, as the format's promise has it; None: no image
    while not cursor.stopped and len(ids) < limit:
        if cursor.awaits:
            answers[len(cursor.spans)] = str(rng.choice(_answers(fmt, cursor.spans[-1].role)))
            cursor.observe(answers[len(cursor.spans)])
            continue
        if left is None and opening is None and cursor.in_image:
            left, images = count, images + 1
        if left == 0 and closing is None:  # the last code closed it, or (a latent) nothing does
            if cursor.in_image and not count:
                cursor.end_image()
            left = None
            continue
        forced = cursor.forced()
        id = forced if forced is not None else _sample(cursor.allowed(), vocabulary, rng)
        assert id not in never, f"{fmt.name}: id {id} may never be sampled"
        if left:
            assert id in codes, f"{fmt.name}: id {id} within an image"
            left -= 1
        elif left == 0:
            assert id == closing and forced == id, f"{fmt.name}: an image is closed by its marker, forced"
            left = None
        else:
            assert id not in codes and id != closing, f"{fmt.name}: id {id} outside an image"
            if id == opening:
                left, images = count, images + 1
        cursor.advance(id)
        ids.append(id)
    stop = StopReason.END if cursor.stopped else StopReason.MAX_TOKENS
    cut = cursor.in_image
    cursor.stop()
    edges = [0, *(span.stop for span in cursor.spans)]
    assert [s.start for s in cursor.spans] == edges[:-1] and edges[-1] == len(ids), f"{fmt.name}: spans do not tile"
    assert cursor.images == images <= fmt.max_images, f"{fmt.name}: more images than max_images"
    least = getattr(fmt, "min_images", 0)
    assert stop is not StopReason.END or images >= least, f"{fmt.name}: a turn ends with fewer images than min_images"
    trajectory = spans_to_trajectory(fmt, vocabulary, ids, cursor.spans, stop, answers=answers)
    found = fmt.violations(trajectory)
    if constrain == "full" and stop is StopReason.END:
        assert not found, f"{fmt.name}: the full constraint let this through: {found[0].message}"
    if stop is not StopReason.END or cut:
        assert found, f"{fmt.name}: a turn that a limit stopped counts as whole"


def _answers(fmt: Format, role: str) -> list[str]:
    """The roles in which the environment may answer a role of the policy."""
    answers = getattr(fmt, "answers", None)
    assert answers is not None, f"{fmt.name}: its cursor awaits the environment, and the format names none of its roles"
    return answers(role)


def _holds(allowed: AllowedSet, id: int) -> bool:
    return any(start <= id < stop for start, stop in allowed.ranges)


def _sample(allowed: AllowedSet, vocabulary: Vocabulary, rng: np.random.Generator) -> int:
    """Half of the time a marker or part of a tag, where there is one: else walks seldom leave the first segment."""
    ids = np.flatnonzero(mask_of(allowed.ranges, vocabulary.size))
    assert len(ids), "a dead end: no id is allowed"
    if rng.random() < 0.5:
        marks = (getattr(vocabulary.imaging, "open", None), vocabulary.eos)
        telling = [id for id in ids if id in marks or "<" in vocabulary.piece(int(id))]
        ids = np.asarray(telling) if telling else ids
    return int(rng.choice(ids))
