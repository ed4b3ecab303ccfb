"""What the commands do: each job takes a recipe, builds its parts, runs, and leaves its results in the run's folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from record.store import check_folder, save_trajectories
from record.trajectory import Trajectory
from rl.grpo import train
from rl.run import Run
from rollout.config import RolloutConfig
from rollout.open import open_rollouts
from rollout.requests import RolloutRequest
from runtime.errors import UserError
from runtime.interrupt import Interrupted
from tasks.base import Split
from training import checkpoint
from underdrawing import build
from underdrawing.evaluations import during_training
from underdrawing.preflight import preflight
from underdrawing.progress import StepProgress
from underdrawing.recipe import Recipe, as_now

logger = logging.getLogger(__name__)
RESUME = "give the same command with --resume"


def run_sft(recipe: Recipe, resume: bool | str = False, resume_command: str = RESUME) -> Path:
    """The warm start. Returns the folder of its weights.

    `resume`: from the newest checkpoint; text: from the one of that step, or in that folder.
    """
    from policy.chameleon.family import ChameleonPolicy
    from sft.checkpoints import finished_checkpoints
    from sft.train import check_demonstrations, demonstrate, warm_start

    build.seed_everything(recipe.seed)
    task, fmt = preflight(recipe, rolls_out=False, trains=True)
    first = PartialState(cpu=recipe.policy.device == "cpu").is_main_process
    if first:
        build.write_recipe(recipe, refused=not resume and bool(finished_checkpoints(recipe.run_dir / "sft")))
    policy = build.build_policy(recipe, task)
    if not isinstance(policy, ChameleonPolicy):
        raise UserError(
            f"policy.family: '{recipe.policy.family}' has no warm start; `underdrawing sft` serves the "
            "family 'chameleon'"
        )
    demonstrations = demonstrate(task, fmt, policy, recipe.sft, recipe.seed)
    check_demonstrations(demonstrations, fmt)
    tracker = build.build_tracker(recipe, recipe.run_dir / "sft", "sft") if first else None
    progress = StepProgress("warm start", recipe.sft.max_steps) if first else None
    if tracker is not None:
        tracker.listeners.append(progress)
    try:
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
    finally:
        for part in (progress, tracker):
            if part is not None:
                part.close()
    return build.warm_start_folder(recipe)


def run_grpo(
    recipe: Recipe,
    weights: Path | None = None,
    resume: bool | str = False,
    resume_command: str = RESUME,
    changed_prompts: bool = False,
) -> Path:
    """GRPO from the warm start (or `weights`) to recipe.grpo.steps. Returns the folder of the final weights.

    Args:
        resume: from the newest checkpoint, if there is one; text: from the one of that step, or in that folder, and
            what came after it is forgotten.
        changed_prompts: resume although the task's prompts are not those of the checkpoint.
    """
    build.seed_everything(recipe.seed)
    task, fmt = preflight(recipe, trains=True)
    start = build.starting_weights(recipe, weights)
    policy = build.build_policy(recipe, task, start)
    accelerator = Accelerator(cpu=recipe.policy.device == "cpu", mixed_precision="no")
    newest = checkpoint.latest(recipe.run_dir / "checkpoints")
    if isinstance(resume, str):
        newest = checkpoint.chosen(recipe.run_dir / "checkpoints", resume)
    elif resume and newest is None:
        logger.warning("%s: no checkpoint to resume from; starting anew", recipe.run_dir)
    first = accelerator.is_main_process
    rollouts = manager = tracker = cluster = None
    progress = StepProgress("GRPO", recipe.grpo.steps) if first else None
    try:
        if first:
            build.write_recipe(recipe, refused=not resume and newest is not None)
            cluster = build.start_cluster(recipe)
            manager = build.build_reward_manager(recipe, task, fmt)
            config = recipe.policy.model_copy(update={"path": str(start)}) if start else recipe.policy
            rollouts = open_rollouts(policy, config, recipe.format, recipe.rollout, build.words(recipe, task, start))
            tracker = build.build_tracker(recipe, recipe.run_dir, "grpo")
            tracker.listeners.append(progress)
        heldout = during_training(recipe, task, fmt, policy, rollouts, manager) if manager else None
        run = Run(
            policy=policy,
            config=recipe.grpo,
            accelerator=accelerator,
            prompts=build.prompts(recipe, task, fmt, policy, "train"),
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
            changed_prompts=changed_prompts,
            read_recipe=as_now,
            resume_command=resume_command,
        )
        train(run, newest if resume else None)
    finally:
        for part in (progress, manager, rollouts, tracker):
            if part is not None:
                part.close()
        if cluster is not None:
            cluster.stop()
    final = checkpoint.latest(recipe.run_dir / "checkpoints")
    assert final is not None
    return final / "weights"


def run_rollout(recipe: Recipe, weights: Path, count: int, split: str, folder: Path) -> list[Any]:
    """Roll out `count` prompts once each, judge them, and store the trajectories.

    Raises:
        StoreError: `folder` holds what saving would delete; nothing was sampled.
        UserError: the split has fewer prompts.
        Interrupted: after Ctrl-C. It and every other UserError say what is stored: all that was finished, judged or
            not.
    """
    check_folder(folder)
    task, fmt = preflight(recipe)
    side: Split = "heldout" if split == "heldout" else "train"
    there = len(task.prompts(side))
    if not 1 <= count <= there:
        raise UserError(f"--prompts {count}: the split '{side}' has {there} prompts; ask for 1 to {there}")
    policy = build.build_policy(recipe, task, weights)
    records = build.prompts(recipe, task, fmt, policy, side)[:count]
    with build.build_reward_manager(recipe, task, fmt) as manager:
        rollouts = open_rollouts(
            policy,
            recipe.policy.model_copy(update={"path": str(weights)}),
            recipe.format,
            recipe.rollout,
            build.words(recipe, task, weights),
        )
        groups: dict[int, list[Trajectory]] = {}  # by request, as they finish
        try:
            try:
                result = rollouts.generate(
                    [
                        RolloutRequest(group, record["prompt"], record, (0,), recipe.seed)
                        for group, record in enumerate(records)
                    ],
                    each=groups.__setitem__,
                )
            finally:
                rollouts.close()
            if result.failed:
                logger.warning(
                    "%d of %d prompts got no answer; the first is group %d: %s",
                    len(result.failed),
                    len(records),
                    result.failed[0].group,
                    f"{result.failed[0].reason}: {result.failed[0].detail}",
                )
            manager.score(result.groups)
        except BaseException as error:  # neither Ctrl-C nor a formula that fails loses a thought
            stored = _store(groups, folder) if groups else []
            judged = sum(t.reward is not None for t in stored)
            told = (
                f"{len(stored)} trajectories are saved in {folder}, {judged} of them judged"
                if stored
                else f"no trajectory was finished, and {folder} is as it was"
            )
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"stopped after {len(groups)} of {len(records)} prompts; {told}") from None
            if isinstance(error, UserError):
                error.args = (f"{error}. {told[0].upper()}{told[1:]}",)
            raise
        return _store(groups, folder)


def _store(groups: dict[int, list[Trajectory]], folder: Path) -> list[Trajectory]:
    trajectories = [trajectory for index in sorted(groups) for trajectory in groups[index]]
    save_trajectories(trajectories, folder)
    return trajectories


def local(recipe: Recipe, threads: int | None = None) -> Recipe:
    """The recipe with rollouts in this process."""
    update: dict[str, Any] = {"workers": 0}
    if threads is not None:
        update["threads"] = threads
    rollout: RolloutConfig = recipe.rollout.model_copy(update=update)
    return recipe.model_copy(update={"rollout": rollout})
