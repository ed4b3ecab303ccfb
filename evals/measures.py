"""What held-out thoughts are measured by: GenEval's rule on their images, or the recipe's reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from evals.heldout import EvaluationError
from record.trajectory import Trajectory
from rewards.contract import RewardContext, policy_images
from rewards.functions.geneval import check_record, score_images
from rewards.manager import RewardManager

GENEVAL, REWARD = "geneval", "reward"
NAMES = (GENEVAL, REWARD)
FINAL_IMAGE, FIRST_SKETCH = "final_image", "first_sketch"


@dataclass(frozen=True)
class GenevalScores:
    """GenEval's released rules: 1 where an image shows what the record asks for, else 0.

    Measures `final_image`, `first_sketch` (0 where nothing was drawn: the task was to draw), and `images`, how many
    were drawn.
    """

    context: RewardContext
    name: str = GENEVAL
    score: str = FINAL_IMAGE

    def check(self, records: Sequence[dict[str, Any]]) -> None:
        """Raises EvaluationError for a record that says nothing of what to draw: without an image it would score 0,
        as one does that was drawn wrong. UserError as rewards.functions.geneval.check_record."""
        detector = self.context.detector_for("geneval")
        for record in records:
            where = f"the held-out prompt '{record['prompt']}'"
            if not record.get("include"):
                raise EvaluationError(
                    f"{where} has no `include`, by which GenEval's rule scores an image; score by "
                    "the recipe's reward with evaluate.by: [reward]"
                )
            check_record(detector, record, where)

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float | None]]:
        drawn = [[image for _, image in policy_images(t)] for t in trajectories]
        some = [row for row, images in enumerate(drawn) if images]
        scores = {position: np.zeros(len(drawn)) for position in (0, -1)}
        for position, score_T in scores.items():
            score_T[some] = self.of_images(
                [drawn[row][position] for row in some], [trajectories[row].record for row in some]
            )
        for row, trajectory in enumerate(trajectories):
            trajectory.rewards = {"first image": float(scores[0][row]), "final image": float(scores[-1][row])}
        return {
            FINAL_IMAGE: list(map(float, scores[-1])),
            FIRST_SKETCH: list(map(float, scores[0])),
            "images": [float(len(images)) for images in drawn],
        }

    def of_images(self, images: Sequence[np.ndarray], records: Sequence[dict[str, Any]]) -> list[float]:
        """Images, uint8 [height, width, 3], by their records."""
        return [float(correct) for correct, _ in score_images(images, records, self.context, "standard")]


@dataclass(frozen=True)
class RewardScores:
    """The recipe's own reward, for prompts that nothing else scores.

    Measures `reward`, the recipe's formula with its schedules as at `step`, and `reward/<part>` for each part. The
    reward manager judges as in training, but nothing of it counts towards its limits.
    """

    manager: RewardManager
    step: int
    name: str = REWARD
    score: str = REWARD

    @property
    def formula(self) -> dict[str, Any]:
        """What makes the reward: `total`, and each schedule's value."""
        config = self.manager.config
        return {
            "total": config.formula(),
            "schedules": {name: schedule.value(self.step) for name, schedule in config.schedules.items()},
        }

    def check(self, records: Sequence[dict[str, Any]]) -> None:
        """The manager refused what it cannot judge when it was made."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float | None]]:
        groups = [list(group) for _, group in groupby(trajectories, lambda t: t.group)]
        self.manager.score(groups, self.step, counted=False)
        parts = {name: [t.rewards.get(name) for t in trajectories] for name in self.manager.parts}
        return {
            REWARD: [t.reward for t in trajectories],
            **{f"{REWARD}/{name}": values for name, values in parts.items()},
        }
