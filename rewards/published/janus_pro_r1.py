"""Janus-Pro-R1: draw, look whether the image is right, draw again; each of the three is paid for itself.

Source: Pan et al., arXiv:2506.01480; wendell0218/Janus-Pro-R1, janus-rl/src/open_r1/grpo_trainer_t2iv1.py. With p1 and
p2 the probability of "yes" that a judge gives the first and the final image, and c = 1 where the self-check says yes:

    draw        p1
    self-check  1 - |p1 - c|
    redraw      p2; p1 where nothing was redrawn

Each has an advantage of its own over the group: (r - mean) / (sample standard deviation + 1e-4). The released trainer
can score in its own process; there the scorer is never called, every p stays 0, and the self-check is paid for saying
no. Here an image that was not scored is None.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from record.trajectory import Author, Modality, Trajectory
from rewards.contract import RewardContext
from rewards.functions.geneval import classes_of, score_images
from rewards.judge.base import Question
from rewards.published.judge_helpers import one_of
from runtime.errors import UserError

EPSILON = 1e-4
QUESTION = 'Does this picture show what the words "{prompt}" describe? Answer with yes or no.'
ROLES = ("inspect", "critique", "self_check")  # of the segments that look whether an image is right
Credit = Literal["trajectory", "segments"]
Places = tuple[list[int], int | None]  # segments of the images, and of the check


# ---- the formulas ---------------------------------------------------------------------------------------------


def segments(first_score: float, final_score: float, says_yes: bool) -> tuple[float, float, float]:
    """(draw, self-check, redraw), each in [0, 1]; their sum is the release's total."""
    return first_score, 1 - abs(first_score - float(says_yes)), final_score


def advantages(rewards: Sequence[float], group_size: int) -> list[float]:
    """Normalised within groups of `group_size` that stand next to each other."""
    normalised: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = list(rewards[start : start + group_size])
        mean = statistics.fmean(group)
        spread = statistics.stdev(group) if len(group) > 1 else 0.0
        normalised += [(reward - mean) / (spread + EPSILON) for reward in group]
    return normalised


# ---- the rewards ----------------------------------------------------------------------------------------------


def janus_pro_r1(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    credit: Credit = "segments",
    roles: Sequence[str] = ROLES,
    question: str = QUESTION,
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """Draw, self-check and redraw of each thought, the images scored by the recipe's judge.

    The first image, the first segment in one of `roles` after it, and the last image; a thought with one image
    redraws nothing, and its last image is the first. A check in which neither yes nor no can be read earns 0, and so
    does a thought without an image; None where the judge gave no probability.

    Args:
        credit: "segments" pays each of the three its own reward, which the advantages by segment then normalise in the
            group as the source does; "trajectory" pays the thought their sum, in [0, 3].
        question: with {prompt} for the prompt.
    """
    one_of("janus_pro_r1", "credit", credit, get_args(Credit))
    if "{prompt}" not in question:
        raise UserError("janus_pro_r1: the question has no {prompt}")
    if not trajectories:
        return []
    places = [_places(t, roles) for t in trajectories]
    asked = _ends(places)
    questions = [
        Question.of(question.format(prompt=trajectories[row].prompt), (_image(trajectories, row, index),))
        for row, index in asked
    ]
    said = context.judge_for("janus_pro_r1").yes_probability(questions) if questions else []
    return _paid(trajectories, places, dict(zip(asked, said, strict=True)), context.task, credit, log_metric)


def janus_pro_r1_geneval(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    credit: Credit = "segments",
    roles: Sequence[str] = ROLES,
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """The same with GenEval's graded score, of the recipe's detector, in place of the judge's probability; None where
    the record has no `include`. Options: see janus_pro_r1."""
    one_of("janus_pro_r1_geneval", "credit", credit, get_args(Credit))
    places = [_places(t, roles) for t in trajectories]
    asked = [(row, index) for row, index in _ends(places) if classes_of(trajectories[row].record)]
    graded = score_images(
        [_image(trajectories, row, index) for row, index in asked],
        [trajectories[row].record for row, _ in asked],
        context,
        "graded",
        "janus_pro_r1_geneval",
    )
    scores: dict[tuple[int, int], float | None] = dict(zip(asked, (float(s) for s, _ in graded), strict=True))
    return _paid(trajectories, places, scores, context.task, credit, log_metric)


def _paid(
    trajectories: Sequence[Trajectory],
    places: Sequence[Places],
    scores: dict[tuple[int, int], float | None],
    task: Any,
    credit: Credit,
    log_metric: Any,
) -> list[float | dict[int, float] | None]:
    """The three rewards by thought; `scores` is p by (thought, segment)."""
    rows: list[float | dict[int, float] | None] = []
    checks: list[bool] = []
    for row, (t, (drawn, check)) in enumerate(zip(trajectories, places, strict=True)):
        if not drawn:
            rows.append(0.0)
            continue
        first, final = scores.get((row, drawn[0])), scores.get((row, drawn[-1]))
        if first is None or final is None:
            rows.append(None)
            continue
        draw, _, redraw = segments(first, final, True)
        paid = {drawn[0]: draw}
        if check is not None:
            verdict = says_yes(t.segments[check].text, task)
            paid[check] = 0.0 if verdict is None else segments(first, final, verdict)[1]
            checks += [] if verdict is None else [verdict]
        if len(drawn) > 1:
            paid[drawn[-1]] = redraw
        rows.append(paid if credit == "segments" else sum(paid.values()) + (redraw if len(drawn) == 1 else 0.0))
    if log_metric is not None and checks:
        log_metric("says_yes", sum(checks) / len(checks))
    return rows


def says_yes(text: str, task: Any = None) -> bool | None:
    """What a self-check says: its first yes or no, else what the task reads in it (fine or wrong); None: neither."""
    found = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    if found:
        return found.group(1).lower() == "yes"
    verdict = task.claims(text).verdict if hasattr(task, "claims") else None
    return None if verdict is None else verdict == "fine"


def _places(trajectory: Trajectory, roles: Sequence[str]) -> Places:
    """Segments of the policy's images, and of the first check after the first of them."""
    own = [(index, s) for index, s in enumerate(trajectory.segments) if s.author is Author.POLICY]
    drawn = [index for index, s in own if s.image is not None]
    checks = [
        index for index, s in own if s.role in roles and s.modality is Modality.TEXT and drawn and index > drawn[0]
    ]
    return drawn, checks[0] if checks else None


def _ends(places: Sequence[Places]) -> list[tuple[int, int]]:
    """(thought, segment) of each thought's first and last image."""
    return [(row, index) for row, (drawn, _) in enumerate(places) for index in sorted({*drawn[:1], *drawn[-1:]})]


def _image(trajectories: Sequence[Trajectory], row: int, index: int) -> np.ndarray:
    image = trajectories[row].segments[index].image
    assert image is not None
    return image
