"""Evaluations on disk: what each holds, when two are the same one, and when two compare.

    evaluations/<label>/
        summary.json     scores, weights, settings, time
        prompts.jsonl    scores by prompt, one a line
        critiques.jsonl  verdicts on the policy's own images, one a line; where they were judged
        answers.jsonl    measures and credit by role of each answer, one a line; where the recipe's reward is a measure
        trajectories/    some of the answers, to look at; not of evaluations during training
        scaling.json     score by cost of every arm, scaling.svg its plot and scaling.jsonl the thoughts that both are
                         of, where the recipe has a section `scaling`; forced/: some of its thoughts that had to go on

A folder is written whole or not at all. Settings are what the scores depend on besides the weights; `prompts` in them
is a fingerprint of the records.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from evals import answers as each_answer
from evals.answers import Answer
from evals.calibration import Calibration, Critique, lines_of
from evals.heldout import Heldout, PromptScore, mean_of_measure, measures_of
from evals.measures import FINAL_IMAGE
from record.store import check_folder, save_trajectories
from record.trajectory import Trajectory
from runtime.errors import UserError, writing
from runtime.files import whole_folder, write_whole

SUMMARY, PROMPTS, TRAJECTORIES = "summary.json", "prompts.jsonl", "trajectories"
SCALING, SCALING_PLOT, SCALING_THOUGHTS = "scaling.json", "scaling.svg", "scaling.jsonl"
FORCED = "forced"
CRITIQUES, ANSWERS = "critiques.jsonl", "answers.jsonl"
OURS = {SUMMARY, PROMPTS, CRITIQUES, ANSWERS, TRAJECTORIES, SCALING, SCALING_PLOT, SCALING_THOUGHTS, FORCED}
DURING = "training-"  # and the step: label of an evaluation during training
STORED_ANSWERS = 60  # of an evaluation, spread over its prompts: enough to look at, small on disk
# What makes scores incomparable, and what a person does about it. Other settings may differ: they are what is compared.
COMPARED_UNDER = {
    "prompts": "evaluate both on the same held-out prompts (task, evaluate.prompts)",
    "samples": "give both the same evaluate.samples",
    "temperature": "give both the same evaluate.temperature",
    "top_p": "give both the same rollout.top_p",
    "top_k": "give both the same rollout.top_k",
    "by": "give both the same evaluate.by",
    "detector": "give both the same rewards.detector",
    "reward": "give both the same rewards.parts and rewards.total",
}


Row = TypeVar("Row", Critique, Answer)


class EvaluationsError(UserError):
    """Evaluations that are missing, in the way, or do not compare."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation is of.

    Args:
        weights: their folder; None: a run's at a step, which were in memory.
        fingerprint: of the weights' tensors; None: not known.
        step: of the run that trained them; None: not known.
    """

    settings: Mapping[str, Any]
    weights: str | None = None
    fingerprint: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class KeptEvaluation:
    """An evaluation as it lies on disk."""

    folder: Path
    prompts: Sequence[PromptScore]
    summary: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)  # empty: release 0.1 wrote none
    critiques: Sequence[Critique] | None = None  # None: they were not judged

    @property
    def calibration(self) -> Calibration | None:
        """See Heldout."""
        return Calibration.of(self.critiques) if self.critiques else None

    @property
    def label(self) -> str:
        return self.folder.name

    @property
    def step(self) -> int | None:
        """Of the run that trained the weights; None: not known."""
        step = self.summary.get("step")
        return None if step is None else int(step)

    @property
    def score_name(self) -> str:
        """The measure that is the score. Release 0.1 knew GenEval's only."""
        return str(self.summary.get("score_of") or FINAL_IMAGE)

    @property
    def score(self) -> float:
        """See Heldout."""
        return mean_of_measure(self.prompts, self.score_name)

    @property
    def means(self) -> dict[str, float]:
        """Of every measure."""
        return {measure: mean_of_measure(self.prompts, measure) for measure in measures_of(self.prompts)}

    @property
    def unjudged(self) -> int:
        """Prompts without a score."""
        return sum(p.measures.get(self.score_name) is None for p in self.prompts)

    def scaling(self) -> dict[str, Any] | None:
        """What is kept of its test-time scaling; None: it was not measured.

        Raises EvaluationsError where it cannot be read.
        """
        path = self.folder / SCALING
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text("utf-8"))
            if not isinstance(content, dict) or not {"points", "equal_cost", "passes", "notes"} <= content.keys():
                raise ValueError("it is none that `underdrawing evaluate` wrote")
        except (OSError, ValueError) as error:
            raise EvaluationsError(
                f"{path}: cannot be read, it may be cut or altered ({error}); remove {self.folder} and evaluate again"
            ) from None
        return dict(content)

    @property
    def by_tag(self) -> dict[str, float]:
        return dict(self.summary["by_tag"])

    @property
    def samples(self) -> int:
        return int(self.summary.get("samples", 1))


def fingerprint_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Of prompts with all their columns, in their order."""
    text = json.dumps([dict(record) for record in records], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def keep(
    heldout: Heldout,
    folder: Path,
    of: Evaluated,
    answers: int = STORED_ANSWERS,
    beside: Mapping[str, str] | None = None,
    forced: Sequence[Trajectory] = (),
) -> None:
    """Write an evaluation's folder, in place of one that is there.

    Args:
        answers: how many trajectories go with it, at most one a prompt; 0: none.
        beside: further files, by name, with their text.
        forced: trajectories that had to go on; at most `answers` are written.

    Raises:
        EvaluationsError: the folder holds what replacing it would delete.
        UserError: the disk is full or not writable; what was there stays.
    """
    check_replaceable(folder)
    of_each = [group[0] for group in heldout.trajectories]
    summary = {
        "score": heldout.score,
        "score_of": heldout.score_name,
        "by_tag": heldout.tags,
        "measures": heldout.means,
        "prompts": len(heldout.prompts),
        "samples": len(heldout.trajectories[0]),
        "metrics": heldout.as_metrics(),
        **({"formula": dict(heldout.formula)} if heldout.formula is not None else {}),
        **({"calibration": heldout.calibration.as_json()} if heldout.calibration else {}),
        "weights": of.weights,
        "fingerprint": of.fingerprint,
        "step": of.step,
        "settings": dict(of.settings),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }
    with writing(folder), whole_folder(folder) as fresh:
        heldout.save(fresh / PROMPTS)
        if heldout.critiques is not None:
            write_whole(fresh / CRITIQUES, lines_of(heldout.critiques))
        if heldout.answers:
            write_whole(fresh / ANSWERS, each_answer.lines_of(heldout.answers))
        if answers:
            save_trajectories(of_each[:: max(1, len(of_each) // answers)], fresh / TRAJECTORIES)
        if answers and forced:
            save_trajectories(forced[:: max(1, len(forced) // answers)], fresh / FORCED)
        for name, text in (beside or {}).items():
            write_whole(fresh / name, text)
        write_whole(fresh / SUMMARY, json.dumps(summary, indent=1))


def check_replaceable(folder: Path) -> None:
    """Raises EvaluationsError, or StoreError, where `folder` holds what is no part of an evaluation."""
    if folder.is_dir():
        foreign = sorted({path.name for path in folder.iterdir()} - OURS)
        if foreign:
            raise EvaluationsError(
                f"{folder}: holds '{foreign[0]}', which is no part of an evaluation and would be deleted; move it "
                f"away, or choose another --label"
            )
    check_folder(folder / TRAJECTORIES)
    check_folder(folder / FORCED)


def read(folder: Path) -> KeptEvaluation:
    """Raises EvaluationsError where there is no evaluation, or it was cut or altered, by file."""
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text())
        settings = summary.get("settings") or {}
        if not all(isinstance(part, dict) for part in (summary["by_tag"], settings)):
            raise TypeError("by_tag and settings are mappings")
    except FileNotFoundError:
        raise EvaluationsError(f"{folder}: no evaluation there ({SUMMARY} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise EvaluationsError(
            f"{path}: cannot be read, it may be cut or altered ({reason}); remove {folder} and evaluate again"
        ) from None
    prompts = read_prompt_scores(folder / PROMPTS)
    return KeptEvaluation(folder, prompts, summary, settings, read_critiques(folder / CRITIQUES, len(prompts)))


def read_prompt_scores(path: Path) -> list[PromptScore]:
    """The scores that Heldout.save wrote.

    Raises:
        EvaluationsError: the file is missing or no text, or a line is none of its rows.
    """
    again = f"remove {path.parent} and evaluate again"
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        if (path.parent / SUMMARY).is_file():
            raise EvaluationsError(f"{path}: missing, though {SUMMARY} is beside it; {again}") from None
        raise EvaluationsError(f"{path}: no evaluation there; run `underdrawing evaluate` first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationsError(f"{path}: cannot be read, it may be cut or altered ({error}); {again}") from None
    scores = []
    for number, line in enumerate(lines, 1):
        try:
            scores.append(PromptScore.of_json(json.loads(line)))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise EvaluationsError(f"{path} line {number}: not a row of scores by prompt") from None
    if not scores:
        raise EvaluationsError(f"{path}: no scores in it; {again}")
    return scores


def read_critiques(path: Path, prompts: int) -> list[Critique] | None:
    """The critiques that `keep` wrote; None: it wrote none. Raises EvaluationsError as _read_rows."""
    return _read_rows(path, Critique.of_json, prompts, "critiques")


def read_answers(folder: Path, prompts: int) -> list[Answer] | None:
    """The answers of an evaluation that `keep` wrote; None: it wrote none. Raises EvaluationsError as _read_rows."""
    return _read_rows(folder / ANSWERS, Answer.of_json, prompts, "answers")


def _read_rows(path: Path, of_json: Callable[[Mapping[str, Any]], Row], prompts: int, what: str) -> list[Row] | None:
    """Raises EvaluationsError: the file is no text, or a line is none of its rows."""
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationsError(
            f"{path}: cannot be read, it may be cut or altered ({error}); remove {path.parent} and evaluate again"
        ) from None
    found = []
    for number, line in enumerate(lines or (), 1):
        try:
            row = of_json(json.loads(line))
            if not 0 <= row.prompt < prompts:
                raise ValueError("no such prompt")
        except (TypeError, KeyError, ValueError, AttributeError):
            raise EvaluationsError(f"{path} line {number}: not a row of {what}") from None
        found.append(row)
    return None if lines is None else found


def evaluations_of(run_dir: Path) -> list[KeptEvaluation]:
    """A run's evaluations: by the step of their weights, and then by time, the newest last."""
    found = [read(path.parent) for path in (run_dir / "evaluations").glob(f"*/{SUMMARY}")]
    return sorted(found, key=lambda kept: (kept.step or 0, str(kept.summary.get("time") or ""), kept.label))


def difference(kept: KeptEvaluation, of: Evaluated) -> str | None:
    """What a kept evaluation differs in from one that is to be made, as a clause; None: it is the same one."""
    if not kept.settings or kept.summary.get("fingerprint") is None:
        return "it does not say of which weights and settings it is"
    if kept.summary["fingerprint"] != of.fingerprint:
        return f"it is of other weights ({kept.summary.get('weights')})"
    return settings_that_differ(kept.settings, of.settings) or None


def settings_that_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """`key: value, there value` for each setting that two evaluations do not share; empty: none."""
    found = []
    for key in dict.fromkeys([*one, *other]):
        if one.get(key) != other.get(key):
            here, there = (json.dumps(settings.get(key)) for settings in (one, other))
            found.append("other prompts" if key == "prompts" else f"{key} {here} there and {there} here")
    return ", ".join(found)


def check_comparable(a: KeptEvaluation, b: KeptEvaluation) -> list[str]:
    """What else differs between two evaluations that compare, as clauses.

    Raises:
        EvaluationsError: they are of other prompts, samples, sampling or detector; the sentence says which.
    """
    if len(a.prompts) != len(b.prompts):
        raise EvaluationsError(
            f"{a.folder} is of {len(a.prompts)} prompts and {b.folder} of {len(b.prompts)}: {COMPARED_UNDER['prompts']}"
        )
    for number, (one, other) in enumerate(zip(a.prompts, b.prompts, strict=True), 1):
        if (one.prompt, one.tag) != (other.prompt, other.tag):
            raise EvaluationsError(
                f"{a.folder} and {b.folder} are of other prompts: number {number} is '{one.prompt}' in the first and "
                f"'{other.prompt}' in the second; {COMPARED_UNDER['prompts']}"
            )
    settings = [{**kept.settings, "samples": kept.samples} for kept in (a, b)]
    for key, advice in COMPARED_UNDER.items():
        values = [each.get(key) for each in settings]
        if None not in values and values[0] != values[1]:
            what = "the prompts' columns differ" if key == "prompts" else f"{key} is {values[0]} and {values[1]}"
            raise EvaluationsError(f"{a.folder} and {b.folder} do not compare: {what}; {advice}")
    if a.score_name != b.score_name:
        raise EvaluationsError(
            f"{a.folder} is scored by '{a.score_name}' and {b.folder} by '{b.score_name}': {COMPARED_UNDER['by']}"
        )
    unknown = [str(kept.folder) for kept in (a, b) if not kept.settings]
    notes = [f"{folder} does not say at which temperature it was sampled" for folder in unknown]
    for key in dict.fromkeys([*a.settings, *b.settings]) if not unknown else ():
        if key not in COMPARED_UNDER and a.settings.get(key) != b.settings.get(key):
            notes.append(f"{key} is {json.dumps(a.settings.get(key))} and {json.dumps(b.settings.get(key))}")
    notes += [
        f"{kept.unjudged} prompt(s) of {kept.folder} have no score; differences are over those that both have"
        for kept in (a, b)
        if kept.unjudged
    ]
    if a.summary.get("fingerprint") and a.summary["fingerprint"] == b.summary.get("fingerprint"):
        notes.append("both are of the same weights")
    return notes
