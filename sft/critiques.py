"""Images that nobody drew on purpose, and what is true of them: the policy's own, or such as were corrupted.

The task looks at each image by its own detector and writes the true words, and the repair if the image is wrong
(CriticTask in tasks/base.py). What stands before is seen and not learned.

    self-sampled     images of stored rollouts, with all that the policy thought before them (DAgger, arXiv:1011.0686:
                     states that the policy comes to, with what somebody who knows would do there)
    corrupted        first images of demonstrations, in which a rectangle is another demonstration's (MoTiF,
                     arXiv:2606.12886: detect and redraw, detect and ignore)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formats.base import Format, Latent, Part, SeenOnly
from formats.render import image_ids, render, render_after, with_codes
from policy.base import Policy
from record.store import load_trajectories
from record.trajectory import Author, Modality, RecordError, Segment, StopReason, Trajectory
from runtime.errors import UserError
from sft.config import CorruptionConfig, CritiquesConfig
from sft.demonstrations import WRONG_IMAGES, see
from sft.perception import first_words, only, seed_of
from sft.sources import identity, stored_folders
from tasks.base import Task

logger = logging.getLogger(__name__)
ATTEMPTS = 12  # corrupted images that are tried for each one that is wanted
BATCH = 256  # images that are encoded and decoded at a time


@dataclass(frozen=True)
class Row:
    """A thought after which the task has written what is true of an image."""

    trajectory: Trajectory
    image: int  # its segment
    fine: bool

    @property
    def words(self) -> int:
        """The segment of the words on the image."""
        return self.image + 1


def check_critic(task: Any, section: str) -> None:
    """Raises UserError where the task cannot say what is true of an image."""
    if not hasattr(task, "critique"):
        raise UserError(
            f"sft.{section}: the task '{task.name}' cannot say what is true of an image: it has no method 'critique' "
            f"(tasks/base.py: CriticTask). Leave sft.{section} out, or take a task that has it, such as shapes"
        )


def criticised(
    task: Any, fmt: Format, policy: Policy, before: Trajectory, seed: int, learn_mistakes: bool = False
) -> Row | None:
    """A thought whose last segment is an image, with the task's critique after it; new images are not encoded yet.

    None where the task cannot say what is wrong.

    Raises RecordError where the whole would be no sentence of the format.
    """
    image = len(before.segments) - 1
    own = [segment for segment in before.segments if segment.author is not Author.USER]
    parts = [Part(segment.role, segment.text, segment.image, segment.author) for segment in own]
    drawn = sum(segment.author is Author.POLICY and segment.modality is not Modality.TEXT for segment in own)
    found = task.critique(fmt.name, before.record, parts, max(fmt.max_images - drawn, 0), seed)
    if found is None or not found.parts:
        return None
    seen = [replace(segment, trained=False) for segment in before.segments]
    whole = render_after(fmt, replace(before, segments=seen), found.parts, policy.vocabulary, found.ends)
    wrong = [image + 1 + index for index in found.mistakes]
    for index in () if learn_mistakes else wrong:
        whole.segments[index].trained = False
    whole.info = {WRONG_IMAGES: [*([] if found.fine else [image]), *wrong]}
    return Row(whole, image, found.fine)


def balanced(rows: Sequence[Row], count: int, wrong: float, where: str, rng: np.random.Generator) -> list[Row]:
    """`count` rows in random order with that share of wrong images, each as often as any other of its verdict, or once
    more.

    Raises:
        UserError: there is no image of a verdict that is asked for.
    """
    of = {True: [row for row in rows if not row.fine], False: [row for row in rows if row.fine]}
    wanted = {True: round(wrong * count)}
    wanted[False] = count - wanted[True]
    for verdict, number in wanted.items():
        if number and not of[verdict]:
            raise UserError(
                f"{where}: none of the {len(rows)} images is {'wrong' if verdict else 'right'}; set {where}.wrong: "
                f"{0 if verdict else 1}, or give more of them"
            )
    chosen = []
    for verdict, number in wanted.items():
        order = rng.permutation(len(of[verdict]))
        chosen += [of[verdict][order[at % len(order)]] for at in range(number)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


# ---- self-sampled ----


def self_sampled_rows(
    task: Task, fmt: Format, policy: Policy, config: CritiquesConfig, count: int, seed: int, learn_mistakes: bool
) -> list[Trajectory]:
    """`count` rows on images of stored rollouts, evenly by verdict as the section says.

    Raises:
        UserError: nothing is stored there, or nothing that serves; another tokenizer's ids.
    """
    check_critic(task, "critiques")
    assert config.path is not None
    folders = stored_folders_or_refuse(config)
    heldout = {identity(record) for record in task.prompts("heldout")}
    skipped: Counter[str] = Counter()
    rows: list[Row] = []
    own = seed_of(seed, "critiques")
    for folder in folders:
        for trajectory in load_trajectories(folder):
            reason = unfit(trajectory, fmt, heldout)
            if reason:
                skipped[reason] += 1
                continue
            for before in up_to_images(trajectory):
                check_ids(before, policy, str(folder))
                try:
                    row = criticised(task, fmt, policy, before, own + len(rows), learn_mistakes)
                except RecordError:
                    skipped["ill-formed before the image"] += 1
                    continue
                if row is None:
                    skipped["of which the task cannot say what is true"] += 1
                else:
                    rows.append(row)
    told = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common())
    if not rows:
        raise UserError(f"sft.critiques.path: {config.path} holds no image that can be criticised: {told or 'none'}")
    wrong = sum(not row.fine for row in rows)
    logger.info(
        "%d images of %s are criticised, %d of them wrong%s",
        len(rows),
        config.path,
        wrong,
        f"; left out: {told}" if told else "",
    )
    chosen = balanced(rows, count, config.wrong, "sft.critiques", np.random.default_rng(own))
    made = [finished(row, config.learn) for row in chosen]
    see(made, policy)
    return made


def stored_folders_or_refuse(config: CritiquesConfig) -> list[Path]:
    """The folders of stored trajectories at critiques.path. Raises UserError where there are none."""
    folders = stored_folders(Path(str(config.path)))
    if not folders:
        raise UserError(
            f"sft.critiques.path: no stored trajectories in {config.path}; write some with "
            "`underdrawing rollout RECIPE --split train --out FOLDER`"
        )
    return folders


def unfit(trajectory: Trajectory, fmt: Format, heldout: set[str]) -> str:
    """Why the images of a stored trajectory are not criticised; empty: they are."""
    if identity(trajectory.record) in heldout:
        return "of a held-out prompt"
    if trajectory.format != fmt.name:
        return f"written in the format '{trajectory.format}'"
    if trajectory.stop is StopReason.DEMONSTRATION:
        return "not sampled but written"
    return ""


def up_to_images(trajectory: Trajectory) -> Iterator[Trajectory]:
    """The beginnings of a stored thought that end with an image of the policy's, as if nobody had sampled them."""
    segments = [
        replace(segment, trained=False, contexts=(), decisions=None, flow=None) for segment in trajectory.segments
    ]
    for number, segment in enumerate(segments):
        if segment.author is Author.POLICY and segment.image is not None:
            yield Trajectory(trajectory.prompt, trajectory.record, trajectory.format, segments[: number + 1])


def check_ids(trajectory: Trajectory, policy: Policy, where: str) -> None:
    """Raises UserError where the ids of what was sampled do not say its words in the policy's vocabulary."""
    for segment in trajectory.segments:
        if segment.author is Author.POLICY and segment.modality is Modality.TEXT:
            known = int(segment.ids.max(initial=0)) < policy.vocabulary.size
            if not known or policy.vocabulary.decode(segment.ids) != segment.text:
                raise UserError(
                    f"{where}: the ids of {segment.text!r} are other words to this policy: it was sampled with another "
                    "tokenizer. Give the weights that sampled it as policy.path"
                )


def finished(row: Row, learn: str) -> Trajectory:
    """What is trained on: a copy, since a row may be taken several times."""
    copy = replace(row.trajectory, segments=[replace(segment) for segment in row.trajectory.segments])
    return only(copy, row.words) if learn == "inspection" else copy


# ---- corrupted ----


def corrupted_rows(
    task: Task, fmt: Format, policy: Policy, config: CorruptionConfig, count: int, seed: int, learn_mistakes: bool
) -> list[Trajectory]:
    """`count` rows on corrupted first images of the task's demonstrations, harmless ones as the section says.

    Raises:
        UserError: the family draws no images; the task cannot say what is true of one, or has no demonstrations that
            begin with an image; no corruption did harm, or none did no harm, where such are asked for.
    """
    check_critic(task, "corruption")
    if isinstance(policy.vocabulary.imaging, SeenOnly):
        raise UserError(f"sft.corruption: the family '{policy.family}' draws no images that could be corrupted")
    own = seed_of(seed, "corruption")
    rng = np.random.default_rng(own)
    wanted = {True: round(config.ignore * count)}  # by whether it is fine
    wanted[False] = count - wanted[True]
    found: dict[bool, list[Row]] = {True: [], False: []}
    for attempt in range(ATTEMPTS):
        lacking = sum(max(number - len(found[fine]), 0) for fine, number in wanted.items())
        if not lacking:
            break
        clean = [*_first_images(task, fmt, policy, max(2 * lacking, 16), own + attempt)]
        if not clean:
            raise UserError(f"sft.corruption: the task '{task.name}' has no demonstration in which a right image is "
                            "followed by words on it")  # fmt: skip
        for before in _corrupt(clean, policy, config.cells, rng):
            row = criticised(task, fmt, policy, before, int(rng.integers(2**31)), learn_mistakes)
            if row is not None and len(found[row.fine]) < wanted[row.fine]:
                found[row.fine].append(row)
    for fine, number in wanted.items():
        if number and not found[fine]:
            raise UserError(
                f"sft.corruption: no corrupted image is {'still right' if fine else 'wrong'} to the task's detector; "
                f"set sft.corruption.ignore: {0 if fine else 1}, or other cells"
            )
    rows = [found[fine][at % len(found[fine])] for fine, number in wanted.items() for at in range(number)]
    made = [finished(rows[i], "thought") for i in rng.permutation(len(rows))]
    see(made, policy)
    return made


def _first_images(task: Task, fmt: Format, policy: Policy, count: int, seed: int) -> Iterator[Trajectory]:
    """Demonstrations up to their first image, where that is right and words on it follow."""
    for d in task.demonstrations(fmt.name, count, seed):
        place = first_words(d.parts, fmt)
        if place is None or place[0] in d.mistakes or place[1] != place[0] + 1:
            continue
        whole = render(fmt, d.prompt, d.record, d.parts, policy.vocabulary, media=d.media)
        first = next(n for n, segment in enumerate(whole.segments) if segment.author is not Author.USER)
        whole.segments = whole.segments[: first + place[0] + 1]
        yield whole


def _corrupt(clean: Sequence[Trajectory], policy: Policy, cells: int, rng: np.random.Generator) -> Iterator[Trajectory]:
    """Each with a rectangle of its last image from another's, as the family draws it; those that stay as they were are
    left out."""
    images = [trajectory.segments[-1].image for trajectory in clean]
    mixed = []
    for number, image in enumerate(images):
        other = images[(number + 1 + int(rng.integers(max(len(images) - 1, 1)))) % len(images)]
        assert image is not None and other is not None
        mixed.append(with_rectangle(image, other, cells, rng))
    for begin in range(0, len(clean), BATCH):
        part = slice(begin, begin + BATCH)
        with torch.inference_mode():
            kept = [image for image in images[part] if image is not None]
            before, contents = policy.encode_images(kept), policy.encode_images(mixed[part])
            seen = policy.decode_images(contents)
        for trajectory, was, content, image in zip(clean[part], before, contents, seen, strict=True):
            if np.array_equal(was, content):
                continue
            segment = replace(trajectory.segments[-1], image=image)
            _hold(segment, content, policy)
            yield replace(trajectory, segments=[*trajectory.segments[:-1], segment])


def _hold(segment: Segment, content: np.ndarray, policy: Policy) -> None:
    """What an image is drawn from: its codes, or its latent."""
    if isinstance(policy.vocabulary.imaging, Latent):
        segment.latent = np.asarray(content, np.float32)
        segment.ids = np.asarray(image_ids(policy.vocabulary), np.int32)
    else:
        segment.ids = np.asarray(with_codes(policy.vocabulary, content, "a corrupted image"), np.int32)


def with_rectangle(image: np.ndarray, other: np.ndarray, cells: int, rng: np.random.Generator) -> np.ndarray:
    """`image` with one rectangle of `other`, uint8 [height, width, 3].

    Its corners lie on a lattice of cells x cells, and each side takes one cell to half of them, evenly. Where the other
    image has another size, its nearest pixels are taken.
    """
    edges = [np.linspace(0, side, cells + 1).round().astype(int) for side in image.shape[:2]]
    spans = []
    for along in edges:
        size = int(rng.integers(1, max(cells // 2, 1) + 1))
        start = int(rng.integers(cells - size + 1))
        spans.append(slice(along[start], along[start + size]))
    rows, columns = (
        (np.arange(side) * given // side) for side, given in zip(image.shape[:2], other.shape[:2], strict=True)
    )
    mixed = image.copy()
    mixed[tuple(spans)] = other[np.ix_(rows, columns)][tuple(spans)]
    return mixed
