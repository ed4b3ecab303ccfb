"""The command `underdrawing replay`: a kept step of a run computed again, and held to what the run logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from formats.base import Format
from rewards.replayed import ReplayManager, asking, on_this_machine, said
from rl.kept_steps import KeptStep, read_step, setup_of
from rl.ledger import Ledger
from rl.replay import (
    Judged,
    Replay,
    Stage,
    advantage_differences,
    credit_again,
    judge_again,
    loss_again,
    needing_weights,
    restore,
    reward_differences,
    shown,
    update_again,
)
from rl.trainer import Trainer
from rollout.pool.local import cpu_threads
from runtime.errors import UserError, nearest
from tasks.base import Task
from training import checkpoint
from underdrawing import build
from underdrawing.lock import lock_sha256
from underdrawing.recipe import Recipe, check_recipe

logger = logging.getLogger(__name__)
TITLES: dict[Stage, str] = {
    "rewards": "rewards",
    "advantages": "advantages and ledger",
    "loss": "loss, by the kept log-ratios",
    "update": "update, by new log-probs",
}


class ReplayError(UserError):
    """A step that cannot be replayed as it was asked for."""


@dataclass(frozen=True)
class Options:
    """What the command is told beside run and step."""

    call_judges: bool = False
    stored: Sequence[str] = ()  # reward parts that are not called
    weights: Path | None = None  # that the run started from; None: where it says
    threads: int | None = None  # of torch; None: the run's
    other_setup: bool = False  # replay though packages or lock are others


def run_replay(run_dir: Path, step: int | None, options: Options) -> int:
    """Print the step's metrics as stored and as replayed; the last line is one JSON object.

    Returns 0 where everything is equal to the last bit, and else 1.

    Raises:
        KeptStepError: the step was not kept, or the record was altered.
        ReplayError: other versions than the run's, or weights that are not those before the step.
    """
    if not run_dir.is_dir():
        raise ReplayError(f"{run_dir}: no such folder; give a run's")
    kept = read_step(run_dir, step)
    source = str(kept.folder / "step.json")
    if not kept.recipe:
        raise ReplayError(f"{source}: its run had no recipe, so nothing says how to judge and train; call rl/replay.py")
    recipe = _here(check_recipe(dict(kept.recipe), source))
    accelerator = Accelerator(cpu=recipe.policy.device == "cpu", mixed_precision="no")
    threads = options.threads or int(kept.setup["threads"])
    with cpu_threads(threads):
        here = {**setup_of(accelerator), "lock": lock_sha256()}
        refused, noted = setup_differences(kept.setup, here)
        if refused and not options.other_setup:
            raise ReplayError(
                f"{source}: the run was made with {'; '.join(refused)}. Replay it there, or give --other-setup to see "
                "what differs here"
            )
        replay, notes, whole = _replay(run_dir, kept, recipe, accelerator, options)
    _print(Console(), kept, replay, notes)
    for reason in [] if replay.equal else _reasons(kept, replay, [*refused, *noted]):
        print(reason)
    first = replay.first
    print(
        json.dumps(
            {
                "run": str(run_dir),
                "step": kept.step,
                "equal": replay.equal,
                "replayed": list(replay.values),
                "whole": whole,
                "metrics": len(replay.metrics),
                "differing": list(dict.fromkeys(metric.name for metric in replay.metrics if not metric.equal)),
                "first": None if first is None else [first.name, first.stored, first.replayed],
            }
        )
    )
    return 0 if replay.equal else 1


def setup_differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What the run was made with and is not here: (versions, for which a replay is refused; the rest, which may
    explain a difference)."""
    refused = [
        f"{name} {version or 'missing'} (here {here['packages'].get(name) or 'missing'})"
        for name, version in stored["packages"].items()
        if version != here["packages"].get(name)
    ]
    if stored.get("lock") != here.get("lock"):
        was, now = (str(each.get("lock") or "none")[:12] for each in (stored, here))
        refused.append(f"another requirements.lock (SHA-256 {was}, here {now})")
    words = {
        "threads": "{} CPU threads, here {}",
        "processes": "{} trainer processes, here {}",
        "device": "device {}, here {}",
        "cpu": "a CPU with {}, here {}",
        "python": "Python {}, here {}",
    }
    noted = [text.format(stored[key], here[key]) for key, text in words.items() if stored[key] != here[key]]
    return refused, noted


def _here(recipe: Recipe) -> Recipe:
    """The recipe with everything in this process and on this machine."""
    rewards = on_this_machine(recipe.rewards)
    rollout = recipe.rollout.model_copy(update={"workers": 0})
    policy = recipe.policy
    if policy.device.startswith("cuda") and not torch.cuda.is_available():
        policy = policy.model_copy(update={"device": "cpu"})
    return recipe.model_copy(update={"rewards": rewards, "rollout": rollout, "policy": policy})


def _replay(
    run_dir: Path, kept: KeptStep, recipe: Recipe, accelerator: Accelerator, options: Options
) -> tuple[Replay, list[str], bool]:
    """The replay, what is to be said of it, and whether the whole step was computed again."""
    build.seed_everything(recipe.seed)
    task, fmt = build.build_task(recipe), build.build_format(recipe)
    trainer, missing = _trainer(run_dir, kept, recipe, task, accelerator, options)
    replay, notes = Replay(), []
    everything = [trajectory for group in kept.groups for trajectory in group]
    judged = {trajectory.key: Judged.of(trajectory) for trajectory in everything}

    stored = _stored_parts(recipe, options)
    if stored:
        notes.append(
            f"not called again, stored values stand for {'it' if len(stored) == 1 else 'them'}: {', '.join(stored)}"
            + ("" if options.call_judges else " (--call-judges calls those that ask a judge)")
        )
    values = {part: said(everything, part) for part in stored}
    metrics = _judge(kept, recipe, task, fmt, values, replay, judged, notes)
    excused = [f"{fork}reward/{part}/" for part in stored for fork in ("", "forks/")]
    replay.compare("rewards", kept, metrics, excused)

    ledger, metrics = credit_again(kept, recipe.grpo)
    replay.values["advantages"] = advantage_differences(kept.groups, judged)
    replay.compare("advantages", kept, metrics)

    replay.values["loss"] = []
    replay.compare("loss", kept, loss_again(kept, ledger, recipe.grpo), needing_weights(kept))
    if trainer is None:
        notes.append(missing)
    else:
        _update(kept, ledger, trainer, replay)
    return replay, notes, trainer is not None and not stored


def _stored_parts(recipe: Recipe, options: Options) -> list[str]:
    parts = recipe.rewards.parts
    for name in options.stored:
        if name not in parts:
            raise ReplayError(f"--stored {name}: no reward part of that name; {nearest(name, parts)}")
    named = set(options.stored) | set([] if options.call_judges else asking(recipe.rewards))
    return [name for name in parts if name in named]


def _judge(
    kept: KeptStep,
    recipe: Recipe,
    task: Task,
    fmt: Format,
    stored: Mapping[str, Any],
    replay: Replay,
    judged: Mapping[str, Judged],
    notes: list[str],
) -> dict[str, float]:
    """The step's reward metrics. Where values differ the parts are called once more, to tell whether they are
    functions of what they are shown at all."""
    with ExitStack() as opened:
        manager = opened.enter_context(ReplayManager(recipe.rewards, task, fmt, recipe.grpo.steps, stored))
        metrics = judge_again(kept, manager)
        replay.values["rewards"] = reward_differences(kept.groups, judged)
        if replay.values["rewards"]:
            first = {t.key: Judged.of(t) for group in kept.groups for t in group}
            judge_again(kept, manager)
            again = reward_differences(kept.groups, first)
            restore(kept.groups, first)
            for part in recipe.rewards.parts:
                mine = [value for value in again if value.what == part]
                if mine:
                    notes.append(
                        f"the reward part '{part}' is not deterministic: called twice here it gives two values "
                        f"(trajectory {mine[0].trajectory}: {shown(mine[0].stored)} and {shown(mine[0].replayed)})"
                    )
    return metrics


def _trainer(
    run_dir: Path, kept: KeptStep, recipe: Recipe, task: Task, accelerator: Accelerator, options: Options
) -> tuple[Trainer | None, str]:
    """A trainer with the weights before the step; or None, and what is missing and so not replayed.

    Raises:
        ReplayError: there are weights, and they are others.
        CheckpointError: the checkpoint before the step is not as it was written.
    """
    before = kept.step - 1
    folder = run_dir / "checkpoints" / f"step-{before:06d}"
    there = ", ".join(map(str, checkpoint.steps(run_dir / "checkpoints"))) or "none"
    partly = "so new log-probs, ratios and the gradient are not replayed; rewards, advantages and the loss of the kept "
    partly += "log-ratios are"
    if before and not checkpoint.is_checkpoint(folder):
        return None, f"the weights before step {kept.step} are not stored (checkpoints: {there}), {partly}"
    start = options.weights or _start(run_dir, kept)
    if start is None or not (start / "config.json").is_file():
        if options.weights is not None:
            raise ReplayError(f"--weights {start}: no model there (config.json is missing)")
        source = kept.start["source"]
        return None, (
            f"the weights that the run started from are not in {source}, {partly}. Give them by --weights, if they are "
            "elsewhere"
        )
    trainer = Trainer(build.build_policy(recipe, task, start), recipe.grpo, accelerator, start)
    for kind in ("frozen", "trained"):
        if kept.start[kind] not in (None, trainer.start[kind]):
            raise ReplayError(
                f"{start}: not the weights that the run started from (fingerprint {str(trainer.start[kind])[:8]} of "
                f"those that are {kind if kind == 'trained' else 'not trained'}, {str(kept.start[kind])[:8]} then); "
                "name their folder by --weights"
            )
    if before:
        trainer.load(checkpoint.load(folder).trainer)
    if kept.weights not in (None, trainer.trained_fingerprint()):
        raise ReplayError(
            f"{folder if before else start}: its weights are not those before step {kept.step} (fingerprint "
            f"{str(trainer.trained_fingerprint())[:8]}, {str(kept.weights)[:8]} then)"
        )
    return trainer, ""


def _start(run_dir: Path, kept: KeptStep) -> Path | None:
    """The folder of the weights that the run started from, where it is known; the run may have been moved since."""
    source = kept.start["source"]
    if source is None:
        return None
    moved = run_dir / "sft" / "model"
    found = Path(source)
    if not (found / "config.json").is_file() and found.parts[-2:] == ("sft", "model") and moved.is_dir():
        return moved
    return found


def _update(kept: KeptStep, ledger: Ledger, trainer: Trainer, replay: Replay) -> None:
    metrics, differing = update_again(kept, ledger, trainer)
    replay.values["update"] = differing
    replay.compare("update", kept, metrics)


# ---- what a person reads ------------------------------------------------------------------------------------------


def _print(console: Console, kept: KeptStep, replay: Replay, notes: Sequence[str]) -> None:
    members = sum(map(len, kept.groups))
    console.print(
        Text(f"{kept.folder}: step {kept.step}, {len(kept.groups)} groups, {members} trajectories", "italic"),
        soft_wrap=True,
    )
    table = Table()
    table.add_column("metric", overflow="fold")  # numbers stay whole where the terminal is narrow
    for name, width in (("stored", 13), ("replayed", 13), ("differs", 9)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for stage in replay.values:
        table.add_section()
        table.add_row(Text(TITLES[stage], "bold"))
        for metric in (metric for metric in replay.metrics if metric.stage == stage):
            style = "" if metric.equal else "red"
            differing = "0" if metric.equal else "" if metric.difference is None else f"{metric.difference:+.3g}"
            table.add_row(metric.name, _number(metric.stored), _number(metric.replayed), differing, style=style)
    console.print(table)
    for note in notes:
        console.print(Text(note[0].upper() + note[1:] + "."), soft_wrap=True)
    count = len(replay.metrics)
    if replay.equal:
        console.print(Text(f"{count} metrics replayed, all of them equal to the last bit.", "green"), soft_wrap=True)


def _reasons(kept: KeptStep, replay: Replay, setup: Sequence[str]) -> list[str]:
    """What differs first, and why it may be."""
    lines = []
    if (first := replay.first) is not None:
        lines.append(
            f"The first metric that differs is {first.name} ({TITLES[first.stage]}): {_number(first.stored)} stored, "
            f"{_number(first.replayed)} replayed."
        )
    for stage, values in replay.values.items():
        if values:
            more = f", and {len(values) - 1} more values" if len(values) > 1 else ""
            lines.append(f"In {stage}: {values[0]}{more}.")
            break
    parts = {value.what for value in replay.values["rewards"]}
    for part in sorted(parts):
        if kept.metrics.get(f"reward/{part}/failed"):
            lines.append(f"The part '{part}' failed for some trajectories when the step was made.")
    if setup:
        lines.append(f"It may be the setup: the run had {'; '.join(setup)}.")
    elif parts - {"reward"}:
        named = ", ".join(sorted(parts - {"reward"}))
        lines.append(
            f"The setup is the run's, so it is what {named} computes or reads: a function that is not deterministic, "
            "or that was changed since."
        )
    else:
        lines.append("The setup is the run's, so it is this package's code, which is not the run's.")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.7g}"
