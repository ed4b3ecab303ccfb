"""What the commands do: each job takes a recipe, builds its parts, runs, and leaves its results in the run's folder."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType, PartialState

from record.store import check_folder, save_trajectories
from record.trajectory import Trajectory
from rl.grpo import train
from rl.run import Run
from rollout.config import RolloutConfig
from rollout.open import open_rollouts
from rollout.requests import request_of
from runtime.errors import UserError
from runtime.interrupt import stopping, uninterrupted
from runtime.locks import beside, only_writer
from tasks.base import Split
from training import checkpoint
from training.ranks import run_on_main
from underdrawing import build
from underdrawing.critiques import of_rollouts
from underdrawing.denoising import check_denoising
from underdrawing.evaluations import check_named, during_training
from underdrawing.lock import lock_sha256
from underdrawing.preflight import preflight
from underdrawing.progress import StepProgress
from underdrawing.recipe import Recipe, as_now

logger = logging.getLogger(__name__)
RESUME = "give the same command with --resume"


def run_sft(recipe: Recipe, resume: bool | str = False, resume_command: str = RESUME) -> Path:
    """The warm start. Returns the folder of its weights.

    Args:
        resume: from the newest checkpoint; text: from the one of that step, or in that folder.

    Raises:
        Busy: another process trains in the run's folder.
        Interrupted: a signal stopped it; says what is saved.
    """
    from sft.checkpoints import finished_checkpoints
    from sft.demonstrations import check_demonstrations, demonstrate
    from sft.mixture import check_mixture, rows_beside
    from sft.train import warm_start

    def saved() -> Path | None:
        return next(reversed(finished_checkpoints(recipe.run_dir / "sft")), None)

    build.seed_everything(recipe.seed)
    state = PartialState(cpu=recipe.policy.device == "cpu")
    with stopping(lambda: _saved_at(saved(), resume_command)), uninterrupted() as closing:
        run_on_main(state, lambda: closing.enter_context(training_lock(recipe.run_dir)))
        task, fmt = preflight(recipe, rolls_out=False, trains=True)
        check_mixture(recipe.sft, task)
        first = state.is_main_process
        if first:
            # A GRPO run's recipe stays: its evaluations are labelled by what differs from it.
            trained = checkpoint.latest(recipe.run_dir / "checkpoints") is not None
            build.write_recipe(recipe, refused=trained or (not resume and saved() is not None))
        policy = build.build_policy(recipe, task)
        demonstrations = demonstrate(task, fmt, policy, recipe.sft, recipe.seed)
        check_demonstrations(demonstrations, fmt)
        demonstrations += rows_beside(task, fmt, policy, recipe.sft, len(demonstrations), recipe.seed)
        tracker = None
        if first:
            tracker = build.build_tracker(recipe, recipe.run_dir / "sft", "sft")
            closing.callback(tracker.close)
            progress = StepProgress("warm start", recipe.sft.max_steps)
            closing.callback(progress.close)
            tracker.listeners.append(progress)
        warm_start(
            policy,
            fmt,
            demonstrations,
            recipe.sft,
            recipe.run_dir,
            seed=recipe.seed,
            tracker=tracker,
            resume=resume,
            resume_command=resume_command,
        )
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
        task, fmt = preflight(recipe, trains=True)
        check_named(recipe, task)
        start = build.starting_weights(recipe, weights)
        policy = build.build_policy(recipe, task, start)
        check_denoising(recipe, build.denoises(policy), fmt)
        newest = saved()
        if isinstance(resume, str):
            newest = checkpoint.chosen(recipe.run_dir / "checkpoints", resume)
        elif resume and newest is None:
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
            words, forks = build.words(recipe, task, start), recipe.grpo.fork is not None
            rollouts = open_rollouts(policy, config, recipe.format, recipe.rollout, words, recipe.tools, forks)
            closing.callback(rollouts.close)
            tracker = build.build_tracker(recipe, recipe.run_dir, "grpo")
            closing.callback(tracker.close)
            tracker.listeners.append(progress)
        prompts = build.prompts(recipe, task, fmt, policy, "train")
        heldout = critiques = None
        if manager:
            # Sharded weights are whole in no process.
            whole = accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
            heldout = during_training(recipe, task, fmt, policy, rollouts, manager, scores=whole)
            critiques = of_rollouts(recipe, task, fmt, policy, prompts, manager)
        run = Run(
            policy=policy,
            config=recipe.grpo,
            accelerator=accelerator,
            prompts=prompts,
            rollouts=rollouts,
            reward_manager=manager,
            tracker=tracker,
            folder=recipe.run_dir,
            seed=recipe.seed,
            recipe=recipe.model_dump(mode="json"),
            weights=start or recipe.policy.path,
            evaluate=heldout,
            fmt=fmt,
            alarms=build.build_alarms(recipe) if first else None,
            critiques=critiques,
            show_every=recipe.track.trajectories_every,
            changed_prompts=changed_prompts,
            read_recipe=as_now,
            resume_command=resume_command,
            setup={"lock": lock_sha256()},
        )
        train(run, newest if resume else None)
    final = saved()
    assert final is not None
    return final / "weights"


def run_rollout(
    recipe: Recipe, weights: Path, count: int, split: str, folder: Path, samples: int = 1
) -> list[Trajectory]:
    """Roll out `count` prompts, `samples` times each, judge them, and store the trajectories.

    Raises:
        StoreError: `folder` holds what saving would delete; nothing was sampled.
        UserError: the split has fewer prompts.
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
        task, fmt = preflight(recipe)
        side: Split = "heldout" if split == "heldout" else "train"
        there = len(task.prompts(side))
        if not 1 <= count <= there:
            has = f"has {there} prompts; ask for 1 to {there}" if there > 1 else f"has {there or 'no'} prompt"
            raise UserError(f"--prompts {count}: the split '{side}' {has}, or give another --split")
        policy = build.build_policy(recipe, task, weights)
        records += build.prompts(recipe, task, fmt, policy, side)[:count]
        manager = build.build_reward_manager(recipe, task, fmt)
        closing.callback(manager.close)
        rollouts = build.open_writers(recipe, task, policy, weights)
        closing.callback(rollouts.close)
        requests = [request_of(group, record, range(samples), recipe.seed) for group, record in enumerate(records)]
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


def local(recipe: Recipe) -> Recipe:
    """The recipe with rollouts in this process, on as many CPU threads as torch has there."""
    rollout: RolloutConfig = recipe.rollout.model_copy(update={"workers": 0, "threads": None})
    return recipe.model_copy(update={"rollout": rollout})
