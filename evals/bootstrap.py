"""How sure a difference between two evaluations of the same prompts is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.calibration import MEASURES, Critique, measures_of_sums, table_of
from evals.heldout import EvaluationError, PromptScore, mean_of_tags, measures_of
from evals.measures import FINAL_IMAGE, FIRST_SKETCH


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
    return _paired(scores, scores, FIRST_SKETCH, FINAL_IMAGE, **options)


def compare(
    before: Sequence[PromptScore], after: Sequence[PromptScore], measure: str = FINAL_IMAGE, **options: int
) -> Interval:
    """The gain of a measure between two evaluations, over the prompts that both have judged.

    Raises EvaluationError unless both are of the same prompts in the same order.
    """
    for one, other in zip(before, after, strict=False):
        if one.prompt != other.prompt:
            raise EvaluationError(
                f"a paired comparison needs the same prompts twice: '{one.prompt}' stands where the "
                f"other evaluation has '{other.prompt}'"
            )
    if len(before) != len(after):
        raise EvaluationError(
            f"a paired comparison needs the same prompts twice, not {len(before)} and {len(after)} of them"
        )
    return _paired(before, after, measure, measure, **options)


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
    """Two evaluations of the same prompts, measure by measure, over the prompts that both have judged."""

    score_name: str
    score: ScorePair
    by_tag: dict[str, ScorePair]  # the score's; empty where the prompts have no tags
    others: dict[str, ScorePair]  # the other measures
    refinement: ScorePair | None  # the final image's score less the first one's, where both were measured


def compare_scores(
    a: Sequence[PromptScore], b: Sequence[PromptScore], score: str = FINAL_IMAGE, **options: int
) -> Comparison:
    """The paired bootstrap of every measure that both evaluations have; `options` are paired_bootstrap's.

    Raises EvaluationError where no prompt has the score in both.
    """

    def pair(of: Callable[[PromptScore], float | None], tag: str | None = None) -> ScorePair | None:
        both = [(x, y, p.tag) for p, q in zip(a, b, strict=True) if None not in (x := of(p), y := of(q))]
        rows = [(float(x), float(y), t) for x, y, t in both if tag in (None, t)]  # type: ignore[arg-type]
        if not rows:
            return None
        before, after, tags = (list(column) for column in zip(*rows, strict=True))
        interval = paired_bootstrap(before, after, tags, **options)
        return ScorePair(mean_of_tags(before, tags), mean_of_tags(after, tags), interval)

    def measure(name: str) -> Callable[[PromptScore], float | None]:
        return lambda p: p.measures.get(name)

    def refined(p: PromptScore) -> float | None:
        first, final = p.measures.get(FIRST_SKETCH), p.measures.get(FINAL_IMAGE)
        return None if first is None or final is None else final - first

    whole = pair(measure(score))
    if whole is None:
        raise EvaluationError(f"no prompt has the measure '{score}' in both evaluations")
    by_tag = {tag: pair(measure(score), tag) for tag in sorted({p.tag for p in a} - {""})}
    others = {name: pair(measure(name)) for name in measures_of(a) if name != score}
    return Comparison(
        score,
        whole,
        {tag: found for tag, found in by_tag.items() if found is not None},
        {name: found for name, found in others.items() if found is not None},
        pair(refined),
    )


def compare_calibration(
    a: Sequence[Critique],
    b: Sequence[Critique],
    tags: Sequence[str],
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, ScorePair]:
    """Every measure of evals/calibration.py that both have, and its difference with the percentile interval.

    Prompts are drawn with replacement within each tag, and bring all critiques of both evaluations along. A measure is
    pooled over the critiques of a resample; a resample in which it is over nothing counts for nothing.

    Args:
        tags: of the prompts, in their order.
    """
    tags_P = np.asarray(tags)
    tables_PK = [table_of(critiques, len(tags)) for critiques in (a, b)]
    rng = np.random.default_rng(seed)
    times_RP = np.zeros((resamples, len(tags)))
    for tag in np.unique(tags_P):
        members = np.flatnonzero(tags_P == tag)
        times_RP[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    whole = [measures_of_sums(table_PK.sum(0)) for table_PK in tables_PK]
    drawn = [measures_of_sums(times_RP @ table_PK) for table_PK in tables_PK]
    found = {}
    for name in MEASURES:
        before, after = (float(measures[name]) for measures in whole)
        if not (math.isfinite(before) and math.isfinite(after)):
            continue
        low, high = np.nanquantile(drawn[1][name] - drawn[0][name], [(1 - level) / 2, (1 + level) / 2])
        found[name] = ScorePair(before, after, Interval(after - before, float(low), float(high), level))
    return found


def _paired(
    before: Sequence[PromptScore], after: Sequence[PromptScore], one: str, other: str, **options: int
) -> Interval:
    rows = [(p.measures.get(one), q.measures.get(other), p.tag) for p, q in zip(before, after, strict=True)]
    rows = [row for row in rows if row[0] is not None and row[1] is not None]
    return paired_bootstrap(
        [x or 0.0 for x, _, _ in rows], [y or 0.0 for _, y, _ in rows], [t for *_, t in rows], **options
    )
