"""How far a policy's verdicts on its own images can be trusted: a confusion table, rates, and calibration.

A critique says "fine" or "wrong" of an image; whether it is right is GenEval's rule on what the image owes, by the
recipe's detector. P("fine") is what the policy's law gave the word at the place of the verdict.

    said_fine/is_right ...              how many critiques, by what they say and what is so
    approved_but_wrong_of_approved      share of the images it approved that are wrong (the false discovery rate)
    approved_but_wrong_of_wrong         share of the wrong images that it approved (the false positive rate)
    disturbed_but_right_of_disturbed    share of the images it called wrong that are right (the false omission rate)
    disturbed_but_right_of_right        share of the right images that it called wrong (the miss rate)
    agreement, unreadable               share of all critiques that say what is so; that give no verdict
    brier                               mean (P("fine") - 1 if right else 0)^2 (Brier, Monthly Weather Review 78, 1950)
    expected_calibration_error          over 10 bins of equal width of P("fine"): the mean of |mean P("fine") - share of
                                        right images|, weighted by critiques (Naeini, Cooper and Hauskrecht, AAAI 2015)

The last two are over the critiques whose P("fine") is known; all are pooled over critiques, not averaged by prompt. A
share of nothing is not given.

Letters: P prompts, R resamples, K the columns of a table, B bins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

BINS = 10
SAID = ("said_fine", "said_wrong", "unreadable")
TRUTH = ("is_right", "is_wrong")
CELLS = tuple(f"{said}/{truth}" for said in SAID for truth in TRUTH)
# Higher is better of this one; of the others lower.
AGREEMENT = "agreement"
BRIER, CALIBRATION_ERROR = "brier", "expected_calibration_error"
OF_CHANCES = (BRIER, CALIBRATION_ERROR)  # those that rest on P("fine")
MEASURES = (
    "approved_but_wrong_of_approved",
    "approved_but_wrong_of_wrong",
    "disturbed_but_right_of_disturbed",
    "disturbed_but_right_of_right",
    AGREEMENT,
    "unreadable",
    BRIER,
    CALIBRATION_ERROR,
)


@dataclass(frozen=True)
class Critique:
    """One verdict of a policy on an image of its own."""

    prompt: int  # number of its prompt
    sample: int  # which answer to it
    segment: int
    said: Literal["fine", "wrong"] | None  # None: no verdict that can be read
    right: bool  # whether the image shows what it owes
    p_fine: float | None = None  # under the policy's law at the place of the verdict; None: not known

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, row: Mapping[str, Any]) -> Critique:
        """Raises KeyError, TypeError or ValueError where `row` is none."""
        said, p_fine = row["said"], row["p_fine"]
        if said not in ("fine", "wrong", None) or not isinstance(row["right"], bool):
            raise ValueError("no verdict in it")
        if p_fine is not None and not 0 <= float(p_fine) <= 1:
            raise ValueError(f"a probability of {p_fine}")
        prompt, sample, segment = (int(row[name]) for name in ("prompt", "sample", "segment"))
        return cls(prompt, sample, segment, said, row["right"], None if p_fine is None else float(p_fine))


@dataclass(frozen=True)
class Bin:
    """The critiques whose P("fine") lies in [low, high), the last bin's in [low, high]."""

    low: float
    high: float
    critiques: int
    p_fine: float  # their mean; NaN of none
    right: float  # share of images that are right; NaN of none


@dataclass(frozen=True)
class Calibration:
    """What is measured of some critiques: the sums that every measure is made of."""

    sums_K: np.ndarray  # see table_of

    @classmethod
    def of(cls, critiques: Sequence[Critique]) -> Calibration:
        return cls(table_of(critiques, 1 + max((c.prompt for c in critiques), default=0)).sum(0))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Critiques by what they say and what is so; the keys are CELLS."""
        return {cell: int(count) for cell, count in zip(CELLS, self.sums_K[: len(CELLS)], strict=True)}

    @property
    def critiques(self) -> int:
        return sum(self.counts.values())

    @property
    def unreadable(self) -> int:
        """Critiques without a verdict, which have no P("fine")."""
        return sum(self.counts[f"unreadable/{truth}"] for truth in TRUTH)

    @cached_property
    def scored(self) -> int:
        """Critiques whose P("fine") is known."""
        return int(self.sums_K[_SCORED])

    @cached_property
    def measures(self) -> dict[str, float]:
        """By name; what would divide by zero is left out."""
        found = {name: float(value) for name, value in measures_of_sums(self.sums_K).items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    @property
    def bins(self) -> list[Bin]:
        """Of the reliability diagram."""
        count_B, p_B, right_B = self.sums_K[_BINNED:].reshape(3, BINS)
        return [
            Bin(b / BINS, (b + 1) / BINS, int(n), p / n if n else math.nan, y / n if n else math.nan)
            for b, (n, p, y) in enumerate(zip(count_B, p_B, right_B, strict=True))
        ]

    def as_metrics(self, prefix: str = "calibration") -> dict[str, float]:
        """<prefix>/<measure>, and <prefix>/<cell> for the counts; empty without a critique."""
        if not self.critiques:
            return {}
        named = {**self.measures, **{cell: float(count) for cell, count in self.counts.items()}}
        return {f"{prefix}/{name}": value for name, value in named.items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "critiques": self.critiques,
            "scored": self.scored,
            "counts": self.counts,
            **self.measures,
            "bins": [
                {**asdict(each), "p_fine": each.p_fine if each.critiques else None,
                 "right": each.right if each.critiques else None}
                for each in self.bins
            ],
        }  # fmt: skip


_SCORED, _SQUARES = len(CELLS), len(CELLS) + 1
_BINNED = _SQUARES + 1
WIDTH = _BINNED + 3 * BINS


def table_of(critiques: Iterable[Critique], prompts: int) -> np.ndarray:
    """float64 [P, K]: by prompt, the critiques in each cell; those with a known P("fine"), and the sum of its squared
    errors; and by bin the critiques, the sum of P("fine"), and the right images."""
    table_PK = np.zeros((prompts, WIDTH))
    for critique in critiques:
        row_K = table_PK[critique.prompt]
        said = SAID.index("unreadable" if critique.said is None else f"said_{critique.said}")
        row_K[len(TRUTH) * said + (not critique.right)] += 1
        if critique.p_fine is not None:
            row_K[_SCORED] += 1
            row_K[_SQUARES] += (critique.p_fine - critique.right) ** 2
            b = min(int(critique.p_fine * BINS), BINS - 1)
            row_K[[_BINNED + b, _BINNED + BINS + b, _BINNED + 2 * BINS + b]] += 1, critique.p_fine, critique.right
    return table_PK


def measures_of_sums(sums_RK: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure of each row of sums [..., K], by name; NaN where it would be over nothing."""
    cell = {name: sums_RK[..., k] for k, name in enumerate(CELLS)}
    wrong = sum(cell[f"{said}/is_wrong"] for said in SAID)
    right = sum(cell[f"{said}/is_right"] for said in SAID)
    approved = cell["said_fine/is_right"] + cell["said_fine/is_wrong"]
    disturbed = cell["said_wrong/is_right"] + cell["said_wrong/is_wrong"]
    unreadable = cell["unreadable/is_right"] + cell["unreadable/is_wrong"]
    scored = sums_RK[..., _SCORED]
    binned_R3B = sums_RK[..., _BINNED:].reshape(*sums_RK.shape[:-1], 3, BINS)
    off_R = np.abs(binned_R3B[..., 1, :] - binned_R3B[..., 2, :]).sum(-1)  # n |mean p - share right|, over bins

    def share(of: Any, among: Any) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(among > 0, of / among, np.nan)

    shares = (
        share(cell["said_fine/is_wrong"], approved),
        share(cell["said_fine/is_wrong"], wrong),
        share(cell["said_wrong/is_right"], disturbed),
        share(cell["said_wrong/is_right"], right),
        share(cell["said_fine/is_right"] + cell["said_wrong/is_wrong"], right + wrong),
        share(unreadable, right + wrong),
        share(sums_RK[..., _SQUARES], scored),
        share(off_R, scored),
    )
    return dict(zip(MEASURES, shares, strict=True))


def lines_of(critiques: Iterable[Critique]) -> str:
    """Critiques as JSON, one a line."""
    return "".join(json.dumps(critique.as_json()) + "\n" for critique in critiques)
