"""The command `underdrawing compare`: two evaluations, or two runs' evaluations, side by side with intervals."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from evals.bootstrap import ScorePair, compare_calibration, compare_scores
from evals.kept import PROMPTS, SUMMARY, EvaluationsError, KeptEvaluation, check_comparable, evaluations_of, read
from runtime.errors import nearest
from underdrawing.tables import print_comparison


def run_compare(a: Path, b: Path, label: str | None = None, every: bool = False) -> int:
    """Print a table for each pair; the last line is one JSON object.

    Raises:
        EvaluationsError: nothing to compare, or evaluations of other prompts, samples or sampling.
    """
    compared = []
    for one, other in pairs(a, b, label, every):
        notes = check_comparable(one, other)
        found = compare_scores(one.prompts, other.prompts, one.score_name)
        compared.append((one, other, notes, found, calibrations(one, other)))
    for one, other, notes, found, calibration in compared:  # all of them are checked before any is printed
        print_comparison(Console(), one, other, found, notes, calibration)
    print(
        json.dumps(
            {
                "comparisons": [
                    {
                        "a": str(one.folder),
                        "b": str(other.folder),
                        "prompts": len(one.prompts),
                        "score_of": found.score_name,
                        "score": found.score.as_json(),
                        **{name: pair.as_json() for name, pair in found.others.items()},
                        "refinement": None if found.refinement is None else found.refinement.as_json(),
                        "by_tag": {tag: pair.as_json() for tag, pair in found.by_tag.items()},
                        **(
                            {"calibration": {name: pair.as_json() for name, pair in calibration.items()}}
                            if calibration
                            else {}
                        ),
                        "notes": notes,
                    }
                    for one, other, notes, found, calibration in compared
                ]
            }
        )
    )
    return 0


def calibrations(a: KeptEvaluation, b: KeptEvaluation) -> dict[str, ScorePair]:
    """How the measures of the policy's critiques differ; empty where one evaluation has none."""
    if not a.critiques or not b.critiques:
        return {}
    return compare_calibration(a.critiques, b.critiques, [prompt.tag for prompt in a.prompts])


def pairs(a: Path, b: Path, label: str | None, every: bool) -> list[tuple[KeptEvaluation, KeptEvaluation]]:
    """What to compare with what: the folders' own evaluations, or those of two runs.

    Raises:
        EvaluationsError: there is none, or none in common; the sentence says what to run.
    """
    single = [folder for folder in (a, b) if (folder / SUMMARY).is_file()]
    if single and (label is not None or every):
        raise EvaluationsError(f"{single[0]} is one evaluation; --label and --all choose among those of two runs")
    if len(single) == 2:
        return [(read(a), read(b))]
    found = [[read(folder)] if folder in single else _of_run(folder) for folder in (a, b)]
    if label is None and not every:
        return [(found[0][-1], found[1][-1])]
    by_label = [{kept.label: kept for kept in run} for run in found]
    if label is not None:
        for folder, run in zip((a, b), by_label, strict=True):
            if label not in run:
                raise EvaluationsError(f"{folder}: no evaluation '{label}'; {nearest(label, run)}")
        return [(by_label[0][label], by_label[1][label])]
    common = [name for name in by_label[0] if name in by_label[1]]
    if not common:
        raise EvaluationsError(
            f"{a} and {b} have no label in common ({', '.join(by_label[0])}; {', '.join(by_label[1])}); give two "
            f"folders RUN/evaluations/LABEL, or evaluate with --label"
        )
    return [(by_label[0][name], by_label[1][name]) for name in common]


def _of_run(folder: Path) -> list[KeptEvaluation]:
    if not folder.is_dir():
        raise EvaluationsError(f"{folder}: no such folder; give a run's, or an evaluation's (RUN/evaluations/LABEL)")
    found = evaluations_of(folder)
    if not found and (folder / PROMPTS).is_file():
        return [read(folder)]  # an evaluation's folder without its summary: the sentence says so
    if not found:
        recipe = folder / "recipe.yaml"
        command = f"{recipe} run_dir={folder}" if recipe.is_file() else f"RECIPE run_dir={folder}"
        raise EvaluationsError(f"{folder}: no evaluation there; run `underdrawing evaluate {command}` first")
    return found
