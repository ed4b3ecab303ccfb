"""What can be known to be wrong with a recipe before any weights are loaded: every job and `--dry-run` begin here."""

from __future__ import annotations

from formats.base import Format
from tasks.base import Task
from underdrawing import build
from underdrawing.recipe import Recipe


def preflight(recipe: Recipe) -> tuple[Task, Format]:
    """The recipe's task and format, once all that stands in the recipe is found to be there and to fit.

    Raises:
        UserError: naming the key, and what would be right.
    """
    build.check_policy_path(recipe)
    return build.build_task(recipe), build.build_format(recipe)
