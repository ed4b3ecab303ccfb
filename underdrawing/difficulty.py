"""How often a policy passes each prompt: k rollouts a prompt, counted, for task.dataset.where to select by.

    underdrawing difficulty RECIPE --samples 8 --pass-at 1 --out difficulty.jsonl
    task: {dataset: {path: difficulty.jsonl, where: {pass_rate: [0.1, 0.9]}}}

A prompt that is always or never passed gives a group without variance, which teaches nothing (DAPO, arXiv:2503.14476).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record.trajectory import Trajectory
from rewards.manager import RewardManager
from rollout.pool.contract import Rollouts
from rollout.requests import request_of
from runtime.errors import UserError, writing
from runtime.files import write_whole
from runtime.interrupt import stopping, uninterrupted
from runtime.locks import beside, only_writer
from tasks.base import Record, Split
from underdrawing import build
from underdrawing.preflight import preflight
from underdrawing.progress import StepProgress
from underdrawing.recipe import Recipe

CHUNK = 64  # prompts between two writes: what an interruption loses at most
COUNTS = ("pass_rate", "passes", "samples", "mean_reward")


def run_difficulty(
    recipe: Recipe, weights: Path, split: Split, samples: int, pass_at: float, out: Path, part: str | None = None
) -> list[Record]:
    """Roll out every prompt of a split `samples` times and write each record with its counts, one JSON object a line.

    Columns added: pass_rate (passes / samples that were judged; null: none was), passes, samples (judged ones),
    mean_reward. What an interrupted call has written stands in `<out>.part`, and the same call goes on from there.

    Args:
        pass_at: a trajectory passes whose reward is at least this.
        part: a component of the reward by which to pass, in place of the total.

    Raises:
        Busy: another process counts into `out`.
        Interrupted: a signal stopped it.
        UserError: `out` is there already, an unknown part, or a `.part` file of other prompts or other settings.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it, or name another file with --out")
    if part is not None and part not in recipe.rewards.parts:
        raise UserError(f"--part: no '{part}'; the recipe has {', '.join(recipe.rewards.parts)}")
    partial = out.with_name(out.name + ".part")

    def told() -> str:
        if not partial.exists():
            return "stopped before anything was counted"
        return f"stopped; what was counted stands in {partial}. Give the same command again to go on from there"

    with stopping(told), only_writer(beside(out), out, "name another file with --out"), uninterrupted() as closing:
        task, fmt = preflight(recipe)
        policy = build.build_policy(recipe, task, weights)
        records = build.prompts(recipe, task, fmt, policy, split)
        settings = {"weights": str(weights), "samples": samples, "pass_at": pass_at, "part": part, "seed": recipe.seed}
        done = _finished(partial, settings, records)
        manager = build.build_reward_manager(recipe, task, fmt)
        closing.callback(manager.close)
        rollouts = build.open_writers(recipe, task, policy, weights)
        closing.callback(rollouts.close)
        progress = StepProgress("prompts", len(records))
        closing.callback(progress.close)
        for start in range(len(done), len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            counted = _counted(rollouts, manager, chunk, start, samples, pass_at, part, recipe.seed)
            _append(partial, settings if not done else None, counted)
            done += counted
            progress.on_metrics(len(done), {})
        with writing(out):
            write_whole(out, "".join(json.dumps(record) + "\n" for record in done))
            partial.unlink(missing_ok=True)
    return done


def _counted(
    rollouts: Rollouts,
    manager: RewardManager,
    records: Sequence[Record],
    start: int,
    samples: int,
    pass_at: float,
    part: str | None,
    seed: int,
) -> list[Record]:
    requests = [request_of(start + number, record, range(samples), seed) for number, record in enumerate(records)]
    result = rollouts.generate(requests)
    manager.score(result.groups)
    by_group = {group[0].group: group for group in result.groups}
    return [
        {**record, **_counts(by_group.get(start + number, []), pass_at, part)} for number, record in enumerate(records)
    ]


def _counts(group: Sequence[Trajectory], pass_at: float, part: str | None) -> dict[str, Any]:
    given = [t.reward if part is None else t.rewards[part] for t in group]
    judged = [value for value in given if value is not None]
    passes = sum(value >= pass_at for value in judged)
    return {
        "pass_rate": passes / len(judged) if judged else None,
        "passes": passes,
        "samples": len(judged),
        "mean_reward": sum(judged) / len(judged) if judged else None,
    }


def _finished(partial: Path, settings: dict[str, Any], records: Sequence[Record]) -> list[Record]:
    """What an earlier call has written: the first line says with which settings."""
    if not partial.exists():
        return []
    try:
        whole = partial.read_text().split("\n")[:-1]  # what follows the last newline, a killed call left half-written
        head, *lines = [json.loads(line) for line in whole]
    except ValueError as error:
        raise UserError(f"{partial}: cannot be read ({error}); remove it to begin anew") from None
    if head != settings:
        differing = sorted(key for key in settings if head.get(key) != settings[key])
        raise UserError(f"{partial}: was begun with another {', '.join(differing)}; remove it to begin anew")
    for number, line in enumerate(lines):
        if number >= len(records) or line["prompt"] != records[number]["prompt"]:
            raise UserError(f"{partial} line {number + 2}: the task has another prompt there; remove it to begin anew")
    with writing(partial):
        write_whole(partial, "".join(f"{line}\n" for line in whole))
    return lines


def _append(partial: Path, head: dict[str, Any] | None, records: Sequence[Record]) -> None:
    with writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a") as file:
            for line in ([head] if head is not None else []) + list(records):
                file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def summary(records: Sequence[Record]) -> dict[str, int]:
    """How many prompts are always, sometimes, never passed, or were not judged."""
    rates = [record["pass_rate"] for record in records]
    return {
        "never": sum(rate == 0 for rate in rates),
        "sometimes": sum(rate is not None and 0 < rate < 1 for rate in rates),
        "always": sum(rate == 1 for rate in rates),
        "unjudged": sum(rate is None for rate in rates),
    }
