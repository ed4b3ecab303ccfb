"""VPRL: a plan drawn as images; each next image is a step, paid by where it leads.

    +1  optimal: a possible step after which less of the way remains
     0  other: a possible step after which it does not
    -5  invalid: an image that shows no state, or one that no single step leads to

Xu et al., arXiv:2505.11409 (its progress reward). No training code of it was available: this is the formula alone. What
an image shows (the paper's dynamics interpreter) and how far it is to the goal (its progress estimator) is the world's
affair: the task must have the functions of `World`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

from record.trajectory import Trajectory
from rewards.contract import RewardContext, RewardError, policy_images
from rewards.published.judge_helpers import one_of

Credit = Literal["segments", "trajectory"]
Kind = Literal["optimal", "other", "invalid"]


class World(Protocol):
    """What a task says of the world that is planned in. States are compared with ==."""

    def first_state(self, record: Mapping[str, Any]) -> Hashable | None:
        """Where the plan starts; None for a record that is no planning problem."""

    def state_in(self, record: Mapping[str, Any], image: np.ndarray) -> Hashable | None:
        """The state that an image shows; None where it shows none."""

    def next_states(self, record: Mapping[str, Any], state: Hashable) -> Collection[Hashable]:
        """Every state that one step leads to."""

    def distance(self, record: Mapping[str, Any], state: Hashable) -> float | None:
        """Steps that remain to the goal, by the shortest way; None where there is no way."""


def kind_of_step(world: World, record: Mapping[str, Any], before: Hashable, after: Hashable | None) -> Kind:
    """What one step is, by the table at the top of this file."""
    if after is None or after not in world.next_states(record, before):
        return "invalid"
    left, was = world.distance(record, after), world.distance(record, before)
    return "optimal" if left is not None and (was is None or left < was) else "other"


def kinds_of_plan(world: World, record: Mapping[str, Any], states: Sequence[Hashable | None]) -> list[Kind]:
    """Each step of a plan, up to and with its first invalid one: after that there is no state from which the next could
    be judged. `states` are those that the images show, without the first state."""
    before = world.first_state(record)
    kinds: list[Kind] = []
    for after in states:
        kinds.append(kind_of_step(world, record, before, after))
        if kinds[-1] == "invalid":
            break
        before = after
    return kinds


def vprl(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_metric: Any = None,
    credit: Credit = "segments",
    optimal: float = 1.0,
    other: float = 0.0,
    invalid: float = -5.0,
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """+1, 0 or -5 for each image drawn; `invalid` for a thought that drew none, None for a record that is no planning
    problem. Logs the shares of steps that were optimal and invalid, and of plans that reached the goal.

    Args:
        credit: "segments" pays each image for itself, "trajectory" the mean over them.
        optimal, other, invalid: pay for a step towards the goal, another possible one, and an impossible one.
    """
    one_of("vprl", "credit", credit, get_args(Credit))
    pay: dict[Kind, float] = {"optimal": optimal, "other": other, "invalid": invalid}
    values: list[float | dict[int, float] | None] = []
    steps: list[Kind] = []
    reached: list[bool] = []
    for t in trajectories:
        world = _world(context)
        if world.first_state(t.record) is None:
            values.append(None)
            continue
        drawn = policy_images(t)
        states = [world.state_in(t.record, image) for _, image in drawn]
        kinds = kinds_of_plan(world, t.record, states)
        steps += kinds
        end = states[-1] if states and "invalid" not in kinds else None
        reached.append(end is not None and world.distance(t.record, end) == 0)
        if not kinds:
            values.append(invalid)
        elif credit == "segments":
            values.append({index: pay[kind] for (index, _), kind in zip(drawn, kinds, strict=False)})
        else:
            values.append(sum(pay[kind] for kind in kinds) / len(kinds))
    if log_metric is not None and reached:
        log_metric("reached", sum(reached) / len(reached))
        for kind in ("optimal", "invalid") if steps else ():
            log_metric(kind, steps.count(kind) / len(steps))
    return values


def _world(context: RewardContext) -> World:
    task = context.task
    lacking = [name for name in ("first_state", "state_in", "next_states", "distance") if not hasattr(task, name)]
    if lacking:
        raise RewardError(
            f"vprl needs a task that is a world to plan in; '{getattr(task, 'name', 'none')}' has no "
            f"function '{lacking[0]}'"
        )
    return task
