"""The commands `replay` and `diff` as the command line has them."""

from __future__ import annotations

import argparse
from typing import Any

from underdrawing.options import Whole, expanded_path


def add_parsers(commands: Any, recipe_help: str) -> None:
    """Add both to the command's subparsers."""
    what = "the same prompts and noise by two sets of weights, and where their thoughts part"
    sub = commands.add_parser("diff", help=what, description=what)
    sub.set_defaults(run=_diff)
    place = "a folder of weights, a run's folder (its newest weights), or RUN@STEP"
    sub.add_argument("a", type=expanded_path, metavar="A", help=place)
    sub.add_argument("b", type=expanded_path, metavar="B", help="the same; gained and lost are B's")
    sub.add_argument("--recipe", type=expanded_path, required=True, help=recipe_help)
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides; values are YAML")
    sub.add_argument("--prompts", type=Whole(1), default=24, help="held-out prompts, over all tags (default 24)")
    sub.add_argument("--out", type=expanded_path, help="file to write (default run_dir/diff.html)")

    what = "compute a kept training step again, and compare to the last bit"
    sub = commands.add_parser("replay", help=what, description=what)
    sub.set_defaults(run=_replay)
    sub.add_argument("folder", type=expanded_path, metavar="RUN", help="a run's folder, kept with grpo.keep_rollouts")
    sub.add_argument("--step", type=Whole(1), help="which kept step (default: the last one)")
    sub.add_argument("--call-judges", action="store_true", help="ask judges again; default: what they said is stored")
    sub.add_argument(
        "--stored", action="append", default=[], metavar="PART", help="do not call this reward part again either"
    )
    sub.add_argument("--weights", type=expanded_path, help="folder that the run started from, if it was moved")
    sub.add_argument("--threads", type=Whole(1, 4096), help="CPU threads (default: as many as the run had)")
    sub.add_argument(
        "--other-setup", action="store_true", help="replay although packages or the lock are not those of the run"
    )


def _diff(options: argparse.Namespace) -> int:
    from underdrawing.diff import run_diff
    from underdrawing.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    return run_diff(recipe, str(options.a), str(options.b), options.prompts, options.out)


def _replay(options: argparse.Namespace) -> int:
    from underdrawing.replay import Options, run_replay

    given = Options(options.call_judges, options.stored, options.weights, options.threads, options.other_setup)
    return run_replay(options.folder, options.step, given)
