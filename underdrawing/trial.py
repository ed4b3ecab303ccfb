"""A recipe's reward tried on what there is: stored thoughts, or a folder of images in GenEval's layout.

Nothing is rolled out and no policy is loaded. `underdrawing rewards try` prints the numbers and writes the page
(report/trial.py) and its rows beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.geneval import load_image
from evals.geneval_folder import read_folder
from record.store import load_trajectories
from record.trajectory import Author, Modality, Segment, Trajectory
from rewards.contract import columns_of, policy_images
from rewards.detectors.base import CachedDetector
from rewards.functions.geneval import THRESHOLDS, classes_of, colored_of, evaluate, kept
from rewards.loader import is_own
from rewards.manager import RewardManager, RewardReport, detector_of
from rewards.registry import REWARDS
from runtime.errors import UserError, writing
from underdrawing import build
from underdrawing.recipe import Recipe
from underdrawing.report.page import Seen
from underdrawing.report.trial import PartRow, TrialPage, image_films, row_of, seen_of, thought_films

DETECTED_AT_ONCE = 32  # images whose detections are made and drawn together


@dataclass
class Trial:
    """What was judged, and how."""

    recipe: Recipe
    trajectories: list[Trajectory]
    report: RewardReport
    source: str  # of the trajectories
    images: Mapping[int, str]  # by id() of a trajectory its file's name; empty for thoughts
    seen: dict[int, dict[int, Seen]] = field(default_factory=dict)  # by id(), then segment
    fault: UserError | None = None  # what went wrong once the parts had judged: there are rows, and no page

    def rows(self) -> list[PartRow]:
        """A row for each part, and one for the reward."""
        rewards, weighted = self.recipe.rewards, self.recipe.rewards.expression().names
        rows = []
        for name, part in rewards.parts.items():
            kind = (
                "log-only"
                if part.log_only
                else ""
                if name in weighted
                else "by segment"
                if self._credits(name)
                else "not weighted"
            )
            what = REWARDS[part.function].formula if is_own(part.function) else part.function
            what += "".join(f" · {option}: {value}" for option, value in part.options.items())
            rows.append(
                row_of(
                    name,
                    [t.rewards.get(name) for t in self.trajectories],
                    kind=kind,
                    what=what,
                    failed=self.report.metrics.get(f"reward/{name}/failed", 0.0),
                )
            )
        return [*rows, row_of("reward", [t.reward for t in self.trajectories], total=True)]

    def _credits(self, part: str) -> bool:
        """Whether what it says of segments moves their advantages."""
        grpo = self.recipe.grpo
        return (
            grpo.credits_segments
            and grpo.segment_reward_weights.get(part, 1.0) != 0
            and any(part in t.segment_rewards for t in self.trajectories)
        )

    def by_tag(self) -> list[tuple[str, int, list[float | None]]]:
        """(tag, how many, the mean of each row), where the records have tags."""
        tags: dict[str, list[Trajectory]] = {}
        for trajectory in self.trajectories:
            if "tag" in trajectory.record:
                tags.setdefault(str(trajectory.record["tag"]), []).append(trajectory)
        parts = list(self.recipe.rewards.parts)
        return [
            (
                tag,
                len(members),
                [
                    *(_mean([t.rewards.get(part) for t in members]) for part in parts),
                    _mean([t.reward for t in members]),
                ],
            )
            for tag, members in tags.items()
        ]

    def page(self, most: int) -> TrialPage:
        shown = spread(self.trajectories, most)
        films = image_films(shown, self.seen, self.images) if self.images else thought_films(shown, self.seen)
        unit = "images" if self.images else "thoughts"
        count = f"{len(self.trajectories)} {unit}"
        heading = unit.capitalize() + (
            f", {len(shown)} of {len(self.trajectories)}" if len(shown) < len(self.trajectories) else ""
        )
        return TrialPage(
            f"{self.recipe.name}: its reward on {count}",
            self.source,
            self.recipe.rewards.formula(),
            self.rows(),
            self.by_tag(),
            unit,
            heading,
            films,
            self.report.sentences(),
            side=262 if self.images else 150,
        )

    def write_rows(self, path: Path) -> None:
        """One JSON object a thought or image: where it is from, its parts, its reward, and what the parts said."""
        lines = []
        for t in self.trajectories:
            row: dict[str, Any] = {"file": self.images[id(t)]} if self.images else {"key": t.key}
            row |= {
                "prompt": t.prompt,
                "tag": t.record.get("tag"),
                "reward": t.reward,
                "rewards": t.rewards,
                "said": t.info.get("rewards", {}),
            }
            lines.append(json.dumps(row, default=str) + "\n")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")


def try_on_thoughts(recipe: Recipe, folder: Path) -> Trial:
    """Stored trajectories, judged anew. Raises UserError where the folder holds none."""
    folder = folder.parent if folder.name == "trajectories.parquet" else folder
    trajectories = load_trajectories(folder)
    if not trajectories:
        raise UserError(f"{folder}: there are no trajectories in it")
    for trajectory in trajectories:
        # They belong to the rewards that were.
        trajectory.rewards, trajectory.reward, trajectory.segment_rewards, trajectory.advantage_S = {}, None, {}, None
    return _judge(recipe, trajectories, str(folder), {})


def try_on_images(recipe: Recipe, folder: Path) -> Trial:
    """A folder in GenEval's layout: each image is a thought of one image and no words, each prompt a group.

    Raises EvaluationError for a folder that misses prompts, two files for one sample, or a file that is no image.
    """
    trajectories: list[Trajectory] = []
    names: dict[int, str] = {}
    groups: dict[str, int] = {}
    members: dict[int, int] = {}
    for sample in read_folder(folder):
        group = groups.setdefault(sample.name.split("/")[0], len(groups))
        member = members[group] = members.get(group, -1) + 1
        prompt = str(sample.record["prompt"])
        segments = [
            Segment("prompt", Author.USER, Modality.TEXT, False, text=prompt),
            Segment("image", Author.POLICY, Modality.IMAGE_TOKENS, True, image=load_image(sample)),
        ]
        trajectory = Trajectory(prompt, sample.record, recipe.format.name, segments, group, member)
        trajectories.append(trajectory)
        names[id(trajectory)] = sample.name
    return _judge(recipe, trajectories, str(folder), names)


def _judge(recipe: Recipe, trajectories: list[Trajectory], source: str, names: Mapping[int, str]) -> Trial:
    task, fmt = build.build_task(recipe), build.build_format(recipe)
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group, []).append(trajectory)
    with build.build_reward_manager(recipe, task, fmt, columns_of(t.record for t in trajectories)) as manager:
        trial = Trial(recipe, trajectories, RewardReport({}, [], 0, 0), source, names)
        try:
            trial.report = manager.score(list(groups.values()))
            detector = _detector(recipe, task, manager)
            if detector is not None:
                trial.seen = look(trajectories, detector, _thresholds(recipe))
        except UserError as error:
            if not any(trajectory.rewards for trajectory in trajectories):
                raise
            trial.fault = error  # what the parts gave may have been paid for
    return trial


def _detector(recipe: Recipe, task: Any, manager: RewardManager) -> CachedDetector | None:
    """The one that the parts look with; None where no part does."""
    needed = any(
        is_own(part.function) and REWARDS[part.function].needs_detector for part in recipe.rewards.parts.values()
    )
    if not needed:
        return None
    if manager.context.detector is not None:
        return manager.context.detector
    made = detector_of(recipe.rewards, task)
    return None if made is None else CachedDetector(made)


def _thresholds(recipe: Recipe) -> tuple[float, float]:
    """Those of the recipe's first part that names some: a detector has one scale of scores."""
    for part in recipe.rewards.parts.values():
        if is_own(part.function) and {"threshold", "counting_threshold"} & set(part.options):
            return (part.options.get("threshold", THRESHOLDS[0]), part.options.get("counting_threshold", THRESHOLDS[1]))
    return THRESHOLDS


def look(
    trajectories: Sequence[Trajectory], detector: CachedDetector, thresholds: tuple[float, float] = THRESHOLDS
) -> dict[int, dict[int, Seen]]:
    """What is seen in every image above the thresholds, with GenEval's verdict where the record asks for
    something."""
    positions = [
        (t, index, image)
        for t in trajectories
        for index, image in policy_images(t)
        if classes_of(t.record) or not detector.open_vocabulary
    ]
    seen: dict[int, dict[int, Seen]] = {}
    for start in range(0, len(positions), DETECTED_AT_ONCE):
        batch = positions[start : start + DETECTED_AT_ONCE]
        found = detector.detect(
            [image for _, _, image in batch],
            [classes_of(t.record) for t, _, _ in batch],
            [colored_of(t.record) for t, _, _ in batch],
        )
        for (trajectory, index, image), objects in zip(batch, found, strict=True):
            record = trajectory.record
            correct, reason = None, ""
            if record.get("include"):
                verdict, reason = evaluate(record, objects, "standard", thresholds)
                correct = bool(verdict)
            named = set(classes_of(record)) or set(objects)
            shown = {
                name: items
                for name, items in kept(record, objects, thresholds).items()
                if items and (name in named or not detector.names_colors)
            }
            seen.setdefault(id(trajectory), {})[index] = seen_of(image, shown, correct, reason)
    return seen


def spread(trajectories: Sequence[Trajectory], most: int) -> list[Trajectory]:
    """At most so many, the tags in turn, whole groups before further ones."""
    if len(trajectories) <= most:
        return list(trajectories)
    queues: dict[str, list[list[Trajectory]]] = {}
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        if trajectory.group not in groups:
            groups[trajectory.group] = []
            queues.setdefault(str(trajectory.record.get("tag", "")), []).append(groups[trajectory.group])
        groups[trajectory.group].append(trajectory)
    chosen: list[Trajectory] = []
    while len(chosen) < most and any(queues.values()):
        for queue in queues.values():
            if queue:
                chosen += queue.pop(0)
    return chosen[:most]


def _mean(values: Sequence[float | None]) -> float | None:
    judged = [value for value in values if value is not None]
    return math.fsum(judged) / len(judged) if judged else None
