"""How sure a difference between two evaluations of the same prompts is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.heldout import EvaluationError, PromptScore, mean_of_tags


@dataclass(frozen=True)
class Interval:
    """A difference of two scores and its percentile interval."""

    difference: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.difference:+.3f} ({self.level:.0%} interval {self.low:+.3f} to {self.high:+.3f})"


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    tags: Sequence[str],
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of mean-of-tags(after) - mean-of-tags(before) over prompts (Efron, 1979).

    Prompts are drawn with replacement within each tag, since the tags are the benchmark's and not a sample; a prompt
    keeps its two scores together, so what makes it easy or hard cancels.

    Raises EvaluationError for sequences of different lengths, or none.
    """
    if not len(before) == len(after) == len(tags) or not len(tags):
        raise EvaluationError(
            f"a paired comparison needs the same prompts twice, not {len(before)} and {len(after)} "
            f"scores of {len(tags)} tags"
        )
    gain_P, tags_P = np.asarray(after, float) - np.asarray(before, float), np.asarray(tags)
    rng, means = np.random.default_rng(seed), []
    for tag in np.unique(tags_P):
        gain_Q = gain_P[tags_P == tag]
        means.append(rng.choice(gain_Q, (resamples, len(gain_Q))).mean(1))
    edges = np.quantile(np.mean(means, 0), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean_of_tags(gain_P.tolist(), tags), float(edges[0]), float(edges[1]), level)


def refinement(scores: Sequence[PromptScore], **options: int) -> Interval:
    """How much more the final images of one evaluation score than its first sketches."""
    return paired_bootstrap(
        [p.first_sketch for p in scores], [p.final_image for p in scores], [p.tag for p in scores], **options
    )


def compare(before: Sequence[PromptScore], after: Sequence[PromptScore], **options: int) -> Interval:
    """The gain of the final image's score between two evaluations.

    Raises EvaluationError unless both are of the same prompts in the same order.
    """
    for one, other in zip(before, after, strict=False):
        if one.prompt != other.prompt:
            raise EvaluationError(
                f"a paired comparison needs the same prompts twice: '{one.prompt}' stands where the "
                f"other evaluation has '{other.prompt}'"
            )
    return paired_bootstrap(
        [p.final_image for p in before], [p.final_image for p in after], [p.tag for p in after], **options
    )


@dataclass(frozen=True)
class ScorePair:
    """One score of two evaluations, and the second's less the first's."""

    a: float
    b: float
    interval: Interval

    def as_json(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "difference": self.interval.difference,
                "interval": [self.interval.low, self.interval.high]}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same prompts, score by score."""

    final_image: ScorePair
    by_tag: dict[str, ScorePair]  # of the final image; empty where the prompts have no tags
    first_image: ScorePair
    refinement: ScorePair  # the final image's score less the first one's


def compare_scores(a: Sequence[PromptScore], b: Sequence[PromptScore], **options: int) -> Comparison:
    """The paired bootstrap of every score that evaluations have; `options` are paired_bootstrap's."""
    tags = [p.tag for p in a]

    def pair(of: Callable[[PromptScore], float], tag: str | None = None) -> ScorePair:
        rows = [n for n, t in enumerate(tags) if tag in (None, t)]
        chosen = [tags[n] for n in rows]
        before, after = ([of(scores[n]) for n in rows] for scores in (a, b))
        interval = paired_bootstrap(before, after, chosen, **options)
        return ScorePair(mean_of_tags(before, chosen), mean_of_tags(after, chosen), interval)

    return Comparison(
        pair(lambda p: p.final_image),
        {tag: pair(lambda p: p.final_image, tag) for tag in sorted(set(tags) - {""})},
        pair(lambda p: p.first_sketch),
        pair(lambda p: p.final_image - p.first_sketch),
    )
