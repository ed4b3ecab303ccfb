"""Held-out evaluations of a run: of some weights by the command, and of the weights at work during training.

Each has a folder of its own under run_dir/evaluations. What lies there is never lost silently: the same evaluation is
taken as it is, and another one of the same label is refused or, where the caller says so, replaced.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import kept
from evals.bootstrap import Interval, compare
from evals.critiques import Critics
from evals.heldout import EvaluationError, Heldout, answer, measure, spread_over_tags
from evals.heldout import evaluate as evaluate_heldout
from evals.kept import Evaluated, EvaluationsError, KeptEvaluation
from evals.measures import GENEVAL, NAMES, REWARD, GenevalScores, RewardScores
from formats.base import Format
from formats.config import FormatConfig
from policy.base import Policy
from rewards.contract import RewardContext
from rewards.detectors.registry import DetectorConfig
from rewards.manager import RewardManager, detector_of
from rollout.config import FlowConfig
from rollout.open import open_rollouts
from rollout.pool.contract import Rollouts
from rollout.weights.wire import fingerprint
from runtime.errors import UserError, nearest, writing
from runtime.files import write_whole
from runtime.interrupt import stopping, uninterrupted
from runtime.locks import beside, only_writer
from tasks.base import Evaluation, Record, Task
from training import checkpoint
from underdrawing import build, scaling
from underdrawing.critiques import contexts_of, open_critics_of
from underdrawing.preflight import preflight
from underdrawing.progress import StepProgress
from underdrawing.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)


def run_evaluate(recipe: Recipe, weights: Path, label: str | None = None, replace: bool = False) -> KeptEvaluation:
    """Held-out scores of some weights, kept under run_dir/evaluations/<label>.

    Args:
        label: None: from the weights' place, and the settings in which the recipe differs from the run's.
        replace: another evaluation of that label makes room for this one.

    Raises:
        Busy: another process evaluates under this label.
        EvaluationsError: another evaluation has that label; nothing was sampled.
        Interrupted: a signal stopped it.
        UserError: a prompt that cannot be judged, or none, or fewer than are asked for; nothing was sampled. Or a
            prompt that got no answer.
    """
    with stopping(lambda: "no score is kept. Give the same command again"), uninterrupted() as opened:
        task, fmt = preflight(recipe)
        if recipe.scaling is not None:
            scaling.check_scaling(recipe, task, fmt)
        evaluations = open_evaluations(recipe, task, fmt, opened)
        for evaluation in evaluations:  # before weights are loaded
            evaluation.check(heldout_records(recipe, task))
        policy = build.build_policy(recipe, task, weights)
        records = heldout_records(recipe, task, policy)
        if recipe.scaling is not None:
            scaling.check_room(recipe, fmt, policy, records)
        critics = open_critics_of(recipe, task, fmt, policy, records, contexts_of(evaluations))
        settings = _settings(recipe, task, records)
        named = None if label is None else check_label(label)
        folder = recipe.run_dir / "evaluations" / (named or default_label(recipe, task, policy, weights, settings))
        opened.enter_context(only_writer(beside(folder), folder, "choose another --label"))
        kept.check_replaceable(folder)
        of = Evaluated(settings, str(weights), fingerprint(policy.model.state_dict()), step_of(weights))
        if (folder / kept.SUMMARY).is_file():
            differs = kept.difference(kept.read(folder), of)
            if differs is None and recipe.scaling is not None and not (folder / kept.SCALING).is_file():
                differs = f"its {kept.SCALING} is missing"
            if differs is None:
                if recipe.evaluate.calibration and not (folder / kept.CRITIQUES).is_file():
                    raise EvaluationsError(
                        f"{folder}: this evaluation is kept there without its critiques (evaluate.calibration). Give "
                        f"this one a name of its own with --label, or remove that folder"
                    )
                logger.info("%s is this evaluation already; it is taken as it is. Remove it to measure again", folder)
                return kept.read(folder)
            if not replace:
                raise EvaluationsError(
                    f"{folder}: another evaluation is kept there: {differs}. Give this one a name of its own with "
                    f"--label, or remove that folder"
                )
            logger.warning("%s: another evaluation was kept there, and is replaced: %s", folder, differs)
        config = recipe.rollout.model_copy(update={"temperature": {"default": recipe.evaluate.temperature}})
        policy_config = recipe.policy.model_copy(update={"path": str(weights)})
        known = build.words(recipe, task, weights)

        def open_pool(format_config: FormatConfig) -> Rollouts:
            rollouts = open_rollouts(policy, policy_config, format_config, config, known, recipe.tools)
            opened.callback(rollouts.close)
            return rollouts

        passes = 2 if recipe.scaling is not None and recipe.scaling.rounds[-1] > 1 else 1
        progress, done = StepProgress("held-out prompts", passes * len(records)), itertools.count(1)
        opened.callback(progress.close)

        def each(*_: Any) -> None:
            progress.on_metrics(next(done), {})

        if recipe.scaling is None:
            heldout = _evaluate(recipe, open_pool(recipe.format), evaluations, records, each, critics)
            kept.keep(heldout, folder, of)
        else:
            heldout, found = _scale(recipe, task, fmt, policy, records, evaluations, open_pool, each, critics)
            kept.keep(heldout, folder, of, beside=found.files, forced=found.forced)
        made = kept.read(folder)
        if recipe.scaling is not None:
            scaling.to_wandb(recipe, made)
        return made


def _scale(
    recipe: Recipe,
    task: Task,
    fmt: Format,
    policy: Policy,
    records: Sequence[Record],
    evaluations: Sequence[Evaluation],
    open_pool: Callable[[FormatConfig], Rollouts],
    each: Any,
    critics: Critics | None,
) -> tuple[Heldout, scaling.ScalingStudy]:
    """The evaluation and its scaling, whose first answers are the evaluation's."""
    section, pool = recipe.evaluate, open_pool(recipe.format)
    groups, metrics = answer(pool, records, section.seed, scaling.samples_of(recipe), each, section.flow)
    pool.close()  # its workers make room for those of the second pass
    heldout = measure(evaluations, records, [group[: section.samples] for group in groups], metrics, critics)
    found = scaling.study(
        recipe, task, fmt, policy, records, evaluations[0], groups, metrics["time/rollout"], open_pool, each
    )
    return heldout, found


def heldout_records(recipe: Recipe, task: Task, policy: Policy | None = None) -> list[Record]:
    """The held-out prompts that the recipe's evaluations are of.

    Args:
        policy: only such as can be asked of it, where the recipe says to leave others out; None: any.

    Raises:
        EvaluationError: there are too few.
        PromptError: one that the policy cannot be asked.
    """
    records = task.prompts("heldout")
    if policy is not None:
        records = build.prompts(recipe, task, build.build_format(recipe), policy, "heldout")
    return spread_over_tags(records, recipe.evaluate.prompts)


def chosen_evaluations(recipe: Recipe, task: Task) -> list[str | Evaluation]:
    """What held-out thoughts are scored by: evaluate.by, else the task's own, else what its prompts allow.

    Raises:
        EvaluationError: a name that is neither the toolkit's nor the task's.
    """
    offered: list[str | Evaluation] = list(task.evaluations()) if hasattr(task, "evaluations") else []
    if recipe.evaluate.by is None:
        if offered:
            return offered
        seen = hasattr(task, "detect") or recipe.rewards.detector is not None
        return [GENEVAL if seen and any(r.get("include") for r in heldout_records(recipe, task)) else REWARD]
    known = {_name(each): each for each in [*NAMES, *offered]}
    for name in recipe.evaluate.by:
        if name not in known:
            raise EvaluationError(f"evaluate.by: no evaluation '{name}'; {nearest(name, known)}")
    return [known[name] for name in recipe.evaluate.by]


def open_evaluations(
    recipe: Recipe, task: Task, fmt: Format, opened: ExitStack, manager: RewardManager | None = None
) -> list[Evaluation]:
    """The chosen evaluations, ready to score.

    Args:
        opened: closes what they need.
        manager: a run's, whose detector and parts are taken in place of others, so that no weights are loaded twice.

    Raises:
        UserError: an unknown one, or one whose detector or rewards cannot be had.
    """
    made: list[Evaluation] = []
    for chosen in chosen_evaluations(recipe, task):
        if chosen == REWARD:
            if manager is None:
                manager = opened.enter_context(build.build_reward_manager(recipe, task, fmt))
            made.append(RewardScores(manager, recipe.grpo.steps))
        elif chosen == GENEVAL:
            context = manager.context if manager is not None else RewardContext()
            if not context.detector:
                context = RewardContext.of(task, fmt, detector_of(recipe.rewards, task))
            made.append(GenevalScores(context))
        else:
            assert not isinstance(chosen, str)
            made.append(chosen)
    return made


def check_named(recipe: Recipe, task: Task) -> None:
    """Raises EvaluationError for a name in evaluate.by that nothing has."""
    if recipe.evaluate.by is not None:
        chosen_evaluations(recipe, task)


def check_label(label: str) -> str:
    """The label, which names a folder of its own in evaluations/. Raises EvaluationsError for one that cannot."""
    if not label or label.startswith(".") or not label.isprintable() or set(label) & set("/\\"):
        raise EvaluationsError(f"--label '{label}': it names a folder in evaluations/; no '/', and no '.' at its start")
    if re.fullmatch(rf"{kept.DURING}\d+", label):
        raise EvaluationsError(f"--label '{label}': evaluations during training are called so; choose another name")
    return label


def check_evaluation(recipe: Recipe, task: Task, fmt: Format) -> None:
    """Raises UserError for evaluations that cannot be made: too few prompts, or one that cannot be scored; or
    critiques to be judged that cannot be."""
    if recipe.scaling is not None:
        scaling.check_scaling(recipe, task, fmt)
    records = heldout_records(recipe, task)
    with ExitStack() as opened:
        evaluations = open_evaluations(recipe, task, fmt, opened)
        for evaluation in evaluations:
            evaluation.check(records)
        open_critics_of(recipe, task, fmt, None, records, contexts_of(evaluations))


def settings_of(recipe: Recipe, task: Task, records: Sequence[Record]) -> dict[str, Any]:
    """What the scores depend on besides the weights, as JSON has it."""
    by = [_name(each) for each in chosen_evaluations(recipe, task)]
    settings: dict[str, Any] = {
        "prompts": kept.fingerprint_of(records),
        "number_of_prompts": len(records),
        "samples": recipe.evaluate.samples,
        "temperature": recipe.evaluate.temperature,
        "seed": recipe.evaluate.seed,
        "top_p": recipe.rollout.top_p,
        "top_k": recipe.rollout.top_k,
        "guidance": recipe.rollout.guidance,
        "max_tokens": recipe.rollout.max_tokens,
        "format": _format_of(recipe),
        "by": by,
    }
    flow = recipe.evaluate.flow or recipe.rollout.flow
    if flow != FlowConfig():  # families without latents read none of it
        settings["flow"] = flow.model_dump(mode="json")
    detector: Any = recipe.rewards.detector
    if isinstance(detector, DetectorConfig):
        detector = detector.model_dump(mode="json", exclude={"device", "batch_size", "download"})
    if detector is not None or hasattr(task, "detect"):
        settings["detector"] = detector if detector is not None else f"the task's ({recipe.task.name})"
    if recipe.tools:
        settings["tools"] = {
            name: config.model_dump(mode="json", exclude={"concurrency"}) for name, config in recipe.tools.items()
        }
    if REWARD in by:
        parts = {
            name: part.model_dump(mode="json", include={"function", "options", "factory"})
            for name, part in recipe.rewards.parts.items()
        }
        schedules = recipe.rewards.model_dump(mode="json", include={"schedules"})
        settings["reward"] = f"{recipe.rewards.formula()} (parts {kept.fingerprint_of([parts, schedules])})"
    return dict(json.loads(json.dumps(settings)))


def _settings(recipe: Recipe, task: Task, records: Sequence[Record]) -> dict[str, Any]:
    """Those of `underdrawing evaluate`, which may also measure scaling."""
    settings = settings_of(recipe, task, records)
    if recipe.scaling is not None:
        settings["scaling"] = scaling.settings_of_scaling(recipe.scaling)
    return settings


def default_label(recipe: Recipe, task: Task, policy: Policy, weights: Path, settings: Mapping[str, Any]) -> str:
    """`warm_start`, `step-000040`, or the name of weights from elsewhere; then each setting that is not the run's."""
    name = place_of(recipe.run_dir, weights)
    run_recipe = recipe.run_dir / "recipe.yaml"
    if not run_recipe.is_file():
        return name
    try:
        usual = load_recipe(run_recipe)
        usual_task = task if usual.task == recipe.task else build.build_task(usual)
        usual_settings = _settings(usual, usual_task, heldout_records(usual, usual_task, policy))
    except UserError:  # of another release, say: then the label says no settings, and another evaluation is refused
        return name
    differing = [key for key in settings if settings[key] != usual_settings.get(key)]
    if "number_of_prompts" in differing:
        differing.remove("prompts")
    values = [f"-{key}-{_short(settings[key])}".replace("number_of_prompts", "prompts") for key in differing]
    return re.sub(r"[^\w.+-]", "_", "".join([name, *values]))


def place_of(run_dir: Path, weights: Path) -> str:
    """What weights are called by where they lie; those of another run bear its name too."""
    weights, run_dir = weights.resolve(), run_dir.resolve()
    if checkpoint.is_checkpoint(weights.parent):
        owner, name = weights.parents[2], weights.parent.name
    elif weights.parts[-2:] == ("sft", "model"):
        owner, name = weights.parents[1], "warm_start"
    else:
        generic = weights.name in ("model", "weights")
        return f"{weights.parent.name}-{weights.name}" if generic else weights.name
    return name if owner == run_dir else f"{owner.name}-{name}"


def step_of(weights: Path) -> int | None:
    """The step of the run whose checkpoint the weights are; 0 of a warm start; None: not known."""
    weights = weights.resolve()
    if checkpoint.is_checkpoint(weights.parent):
        return int(weights.parent.name.rpartition("-")[2])
    return 0 if weights.parts[-2:] == ("sft", "model") else None


def compare_evaluations(run_dir: Path, before: str, after: str) -> Interval:
    """The gain between two kept evaluations with its paired bootstrap interval, kept as comparison.json."""
    folder = run_dir / "evaluations"
    one, other = (kept.read(folder / label) for label in (before, after))
    interval = compare(one.prompts, other.prompts, other.score_name)
    content = {
        "before": before,
        "after": after,
        "gain": interval.difference,
        "interval": [interval.low, interval.high],
    }
    with writing(folder):
        write_whole(folder / "comparison.json", json.dumps(content))
    return interval


@dataclass(frozen=True)
class DuringTraining:
    """Evaluations during training, with the rollout workers and the reward manager of the training itself.

    Each is kept with its scores by prompt. Those of later steps, which a run that went back makes again, are deleted.
    """

    recipe: Recipe
    task: Task
    records: Sequence[Record]
    rollouts: Any
    evaluations: Sequence[Evaluation]
    critics: Critics | None = None

    def __call__(self, step: int) -> dict[str, float]:
        heldout = _evaluate(self.recipe, self.rollouts, self.evaluations, self.records, critics=self.critics)
        folder = self.recipe.run_dir / "evaluations"
        for path in folder.glob(f"{kept.DURING}*"):
            number = path.name.removeprefix(kept.DURING)
            if number.isdigit() and int(number) > step:
                kept.check_replaceable(path)
                shutil.rmtree(path)
        of = Evaluated(settings_of(self.recipe, self.task, self.records), step=step)
        kept.keep(heldout, folder / f"{kept.DURING}{step:06d}", of, answers=0)
        return heldout.as_metrics()


def during_training(
    recipe: Recipe,
    task: Task,
    fmt: Format,
    policy: Policy,
    rollouts: Any,
    manager: RewardManager,
    scores: bool = True,
) -> DuringTraining | None:
    """None where the recipe has no evaluations during training. Raises as check_evaluation, before the first step.

    Args:
        manager: the training's.
        scores: this process can score the policy by itself.
    """
    if not recipe.grpo.evaluate_every:
        return None
    records = heldout_records(recipe, task, policy)
    evaluations = open_evaluations(recipe, task, fmt, ExitStack(), manager)
    for evaluation in evaluations:
        evaluation.check(records)
    contexts = [manager.context, *contexts_of(evaluations)]
    critics = open_critics_of(recipe, task, fmt, policy, records, contexts, scores)
    return DuringTraining(recipe, task, records, rollouts, evaluations, critics)


def _evaluate(
    recipe: Recipe,
    rollouts: Any,
    evaluations: Sequence[Evaluation],
    records: Sequence[Record],
    each: Any = None,
    critics: Critics | None = None,
) -> Heldout:
    section = recipe.evaluate
    return evaluate_heldout(rollouts, evaluations, records, section.seed, section.samples, each, section.flow, critics)


def _format_of(recipe: Recipe) -> dict[str, Any]:
    values = recipe.format.model_dump(mode="json")
    if values["min_images"] is None:  # evaluations without the key are of the same format
        del values["min_images"]
    return values


def _name(evaluation: str | Evaluation) -> str:
    return evaluation if isinstance(evaluation, str) else evaluation.name


def _short(value: Any) -> str:
    """A setting's value as part of a file's name."""
    if isinstance(value, bool | int | float):
        return f"{value:g}" if isinstance(value, float) else str(value).lower()
    return kept.fingerprint_of([{"value": value}])[:6]
