"""From a recipe to the objects that run: the one place where packages meet.

Each function builds one thing from its section, so that a user's own script can take some and replace others.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formats.base import Format, Latent
from formats.roles import check_names, check_roles, roles_of
from policy.base import Policy
from policy.registry import FAMILIES, load_policy, load_vocabulary
from rewards.alarms import Alarms
from rewards.loader import is_own
from rewards.manager import RewardManager
from rollout.capabilities import drawing_roles
from rollout.open import open_rollouts
from rollout.pool.contract import Rollouts
from rollout.shown import ShownSlots
from rollout.tools.fitting import check_fit
from rollout.tools.registry import Tools, build_tools
from rollout.tools.registry import words_of as tool_words
from runtime.errors import UserError, writing
from runtime.ray_cluster import Cluster, start_ray
from sft.sources import words_of
from tasks import dataset
from tasks.base import Record, Split, Task
from tasks.lengths import fitting
from tasks.registry import get_task
from training import checkpoint
from training.tracking import Tracker
from underdrawing.denoising import check_denoising
from underdrawing.recipe import Recipe, dump_recipe


def seed_everything(seed: int) -> None:
    """Python, numpy and torch; rollouts and demonstrations take their own seeds and need none of these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_task(recipe: Recipe) -> Task:
    if recipe.task.dataset is not None:
        return dataset.build(recipe.task.dataset)
    return get_task(recipe.task.name, **recipe.task.keywords)


def build_format(recipe: Recipe) -> Format:
    """The recipe's format, to which its maps by role, and its rewards' lists of roles, are held.

    Raises:
        UserError: no such format, an option that it does not take, or a map that names no role of it.
    """
    fmt = recipe.format.build()
    check_roles(recipe, fmt)
    if recipe.grpo.image_credit is not None and not fmt.max_images:
        raise UserError(f"grpo.image_credit: the format '{fmt.name}' draws no image; leave it out, or draw")
    if recipe.grpo.restart is not None:
        images = drawing_roles(fmt)
        for role in recipe.grpo.restart.roles:
            if roles_of(fmt) is not None and role not in images:
                known = f"its images are {', '.join(images)}" if images else "and none in any other"
                raise UserError(
                    f"grpo.restart.roles: in the role '{role}' the format '{fmt.name}' draws no image; {known}"
                )
    for name, part in recipe.rewards.parts.items():
        roles = part.options.get("roles", ())
        if is_own(part.function) and isinstance(roles, list):
            check_names(roles, fmt, f"rewards.parts.{name}.options.roles")
    return fmt


def build_recipe_tools(recipe: Recipe, fmt: Format) -> Tools | None:
    """The recipe's tools, to which the format is held; None: it has none.

    Raises:
        ToolsError: a tool that cannot be had, or tools that do not fit the format.
    """
    tools = build_tools(recipe.tools)
    check_fit(fmt, tools)
    return tools


def build_policy(recipe: Recipe, task: Task, weights: Path | None = None) -> Policy:
    """The recipe's policy; with `weights`, a folder in the released layout in place of policy.path.

    Raises:
        CheckpointError: the weights are a checkpoint's, and that is not as it was written.
        UserError: the recipe says of denoising what is of no effect in its family.
    """
    config = recipe.policy.model_copy(update={"path": str(weights)}) if weights else recipe.policy
    folder = Path(config.path).resolve() if config.path else None
    if folder is not None and folder.name == "weights" and checkpoint.is_checkpoint(folder.parent):
        checkpoint.verify(folder.parent)  # its weights bear no checksums of their own
    policy = load_policy(config, words(recipe, task, weights))
    check_denoising(recipe, denoises(policy))
    return policy


def denoises(policy: Policy) -> bool:
    """Whether it makes images by denoising latents."""
    return isinstance(policy.vocabulary.imaging, Latent)


def open_writers(recipe: Recipe, task: Task, policy: Policy, weights: Path) -> Rollouts:
    """Who writes for a command that trains nothing: the weights, under the recipe's own sampling."""
    return open_rollouts(
        policy,
        recipe.policy.model_copy(update={"path": str(weights)}),
        recipe.format,
        recipe.rollout,
        words(recipe, task, weights),
        recipe.tools,
    )


def words(recipe: Recipe, task: Task, weights: Path | None = None) -> list[str]:
    """What a fresh policy's tokenizer must know: the task's words, those of its tools, and those of demonstrations that
    neither wrote.

    A policy that is loaded from a folder brings its tokenizer.
    """
    known = list(dict.fromkeys([*task.words, *tool_words(build_tools(recipe.tools))]))
    if weights is not None or recipe.policy.path is not None or recipe.sft.data is None:
        return known
    return sorted({*known, *words_of(recipe.sft.data, recipe.policy.fresh_tags)})


def prompts(recipe: Recipe, task: Task, fmt: Format, policy: Policy, split: Split) -> Sequence[Record]:
    """The task's prompts that this policy can be asked.

    Raises:
        PromptError: one that it cannot, where the recipe does not say to leave such out.
    """
    records = task.prompts(split)
    if not records:
        return records
    return fitting(records, fmt, policy.vocabulary, policy.max_length, recipe.task, split, ShownSlots(policy))


def build_reward_manager(
    recipe: Recipe, task: Task, fmt: Format, columns: Sequence[str] | None = None
) -> RewardManager:
    """`columns`: of the records that will be judged, where they are not the task's."""
    return RewardManager(recipe.rewards, task, fmt, max_steps=recipe.grpo.steps, columns=columns)


def build_alarms(recipe: Recipe) -> Alarms:
    """Watched are the parts that move no advantage: neither the formula names them, nor are segments credited by
    them."""
    weighted, by_segment = recipe.rewards.expression().names, recipe.grpo.credits_segments
    log_only = [
        name
        for name, part in recipe.rewards.parts.items()
        if part.log_only
        or name not in weighted
        and not (by_segment and recipe.grpo.segment_reward_weights.get(name, 1.0))
    ]
    return Alarms(recipe.rewards.alarms, log_only)


def start_cluster(recipe: Recipe) -> Cluster | None:
    """One Ray with room for the workers of both, where the rewards have Ray workers; None: whoever else needs Ray
    starts it. Raises ClusterError where it cannot be had."""
    if recipe.rewards.ray_cpus is None:
        return None
    return start_ray(recipe.rollout.workers * recipe.rollout.actor_threads + recipe.rewards.ray_cpus)


def build_tracker(recipe: Recipe, folder: Path, job: str) -> Tracker:
    """Rank 0's writer; `job` tells a warm start's W&B run from a GRPO run's."""
    return Tracker(folder, recipe.track, name=f"{recipe.name}-{job}", recipe=recipe.model_dump(mode="json"))


def warm_start_folder(recipe: Recipe) -> Path:
    """Where `underdrawing sft` leaves the weights."""
    return recipe.run_dir / "sft" / "model"


def starting_weights(recipe: Recipe, given: Path | None = None) -> Path | None:
    """The weights that a run starts from: those given, else the warm start's, else policy.path (None).

    Raises:
        UserError: the folder given is none, or there is neither a warm start nor a policy.path; of a run that has
            checkpoints the sentence names the weights that it started from.
    """
    if given is not None:
        if not (given / "config.json").is_file():
            raise UserError(f"{given}: no model here (config.json is missing); give a folder in the released layout")
        return given
    folder = warm_start_folder(recipe)
    if (folder / "config.json").is_file():
        return folder
    if recipe.policy.path is None:
        newest = checkpoint.latest(recipe.run_dir / "checkpoints")
        if newest is not None:
            source = checkpoint.started_from(newest)
            raise UserError(
                f"{recipe.run_dir}: its run started from weights that were given, and policy.path is not set; give "
                f"them again: --weights {source or 'and the folder that it started from'}"
            )
        raise UserError(
            f"{folder}: no warm start there, and policy.path is not set; run `underdrawing sft` with this "
            "recipe first, or give --weights"
        )
    return None


def known_weights(recipe: Recipe, given: Path | None = None) -> Path | None:
    """The weights that a job would begin with, where there are any by now: those given, the newest checkpoint's, the
    warm start's, or policy.path.

    Raises:
        UserError: the folder given is none.
    """
    newest = checkpoint.latest(recipe.run_dir / "checkpoints")
    if given is not None or newest is None:
        if given is None and recipe.policy.path is None and not (warm_start_folder(recipe) / "config.json").is_file():
            return None
        return starting_weights(recipe, given) or Path(str(recipe.policy.path))
    return newest / "weights"


def check_prompts(recipe: Recipe, task: Task, fmt: Format, weights: Path | None, splits: Sequence[Split]) -> None:
    """Raises PromptError as `prompts`, without loading weights: by the vocabulary in their folder, where the family
    says how to read it."""
    if weights is None:
        return
    known = load_vocabulary(recipe.policy.model_copy(update={"path": str(weights)}))
    if known is None:
        return
    vocabulary, max_length = known
    for split in splits:
        records = task.prompts(split)
        if records:
            fitting(records, fmt, vocabulary, max_length, recipe.task, split)


def check_run_dir(recipe: Recipe) -> None:
    """Raises UserError where run_dir is a file, or cannot be made."""
    there = next(path for path in (recipe.run_dir.absolute(), *recipe.run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"run_dir: {there} is a file; name a folder, or one that can be made")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {there} is not writable for you; choose another run_dir")


def check_policy_path(recipe: Recipe) -> None:
    """Raises UserError where policy.path is no folder with a model of a known family."""
    path = recipe.policy.path
    if path is not None and recipe.policy.family in FAMILIES and not (Path(path) / "config.json").is_file():
        raise UserError(
            f"policy.path: no model in {path} (config.json is missing); give a folder in the released layout"
        )


def write_recipe(recipe: Recipe, refused: bool = False) -> None:
    """Keep the resolved recipe beside what it makes. `refused`: the folder holds a run that will not be gone on with,
    so that run's recipe stays."""
    if refused:
        return
    with writing(recipe.run_dir, "choose another run_dir"):
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        (recipe.run_dir / "recipe.yaml").write_text(dump_recipe(recipe))


def worker_policy(recipe: Recipe, task: Task, weights: Path | None) -> dict[str, Any]:
    """What a rollout worker in another process needs to build the same policy: plain data."""
    config = recipe.policy.model_copy(update={"path": str(weights)}) if weights else recipe.policy
    return {"config": config.model_dump(mode="json"), "words": words(recipe, task, weights)}
