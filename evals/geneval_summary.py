"""From GenEval's result rows to its numbers.

Source: djghosh13/geneval, evaluation/summary_scores.py. A score is the mean of the tags' means; a prompt is its record,
word by word, and counts as solved if any of its images is correct.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from evals.heldout import EvaluationError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Summary:
    """GenEval's numbers; shares are in [0, 1]."""

    overall: float  # the mean of the tags
    tags: dict[str, float]  # share of correct images
    images: float  # share of correct images over all
    prompts: float  # share of prompts with a correct image
    counts: dict[str, tuple[float, int]]  # by tag: correct, judged
    num_images: int
    num_prompts: int
    prompts_expected: int | None = None  # None: nobody says how many there are
    unjudged: int = 0  # of num_images, those without a verdict

    @property
    def incomplete(self) -> bool:
        return self.prompts_expected is not None and self.num_prompts < self.prompts_expected

    def as_json(self) -> dict[str, Any]:
        return {
            "overall": self.overall,
            "tags": self.tags,
            "images": self.images,
            "prompts": self.prompts,
            "num_images": self.num_images,
            "num_prompts": self.num_prompts,
            "prompts_expected": self.prompts_expected,
            "unjudged": self.unjudged,
        }


def summarise(rows: Sequence[Mapping[str, Any]], prompts_expected: int | None = None) -> Summary:
    """The scores of all rows, each with `tag`, `correct` (a bool, or a share) and `metadata` (the record as text).

    As in the release, a row without a tag is in the totals alone, one without metadata belongs to no prompt, and one
    without a verdict is in no mean; the release prints it among the images of its tag all the same, and `counts` does
    not.

    Raises:
        EvaluationError: there are no rows, a key is in none of them, a value is of another kind, or no image of a tag
            was judged.
    """
    if not rows:
        raise EvaluationError("there are no images to sum up")
    for key, kind, what in (
        ("tag", str, "a text"),
        ("correct", bool | int | float, "true, false or a share"),
        ("metadata", str, "the record as a text"),
    ):
        values = [row.get(key) for row in rows]
        fits = [isinstance(value, kind | None) and value == value for value in values]  # NaN is no share
        wrong = next((number for number, fit in enumerate(fits) if not fit), None)
        if wrong is not None:
            raise EvaluationError(f"result row {wrong + 1} has {key} {values[wrong]!r}; it is {what}")
        if all(value is None for value in values):
            raise EvaluationError(f"no result row has '{key}'")
    judged = [row for row in rows if row.get("correct") is not None]
    tags = {row["tag"] for row in rows if row.get("tag") is not None}
    tallies: dict[str, tuple[float, int]] = {}
    for tag in [*(tag for tag in TAGS if tag in tags), *sorted(tags - set(TAGS))]:
        verdicts = [row["correct"] for row in judged if row.get("tag") == tag]
        if not verdicts:
            raise EvaluationError(f"no image of the tag '{tag}' was judged, so that there is no mean of the tags")
        tallies[tag] = (_added(verdicts), len(verdicts))
    solved: dict[str, bool] = {}
    for row in rows:
        if row.get("metadata") is not None:
            solved[row["metadata"]] = solved.get(row["metadata"], False) or bool(row.get("correct"))
    shares = {tag: correct / count for tag, (correct, count) in tallies.items()}
    return Summary(
        overall=_added(shares.values()) / len(shares),
        tags=shares,
        images=_added(row["correct"] for row in judged) / len(judged),
        prompts=sum(solved.values()) / len(solved),
        counts=tallies,
        num_images=len(rows),
        num_prompts=len(solved),
        prompts_expected=prompts_expected,
        unjudged=len(rows) - len(judged),
    )


def _added(values: Iterable[float]) -> float:
    """One after another, which decides the last digit shown; from Python 3.12 on, sum() corrects its rounding."""
    return reduce(operator.add, values, 0)
