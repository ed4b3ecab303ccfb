"""What can be known to be wrong with a recipe before any weights are loaded: every job and `--dry-run` begin here."""

from __future__ import annotations

from pathlib import Path

from formats.base import Format
from policy.registry import check_policy
from rollout.registry import check_writer_config
from runtime.errors import UserError
from tasks.base import Task
from underdrawing import build, search_path
from underdrawing.recipe import Recipe


def preflight(recipe: Recipe, rolls_out: bool = True, trains: bool = False) -> tuple[Task, Format]:
    """The recipe's task and format, once all that stands in the recipe is found to be there and to fit.

    Args:
        rolls_out: whether thoughts will be written and judged; a warm start does neither.
        trains: whether the weights will be trained, not only sampled with.

    Raises:
        UserError: naming the key, and what would be right.
    """
    if rolls_out:
        _check_working_folder(recipe)
    build.check_policy_path(recipe)
    task, fmt = build.build_task(recipe), build.build_format(recipe)
    if rolls_out:
        forks = trains and recipe.grpo.fork is not None
        check_writer_config(recipe.rollout, fmt, recipe.format.constrain, forks, recipe.tools)
        build.build_recipe_tools(recipe, fmt)
    # A tiny policy's tokenizer is made by the warm start, of the task's words; all others read it from its folder.
    check_policy(recipe.policy, () if rolls_out else build.words(recipe, task), trains)
    return task, fmt


def _check_working_folder(recipe: Recipe) -> None:
    """Raises UserError where Ray's workers, which seek everything in the working folder first, would find other
    packages than ours there."""
    if not recipe.rollout.workers and recipe.rewards.ray_cpus is None:
        return
    hiding = search_path.packages_here(Path.cwd())
    if hiding:
        raise UserError(
            f"{Path.cwd() / hiding[0]} bears the name of a package of this toolkit, and Ray's workers would import "
            f"it in their place: start the command in another folder, rename that one, or set rollout.workers: 0"
        )
