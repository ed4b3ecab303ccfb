"""Held-out prompts, scored as GenEval scores: a mean by tag, and the mean of the tags.

Each prompt is answered under noise that depends on (seed, prompt, sample) alone, so that two policies, or one before
and after training, are compared on the same prompts under the same noise: bootstrap.py says how sure the difference is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from record.trajectory import Trajectory
from rewards.contract import RewardContext, policy_images
from rewards.functions.geneval import check_record, score_images
from rollout.pool.contract import Rollouts
from rollout.requests import RolloutRequest
from runtime.errors import UserError

Scorer = Callable[[Sequence[np.ndarray], Sequence[dict[str, Any]]], list[float]]


class EvaluationError(UserError):
    """Held-out scores that would not mean what they say."""


@dataclass(frozen=True)
class PromptScore:
    """One prompt, averaged over its samples. All scores lie in [0, 1]."""

    prompt: str
    tag: str  # empty: the task's prompts have none
    final_image: float  # of the last image; 0 where none was drawn: the task was to draw
    first_sketch: float  # of the first one
    images: float  # drawn, on average


@dataclass(frozen=True)
class Heldout:
    """A policy's held-out scores."""

    prompts: list[PromptScore]
    trajectories: list[list[Trajectory]]  # by prompt; their `rewards` are the scores of "first image" and "final image"
    metrics: dict[str, float]  # of the rollouts

    @property
    def final_image(self) -> float:
        """The score: the mean over tags of the mean over the tag's prompts, as GenEval's overall score."""
        return mean_of_tags([p.final_image for p in self.prompts], [p.tag for p in self.prompts])

    @property
    def first_sketch(self) -> float:
        return mean_of_tags([p.first_sketch for p in self.prompts], [p.tag for p in self.prompts])

    @property
    def tags(self) -> dict[str, float]:
        """The final image's score by tag; empty where the prompts have none."""
        return {
            tag: float(np.mean([p.final_image for p in self.prompts if p.tag == tag]))
            for tag in sorted({p.tag for p in self.prompts} - {""})
        }

    def as_metrics(self) -> dict[str, float]:
        """heldout/score (the final image's), heldout/first_sketch, heldout/final_image, heldout/<tag>, ..."""
        return {
            "heldout/score": self.final_image,
            "heldout/final_image": self.final_image,
            "heldout/first_sketch": self.first_sketch,
            "heldout/images": float(np.mean([p.images for p in self.prompts])),
            **{f"heldout/tag/{tag}": score for tag, score in self.tags.items()},
        }

    def save(self, path: Path) -> None:
        """Scores by prompt, one JSON object a line."""
        Path(path).write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in self.prompts))


def evaluate(
    rollouts: Rollouts,
    score: Scorer,
    records: Sequence[dict[str, Any]],
    seed: int,
    samples: int = 1,
    each: Callable[[int, list[Trajectory]], None] | None = None,
) -> Heldout:
    """Answer every record `samples` times and score the first and the last image of each answer.

    Args:
        score: images and their records to scores in [0, 1]; `geneval_scorer` gives the released rules.
        records: held-out, in GenEval's schema; their order numbers them, so keep it between evaluations.
        each: is told a prompt's number and its answers as they are finished.

    Raises:
        EvaluationError: there are no records, or one that cannot be scored; or some prompts got no answer, so that a
            mean over the others would not compare.
    """
    if not records:
        raise EvaluationError("there are no held-out prompts to evaluate on")
    if isinstance(score, GenevalScorer):
        score.check(records)
    requests = [
        RolloutRequest(number, record["prompt"], record, tuple(range(samples)), seed)
        for number, record in enumerate(records)
    ]
    result = rollouts.generate(requests, each=each)
    if result.failed:
        first = result.failed[0]
        raise EvaluationError(
            f"{len(result.failed)} of {len(records)} held-out prompts got no answer; the first is "
            f"'{records[first.index]['prompt']}' ({first.reason}: {first.detail})"
        )
    drawn = [[image for _, image in policy_images(t)] for group in result.groups for t in group]
    owners = [records[group[0].group] for group in result.groups for _ in group]
    some = [row for row, images in enumerate(drawn) if images]
    scores = {position: np.zeros(len(drawn)) for position in (0, -1)}
    for position, score_T in scores.items():
        score_T[some] = score([drawn[row][position] for row in some], [owners[row] for row in some])

    for row, trajectory in enumerate(t for group in result.groups for t in group):
        trajectory.rewards = {"first image": float(scores[0][row]), "final image": float(scores[-1][row])}
    prompts, row = [], 0
    for record, group in zip(records, result.groups, strict=True):
        rows = slice(row, row := row + len(group))
        prompts.append(
            PromptScore(
                record["prompt"],
                tag_of(record),
                float(scores[-1][rows].mean()),
                float(scores[0][rows].mean()),
                float(np.mean([len(p) for p in drawn[rows]])),
            )
        )
    return Heldout(prompts, result.groups, result.metrics)


def tag_of(record: Mapping[str, Any]) -> str:
    """The kind of a prompt, by which scores are averaged; empty where the record says none."""
    return str(record.get("tag") or "")


def mean_of_tags(values: Sequence[float], tags: Sequence[str]) -> float:
    """Every tag weighs the same, however many prompts it has."""
    values_P, tags_P = np.asarray(values, float), np.asarray(tags)
    return float(np.mean([values_P[tags_P == tag].mean() for tag in np.unique(tags_P)]))


@dataclass(frozen=True)
class GenevalScorer:
    """GenEval's released rules: 1 where the image shows what the record asks for, else 0."""

    context: RewardContext

    def __call__(self, images: Sequence[np.ndarray], records: Sequence[dict[str, Any]]) -> list[float]:
        return [float(correct) for correct, _ in score_images(images, records, self.context, "standard")]

    def check(self, records: Sequence[dict[str, Any]]) -> None:
        """Raises EvaluationError for a record that says nothing of what to draw: without an image it would score 0,
        as one does that was drawn wrong. UserError as rewards.functions.geneval.check_record."""
        detector = self.context.detector_for("geneval")
        for record in records:
            where = f"the held-out prompt '{record['prompt']}'"
            if not record.get("include"):
                raise EvaluationError(f"{where} has no `include`, by which GenEval's rule scores an image")
            check_record(detector, record, where)


def geneval_scorer(context: RewardContext) -> GenevalScorer:
    """See GenevalScorer."""
    return GenevalScorer(context)


def spread_over_tags(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` records, as evenly over the tags as there are enough; evenly spaced within a tag, in their order.

    Raises EvaluationError when there are fewer.
    """
    if count > len(records):
        raise EvaluationError(
            f"evaluate.prompts asks for {count} held-out prompts, and the task has {len(records)}; "
            + (f"give at most {len(records)}" if records else "hold some out, or evaluate on another task")
        )
    by_tag: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        by_tag.setdefault(tag_of(record), []).append(number)
    share = dict.fromkeys(by_tag, 0)
    while sum(share.values()) < count:
        open_tags = [tag for tag in by_tag if share[tag] < len(by_tag[tag])]
        for tag in open_tags[: count - sum(share.values())]:
            share[tag] += 1
    chosen = [
        by_tag[tag][index * len(by_tag[tag]) // wanted] for tag, wanted in share.items() for index in range(wanted)
    ]
    return [records[number] for number in sorted(chosen)]
