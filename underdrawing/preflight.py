"""What can be known to be wrong with a recipe before any weights are loaded: every job and `--dry-run` begin here."""

from __future__ import annotations

from pathlib import Path

from formats.base import Format
from policy.registry import FAMILIES, check_policy, denoises
from rollout.registry import check_writer_config
from runtime.errors import UserError
from tasks.base import Task
from underdrawing import build, search_path
from underdrawing.denoising import check_denoising
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
    if not rolls_out:
        check_tags(recipe, fmt)
    check_policy(recipe.policy, () if rolls_out else build.words(recipe, task), trains)
    check_denoising(recipe, denoises(recipe.policy), fmt if rolls_out and trains else None)
    return task, fmt


def check_tags(recipe: Recipe, fmt: Format) -> None:
    """Raises UserError where the tokenizer that a warm start makes could not spell one of the format's tags."""
    grammar, made = getattr(fmt, "grammar", None), recipe.policy.fresh_tags
    if grammar is None or recipe.policy.path is not None or recipe.policy.family not in FAMILIES or not made:
        return
    known = {*made, *getattr(getattr(recipe.policy, "tiny", None), "words", ())}
    for tag in grammar.tags:
        if tag not in known:
            raise UserError(
                f"policy.tiny.tags: the format '{fmt.name}' has the tag '{tag}', which the fresh tokenizer would not "
                f"know; add it: {[*made, *(other for other in grammar.tags if other not in known)]}"
            )


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
