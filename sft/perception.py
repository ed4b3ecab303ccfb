"""Perception rows: an image and the words on it, of which the words alone are learned.

An inspection stands in the context in which it will be sampled: prompt, plan and image of one of the task's
demonstrations, and the thought is cut behind it, so that a row is short. A question is a row of the format `questions`,
whose prompt shows the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from formats.base import Format, Part
from formats.questions import questions
from formats.render import render
from policy.base import Policy
from record.trajectory import Author, Trajectory
from runtime.errors import UserError, nearest
from sft.config import INSPECTION, PerceptionConfig
from sft.demonstrations import WRONG_IMAGES, see
from tasks.base import Demonstration, Task

ATTEMPTS = 6  # batches of demonstrations that are asked for, to fill the shares of right and wrong images


def check_kinds(config: PerceptionConfig, task: Task) -> None:
    """Raises UserError for a kind of rows that the task does not have."""
    offered = tuple(getattr(task, "question_kinds", ()))
    for kind in config.kinds:
        if kind != INSPECTION and kind not in offered:
            raise UserError(
                f"sft.perception.kinds: the task '{task.name}' asks no questions of the kind '{kind}'; "
                f"{nearest(kind, (INSPECTION, *offered))}"
            )


def perception_rows(
    task: Task, fmt: Format, policy: Policy, config: PerceptionConfig, count: int, seed: int
) -> list[Trajectory]:
    """`count` rows, evenly of the kinds; a function of the seed.

    Raises:
        UserError: a kind that the task does not have; no inspections of right or of wrong images where they are asked
            for.
    """
    check_kinds(config, task)
    rows: list[Trajectory] = []
    for number, kind in enumerate(config.kinds):
        of_kind = (count + number) // len(config.kinds)  # adds up to `count`
        own = seed_of(seed, "perception", kind)
        if kind == INSPECTION:
            rows += inspection_rows(task, fmt, policy, of_kind, config.wrong, own)
        else:
            rows += question_rows(task, policy, kind, of_kind, own)
    see(rows, policy)
    return rows


def question_rows(task: Any, policy: Policy, kind: str, count: int, seed: int) -> list[Trajectory]:
    """Questions of one kind; their images are not perceived yet."""
    fmt = questions()
    return [
        render(fmt, d.prompt, d.record, d.parts, policy.vocabulary, media=d.media)
        for d in task.questions(kind, count, seed)
    ]


def inspection_rows(task: Task, fmt: Format, policy: Policy, count: int, wrong: float, seed: int) -> list[Trajectory]:
    """The task's demonstrations up to the words on their first image; their images are not encoded yet."""
    wanted = {True: round(wrong * count)}
    wanted[False] = count - wanted[True]
    found: dict[bool, list[tuple[Demonstration, int, int]]] = {True: [], False: []}
    for attempt in range(ATTEMPTS):
        if all(len(found[verdict]) >= wanted[verdict] for verdict in wanted):
            break
        for demonstration in task.demonstrations(fmt.name, max(count, 16), seed + attempt):
            place = first_words(demonstration.parts, fmt)
            if place is not None:
                found[_called_wrong(task, demonstration, *place)].append((demonstration, *place))
    for verdict, number in wanted.items():
        if number and not found[verdict]:
            raise UserError(
                f"sft.perception: the task '{task.name}' has no demonstration with words on a "
                f"{'wrong' if verdict else 'right'} first image; set sft.perception.wrong: {0 if verdict else 1}, or "
                f"leave '{INSPECTION}' out of sft.perception.kinds"
            )
    rows = []
    for verdict, number in wanted.items():
        for at in range(number):
            demonstration, image, words = found[verdict][at % len(found[verdict])]
            rows.append(_inspection(demonstration, image, words, verdict, fmt, policy))
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def first_words(parts: Sequence[Part], fmt: Format) -> tuple[int, int] | None:
    """The indices of the first image that the policy draws and of the words on it: the next ones of its own that call
    nobody. None where there are none before another image."""
    calls = getattr(fmt, "calls", ())
    image = None
    for index, part in enumerate(parts):
        if fmt.author(part.role) is not Author.POLICY:
            continue
        if part.image is not None:
            if image is not None:
                return None
            image = index
        elif image is not None and part.role not in calls:
            return image, index
    return None


def _called_wrong(task: Any, d: Demonstration, image: int, words: int) -> bool:
    """What the words say where the task can read them: an image that is no mistake may lack what comes next."""
    span = task.verdict(d.parts[words].text) if hasattr(task, "verdict") else None
    return image in d.mistakes if span is None else bool(span.says == "wrong")


def _inspection(d: Demonstration, image: int, words: int, wrong: bool, fmt: Format, policy: Policy) -> Trajectory:
    whole = render(fmt, d.prompt, d.record, d.parts, policy.vocabulary, media=d.media)
    first = next(n for n, segment in enumerate(whole.segments) if segment.author is not Author.USER)
    whole.info[WRONG_IMAGES] = [first + image] if wrong else []
    return only(whole, first + words)


def only(trajectory: Trajectory, segment: int) -> Trajectory:
    """The thought up to a segment, which alone is learned."""
    del trajectory.segments[segment + 1 :]
    for before in trajectory.segments[:segment]:
        before.trained = False
    return trajectory


def seed_of(seed: int, *names: str) -> int:
    """A seed of its own for each use, so that no two draw the same."""
    words = [int.from_bytes(name.encode()[:8].ljust(8, b"\0"), "big") for name in names]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1)[0])
