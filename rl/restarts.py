"""Groups that begin from a stored picture, as R3's (arXiv:2602.15772) begin from one of the step before: reflect, then
leave the picture or redraw it.

What the latest steps' thoughts drew first is judged by itself and kept (RestartBuffer). A restarted group goes on from
one such picture, with all that stood before it. It is paid for what it made of the picture, and for leaving one that
was perfect. Of R3's release these faults are mended: a policy that was unsure and stopped earned 0, which is safe; one
that redrew a perfect picture as well earned 0 for it; a judge that failed was 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from record.trajectory import PARENT_GROUP, Author, StopReason, Trajectory
from rl.config import GrpoConfig, RestartConfig
from rl.restart_buffer import RestartBuffer
from rl.run import Run
from rollout.counterfactuals import images_gone_on_from
from rollout.forks import fork
from rollout.pool.contract import FailedGroup
from rollout.requests import RolloutRequest

RESTART = "restart"  # in Trajectory.info: what a restarted thought was paid for


@dataclass(frozen=True)
class Restarts:
    """Restarted groups that came back, those that did not, and what was measured meanwhile."""

    groups: list[list[Trajectory]] = field(default_factory=list)
    failed: list[FailedGroup] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def restarts_in(step: int, config: GrpoConfig, buffer: RestartBuffer) -> int:
    """How many of a step's groups begin from a stored picture. At least one begins at its prompt."""
    restart = config.restart
    if restart is None or step % restart.every or not buffer.pictures:
        return 0
    return min(round(restart.share * config.prompts_per_step), config.prompts_per_step - 1)


def restart_requests(
    buffer: RestartBuffer, count: int, config: GrpoConfig, seed: int, step: int
) -> list[RolloutRequest]:
    """Their groups are numbered down from -1 through the run, so that their noise is nobody else's."""
    assert config.restart is not None
    first = 1 + (step - 1) * config.prompts_per_step
    return [
        replace(fork(picture, len(picture.segments), range(config.num_generations), group=-(first + number)), seed=seed)
        for number, picture in enumerate(buffer.draw(count, config.restart, seed, step))
    ]


def roll_out_restarts(run: Run, count: int, step: int) -> Restarts:
    """Write groups from stored pictures, judge them, and pay them for what became of the pictures."""
    assert run.rollouts is not None and run.reward_manager is not None
    config = run.config.restart
    if config is None or not count:
        return Restarts()
    requests = restart_requests(run.restarts, count, run.config, run.seed, step)
    pending = run.reward_manager.begin(step, [len(request.members) for request in requests], counted=False)
    written = run.rollouts.generate(requests, each=pending.add)
    report = pending.finish(written.groups)
    found = {(p.group, p.member): p.reward for p in run.restarts.pictures}
    for group in written.groups:
        for trajectory in group:
            parent = trajectory.info[PARENT_GROUP], trajectory.parent[0] if trajectory.parent else 0
            pay(trajectory, found[parent], config)
    metrics = {
        **written.metrics,
        **{name: value for name, value in report.metrics.items() if name.startswith(("judge/", "time/"))},
        **measured(written.groups),
        "restart/in": float(count),
        "restart/buffer": float(len(run.restarts.pictures)),
    }
    return Restarts(written.groups, written.failed, metrics)


def pay(trajectory: Trajectory, picture: float | None, config: RestartConfig) -> None:
    """Turn a judged thought's reward into that for what it made of the picture that it began from, and note both."""
    assert trajectory.parent is not None
    result = judged_by(trajectory, config)
    own = trajectory.segments[trajectory.parent[1] :]
    left = not any(segment.author is Author.POLICY and segment.image is not None for segment in own)
    if config.reward == "improvement" and trajectory.reward is not None:
        trajectory.reward = worth(picture, result, left, config.perfect)
    trajectory.info[RESTART] = {"picture": picture, "result": result, "left": left}


def worth(picture: float | None, result: float | None, left: bool, perfect: float) -> float | None:
    """What going on from a picture was worth; None where the picture or the result was not judged.

    From a perfect picture it is the result's own reward, whether the picture was left (1, then) or redrawn. From
    another it is what was gained; to leave one says that it is perfect, and costs what it lacks of that.
    """
    if picture is None or result is None:
        return None
    if picture >= perfect:
        return result
    return result - (perfect if left else picture)


def judged_by(trajectory: Trajectory, config: RestartConfig) -> float | None:
    """What pictures and results are compared by."""
    return trajectory.reward if config.part is None else trajectory.rewards.get(config.part)


def keep_pictures(run: Run, groups: Sequence[Sequence[Trajectory]], step: int) -> dict[str, float]:
    """Judge the first picture of each of a step's thoughts by itself, and keep it for the steps to come."""
    config = run.config.restart
    if config is None:
        return {}
    assert run.reward_manager is not None
    drawn = [[p for t in group if (p := first_picture(t, config)) is not None] for group in groups]
    drawn = [group for group in drawn if group]
    if not drawn:
        return {"restart/pictures": 0.0}
    report = run.reward_manager.score(drawn, step, counted=False)
    pictures = [picture for group in drawn for picture in group]
    for picture in pictures:
        picture.reward = judged_by(picture, config)
    run.restarts.add(step, pictures, config.steps)
    judged = [picture.reward for picture in pictures if picture.reward is not None]
    return {
        **{name: value for name, value in report.metrics.items() if name.startswith(("judge/", "time/"))},
        "restart/pictures": float(len(judged)),
        "restart/perfect": float(np.mean([value >= config.perfect for value in judged])) if judged else 0.0,
    }


def first_picture(trajectory: Trajectory, config: RestartConfig) -> Trajectory | None:
    """The thought up to its first image in one of the roles, after which it went on; None: there is none."""
    for index in images_gone_on_from(trajectory):
        if trajectory.segments[index].role in config.roles:
            return Trajectory(
                trajectory.prompt,
                trajectory.record,
                trajectory.format,
                trajectory.segments[: index + 1],
                trajectory.group,
                trajectory.member,
                trajectory.seed,
                StopReason.END,
                exact=trajectory.exact,
            )
    return None


def measured(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """restart/*: means over judged thoughts: of the pictures, the results and the pay; the shares that left the
    picture, and that were better or worse than it."""
    members = [(t, t.info[RESTART]) for group in groups for t in group]
    judged = [(t, said) for t, said in members if None not in (t.reward, said["result"], said["picture"])]
    metrics = {"restart/trajectories": float(len(members))}
    if not judged:
        return metrics
    gains = np.array([said["result"] - said["picture"] for _, said in judged])
    values: Mapping[str, Sequence[float]] = {
        "restart/picture": [said["picture"] for _, said in judged],
        "restart/result": [said["result"] for _, said in judged],
        "restart/reward": [t.reward or 0.0 for t, _ in judged],
        "restart/left": [float(said["left"]) for _, said in judged],
        "restart/better": (gains > 0).astype(float).tolist(),
        "restart/worse": (gains < 0).astype(float).tolist(),
    }
    return {**metrics, **{name: float(np.mean(given)) for name, given in values.items()}}
