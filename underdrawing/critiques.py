"""Who judges the policy's verdicts on its own images: in evaluations, and on the rollouts of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from evals.calibration import OF_CHANCES, Calibration
from evals.critiques import Critics, open_critics
from evals.measures import GenevalScores, RewardScores
from formats.base import Format
from policy.base import Policy
from record.trajectory import Trajectory
from rewards.contract import RewardContext
from rewards.manager import RewardManager, detector_of
from tasks.base import Evaluation, Record, Task
from underdrawing.recipe import Recipe


def open_critics_of(
    recipe: Recipe,
    task: Task,
    fmt: Format,
    policy: Policy | None,
    records: Sequence[Record],
    contexts: Sequence[RewardContext],
    scores: bool = True,
) -> Critics | None:
    """What judges the policy's verdicts on its own images, as evaluate.calibration says.

    Args:
        contexts: of evaluations and rewards, whose detector is taken where one has any: no weights are loaded twice.
        scores: the policy may be scored for what the record does not say.

    Raises:
        CalibrationError: evaluate.calibration is true, and something is missing.
        UserError: it is true, and the detector cannot be had.
    """
    asked = recipe.evaluate.calibration
    if asked is False:
        return None
    shared = next((each for each in contexts if each.detector is not None), None)
    if shared is not None:
        return open_critics(shared, fmt, records, policy, bool(asked), scores)
    detector = detector_of(recipe.rewards, task) if asked or recipe.rewards.detector is None else None
    critics = open_critics(RewardContext.of(task, fmt, detector), fmt, records, policy, bool(asked), scores)
    return None if critics is None else replace(critics, forgets=True)


def contexts_of(evaluations: Sequence[Evaluation]) -> list[RewardContext]:
    """What the toolkit's own evaluations stand on."""
    own = (e.context if isinstance(e, GenevalScores) else e.manager.context for e in evaluations
           if isinstance(e, GenevalScores | RewardScores))  # fmt: skip
    return list(own)


def of_rollouts(
    recipe: Recipe, task: Task, fmt: Format, policy: Policy, records: Sequence[Record], manager: RewardManager
) -> Callable[[Sequence[Sequence[Trajectory]]], dict[str, float]] | None:
    """calibration/* of a training step's groups, without scoring: P("fine") is what the record says, and the two
    measures that rest on it are given only where it says all. None: nothing reads or sees critiques, or the recipe
    wants none. Raises as open_critics_of."""
    critics = open_critics_of(recipe, task, fmt, policy, records, [manager.context], scores=False)
    if critics is None:
        return None

    def measured(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
        found = Calibration.of(critics(groups))
        metrics = found.as_metrics()
        if found.scored < found.critiques - found.unreadable:
            metrics = {name: value for name, value in metrics.items() if name.rpartition("/")[2] not in OF_CHANCES}
        return metrics

    return measured
