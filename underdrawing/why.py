"""What a run's reward went up by, and whether the truth went up with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evals import gains, windows
from evals.gains import Changed, Gain, Line
from evals.heldout import EvaluationError
from evals.kept import EvaluationsError, KeptEvaluation, check_comparable, evaluations_of, read_answers
from evals.measures import FINAL_IMAGE, REWARD
from rewards.config import RewardsConfig
from rewards.formula.expression import Expression
from runtime.errors import UserError, first_line, nearest
from runtime.paths import reading
from runtime.yaml_core import load_yaml
from training.tracking import read_metrics

AGAIN = "evaluate both with evaluate.by=[geneval,reward], or [reward] where no image is judged"


@dataclass(frozen=True)
class Recipe:
    """What a run was trained by."""

    rewards: RewardsConfig
    beside: tuple[str, ...]  # parts that the formula does not name, by which segments may be credited
    credited: tuple[str, ...]  # those of them that are given a weight for it

    @property
    def unpaid(self) -> list[str]:
        """Parts that move no advantage, as the alarm `divergence` has it."""
        return [name for name in self.rewards.parts if name not in (*self.rewards.expression().names, *self.beside)]


@dataclass(frozen=True)
class Watched:
    """A measure beside the trained reward."""

    line: Line
    constant: bool = False  # it is the same of everything, so it says nothing
    truth: bool = True  # it is to rise with the reward; False: a part that is not paid, which is only not to fall

    @property
    def moved(self) -> str:
        """rose, fell or flat, by whether the interval leaves out 0."""
        if self.line.gain.low > 0:
            return "rose"
        return "fell" if self.line.gain.high < 0 else "flat"


@dataclass(frozen=True)
class Explanation:
    """Why a run's reward went up, or that it did not."""

    run: Path
    of: tuple[str, str]  # what is compared, in words
    score: Line | None  # of the evaluations; None: training's metrics alone are explained
    tags: Sequence[Line]  # they add up to the score's gain
    by_image: Gain | None
    changed: Sequence[Changed]
    parts: Sequence[Gain]  # of held-out answers, of training
    roles: Sequence[Gain]
    trained: Line | None  # the trained reward; None: not recorded
    watched: Sequence[Watched]
    credited: Sequence[Line] = ()  # parts that segments are credited by, beside the formula; no sum is made of them
    notes: Sequence[str] = ()

    @property
    def rose(self) -> bool:
        return self.trained is not None and self.trained.gain.low > 0

    @property
    def suspects(self) -> list[Watched]:
        """Measures of the truth that did not rise with the trained reward, and unpaid parts that fell."""
        suspect = (each for each in self.watched if self.rose and not each.constant)
        return [each for each in suspect if each.moved == "fell" or (each.truth and each.moved == "flat")]

    @property
    def verdict(self) -> list[str]:
        """Whether the truth went up with the reward, in sentences."""
        if self.trained is None:
            return ["The trained reward is not recorded at both ends, so nothing says whether it rose."]
        moved = f"from {self.trained.before:.3f} to {self.trained.after:.3f} ({_signed(self.trained)})"
        if not self.rose:
            return [f"The trained reward did not rise beyond chance: {moved}."]
        told = [each for each in self.watched if not each.constant]
        if not told:
            return [f"The trained reward rose {moved}. Nothing else is measured beside it: {AGAIN}."]
        sentences = [f"The trained reward rose {moved}."]
        for each in told:
            line = each.line
            at = f"from {line.before:.3f} to {line.after:.3f} ({_signed(line)})"
            if each.moved == "rose":
                sentences.append(f"{line.name}, watched beside it, rose with it, {at}.")
            elif each.moved == "fell":
                sentences.append(
                    f"{line.name}, watched beside it, FELL {at}: the policy may have found what the reward overlooks."
                )
            elif each.truth:
                sentences.append(
                    f"{line.name}, watched beside it, did NOT rise with it, {at}: the policy may have found what the "
                    f"reward overlooks, or there are too few held-out prompts to tell."
                )
            else:
                sentences.append(f"{line.name}, which is not paid, stayed where it was, {at}.")
        return sentences

    @property
    def flagged(self) -> list[str]:
        """The sentences of the verdict that tell of suspects."""
        names = tuple(f"{each.line.name}, " for each in self.suspects)
        return [sentence for sentence in self.verdict if names and sentence.startswith(names)]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "from": self.of[0],
            "to": self.of[1],
            "score": None if self.score is None else self.score.as_json(),
            "by_tag": [line.as_json() for line in self.tags],
            "by_image": None if self.by_image is None else self.by_image.as_json(),
            "changed": [each.as_json() for each in self.changed],
            "parts": [gain.as_json() for gain in self.parts],
            "credited": [line.as_json() for line in self.credited],
            "roles": [gain.as_json() for gain in self.roles],
            "trained": None if self.trained is None else self.trained.as_json(),
            "watched": [{**each.line.as_json(), "moved": each.moved, "constant": each.constant}
                        for each in self.watched],
            "flagged": bool(self.suspects),
            "verdict": self.verdict,
            "notes": list(self.notes),
        }  # fmt: skip


def explain(run: Path, start: str | None = None, end: str | None = None, resamples: int = 10_000) -> Explanation:
    """What a run gained between two evaluations, or two steps of its training.

    Args:
        start, end: a label of an evaluation, or a step: of the evaluation of that step's weights, else of training.
            None: the last evaluation, and the first that compares with it.

    Raises:
        EvaluationsError: no run, no evaluation, no such label or step, evaluations that do not compare, or neither
            evaluations nor metrics that have the reward's parts.
    """
    if not run.is_dir():
        raise EvaluationsError(f"{run}: no such folder; give a run's")
    metrics = [row for row in read_metrics(run / "metrics.jsonl") if "step" in row]
    ends = _ends(run, metrics, start, end)
    recipe, notes = _recipe(run, metrics)
    before, after = (each if isinstance(each, KeptEvaluation) else None for each in ends)
    steps = tuple(each.step if isinstance(each, KeptEvaluation) else each for each in ends)
    both = windows.windows(metrics, 20 if recipe is None else recipe.rewards.alarms.window, *steps)
    parts: list[Gain] = []
    roles: list[Gain] = []
    watched: list[Watched] = []
    credited: list[Line] = []
    trained: Line | None = None
    score: Line | None = None
    images: Gain | None = None
    tags: list[Line] = []
    shares: list[Changed] = []
    if before is not None and after is not None:
        notes += check_comparable(before, after)
        pairs = gains.pairs_of(before.prompts, after.prompts, after.score_name)
        if not pairs:
            raise EvaluationsError(f"{before.folder} and {after.folder}: no prompt has a score in both")
        score = gains.line_of(after.score_name, pairs, resamples)
        tags, images = gains.by_tag(pairs, resamples), gains.by_image(before.prompts, after.prompts, resamples)
        shares.append(gains.changed(after.score_name, pairs))
        found = _heldout_parts(before, after, resamples)
        if found is not None:
            part, role = found
            parts.append(part)
            roles += role
            notes += [part.note] if part.note else []
            trained = part.whole
            if after.score_name != REWARD:
                shares.append(gains.changed(REWARD, gains.pairs_of(before.prompts, after.prompts, REWARD)))
        watched = _watched_heldout(before, after, recipe, resamples)
    if both is not None:
        gain = None if recipe is None else windows.part_gains(recipe.rewards.expression(), *both)
        if gain is not None:
            parts.append(gain)
            trained = trained or gain.whole
            roles = roles or windows.role_gains(*both)
        names = recipe.credited if recipe is not None else ()
        credited = [line for name in names if (line := windows.metric_gain(f"reward/{name}", *both, name))]
        watched += _watched_training(both, recipe, watched)
        first, last = (f"steps {rows[0]['step']} to {rows[-1]['step']}" for rows in both)
        notes.append(f"training: {first} against {last}")
    if not parts:
        inside = [row["step"] for row in metrics if _within(row["step"], *steps)]
        if both is None and inside:
            raise EvaluationsError(
                f"{run}: {len(inside)} steps of training are between those ends, and two windows of them need at least "
                f"4; {AGAIN}"
            )
        raise EvaluationsError(
            f"{run}: nothing there has the parts of the reward at both ends, neither the evaluations nor "
            f"metrics.jsonl; {AGAIN}"
        )
    return Explanation(
        run,
        (_called(ends[0]), _called(ends[1])),
        score,
        tags,
        images,
        shares,
        parts,
        roles,
        trained,
        watched,
        credited,
        notes,
    )


End = KeptEvaluation | int


def _ends(run: Path, metrics: Sequence[dict[str, Any]], start: str | None, end: str | None) -> tuple[End, End]:
    evaluations = evaluations_of(run)
    if not evaluations and (start is None or end is None):
        recipe = run / "recipe.yaml"
        command = f"underdrawing evaluate {recipe if recipe.is_file() else 'RECIPE'} run_dir={run}"
        steps = (
            f"; or give two steps of its training: --from {metrics[0]['step']} --to {metrics[-1]['step']}"
            if metrics
            else ""
        )
        raise EvaluationsError(f"{run}: no evaluation there; run `{command}` first, of weights before and after{steps}")
    last = evaluations[-1] if end is None else _named(end, "--to", evaluations, metrics, run)
    if start is not None:
        first = _named(start, "--from", evaluations, metrics, run)
    else:
        first = _first_comparable(last, evaluations, run)
    if first == last:
        raise EvaluationsError(f"{run}: --from and --to are the same; name two of {_labels(evaluations)}, or two steps")
    return first, last


def _named(
    name: str, option: str, evaluations: Sequence[KeptEvaluation], metrics: Sequence[dict[str, Any]], run: Path
) -> End:
    by_label = {kept.label: kept for kept in evaluations}
    if name in by_label:
        return by_label[name]
    if name.isdigit():
        of_step = [kept for kept in evaluations if kept.step == int(name)]
        if of_step:
            return of_step[-1]
        steps = [row["step"] for row in metrics]
        if steps and steps[0] <= int(name) <= steps[-1]:
            return int(name)
        there = f"metrics.jsonl has steps {steps[0]} to {steps[-1]}" if steps else "metrics.jsonl has no steps"
        raise EvaluationsError(f"{run}: {option} {name}: no evaluation is of that step, and {there}")
    raise EvaluationsError(f"{run}: {option} {name}: no evaluation '{name}'; {nearest(name, by_label)}")


def _first_comparable(last: End, evaluations: Sequence[KeptEvaluation], run: Path) -> End:
    if not isinstance(last, KeptEvaluation):
        raise EvaluationsError(f"{run}: --to names a step of training; give --from too")
    reason = ""
    for kept in evaluations:
        if kept.label != last.label:
            try:
                check_comparable(kept, last)
                return kept
            except EvaluationsError as error:
                reason = reason or str(error)
    raise EvaluationsError(
        reason
        or f"{run}: '{last.label}' is its only evaluation; evaluate the weights that it started from too, or give "
        f"two steps with --from and --to"
    )


def _within(step: int, start: int | None, end: int | None) -> bool:
    return (start is None or step >= start) and (end is None or step <= end)


def _labels(evaluations: Sequence[KeptEvaluation]) -> str:
    return ", ".join(kept.label for kept in evaluations) or "none"


def _recipe(run: Path, metrics: Sequence[Mapping[str, Any]]) -> tuple[Recipe | None, list[str]]:
    """What the run was trained by, and what to say where that cannot be read."""
    path = run / "recipe.yaml"
    try:
        data = load_yaml(path.read_text("utf-8"))
        rewards = RewardsConfig.model_validate(data["rewards"], context=reading(path.parent))
        grpo = data.get("grpo") or {}
        weights = grpo.get("segment_reward_weights") or {}
        by_segment = grpo.get("advantage_level", "trajectory") != "trajectory"
        beside = [
            name
            for name, part in rewards.parts.items()
            if by_segment and not part.log_only and name not in rewards.expression().names and weights.get(name, 1.0)
        ]
        logged = {name for row in metrics for name in row}
        credits = [  # of the others, those that credited a segment say so
            name
            for name in beside
            if name in weights or any(metric.startswith(f"reward/{name}/role/") for metric in logged)
        ]
        return Recipe(rewards, tuple(beside), tuple(credits)), []
    except FileNotFoundError:
        reason = "it is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, UserError) as error:
        reason = first_line(error)
    return None, [f"{path} cannot be read ({reason}), so training's own reward is not taken apart"]


def _heldout_parts(before: KeptEvaluation, after: KeptEvaluation, resamples: int) -> tuple[Gain, list[Gain]] | None:
    """The held-out reward's gain by part and by role; None: an evaluation did not measure the reward."""
    earlier, later = (read_answers(kept.folder, len(kept.prompts)) for kept in (before, after))
    made_by: list[Any] = [kept.summary.get("formula") for kept in (before, after)]
    if not earlier or not later or None in made_by:
        return None
    tags = [prompt.tag for prompt in after.prompts]
    names = list(dict.fromkeys(name for answer in (*earlier, *later) for name in answer.parts))
    try:
        schedules = [{str(name): float(value) for name, value in of["schedules"].items()} for of in made_by]
        total = str(made_by[1]["total"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise EvaluationsError(
            f"{after.folder}: its summary.json, or that of {before.folder}, has no formula that can be read; {AGAIN}"
        ) from None
    expression = Expression(total, [*names, *schedules[1]], f"{after.folder}: the formula")
    try:
        part = gains.by_part(expression, earlier, later, tags, (schedules[0], schedules[1]), resamples)
    except EvaluationError as error:
        raise EvaluationsError(f"{before.folder} and {after.folder}: {error}") from None
    return part, gains.by_role(earlier, later, tags, resamples)


def _called(end: End) -> str:
    """An end in words."""
    if not isinstance(end, KeptEvaluation):
        return f"step {end}"
    return end.label if end.step is None else f"{end.label} (step {end.step})"


def _watched_heldout(
    before: KeptEvaluation, after: KeptEvaluation, recipe: Recipe | None, resamples: int
) -> list[Watched]:
    """The truth beside the reward, as far as both evaluations measured it."""
    found = []
    for name in [m for m in after.means if m in before.means and _is_watched(m, after.score_name, recipe)]:
        pairs = gains.pairs_of(before.prompts, after.prompts, name)
        if pairs:
            values = {value for a, b, _ in pairs for value in (a, b)}
            truth = not name.startswith(f"{REWARD}/")
            found.append(Watched(gains.line_of(name, pairs, resamples), len(values) == 1, truth))
    return found


def _watched_training(
    both: tuple[windows.Rows, windows.Rows], recipe: Recipe | None, heldout: Sequence[Watched]
) -> list[Watched]:
    """What training's metrics tell beside that; the evaluations say more of held-out scores than the few that training
    logged."""
    told, found = {each.line.name for each in heldout}, []
    for name in _watched_metrics(recipe):
        line = windows.metric_gain(name, *both)
        if line is not None and name not in told and not (heldout and name.startswith("heldout/")):
            truth = recipe is not None and name in recipe.rewards.alarms.watch
            found.append(Watched(line, _constant(name, both), truth))
    return found


def _is_watched(measure: str, score: str, recipe: Recipe | None) -> bool:
    """Whether an evaluation's measure is the truth beside the reward: GenEval's rule on the final image, a task's own
    score, or a part that is not paid."""
    if measure.startswith(f"{REWARD}/"):
        return recipe is not None and measure.removeprefix(f"{REWARD}/") in recipe.unpaid
    return measure == FINAL_IMAGE or measure == score != REWARD


def _watched_metrics(recipe: Recipe | None) -> list[str]:
    if recipe is None:
        return []
    return [*recipe.rewards.alarms.watch, *(f"reward/{name}" for name in recipe.unpaid)]


def _constant(name: str, both: tuple[windows.Rows, windows.Rows]) -> bool:
    return len({row[name] for rows in both for row in rows if row.get(name) is not None}) == 1


def _signed(line: Line) -> str:
    gain = line.gain
    return f"{gain.difference:+.3f}, {gain.level:.0%} interval {gain.low:+.3f} to {gain.high:+.3f}"
