"""What the commands do: each job takes a recipe, builds its parts, runs, and leaves its results in the run's folder."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from evals.bootstrap import Interval, compare
from evals.heldout import Heldout, PromptScore, geneval_scorer, spread_over_tags
from evals.heldout import evaluate as evaluate_heldout
from record.store import check_folder, save_trajectories
from record.trajectory import Trajectory
from rewards.contract import RewardContext
from rewards.manager import detector_of
from rewards.runtime.serving import check_prompts
from rl.grpo import train
from rl.run import Run
from rollout.config import RolloutConfig
from rollout.open import open_rollouts
from rollout.requests import RolloutRequest
from runtime.errors import UserError, writing
from runtime.files import write_whole
from runtime.interrupt import stopping, uninterrupted
from runtime.locks import beside, only_writer
from tasks.base import Task
from training import checkpoint
from training.ranks import run_on_main
from underdrawing import build
from underdrawing.progress import StepProgress
from underdrawing.recipe import Recipe

logger = logging.getLogger(__name__)
RESUME = "give the same command with --resume"
STORED_ANSWERS = 60  # of an evaluation, spread over its prompts: enough to look at, small on disk


def run_sft(recipe: Recipe, resume: bool = False, resume_command: str = RESUME) -> Path:
    """The warm start. Returns the folder of its weights.

    Raises:
        Busy: another process trains in the run's folder.
        Interrupted: a signal stopped it; says what is saved.
    """
    from policy.chameleon.family import ChameleonPolicy
    from sft.checkpoints import finished_checkpoints
    from sft.train import check_demonstrations, demonstrate, warm_start

    def saved() -> Path | None:
        return next(reversed(finished_checkpoints(recipe.run_dir / "sft")), None)

    build.seed_everything(recipe.seed)
    state = PartialState(cpu=recipe.policy.device == "cpu")
    with stopping(lambda: _saved_at(saved(), resume_command)), uninterrupted() as closing:
        run_on_main(state, lambda: closing.enter_context(training_lock(recipe.run_dir)))
        first = state.is_main_process
        if first:
            build.write_recipe(recipe, refused=not resume and saved() is not None)
        task, fmt = build.build_task(recipe), build.build_format(recipe)
        policy = build.build_policy(recipe, task)
        if not isinstance(policy, ChameleonPolicy):
            raise UserError(
                f"policy.family: '{recipe.policy.family}' has no warm start; `underdrawing sft` serves the "
                "family 'chameleon'"
            )
        demonstrations = demonstrate(task, fmt, policy, recipe.sft, recipe.seed)
        check_demonstrations(demonstrations, fmt)
        tracker = None
        if first:
            tracker = build.build_tracker(recipe, recipe.run_dir / "sft", "sft")
            closing.callback(tracker.close)
            progress = StepProgress("warm start", recipe.sft.max_steps)
            closing.callback(progress.close)
            tracker.listeners.append(progress)
        warm_start(
            policy,
            demonstrations,
            recipe.sft,
            recipe.run_dir,
            seed=recipe.seed,
            tracker=tracker,
            resume=resume,
            resume_command=resume_command,
        )
    return build.warm_start_folder(recipe)


def run_grpo(recipe: Recipe, weights: Path | None = None, resume: bool = False, resume_command: str = RESUME) -> Path:
    """GRPO from the warm start (or `weights`) to recipe.grpo.steps. Returns the folder of the final weights.

    Raises:
        Busy: another process trains in the run's folder.
        Interrupted: a signal stopped it; says what is saved.
    """

    def saved() -> Path | None:
        return checkpoint.latest(recipe.run_dir / "checkpoints")

    build.seed_everything(recipe.seed)
    with stopping(lambda: _saved_at(saved(), resume_command)), uninterrupted() as closing:
        accelerator = Accelerator(cpu=recipe.policy.device == "cpu", mixed_precision="no")
        run_on_main(accelerator, lambda: closing.enter_context(training_lock(recipe.run_dir)))
        task, fmt = build.build_task(recipe), build.build_format(recipe)
        start = build.starting_weights(recipe, weights)
        policy = build.build_policy(recipe, task, start)
        newest = saved()
        if resume and newest is None:
            logger.warning("%s: no checkpoint to resume from; starting anew", recipe.run_dir)
        first = accelerator.is_main_process
        rollouts = manager = tracker = None
        if first:
            progress = StepProgress("GRPO", recipe.grpo.steps)
            closing.callback(progress.close)
            build.write_recipe(recipe, refused=not resume and newest is not None)
            cluster = build.start_cluster(recipe)
            if cluster is not None:
                closing.callback(cluster.stop)
            manager = build.build_reward_manager(recipe, task, fmt)
            closing.callback(manager.close)
            config = recipe.policy.model_copy(update={"path": str(start)}) if start else recipe.policy
            rollouts = open_rollouts(policy, config, recipe.format, recipe.rollout, task.words)
            closing.callback(rollouts.close)
            tracker = build.build_tracker(recipe, recipe.run_dir, "grpo")
            closing.callback(tracker.close)
            tracker.listeners.append(progress)
        heldout = _heldout_metrics(recipe, task, rollouts, manager.context) if manager else None
        run = Run(
            policy=policy,
            config=recipe.grpo,
            accelerator=accelerator,
            prompts=task.prompts("train"),
            rollouts=rollouts,
            reward_manager=manager,
            tracker=tracker,
            folder=recipe.run_dir,
            seed=recipe.seed,
            recipe=recipe.model_dump(mode="json"),
            weights=start or recipe.policy.path,
            evaluate=heldout,
            alarms=build.build_alarms(recipe) if first else None,
            show_every=recipe.track.trajectories_every,
            resume_command=resume_command,
        )
        train(run, newest if resume else None)
    final = saved()
    assert final is not None
    return final / "weights"


def run_evaluate(recipe: Recipe, weights: Path, label: str) -> Heldout:
    """Held-out scores of some weights, kept under run_dir/evaluations/<label>.

    Raises:
        Busy: another process evaluates under this label.
        Interrupted: a signal stopped it.
    """
    folder = recipe.run_dir / "evaluations" / label
    with (
        stopping(lambda: "no score is kept. Give the same command again"),
        only_writer(beside(folder), folder, "choose another --label"),
        uninterrupted() as closing,
    ):
        check_folder(folder / "trajectories")
        task = build.build_task(recipe)
        policy = build.build_policy(recipe, task, weights)
        config = recipe.rollout.model_copy(update={"temperature": {"default": recipe.evaluate.temperature}})
        policy_config = recipe.policy.model_copy(update={"path": str(weights)})
        rollouts = open_rollouts(policy, policy_config, recipe.format, config, task.words)
        closing.callback(rollouts.close)
        heldout = _evaluate(recipe, task, rollouts, _setting(recipe, task))
        keep_evaluation(heldout, folder)
    return heldout


def run_rollout(recipe: Recipe, weights: Path, count: int, split: str, folder: Path) -> list[Any]:
    """Roll out `count` prompts once each, judge them, and store the trajectories.

    Raises:
        StoreError: `folder` holds what saving would delete; nothing was sampled.
        Busy: another process writes to `folder`.
        Interrupted: after a signal. It and every other UserError say what is stored: all that was finished, judged or
            not.
    """
    groups: dict[int, list[Trajectory]] = {}  # by request, as they finish
    records: list[dict[str, Any]] = []

    def told() -> str:
        stored = _in_order(groups)
        if not stored:
            return f"no trajectory was finished, and {folder} is as it was"
        judged = sum(t.reward is not None for t in stored)
        return f"{len(stored)} trajectories are saved in {folder}, {judged} of them judged"

    check_folder(folder)
    with (
        stopping(lambda: f"stopped after {len(groups)} of {len(records)} prompts; {told()}"),
        only_writer(beside(folder), folder),
        uninterrupted() as closing,
    ):
        task, fmt = build.build_task(recipe), build.build_format(recipe)
        policy = build.build_policy(recipe, task, weights)
        records += task.prompts("heldout" if split == "heldout" else "train")[:count]
        manager = build.build_reward_manager(recipe, task, fmt)
        closing.callback(manager.close)
        rollouts = open_rollouts(
            policy, recipe.policy.model_copy(update={"path": str(weights)}), recipe.format, recipe.rollout, task.words
        )
        closing.callback(rollouts.close)
        requests = [
            RolloutRequest(group, record["prompt"], record, (0,), recipe.seed) for group, record in enumerate(records)
        ]
        try:
            result = rollouts.generate(requests, each=groups.__setitem__)
            if result.failed:
                logger.warning(
                    "%d of %d prompts got no answer; the first is group %d: %s",
                    len(result.failed),
                    len(records),
                    result.failed[0].group,
                    f"{result.failed[0].reason}: {result.failed[0].detail}",
                )
            manager.score(result.groups)
        except BaseException as error:  # neither a signal nor a formula that fails loses a thought
            if groups:
                _store(groups, folder)
            if isinstance(error, UserError):
                error.args = (f"{error}. {told()[0].upper()}{told()[1:]}",)
            raise
        return _store(groups, folder)


def _in_order(groups: dict[int, list[Trajectory]]) -> list[Trajectory]:
    return [trajectory for index in sorted(groups) for trajectory in groups[index]]


def _store(groups: dict[int, list[Trajectory]], folder: Path) -> list[Trajectory]:
    """Save them; a signal waits so long."""
    trajectories = _in_order(groups)
    with uninterrupted() as storing:
        storing.callback(save_trajectories, trajectories, folder)
    return trajectories


def _saved_at(newest: Path | None, resume_command: str) -> str:
    """What there is of a run that was stopped at once."""
    if newest is None:
        return "stopped at once; nothing was saved"
    return f"stopped at once; {newest} was the last to be saved. To go on, {resume_command}"


def training_lock(run_dir: Path) -> AbstractContextManager[None]:
    """Within it no other process trains in the folder, be it a warm start, GRPO or the quickstart. Others may evaluate
    and roll out beside it: these have folders of their own."""
    return only_writer(run_dir / ".lock", run_dir, "choose another run_dir")


def keep_evaluation(heldout: Heldout, folder: Path) -> None:
    """summary.json, prompts.jsonl and some trajectories, at most one a prompt."""
    answers = [group[0] for group in heldout.trajectories]
    stride = max(1, len(answers) // STORED_ANSWERS)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        heldout.save(folder / "prompts.jsonl")
        save_trajectories(answers[::stride], folder / "trajectories")
        write_whole(
            folder / "summary.json",
            json.dumps(
                {
                    "score": heldout.final_image,
                    "by_tag": heldout.tags,
                    "first_sketch": heldout.first_sketch,
                    "final_image": heldout.final_image,
                    "prompts": len(heldout.prompts),
                    "samples": len(heldout.trajectories[0]),
                    "metrics": heldout.as_metrics(),
                },
                indent=1,
            ),
        )


def compare_evaluations(run_dir: Path, before: str, after: str) -> Interval:
    """The gain between two kept evaluations with its paired bootstrap interval, kept as comparison.json."""
    folder = run_dir / "evaluations"
    interval = compare(*(read_prompt_scores(folder / label / "prompts.jsonl") for label in (before, after)))
    with writing(folder):
        write_whole(
            folder / "comparison.json",
            json.dumps(
                {
                    "before": before,
                    "after": after,
                    "gain": interval.difference,
                    "interval": [interval.low, interval.high],
                }
            ),
        )
    return interval


def read_prompt_scores(path: Path) -> list[PromptScore]:
    """The scores that Heldout.save wrote.

    Raises:
        UserError: the file is missing or a line is none of its rows.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no evaluation there; run `underdrawing evaluate` first") from None
    scores = []
    for number, line in enumerate(lines, 1):
        try:
            scores.append(PromptScore(**json.loads(line)))
        except (TypeError, json.JSONDecodeError):
            raise UserError(f"{path} line {number}: not a row of scores by prompt") from None
    return scores


def _setting(recipe: Recipe, task: Task) -> RewardContext:
    return RewardContext.of(task, build.build_format(recipe), detector_of(recipe.rewards, task))


def _evaluate(recipe: Recipe, task: Task, rollouts: Any, context: RewardContext) -> Heldout:
    records = spread_over_tags(task.prompts("heldout"), recipe.evaluate.prompts)
    return evaluate_heldout(rollouts, geneval_scorer(context), records, recipe.evaluate.seed, recipe.evaluate.samples)


@dataclass(frozen=True)
class _HeldoutMetrics:
    """Evaluations during training, with the rollout workers and the detector of the training itself."""

    recipe: Recipe
    task: Task
    rollouts: Any
    context: RewardContext

    def __call__(self, step: int) -> dict[str, float]:
        return _evaluate(self.recipe, self.task, self.rollouts, self.context).as_metrics()


def _heldout_metrics(recipe: Recipe, task: Task, rollouts: Any, context: RewardContext) -> _HeldoutMetrics | None:
    """`setting`: the judge's, whose detector is taken where it has one, so that no weights are loaded twice.

    Raises UserError for a held-out prompt that cannot be judged, before the first step.
    """
    if not recipe.grpo.evaluate_every:
        return None
    context = context if context.detector else _setting(recipe, task)
    check_prompts(context.detector_for("grpo.evaluate_every"), task, splits=("heldout",))
    return _HeldoutMetrics(recipe, task, rollouts, context)


def local(recipe: Recipe) -> Recipe:
    """The recipe with rollouts in this process, on as many CPU threads as torch has there."""
    rollout: RolloutConfig = recipe.rollout.model_copy(update={"workers": 0, "threads": None})
    return recipe.model_copy(update={"rollout": rollout})
