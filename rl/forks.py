"""Candidates at states of what was written: which states, the requests for them, their rollouts and rewards.

A fork set is the members that continue from one state. It is a baseline group of its own, and the ledger counts it as a
group. Members are numbered on from the group's own, in the order of (member, segment), so that a run that is taken up
again asks for the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from record.trajectory import Author, Trajectory
from rl.config import ForkConfig
from rl.run import Run
from rollout.forks import fork, stands_in_call
from rollout.pool.contract import FailedGroup
from rollout.requests import RolloutRequest


@dataclass(frozen=True)
class Forks:
    """Fork sets that came back, those that did not, and what was measured meanwhile."""

    sets: list[list[Trajectory]]
    failed: list[FailedGroup]
    metrics: dict[str, float]
    asked: Sequence[int] = ()  # members of each request


def fork_requests(groups: Sequence[Sequence[Trajectory]], config: ForkConfig) -> list[RolloutRequest]:
    """A request for each state at which candidates are wanted. Only members that began at the prompt are forked."""
    requests = []
    for group in groups:
        number = 1 + max(trajectory.member for trajectory in group)
        for trajectory in sorted(group, key=lambda trajectory: trajectory.member)[: config.members]:
            for segment in states(trajectory, config):
                requests.append(fork(trajectory, segment, range(number, number + config.candidates)))
                number += config.candidates
    return requests


def states(trajectory: Trajectory, config: ForkConfig) -> list[int]:
    """The segments before which a trajectory is continued: those that the policy wrote in one of the roles."""
    found = [
        index
        for index, segment in enumerate(trajectory.segments)
        if segment.role in config.roles and segment.author is Author.POLICY
    ]
    return found[: config.occurrences]


def outside_calls(run: Run, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
    """Those that do not continue from within a call that was never closed: what asks a tool is one segment."""
    if run.fmt is None:
        return list(requests)
    fmt, vocabulary = run.fmt, run.policy.vocabulary
    return [request for request in requests if not stands_in_call(request, fmt, vocabulary)]


def roll_out_forks(run: Run, groups: Sequence[Sequence[Trajectory]], config: ForkConfig, step: int) -> Forks:
    """Write and judge the candidates at the states of some groups."""
    assert run.rollouts is not None and run.reward_manager is not None
    asked = fork_requests(groups, config)
    requests = outside_calls(run, asked)
    passed_over = {"forks/in_call": float(len(asked) - len(requests))} if len(requests) < len(asked) else {}
    if not requests:
        return Forks([], [], {"forks/in": 0.0, "forks/candidates": 0.0, **passed_over})
    pending = run.reward_manager.begin(step, [len(request.members) for request in requests], counted=False)
    rolled_out = run.rollouts.generate(requests, each=pending.add)
    report = pending.finish(rolled_out.groups)
    metrics = {
        **rolled_out.metrics,
        **fork_metrics(len(requests), rolled_out.groups, report.metrics),
        **passed_over,
    }
    return Forks(rolled_out.groups, rolled_out.failed, metrics, [len(request.members) for request in requests])


def fork_metrics(asked: int, sets: Sequence[Sequence[Trajectory]], rewards: Mapping[str, float]) -> dict[str, float]:
    """forks/in, forks/candidates, and the candidates' own reward metrics as forks/reward/*."""
    metrics = {f"forks/{name}": value for name, value in rewards.items() if "reward/" in name}
    return {**metrics, "forks/in": float(asked), "forks/candidates": float(sum(map(len, sets)))}


def shown_first(groups: Sequence[Sequence[Trajectory]], sets: Sequence[Sequence[Trajectory]]) -> list[Trajectory]:
    """One of every group before a second of any; after a group's member one of each set that continues in the group."""
    ordered: list[Sequence[Trajectory]] = []
    for group in groups:
        ordered += [group, *(candidates for candidates in sets if candidates[0].group == group[0].group)]
    by_turn = sorted(
        ((turn, place) for place, members in enumerate(ordered) for turn in range(len(members))),
    )
    return [ordered[place][turn] for turn, place in by_turn]
