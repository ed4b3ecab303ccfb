"""The page of `underdrawing diff`: pairs of thoughts side by side, and the decision at which they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.bootstrap import ScorePair
from evals.trajectory_diff import DiffSummary, FirstDifference, ThoughtPair
from underdrawing.report.page import Film, film_of, from_template, write_page


@dataclass(frozen=True)
class DiffPage:
    """All that the page shows."""

    recipe: str
    a: str  # what the two are called
    b: str
    pairs: Sequence[ThoughtPair]
    summary: DiffSummary
    score: ScorePair
    score_name: str


@dataclass(frozen=True)
class Shown:
    """A pair as the page lays it out."""

    a: Film
    b: Film
    first: FirstDifference
    verdict: str  # "gained", "lost" or ""
    gain: float


def write_diff(page: DiffPage, path: Path) -> Path:
    """Render to one self-contained file, written whole or not at all."""
    return write_page(render(page), path)


def render(page: DiffPage) -> str:
    """The page as a string. Prompts that were lost come first, then those gained, then others that part."""
    parted = [pair for pair in page.pairs if pair.first is not None]
    order = {"lost": 0, "gained": 1, "": 2}
    shown = sorted((_shown(pair) for pair in parted), key=lambda each: order[each.verdict])
    equal = [pair.prompt.prompt for pair in page.pairs if pair.first is None]
    return from_template("diff.html.j2", data=page, pairs=shown, equal=equal)


def _shown(pair: ThoughtPair) -> Shown:
    assert pair.first is not None
    verdict = "gained" if pair.gain > 0 else "lost" if pair.gain < 0 else ""
    return Shown(
        film_of(pair.a, marked=pair.first.a.segment),
        film_of(pair.b, marked=pair.first.b.segment),
        pair.first,
        verdict,
        pair.gain,
    )
