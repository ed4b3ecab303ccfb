"""The command `underdrawing`. Errors that a user can mend are one sentence and exit code 2; anything else is a bug
and keeps its traceback."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError

OUR_PACKAGES = (
    "underdrawing",
    "rl",
    "sft",
    "evals",
    "training",
    "rewards",
    "rollout",
    "tasks",
    "policy",
    "formats",
    "record",
    "runtime",
)
RECIPE_HELP = "a YAML recipe; shipped ones are under configs/"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a UserError into its sentence and exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positionals at the first option; overrides may stand on both sides of one.
    if rest and (not hasattr(options, "overrides") or any(a.startswith("-") or "=" not in a for a in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    quieten()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a recipe may name functions of modules in the folder one stands in
    try:
        return options.run(options)
    except UserError as error:
        print(f"underdrawing: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        again = "; --resume goes on from there" if hasattr(options, "resume") else ""
        print(f"underdrawing: interrupted; what was saved stays{again}", file=sys.stderr)
        return 130


def quieten() -> None:
    """Our own messages at INFO, the libraries' at WARNING; their bars and banners off."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(name)s: %(message)s", stream=sys.stderr)
    for name in OUR_PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DS_ACCELERATOR", "" if _has_gpu() else "cpu"),
    ):
        if value:
            os.environ.setdefault(name, value)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="underdrawing",
        description="Reinforcement-learning post-training for models that think in images and words.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, recipe: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        if recipe:
            sub.add_argument("recipe", type=Path, help=RECIPE_HELP)
            sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides; values are YAML")
            sub.add_argument("--dry-run", action="store_true", help="check everything, print the resolved recipe, stop")
        return sub

    sub = command("sft", _sft, "warm start: learn from demonstrations")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")

    sub = command("grpo", _grpo, "improve the warm-started policy by its rewards")
    sub.add_argument("--weights", type=Path, help="folder to start from; default: the recipe's warm start")
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")

    sub = command("rollout", _rollout, "sample trajectories, judge and store them")
    sub.add_argument("--weights", type=Path, help="folder of the weights; default: the newest of the run")
    sub.add_argument("--prompts", type=int, default=16, help="how many (default 16)")
    sub.add_argument("--split", choices=("train", "heldout"), default="heldout")
    sub.add_argument("--out", type=Path, help="folder to write (default run_dir/rollout)")

    from underdrawing import geneval

    sub = command("evaluate", _evaluate, "held-out score of some weights; `evaluate geneval`: of images in a folder")
    sub.add_argument("--weights", type=Path, help="folder of the weights; default: the newest of the run")
    sub.add_argument("--label", help="name under run_dir/evaluations (default: from the weights' place)")
    geneval.add_options(sub)

    from underdrawing import rewards_cli

    rewards_cli.add_parser(commands)

    sub = command("view", _view, "write the HTML report of a run, or of stored trajectories", recipe=False)
    sub.add_argument("folder", type=Path, help="a run's folder, or a folder of stored trajectories")
    sub.add_argument("--out", type=Path, help="file to write (default report.html in the folder)")

    sub = command("doctor", _doctor, "what works on this machine, and what to do about what doesn't", recipe=False)
    sub.add_argument("--no-ray", action="store_true", help="leave out the check that starts Ray")
    return parser


def _recipe(options: argparse.Namespace) -> Any:
    from underdrawing.recipe import load_recipe

    return load_recipe(options.recipe, options.overrides)


def _dry_run(recipe: Any) -> int:
    """Print the resolved recipe and how the reward is made. Loads rewards and task, no weights."""
    from rewards.tree import lines
    from underdrawing import build
    from underdrawing.recipe import dump_recipe

    build.check_policy_path(recipe)
    task, fmt = build.build_task(recipe), build.build_format(recipe)
    with build.build_reward_manager(recipe, task, fmt):
        pass
    print(dump_recipe(recipe), end="")
    print(f"# reward = {recipe.rewards.formula()}")
    print("\n".join(f"# {line}" for line in lines(recipe.rewards)))
    print(f"# {len(task.prompts('train'))} train prompts, {len(task.prompts('heldout'))} held-out prompts")
    return 0


def _sft(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe)
    from underdrawing.jobs import run_sft

    print(f"warm-started weights: {run_sft(recipe, options.resume)}")
    return 0


def _grpo(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe)
    from underdrawing.jobs import run_grpo

    print(f"trained weights: {run_grpo(recipe, options.weights, options.resume)}")
    return 0


def _newest_weights(recipe: Any, given: Path | None) -> Path:
    from training import checkpoint
    from underdrawing import build

    newest = checkpoint.latest(recipe.run_dir / "checkpoints") if given is None else None
    if newest is not None:
        return newest / "weights"
    found = build.starting_weights(recipe, given)
    return found if found is not None else Path(recipe.policy.path)


def _rollout(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe)
    from underdrawing.jobs import run_rollout

    folder = options.out or recipe.run_dir / "rollout"
    weights = _newest_weights(recipe, options.weights)
    trajectories = run_rollout(recipe, weights, options.prompts, options.split, folder)
    rewards = [t.reward for t in trajectories if t.reward is not None]
    mean = f"{sum(rewards) / len(rewards):.3f}" if rewards else "none judged"
    print(f"{len(trajectories)} trajectories of {weights} in {folder}; mean reward {mean}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from underdrawing import geneval

    if str(options.recipe) == geneval.NAME:
        return geneval.run(options)
    geneval.refuse_options(options)
    recipe = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe)
    from rich.console import Console
    from rich.table import Table

    from underdrawing.jobs import run_evaluate

    weights = _newest_weights(recipe, options.weights)
    label = options.label or ("warm_start" if weights.parent.name == "sft" else weights.parent.name)
    heldout = run_evaluate(recipe, weights, label)
    table = Table(title=f"{weights}: {len(heldout.prompts)} held-out prompts", title_justify="left")
    table.add_column("tag")
    table.add_column("score", justify="right")
    for tag, score in heldout.tags.items():
        table.add_row(tag, f"{score:.3f}")
    table.add_section()
    table.add_row("[bold]mean of tags", f"[bold]{heldout.final_image:.3f}")
    table.add_row("first sketch alone", f"{heldout.first_sketch:.3f}")
    Console().print(table)
    print(
        json.dumps(
            {
                "score": heldout.final_image,
                "first_sketch": heldout.first_sketch,
                "by_tag": heldout.tags,
                "prompts": len(heldout.prompts),
                "weights": str(weights),
            }
        )
    )
    return 0


def _view(options: argparse.Namespace) -> int:
    from record.store import check_beside, load_trajectories
    from underdrawing.report.page import ReportData, report_data, write_report

    folder: Path = options.folder
    page = options.out or folder / "report.html"
    check_beside(page)
    if (folder / "trajectories.parquet").is_file():
        trajectories = load_trajectories(folder)
        data = ReportData(folder.name, f"{len(trajectories)} stored trajectories", sampled=[(0, trajectories)])
    else:
        data = report_data(folder)
    print(f"report: {write_report(data, page)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from underdrawing.doctor import examine, print_findings

    return print_findings(examine(ray=not options.no_ray))


if __name__ == "__main__":
    sys.exit(main())
