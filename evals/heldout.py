"""Held-out prompts, scored: measures by prompt, a mean by tag, and the mean of the tags.

Each prompt is answered under noise that depends on (seed, prompt, sample) alone, so that two policies, or one before
and after training, are compared on the same prompts under the same noise: bootstrap.py says how sure the difference is.
What is measured is an Evaluation's (tasks/base.py); measures.py has GenEval's rule and the recipe's reward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.answers import Answer
from evals.calibration import Calibration, Critique
from record.trajectory import Trajectory
from rewards.credit import role_shares
from rollout.requests import request_of
from runtime.errors import UserError
from tasks.base import Evaluation

if TYPE_CHECKING:  # scores that are kept are read without torch, which it imports
    from rollout.config import FlowConfig
    from rollout.pool.contract import Rollouts

MeasureByName = Mapping[str, float | None]


class EvaluationError(UserError):
    """Held-out scores that would not mean what they say."""


@dataclass(frozen=True)
class PromptScore:
    """One prompt, averaged over those of its samples that were judged."""

    prompt: str
    tag: str  # empty: the task's prompts have none
    measures: MeasureByName  # None: no sample was judged

    def as_json(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "tag": self.tag, **self.measures}

    @classmethod
    def of_json(cls, row: Mapping[str, Any]) -> PromptScore:
        """Raises KeyError, TypeError or ValueError where `row` is none."""
        measures = {
            name: None if value is None else float(value)
            for name, value in row.items()
            if name not in ("prompt", "tag")
        }
        if not measures:
            raise ValueError("no measure in it")
        return cls(str(row["prompt"]), str(row["tag"]), measures)


@dataclass(frozen=True)
class Heldout:
    """A policy's held-out scores."""

    prompts: Sequence[PromptScore]
    trajectories: Sequence[list[Trajectory]]  # by prompt; their `rewards` are their own scores
    metrics: Mapping[str, float]  # of the rollouts
    score_name: str  # the measure that is the score
    critiques: Sequence[Critique] | None = None  # None: they were not judged
    answers: Sequence[Answer] = ()  # where the recipe's reward was measured
    formula: Mapping[str, Any] | None = None  # that it was made by: `total`, and the values of `schedules`

    @property
    def calibration(self) -> Calibration | None:
        """Of the policy's verdicts on its own images; None: they were not judged, or it gave none."""
        return Calibration.of(self.critiques) if self.critiques else None

    @property
    def score(self) -> float:
        """The mean over tags of the mean over the tag's prompts, as GenEval's overall score."""
        return self.mean(self.score_name)

    def mean(self, measure: str) -> float:
        """The mean of the tags' means over the prompts that were judged; NaN where none was."""
        return mean_of_measure(self.prompts, measure)

    @property
    def means(self) -> dict[str, float]:
        return {measure: self.mean(measure) for measure in measures_of(self.prompts)}

    @property
    def tags(self) -> dict[str, float]:
        """The score by tag; empty where the prompts have none."""
        return means_by_tag(self.prompts, self.score_name)

    @property
    def unjudged(self) -> int:
        """Prompts without a score."""
        return sum(p.measures.get(self.score_name) is None for p in self.prompts)

    def as_metrics(self) -> dict[str, float]:
        """heldout/score, heldout/<measure>, heldout/tag/<tag>; heldout/unjudged where some prompts have no score;
        heldout/calibration/* where critiques were judged (calibration.py)."""
        return {
            "heldout/score": self.score,
            **{f"heldout/{measure}": mean for measure, mean in self.means.items()},
            **{f"heldout/tag/{tag}": score for tag, score in self.tags.items()},
            **({"heldout/unjudged": float(self.unjudged)} if self.unjudged else {}),
            **(self.calibration.as_metrics("heldout/calibration") if self.calibration else {}),
        }

    def save(self, path: Path) -> None:
        """Measures by prompt, one JSON object a line."""
        Path(path).write_text("".join(json.dumps(prompt.as_json()) + "\n" for prompt in self.prompts))


def evaluate(
    rollouts: Rollouts,
    evaluations: Sequence[Evaluation],
    records: Sequence[dict[str, Any]],
    seed: int,
    samples: int = 1,
    each: Callable[[int, list[Trajectory]], None] | None = None,
    flow: FlowConfig | None = None,
    critics: Callable[[Sequence[Sequence[Trajectory]]], list[Critique]] | None = None,
) -> Heldout:
    """Answer every record `samples` times and measure each answer.

    Args:
        evaluations: the first one's score is the score.
        records: held-out; their order numbers them, so keep it between evaluations.
        each: is told a prompt's number and its answers as they are finished.
        flow: how images are denoised; None: as `rollouts` do.
        critics: judges the policy's verdicts on its own images (critiques.py); None: nobody does.

    Raises:
        EvaluationError: there are no records; or some prompts got no answer, so that a mean over the others would not
            compare; or nothing at all was judged.
        UserError: an evaluation finds a record that it cannot score; nothing was sampled.
    """
    if not records:
        raise EvaluationError("there are no held-out prompts to evaluate on")
    for evaluation in evaluations:
        evaluation.check(records)
    groups, metrics = answer(rollouts, records, seed, samples, each, flow)
    return measure(evaluations, records, groups, metrics, critics)


def answer(
    rollouts: Rollouts,
    records: Sequence[dict[str, Any]],
    seed: int,
    samples: int = 1,
    each: Callable[[int, list[Trajectory]], None] | None = None,
    flow: FlowConfig | None = None,
) -> tuple[Sequence[list[Trajectory]], Mapping[str, float]]:
    """Every record's answers, and the metrics of the rollouts; arguments as `evaluate` has them.

    Raises EvaluationError where some prompts got no answer, so that a mean over the others would not compare.
    """
    requests = [request_of(number, record, range(samples), seed, flow) for number, record in enumerate(records)]
    result = rollouts.generate(requests, each=each)
    if result.failed:
        first = result.failed[0]
        raise EvaluationError(
            f"{len(result.failed)} of {len(records)} held-out prompts got no answer; the first is "
            f"'{records[first.index]['prompt']}' ({first.reason}: {first.detail})"
        )

    return result.groups, result.metrics


def measure(
    evaluations: Sequence[Evaluation],
    records: Sequence[dict[str, Any]],
    groups: Sequence[list[Trajectory]],
    metrics: Mapping[str, float],
    critics: Callable[[Sequence[Sequence[Trajectory]]], list[Critique]] | None = None,
) -> Heldout:
    """Answers by record, scored; their critiques judged where `critics` are given.

    Raises EvaluationError where nothing at all was judged.
    """
    trajectories = [trajectory for group in groups for trajectory in group]
    values: dict[str, list[float | None]] = {}
    shown: list[dict[str, float | None]] = [{} for _ in trajectories]
    for evaluation in evaluations:
        values |= evaluation(trajectories)
        for scores, trajectory in zip(shown, trajectories, strict=True):
            scores |= trajectory.rewards
    for scores, trajectory in zip(shown, trajectories, strict=True):
        trajectory.rewards = scores

    prompts, row = [], 0
    for record, group in zip(records, groups, strict=True):
        rows = slice(row, row := row + len(group))
        measures = {name: _mean(column[rows]) for name, column in values.items()}
        prompts.append(PromptScore(record["prompt"], tag_of(record), measures))
    critiques = critics(groups) if critics is not None else None
    formula = next((found for e in evaluations if (found := getattr(e, "formula", None)) is not None), None)
    answers = _answers(groups, values) if formula is not None else ()
    heldout = Heldout(prompts, groups, metrics, evaluations[0].score, critiques, answers, formula)
    if heldout.unjudged == len(prompts):
        raise EvaluationError(
            f"none of {len(prompts)} held-out prompts has a score: evaluation '{evaluations[0].name}' judged nothing"
        )
    return heldout


def _answers(groups: Sequence[Sequence[Trajectory]], values: Mapping[str, Sequence[float | None]]) -> list[Answer]:
    numbered = [(number, trajectory) for number, group in enumerate(groups) for trajectory in group]
    return [
        Answer(number, t.member, {name: column[row] for name, column in values.items()}, role_shares(t))
        for row, (number, t) in enumerate(numbered)
    ]


def tag_of(record: Mapping[str, Any]) -> str:
    """The kind of a prompt, by which scores are averaged; empty where the record says none."""
    return str(record.get("tag") or "")


def mean_of_tags(values: Sequence[float], tags: Sequence[str]) -> float:
    """Every tag weighs the same, however many prompts it has; NaN of nothing."""
    values_P, tags_P = np.asarray(values, float), np.asarray(tags)
    return float(np.mean([values_P[tags_P == tag].mean() for tag in np.unique(tags_P)])) if len(tags) else float("nan")


def measures_of(prompts: Sequence[PromptScore]) -> list[str]:
    """Every measure by which some prompt was judged, in order."""
    found = (name for prompt in prompts for name, value in prompt.measures.items() if value is not None)
    return list(dict.fromkeys(found))


def mean_of_measure(prompts: Sequence[PromptScore], measure: str) -> float:
    """See Heldout.mean."""
    judged = [(value, p.tag) for p in prompts if (value := p.measures.get(measure)) is not None]
    return mean_of_tags([value for value, _ in judged], [tag for _, tag in judged])


def means_by_tag(prompts: Sequence[PromptScore], measure: str) -> dict[str, float]:
    """The mean of each tag that has a name and a judged prompt."""
    by_tag: dict[str, list[float]] = {}
    for prompt in prompts:
        value = prompt.measures.get(measure)
        if prompt.tag and value is not None:
            by_tag.setdefault(prompt.tag, []).append(value)
    return {tag: float(np.mean(by_tag[tag])) for tag in sorted(by_tag)}


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


def _mean(values: Sequence[float | None]) -> float | None:
    judged = [value for value in values if value is not None]
    return float(np.mean(judged)) if judged else None
