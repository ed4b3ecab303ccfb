"""`underdrawing probe`: does the policy think with its pictures? Each is replaced, and what follows is written again.

    underdrawing probe RECIPE --prompts 32 --arms sibling,blank,other --draws 2

Thoughts of held-out prompts are continued from right after each of their images, with another picture in its place and
the same noise (rollout/counterfactuals.py); both ends are judged by the recipe's reward (evals/image_worth.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.image_worth import PictureWorth, Swap, summarise, swaps_of
from record.store import check_folder, save_trajectories
from record.trajectory import Trajectory
from rollout.counterfactuals import OTHER, SIBLING, Asked, counterfactuals
from rollout.requests import request_of
from runtime.errors import UserError, writing
from runtime.files import write_whole
from runtime.interrupt import stopping, uninterrupted
from runtime.locks import beside, only_writer
from tasks.base import Split
from underdrawing import build
from underdrawing.preflight import preflight
from underdrawing.recipe import Recipe

RESULTS, TRAJECTORIES = "probe.json", "trajectories"


@dataclass(frozen=True)
class ProbeOptions:
    """What is asked. Raises UserError for an arm that has nobody to take a picture of."""

    prompts: int
    samples: int  # thoughts of each prompt
    arms: tuple[str, ...]
    draws: int  # continuations of each image and arm

    def __post_init__(self) -> None:
        if SIBLING in self.arms and self.samples < 2:
            raise UserError("--arms sibling: a group of one has no sibling; give --samples 2 or more, or other arms")
        if OTHER in self.arms and self.prompts < 2:
            raise UserError("--arms other: there is no other prompt; give --prompts 2 or more, or other arms")


@dataclass(frozen=True)
class Probe:
    """What came of it."""

    rows: list[PictureWorth]
    thoughts: int
    lacking: dict[str, int]  # images for which an arm had no picture
    lost: int  # arms that never came back
    folder: Path


def run_probe(recipe: Recipe, weights: Path, options: ProbeOptions, split: Split, out: Path) -> Probe:
    """Write thoughts, write what follows their images again with other pictures, judge all, and keep both.

    Into `out`: probe.json (the table's rows, and every pair of ends), and trajectories/, where each thought is followed
    by its arms.

    Raises:
        UserError: a split with fewer prompts, thoughts that go on from no image, or an arm for which no image had a
            picture.
        Busy: another process writes to `out`.
        Interrupted: a signal stopped it; nothing is kept.
    """
    check_folder(out / TRAJECTORIES)
    with (
        stopping(lambda: f"stopped; {out} is as it was"),
        only_writer(beside(out), out, "name another folder with --out"),
        uninterrupted() as closing,
    ):
        task, fmt = preflight(recipe)
        there = len(task.prompts(split))
        if options.prompts > there:
            raise UserError(f"--prompts {options.prompts}: the split '{split}' has {there}")
        policy = build.build_policy(recipe, task, weights)
        records = build.prompts(recipe, task, fmt, policy, split)[: options.prompts]
        manager = build.build_reward_manager(recipe, task, fmt)
        closing.callback(manager.close)
        rollouts = build.open_writers(recipe, task, policy, weights)
        closing.callback(rollouts.close)
        members = range(options.samples)
        trunk = rollouts.generate(
            [request_of(group, record, members, recipe.seed) for group, record in enumerate(records)]
        ).groups
        asked = counterfactuals(trunk, options.arms, options.draws, policy)
        check_asked(asked, options.arms, recipe.format.name)
        manager.score(trunk)
        written = rollouts.generate([one.request for one in asked.arms])
        manager.score(written.groups, counted=False)
        swaps = swaps_of(asked.arms, written.groups)
        probe = Probe(summarise(swaps), sum(map(len, trunk)), dict(asked.lacking), len(written.failed), out)
        with uninterrupted() as storing:
            storing.callback(_keep, probe, swaps, _beside(trunk, written.groups), _settings(recipe, weights, options))
    return probe


def check_reward(recipe: Recipe) -> None:
    """Raises UserError where what a thought earns rests on other thoughts."""
    try:
        recipe.rewards.refuse_compared("probe")
    except ValueError as error:
        raise UserError(str(error)) from None


def check_asked(asked: Asked, arms: Sequence[str], fmt: str) -> None:
    """Raises UserError where there is nothing to compare, in all or in one arm."""
    if not asked.arms and not asked.lacking:
        raise UserError(
            f"no thought drew an image and went on from it, so there is nothing to replace: format '{fmt}' has no such "
            "image, the limits (format.max_images, rollout.max_tokens) end thoughts before, or these weights draw none"
        )
    found = {one.arm for one in asked.arms}
    for arm in arms:
        if arm not in found:
            raise UserError(
                f"--arms {arm}: none of {asked.lacking[arm]} images had a picture of the same role to put in its "
                "place; give more --prompts or --samples, or leave the arm out"
            )


def _beside(trunk: Sequence[Sequence[Trajectory]], arms: Sequence[Sequence[Trajectory]]) -> list[Trajectory]:
    """Each thought, followed by its arms."""
    by_parent: dict[tuple[int, int], list[Trajectory]] = {}
    for group in arms:
        for trajectory in group:
            assert trajectory.parent is not None
            by_parent.setdefault((trajectory.group, trajectory.parent[0]), []).append(trajectory)
    return [t for group in trunk for own in group for t in (own, *by_parent.get((own.group, own.member), ()))]


def _settings(recipe: Recipe, weights: Path, options: ProbeOptions) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "weights": str(weights),
        "reward": recipe.rewards.formula(),
        "prompts": options.prompts,
        "samples": options.samples,
        "arms": list(options.arms),
        "draws": options.draws,
        "seed": recipe.seed,
    }


def _keep(probe: Probe, swaps: Sequence[Swap], trajectories: Sequence[Trajectory], settings: dict[str, Any]) -> None:
    save_trajectories(trajectories, probe.folder / TRAJECTORIES)
    kept = {
        **settings,
        "thoughts": probe.thoughts,
        "lacking": probe.lacking,
        "lost": probe.lost,
        "rows": [row.as_json() for row in probe.rows],
        "swaps": [swap.as_json() for swap in swaps],
    }
    with writing(probe.folder, "name another folder with --out"):
        write_whole(probe.folder / RESULTS, json.dumps(kept, indent=1) + "\n")


def print_probe(console: Console, probe: Probe) -> None:
    """A line an image's place and arm."""
    table = Table()
    table.add_column("image", no_wrap=True)
    table.add_column("instead", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("worth", justify="right", no_wrap=True)
    table.add_column("95% interval", justify="right")  # on a narrow terminal this one is folded
    for name in ("reward", "words", "drawn"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in probe.rows:
        place = row.role if not row.occurrence else f"{row.role} {row.occurrence + 1}"
        if before not in (None, place):
            table.add_section()
        sure = row.interval is not None and (row.interval.low > 0 or row.interval.high < 0)
        style = ("green" if (row.worth or 0) > 0 else "red") if sure else ""
        table.add_row(
            Text(place if place != before else "", "bold"),
            row.arm,
            str(row.images),
            Text("–" if row.worth is None else f"{row.worth:+.3f}", style=style),
            "" if row.interval is None else f"{row.interval.low:+.2f} to {row.interval.high:+.2f}",
            *(_share(value) for value in (row.reward_changed, row.words_changed, row.image_changed)),
        )
        before = place
    console.print(table)
    notes = [
        "instead: the picture in its place; worth: the thought's reward less the one with that; reward, words, drawn: "
        "the share whose reward, later words, last later image were others",
        f"{probe.thoughts} thoughts; kept in {probe.folder}",
    ]
    notes += [
        f"{count} images had no picture to put in their place for the arm '{arm}'"
        for arm, count in probe.lacking.items()
        if count
    ]
    if probe.lost:
        notes.append(f"{probe.lost} arms never came back")
    unjudged = sum(row.unjudged for row in probe.rows)
    if unjudged:
        notes.append(f"{unjudged} continuations were not judged, or what they are compared with was not")
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
