"""A gain between two evaluations of the same prompts, taken apart; every table adds up to its whole.

    by reward part    Shapley values of the recipe's formula, answer by answer (attribution.py)
    by role           of a part that credits segments: the roles' shares of its value (rewards/credit.py)
    by tag            a tag's gain divided by the number of tags, since a score is the mean of the tags' means
    by image          what first sketches gained, and what refining adds to that
    by prompt         the prompts that gained, those that lost, and those that stayed

Intervals are evals/bootstrap.py's: over prompts, each with all that is said of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.answers import Answer
from evals.attribution import attribute
from evals.bootstrap import Interval, paired_bootstrap
from evals.heldout import EvaluationError, PromptScore, mean_of_tags
from evals.measures import FINAL_IMAGE, FIRST_SKETCH
from rewards.formula.expression import Expression

REST = "the rest"  # of a gain by part: see attribution.py
SAME = 1e-9  # a prompt whose score moved less stayed as it was


@dataclass(frozen=True)
class Line:
    """One summand of a gain."""

    name: str
    before: float | None  # what it is of, in the earlier evaluation and in the later; None: it has no value of its own
    after: float | None
    gain: Interval  # what it contributes

    def as_json(self) -> dict[str, object]:
        interval = [self.gain.low, self.gain.high]
        return {"name": self.name, "from": self.before, "to": self.after, "gain": self.gain.difference,
                "interval": interval}  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """A gain and its summands."""

    name: str
    whole: Line
    lines: Sequence[Line]
    note: str = ""

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "whole": self.whole.as_json(), "lines": [each.as_json() for each in self.lines],
                "note": self.note}  # fmt: skip


@dataclass(frozen=True)
class Changed:
    """How many prompts a measure changed on, and what those contributed to the gain."""

    measure: str
    prompts: int
    up: int
    down: int
    gained: float  # what the prompts that gained contribute to the gain
    lost: float

    @property
    def same(self) -> int:
        return self.prompts - self.up - self.down

    def as_json(self) -> dict[str, object]:
        return {"measure": self.measure, "prompts": self.prompts, "up": self.up, "down": self.down, "same": self.same,
                "gained": self.gained, "lost": self.lost}  # fmt: skip


Pair = tuple[float, float, str]  # a prompt's two values, and its tag


def pairs_of(before: Sequence[PromptScore], after: Sequence[PromptScore], measure: str) -> list[Pair]:
    """Of the prompts that both have judged."""
    both = ((a.measures.get(measure), b.measures.get(measure), a.tag) for a, b in zip(before, after, strict=True))
    return [(a, b, tag) for a, b, tag in both if a is not None and b is not None]


def line_of(name: str, pairs: Sequence[Pair], resamples: int) -> Line:
    """A measure of both evaluations, and its gain. Raises EvaluationError of no pairs."""
    before, after, tags = [a for a, _, _ in pairs], [b for _, b, _ in pairs], [tag for *_, tag in pairs]
    interval = paired_bootstrap(before, after, tags, resamples=resamples)
    return Line(name, mean_of_tags(before, tags), mean_of_tags(after, tags), interval)


def by_tag(pairs: Sequence[Pair], resamples: int) -> list[Line]:
    """A tag's scores, and what it contributes to the mean of tags. Empty where the prompts have no tags."""
    tags = sorted({tag for *_, tag in pairs})
    if tags in ([], [""]):
        return []
    found = []
    for tag in tags:
        line = line_of(tag, [pair for pair in pairs if pair[2] == tag], resamples)
        found.append(Line(tag, line.before, line.after, _scaled(line.gain, 1 / len(tags))))
    return found


def by_image(before: Sequence[PromptScore], after: Sequence[PromptScore], resamples: int) -> Gain | None:
    """The final image's gain as that of the first sketches and that of refining, over the prompts where both are
    known. None: they are not."""
    names = (FIRST_SKETCH, FINAL_IMAGE)
    rows = [
        ([a.measures[n] for n in names], [b.measures[n] for n in names], a.tag)
        for a, b in zip(before, after, strict=True)
        if None not in [p.measures.get(n) for p in (a, b) for n in names]
    ]
    if not rows:
        return None
    whole, first, refined = (
        line_of(name, [(of(a), of(b), tag) for a, b, tag in rows], resamples)
        for name, of in (
            (FINAL_IMAGE, lambda x: x[1]),
            (FIRST_SKETCH, lambda x: x[0]),
            ("refining", lambda x: x[1] - x[0]),
        )
    )
    return Gain("first sketch and refining", whole, [first, refined])


def changed(measure: str, pairs: Sequence[Pair]) -> Changed:
    """The prompts that gained and lost; `gained` and `lost` add up to the gain."""
    tags = [tag for *_, tag in pairs]
    gain_P = [b - a for a, b, _ in pairs]
    up, down = ([max(0.0, sign * gain) if abs(gain) > SAME else 0.0 for gain in gain_P] for sign in (1, -1))
    return Changed(measure, len(pairs), sum(x > 0 for x in up), sum(x > 0 for x in down), mean_of_tags(up, tags),
                   -mean_of_tags(down, tags))  # fmt: skip


def by_part(
    expression: Expression,
    before: Sequence[Answer],
    after: Sequence[Answer],
    tags: Sequence[str],
    schedules: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
    resamples: int = 10_000,
) -> Gain:
    """The reward's gain by the parts that the formula names, over the answers that both evaluations have judged.

    Args:
        expression: the recipe's formula.
        tags: of the prompts, by number.
        schedules: their values in either evaluation.

    Raises:
        EvaluationError: no answer is judged in both.
        ExpressionError: the formula does not fit the recorded parts.
    """
    pairs = paired(before, after)
    pairs = [(a, b) for a, b in pairs if a.reward is not None and b.reward is not None]
    if not pairs:
        raise EvaluationError("no answer has a reward in both evaluations")
    rows = [
        [{**answer.parts, **of} for answer in column]
        for column, of in zip(zip(*pairs, strict=True), schedules, strict=True)
    ]
    groups: dict[int, list[int]] = {}
    for row, (a, _) in enumerate(pairs):
        groups.setdefault(a.prompt, []).append(row)
    found = attribute(expression, rows[0], rows[1], list(groups.values()) if expression.groupwise else None)
    prompts_tags = [tags[prompt] for prompt in groups]

    def means(values_N: Sequence[float] | np.ndarray) -> list[float]:
        return [float(np.mean([values_N[row] for row in members])) for members in groups.values()]

    def line(name: str, gains_N: np.ndarray, column: Iterable[tuple[float | None, float | None]]) -> Line:
        interval = paired_bootstrap([0.0] * len(groups), means(gains_N), prompts_tags, resamples=resamples)
        known = [(a, b) for a, b in column if a is not None and b is not None]
        if len(known) < len(pairs):
            return Line(name, None, None, interval)
        sides = [mean_of_tags(means([pair[side] for pair in known]), prompts_tags) for side in (0, 1)]
        return Line(name, sides[0], sides[1], interval)

    lines = [
        line(name, values_N, [(a.get(name), b.get(name)) for a, b in zip(*rows, strict=True)])
        for name, values_N in found.by_name.items()
    ]
    if np.abs(found.rest).max() > SAME:
        lines.append(line(REST, found.rest, ()))
    whole = line("reward", found.difference, [(a.reward, b.reward) for a, b in pairs])
    off = abs(float(whole.after or 0) - float(whole.before or 0) - whole.gain.difference)
    if off > 1e-6:
        raise EvaluationError(
            f"the formula '{expression.text}' gives another gain of the recorded parts than the recorded rewards have; "
            f"evaluate both again by one recipe"
        )
    judged = f"reward by part: over the {len(pairs)} of {len(before)} answers that both evaluations have judged"
    note = judged if len(pairs) < len(before) else ""
    return Gain("reward by part", whole, sorted(lines, key=lambda each: -abs(each.gain.difference)), note)


def paired(before: Sequence[Answer], after: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Answers to the same prompt under the same noise."""
    later = {(answer.prompt, answer.sample): answer for answer in after}
    return [(a, later[key]) for a in before if (key := (a.prompt, a.sample)) in later]


def by_role(before: Sequence[Answer], after: Sequence[Answer], tags: Sequence[str], resamples: int) -> list[Gain]:
    """For each part that credits segments: its gain by the roles that it credits, over the answers in which it credits
    any in both evaluations."""
    pairs = paired(before, after)
    found = []
    for part in dict.fromkeys(part for pair in pairs for answer in pair for part in answer.credit):
        both = [(a.credit[part], b.credit[part], a.prompt) for a, b in pairs if part in a.credit and part in b.credit]
        if not both:
            continue
        prompts = list(dict.fromkeys(prompt for *_, prompt in both))

        def line(name: str, roles: Sequence[str], both=both, prompts=prompts) -> Line:
            of: dict[int, list[tuple[float, float]]] = {prompt: [] for prompt in prompts}
            for a, b, prompt in both:
                of[prompt].append(tuple(math.fsum(x.get(r, 0.0) for r in roles) for x in (a, b)))  # type: ignore[arg-type]
            means = [(*np.mean(values, 0).tolist(), tags[prompt]) for prompt, values in of.items()]
            return line_of(name, means, resamples)

        roles = sorted({role for a, b, _ in both for role in (*a, *b)})
        found.append(Gain(part, line(part, roles), [line(role, [role]) for role in roles]))
    return found


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(factor * interval.difference, factor * interval.low, factor * interval.high, interval.level)
