"""What can be known of a recipe without weights: `--dry-run` of every command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rewards.tree import lines
from sft.mixture import check_mixture
from sft.sources import check_data
from tasks.base import Split
from underdrawing import build
from underdrawing.evaluations import check_evaluation, check_named
from underdrawing.preflight import check_tags, preflight
from underdrawing.recipe import Recipe, dump_recipe


def dry_run(
    recipe: Recipe,
    rolls_out: bool = True,
    trains: bool = False,
    evaluates: bool = False,
    weights: Path | None = None,
    splits: Sequence[Split] = (),
) -> int:
    """Print the resolved recipe and how the reward is made. Loads rewards and task, no weights.

    Args:
        rolls_out: the command writes thoughts and judges them; a warm start does neither.
        trains: it makes optimiser steps, for which the recipe must be fit.
        evaluates: it asks the held-out prompts, which must be there and can be judged.
        weights: as given.
        splits: whose prompts it asks; held to the vocabulary of the weights, where there are any by now.
    """
    task, fmt = preflight(recipe, rolls_out, trains)
    # The other commands begin with weights, and may run where what these were taught with is not.
    if not rolls_out and recipe.sft.data is not None:
        check_data(recipe.sft, recipe.policy.fresh_tags)
    if not rolls_out:
        check_mixture(recipe.sft, task)
    with build.build_reward_manager(recipe, task, fmt):
        pass
    build.check_run_dir(recipe)
    check_named(recipe, task)
    if rolls_out:
        there = build.known_weights(recipe, weights)
        if there is None:  # these begin with a warm start, which will make the tokenizer
            check_tags(recipe, fmt)
        build.check_prompts(recipe, task, fmt, there, splits)
    if evaluates:
        check_evaluation(recipe, task, fmt)
    print(dump_recipe(recipe), end="")
    print(f"# reward = {recipe.rewards.formula()}")
    print("\n".join(f"# {line}" for line in lines(recipe.rewards)))
    print(f"# {len(task.prompts('train'))} train prompts, {len(task.prompts('heldout'))} held-out prompts")
    return 0
