"""The command `underdrawing`. Errors that a user can mend are one sentence and exit code 2; anything else is a bug
and keeps its traceback."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from underdrawing import search_path

search_path.settle()
# isort: split
from runtime.ending import leave  # noqa: E402
from runtime.errors import UserError  # noqa: E402
from runtime.interrupt import heed_signals, name_of, number_of, uninterrupted  # noqa: E402
from runtime.ray_cluster import stop_ray  # noqa: E402
from underdrawing.options import (  # noqa: E402
    NEWEST,
    Number,
    Parser,
    Whole,
    checkpoint_name,
    expanded_path,
    join_resume,
)

if TYPE_CHECKING:
    from tasks.base import Split

RECIPE_HELP = "a YAML recipe; shipped ones are under configs/"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a UserError into its sentence and exit code."""
    parser = _parser()
    words = join_resume(sys.argv[1:] if arguments is None else arguments)
    try:
        options, rest = parser.parse_known_args(words)
    except UserError as error:
        print(f"underdrawing: {error}", file=sys.stderr)
        return error.exit_code
    # argparse ends a list of positionals at the first option; overrides may stand on both sides of one.
    if rest and (not hasattr(options, "overrides") or any(a.startswith("-") or "=" not in a for a in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    quieten()
    search_path.working_folder_last()
    with heed_signals():
        try:
            return options.run(options)
        except UserError as error:
            print(f"underdrawing: {error}{_way_back(error, options, words)}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt as error:
            number = number_of(error)
            print(f"underdrawing: stopped by {name_of(number)}", file=sys.stderr)
            return 128 + number


def command() -> NoReturn:
    """The command as a program: whatever happens, what it started ends before it does."""
    leave_clean(main)


def leave_clean(run: Callable[[], int]) -> NoReturn:
    """Run, end the Ray that may be left, and exit with the code that `run` returns."""
    with uninterrupted() as closing:
        closing.callback(stop_ray)
        code = run()
    leave(code)


class StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at the moment: while a progress line stands, rich puts itself there, and what is
    written goes above the line instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _way_back(error: UserError, options: argparse.Namespace, words: Sequence[str]) -> str:
    """How to take the checkpoint before one that is not as it was written, where there is one."""
    broken, earlier = getattr(error, "broken", None), getattr(error, "earlier", None)
    resuming = bool(getattr(options, "resume", None))
    if earlier is None:
        return f". There is none before it; remove {broken} to start anew" if broken is not None and resuming else ""
    if resuming:
        others = [word for word in words if not word.startswith("--resume=")]
        command = shlex.join(["underdrawing", *others, "--resume", str(int(re.sub(r"\D", "", earlier.name)))])
        return f". To go on from that, and forget what came after it: {command}"
    return f". To take its weights: --weights {earlier / 'weights'}"


def quieten() -> None:
    """Our own messages at INFO, the libraries' at WARNING; their bars and banners off."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname).1s %(name)s: %(message)s", handlers=[StderrHandler()]
    )
    for name in search_path.PACKAGES:
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
    if (
        "transformers" in sys.modules
    ):  # it reads the environment as it is imported, and half of the commands need it not
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="underdrawing",
        description="Reinforcement-learning post-training for models that think in images and words.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, recipe: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        if recipe:
            sub.add_argument("recipe", type=expanded_path, help=RECIPE_HELP)
            sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides; values are YAML")
            sub.add_argument(
                "--dry-run",
                action="store_true",
                help="check what can be known without weights, print the resolved recipe",
            )
        return sub

    def resumable(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--resume",
            nargs="?",
            const=NEWEST,
            type=checkpoint_name,
            metavar="STEP|FOLDER",
            help="go on from the newest checkpoint, or from the one of that step or in that folder; later checkpoints "
            "and lines of metrics are then forgotten",
        )

    sub = command("sft", _sft, "warm start: learn from demonstrations")
    resumable(sub)

    sub = command("grpo", _grpo, "improve the warm-started policy by its rewards")
    sub.add_argument("--weights", type=expanded_path, help="folder to start from; default: the recipe's warm start")
    resumable(sub)
    sub.add_argument(
        "--changed-prompts", action="store_true", help="with --resume: the task's prompts are others than they were"
    )

    sub = command("rollout", _rollout, "sample trajectories, judge and store them")
    sub.add_argument("--weights", type=expanded_path, help="folder of the weights; default: the newest of the run")
    sub.add_argument("--prompts", type=Whole(1), default=16, help="how many (default 16)")
    sub.add_argument("--samples", type=Whole(1), default=1, help="trajectories of each prompt (default 1)")
    sub.add_argument(
        "--split", choices=("train", "heldout"), default="heldout", help="default heldout; to learn from: train"
    )
    sub.add_argument("--out", type=expanded_path, help="folder to write (default run_dir/rollout)")

    sub = command("difficulty", _difficulty, "how often the policy passes each prompt, to select prompts by")
    sub.add_argument("--weights", type=expanded_path, help="folder of the weights; default: the newest of the run")
    sub.add_argument("--samples", type=Whole(2), default=8, help="answers to each prompt, two or more (default 8)")
    sub.add_argument(
        "--pass-at", type=Number(above=-math.inf), default=1.0, help="reward from which on an answer passes (default 1)"
    )
    sub.add_argument("--part", help="component of the reward to pass by; default: the total")
    sub.add_argument("--split", choices=("train", "heldout"), default="train")
    sub.add_argument("--out", type=expanded_path, help="file to write (default run_dir/difficulty.jsonl)")

    from underdrawing import geneval, probe_cli

    probe_cli.add_options(command("probe", _probe, probe_cli.HELP))

    sub = command("evaluate", _evaluate, "held-out score of some weights; `evaluate geneval`: of images in a folder")
    sub.add_argument("--weights", type=expanded_path, help="folder of the weights; default: the newest of the run")
    sub.add_argument(
        "--label",
        help="name under run_dir/evaluations (default: from the weights' place, and what is not as in the run)",
    )
    geneval.add_options(sub)

    sub = command(
        "compare", _compare, "two evaluations, or two runs' evaluations, by the paired bootstrap", recipe=False
    )
    place = "a run's folder (the evaluation of its latest step counts), or an evaluation's: RUN/evaluations/LABEL"
    sub.add_argument("a", type=Path, metavar="RUN_A", help=place)
    sub.add_argument("b", type=Path, metavar="RUN_B", help="the same; differences are B less A")
    chosen = sub.add_mutually_exclusive_group()
    chosen.add_argument("--label", help="of two runs: the evaluations of this label")
    chosen.add_argument("--all", action="store_true", help="of two runs: every label that both have")

    sub = command("why", _why, "what a run's reward went up by, and whether the truth went up with it", recipe=False)
    sub.add_argument("run_dir", type=expanded_path, metavar="RUN", help="a run's folder")
    place = "an evaluation's label, or a step"
    sub.add_argument("--from", dest="start", metavar="A", help=f"{place} (default: the first that compares)")
    sub.add_argument("--to", dest="end", metavar="B", help=f"{place} (default: the last evaluation)")
    sub.add_argument("--json", action="store_true", help="print one JSON object in place of tables")

    from underdrawing import replay_cli, rewards_cli

    replay_cli.add_parsers(commands, RECIPE_HELP)
    rewards_cli.add_parser(commands)

    sub = command("view", _view, "write the HTML report of a run, or of stored trajectories", recipe=False)
    sub.add_argument("folder", type=expanded_path, help="a run's folder, or a folder of stored trajectories")
    sub.add_argument("--out", type=expanded_path, help="file to write (default report.html in the folder)")

    sub = command("doctor", _doctor, "what works on this machine, and what to do about what doesn't", recipe=False)
    sub.add_argument("--no-ray", action="store_true", help="leave out the check that starts Ray")
    return parser


def _recipe(options: argparse.Namespace) -> Any:
    from underdrawing.recipe import load_recipe

    return load_recipe(options.recipe, options.overrides)


def _resume(options: argparse.Namespace) -> bool | str:
    return options.resume == NEWEST or (options.resume or False)


def _dry_run(recipe: Any, **asked: Any) -> int:
    from underdrawing.dry_run import dry_run

    return dry_run(recipe, **asked)


def _sft(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe, rolls_out=False, trains=True)
    from underdrawing.jobs import run_sft

    print(f"warm-started weights: {run_sft(recipe, _resume(options))}")
    return 0


def _grpo(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if options.dry_run:
        evaluates = recipe.grpo.evaluate_every is not None
        splits: list[Split] = ["train", "heldout"] if evaluates else ["train"]
        return _dry_run(recipe, trains=True, evaluates=evaluates, weights=options.weights, splits=splits)
    from underdrawing.jobs import run_grpo

    weights = run_grpo(recipe, options.weights, _resume(options), changed_prompts=options.changed_prompts)
    print(f"trained weights: {weights}")
    return 0


def _newest_weights(recipe: Any, given: Path | None) -> Path:
    from underdrawing import build

    found = build.known_weights(recipe, given) or build.starting_weights(recipe)  # which says what is missing
    assert found is not None
    return found


def _rollout(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe, weights=options.weights, splits=[options.split])
    from underdrawing.jobs import run_rollout

    folder = options.out or recipe.run_dir / "rollout"
    weights = _newest_weights(recipe, options.weights)
    trajectories = run_rollout(recipe, weights, options.prompts, options.split, folder, options.samples)
    rewards = [t.reward for t in trajectories if t.reward is not None]
    mean = f"{sum(rewards) / len(rewards):.3f}" if rewards else "none judged"
    print(f"{len(trajectories)} trajectories of {weights} in {folder}; mean reward {mean}")
    return 0


def _difficulty(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe, weights=options.weights, splits=[options.split])
    from underdrawing.difficulty import run_difficulty, summary

    out = options.out or recipe.run_dir / "difficulty.jsonl"
    weights = _newest_weights(recipe, options.weights)
    records = run_difficulty(recipe, weights, options.split, options.samples, options.pass_at, out, options.part)
    counts = summary(records)
    print(f"{len(records)} prompts in {out}: passed never {counts['never']}, sometimes {counts['sometimes']}, always "
          f"{counts['always']}, not judged {counts['unjudged']}")  # fmt: skip
    print("To train on those in between: task.dataset.path of this file, task.dataset.where: {pass_rate: [0.1, 0.9]}")
    return 0


def _probe(options: argparse.Namespace) -> int:
    from rich.console import Console

    from underdrawing.probe import ProbeOptions, check_reward, print_probe, run_probe

    recipe = _recipe(options)
    asked = ProbeOptions(options.prompts, options.samples, options.arms, options.draws)
    check_reward(recipe)
    if options.dry_run:
        return _dry_run(recipe, weights=options.weights, splits=[options.split])
    weights = _newest_weights(recipe, options.weights)
    probe = run_probe(recipe, weights, asked, options.split, options.out or recipe.run_dir / "probe")
    print_probe(Console(), probe)
    print(json.dumps({"rows": [row.as_json() for row in probe.rows], "probe": str(probe.folder)}))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from underdrawing import geneval

    if str(options.recipe) == geneval.NAME:
        return geneval.run(options)
    geneval.refuse_options(options)
    recipe = _recipe(options)
    if options.dry_run:
        return _dry_run(recipe, evaluates=True, weights=options.weights, splits=["heldout"])
    from rich.console import Console

    from underdrawing.evaluations import run_evaluate
    from underdrawing.scaling_table import print_scaling
    from underdrawing.tables import print_evaluation

    kept = run_evaluate(recipe, _newest_weights(recipe, options.weights), options.label)
    print_evaluation(Console(), kept)
    scaling = kept.scaling()
    if scaling is not None:
        print_scaling(Console(), scaling, kept.folder)
    print(
        json.dumps(
            {
                "score": kept.score,
                "score_of": kept.score_name,
                **kept.means,
                "by_tag": kept.by_tag,
                **({"calibration": kept.calibration.as_json()} if kept.calibration else {}),
                "prompts": len(kept.prompts),
                "weights": kept.summary["weights"],
                "evaluation": str(kept.folder),
            }
        )
    )
    return 0


def _compare(options: argparse.Namespace) -> int:
    from underdrawing.compare import run_compare

    return run_compare(options.a, options.b, options.label, options.all)


def _why(options: argparse.Namespace) -> int:
    from underdrawing.why_tables import run_why

    return run_why(options.run_dir, options.start, options.end, options.json)


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
    command()
