"""What can be known to be wrong with a recipe before any weights are loaded: every job and `--dry-run` begin here."""

from __future__ import annotations

from pathlib import Path

from formats.base import Format
from runtime.errors import UserError
from tasks.base import Task
from underdrawing import build, search_path
from underdrawing.recipe import Recipe


def preflight(recipe: Recipe, rolls_out: bool = True) -> tuple[Task, Format]:
    """The recipe's task and format, once all that stands in the recipe is found to be there and to fit.

    Args:
        rolls_out: whether thoughts will be written and judged; a warm start does neither.

    Raises:
        UserError: naming the key, and what would be right.
    """
    if rolls_out:
        _check_working_folder(recipe)
    build.check_policy_path(recipe)
    return build.build_task(recipe), build.build_format(recipe)


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
