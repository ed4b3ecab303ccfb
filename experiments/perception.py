"""Which warm start teaches to see: rows beside the demonstrations, compared at equal trained tokens.

    python -m experiments.perception --out runs/perception-arms

All arms go on from one warm start of `--tokens` trained tokens, whose rollouts on train prompts are stored, and learn
from as many tokens again:

    plain         demonstrations alone
    perception    and inspections of first images, and questions
    corrupted     and corrupted first images, redrawn or ignored: mistakes that were rendered
    self_sampled  and the stored images of the policy itself: mistakes that it makes

Prints, and writes to <out>/results.json after each arm: the nats of an inspection of a right and of a wrong image (of
demonstrations that no arm learns from); of images that the arm draws on held-out prompts, the share of wrong ones that
it approves and of right ones that it does not, against the detector; and the share of right final images.

Each arm is a folder of its own that resumes, and `--arms NAME ...` does some of them, so that a piece ends within an
hour.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import math

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from policy.base import Policy
from record.store import load_trajectories
from rewards.contract import RewardContext
from rewards.functions.critique_consistency import inspect_all, rates
from rewards.manager import detector_of
from runtime.errors import UserError
from runtime.files import write_whole
from runtime.interrupt import heed_signals, name_of, number_of
from sft.demonstrations import WRONG_IMAGES, check_demonstrations, demonstrate, see
from sft.mixture import rows_beside
from sft.perception import inspection_rows
from sft.teacher_forcing import Example, examples
from sft.train import warm_start
from training.tracking import Tracker
from underdrawing import build
from underdrawing.cli import quieten
from underdrawing.jobs import local, run_rollout, training_lock
from underdrawing.options import LARGEST_SEED, Number, Parser, Whole, expanded_path
from underdrawing.preflight import preflight
from underdrawing.progress import StepProgress
from underdrawing.recipe import Recipe, load_recipe

FIRST = "first"
QUESTIONS = "[inspection, count, object, presence, relation]"
SHARE = 0.4  # of the rows that an arm learns from beside the demonstrations
# Overrides of the recipe; STORED is where the first warm start's rollouts lie.
STORED = "STORED"
ARMS: dict[str, list[str]] = {
    "plain": [],
    "perception": [f"sft.perception={{share: {SHARE}, kinds: {QUESTIONS}}}"],
    "corrupted": [f"sft.corruption={{share: {SHARE}}}"],
    "self_sampled": [f"sft.critiques={{path: {STORED}, share: {SHARE}}}"],
}
ROLES = ("inspect", "critique")
MEASURES = {  # headings of two lines each, so that the table fits a terminal
    "nats_right": "nats,\nright",
    "nats_wrong": "nats,\nwrong",
    "approved_but_wrong": "approved\nbut wrong",
    "disturbed_but_right": "disturbed\nbut right",
    "wrong_images": "images\nwrong",
    "final_right": "final\nright",
}


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=expanded_path, default=Path("configs/shapes/quickstart.yaml"))
    parser.add_argument("--out", type=expanded_path, default=Path("runs/perception-arms"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all of them")
    parser.add_argument("--tokens", type=Number(), default=1e6, help="trained tokens of each of the two warm starts")
    parser.add_argument(
        "--prompts", type=Whole(1), default=200, help="held-out prompts; as many train prompts are sampled"
    )
    parser.add_argument("--samples", type=Whole(1), default=2, help="answers to each prompt")
    parser.add_argument("--seed", type=Whole(0, LARGEST_SEED), default=7, help="a development seed")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="overrides of the recipe")
    quieten()
    with heed_signals():
        try:
            options = parser.parse_args()
            results = compare_arms(options)
        except UserError as error:
            print(f"perception: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt as error:
            number = number_of(error)
            print(f"stopped by {name_of(number)}; the same command goes on from what was saved", file=sys.stderr)
            return 128 + number
    show(results)
    return 0


def compare_arms(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What each arm came to, that of earlier calls included."""
    path = options.out / "results.json"
    settings = {name: str(getattr(options, name)) for name in ("recipe", "tokens", "prompts", "samples", "seed", "set")}
    kept = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "arms": {}}
    if kept["settings"] != settings:
        raise UserError(f"{path} is of other settings; choose another --out, or remove that folder")
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / FIRST / "rollout"
    for arm in (FIRST, *options.arms):
        if arm not in kept["arms"]:
            kept["arms"][arm] = run_arm(options, arm, stored)
            write_whole(path, json.dumps(kept, indent=1))
    return dict(kept["arms"])


def run_arm(options: argparse.Namespace, arm: str, stored: Path) -> dict[str, float]:
    """Train, or go on training, and measure."""
    recipe = recipe_of(options, arm, stored)
    tokens = train(recipe, options.tokens)
    weights = build.warm_start_folder(recipe)
    if arm == FIRST and not stored.is_dir():
        run_rollout(local(recipe), weights, options.prompts, "train", stored, options.samples)
    return {**measure(recipe, weights, options), "tokens": tokens}


def recipe_of(options: argparse.Namespace, arm: str, stored: Path) -> Recipe:
    """The arm's recipe. All but the first begin with the first one's weights."""
    overrides = [*options.set, f"seed={options.seed}", f"run_dir={options.out / arm}", "track.wandb=disabled"]
    if arm != FIRST:
        overrides.append(f"policy.path={build.warm_start_folder(recipe_of(options, FIRST, stored))}")
        overrides += [override.replace(STORED, str(stored)) for override in ARMS[arm]]
    return load_recipe(options.recipe, overrides)


def train(recipe: Recipe, tokens: float) -> float:
    """A warm start of so many trained tokens, or the rest of one that was stopped. Returns how many it is."""
    build.seed_everything(recipe.seed)
    task, fmt = preflight(recipe, rolls_out=False, trains=True)
    policy = build.build_policy(recipe, task)
    # A warm start that goes on from another's weights learns from other demonstrations.
    seed = recipe.seed if recipe.policy.path is None else recipe.seed + 1
    shown = demonstrate(task, fmt, policy, recipe.sft, seed)
    check_demonstrations(shown, fmt)
    rows = [*shown, *rows_beside(task, fmt, policy, recipe.sft, len(shown), seed)]
    found, _ = examples(rows, fmt, policy, policy.max_length)
    per_step = recipe.sft.batch_size * float(np.mean([decisions(example) for example in found]))
    steps = math.ceil(tokens / per_step)
    if not (recipe.run_dir / "sft" / "done.json").is_file():
        section = recipe.sft.model_copy(update={"max_steps": steps})
        with training_lock(recipe.run_dir):
            build.write_recipe(recipe)
            tracker = Tracker(recipe.run_dir / "sft")
            progress = StepProgress(recipe.run_dir.name, steps)
            tracker.listeners.append(progress)
            try:
                warm_start(policy, fmt, rows, section, recipe.run_dir, seed=seed, tracker=tracker, resume=True)
            finally:
                progress.close()
                tracker.close()
    return round(steps * per_step)


def decisions(example: Example) -> int:
    return sum(one.decisions for one in example.passes)


def measure(recipe: Recipe, weights: Path, options: argparse.Namespace) -> dict[str, float]:
    """The nats of inspections, and what is said of the images that are drawn on held-out prompts."""
    task, fmt = preflight(recipe)
    policy = build.build_policy(recipe, task, weights)
    found = nats(policy, recipe, 400)
    folder = recipe.run_dir / "heldout"
    if not folder.is_dir():
        run_rollout(local(recipe), weights, options.prompts, "heldout", folder, options.samples)
    trajectories = load_trajectories(folder)
    said = rates(inspect_all(trajectories, RewardContext.of(task, fmt, detector_of(recipe.rewards, task)), ROLES))
    found |= {name: said[name] for name in ("wrong_images",) if name in said}
    if "approves_wrong" in said:
        found["approved_but_wrong"] = said["approves_wrong"]
    if "right_fine" in said:
        found["disturbed_but_right"] = 1 - said["right_fine"]
    detected = [t.rewards["detect"] for t in trajectories if t.rewards.get("detect") is not None]
    return found | ({"final_right": float(np.mean(detected))} if detected else {})


def nats(policy: Policy, recipe: Recipe, count: int) -> dict[str, float]:
    """Minus the log-prob of an inspection, the sum over its words: the mean over right and over wrong images."""
    task, fmt = build.build_task(recipe), build.build_format(recipe)
    rows = inspection_rows(task, fmt, policy, count, 0.5, recipe.seed + 1000)
    see(rows, policy)
    of: dict[bool, list[float]] = {True: [], False: []}
    found, _ = examples(rows, fmt, policy, policy.max_length)
    for begin in range(0, len(found), 50):
        part = found[begin : begin + 50]
        passes = [one for example in part for one in example.passes]
        with torch.no_grad():
            scored = policy.score(passes)
        nll_P = torch.zeros(len(passes)).index_add(0, scored.pass_N.cpu(), -scored.logprob_N.cpu())
        for one, value in zip(passes, nll_P.tolist(), strict=True):
            of[bool(one.trajectory.info[WRONG_IMAGES])].append(value)
    return {f"nats_{'wrong' if wrong else 'right'}": float(np.mean(values)) for wrong, values in of.items() if values}


def show(results: dict[str, dict[str, float]]) -> None:
    table = Table()
    table.add_column("warm start", no_wrap=True)
    for label in MEASURES.values():
        table.add_column(label, justify="right", no_wrap=True)
    for arm, values in results.items():
        cells = [values.get(name) for name in MEASURES]
        table.add_row(arm.replace("_", " "), *("–" if value is None else f"{value:.3f}" for value in cells))
        if arm == FIRST:
            table.add_section()
    console = Console()
    console.print(table)
    tokens = round(float(np.mean([values["tokens"] for values in results.values()])))
    console.print(f"Each warm start learned about {tokens:,} tokens; all but the first go on from the first.")


if __name__ == "__main__":
    sys.exit(main())
