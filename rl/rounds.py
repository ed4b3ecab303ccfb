"""One step's groups: rolled out, scored, credited; and again for those that were dropped, while rounds are left.

Groups are scored as they finish, while the others are still being written. With grpo.max_rollout_rounds above 1 this is
the dynamic sampling of DAPO (arXiv:2503.14476, section 3.2), bounded: what cannot be trained on is replaced by groups
of the next prompts. The ledger accounts for every group of every round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from record.trajectory import Trajectory
from rl.advantages import compute_advantages
from rl.batches import drop_untrainable
from rl.ledger import FAILED, Ledger
from rl.prompts import PromptCursor
from rl.run import Run
from rollout.pool.contract import NOT_REPEATABLE
from rollout.requests import RolloutRequest

SUMMED = ("rollout/trajectories", "rollout/tokens", "rollout/decisions", "rollout/images", "rollout/prompts",
          "rollout/refills", "rollout/reprefills", "rollout/groups", "rollout/groups_failed")  # fmt: skip


def next_requests(run: Run, cursor: PromptCursor, count: int) -> list[RolloutRequest]:
    """One request a prompt; groups are numbered through the run, which makes their noise their own."""
    members = tuple(range(run.config.num_generations))
    return [RolloutRequest(group, record["prompt"], record, members, run.seed) for group, record in cursor.take(count)]


def rollout_and_score(run: Run, cursor: PromptCursor, step: int) -> tuple[Ledger, dict[str, float]]:
    """Roll out, score, and compute advantages. The first process does it; `cursor` moves on."""
    assert run.rollouts is not None and run.reward_manager is not None
    config = run.config
    groups: list[list[Trajectory]] = []
    rounds: list[tuple[int, Mapping[str, float]]] = []  # trajectories, metrics
    failed, replaced, wanted = Counter[str](), dict[str, int](), config.prompts_per_step
    for number in range(config.max_rollout_rounds):
        requests = next_requests(run, cursor, wanted)
        pending = run.reward_manager.begin(step, [len(request.members) for request in requests], counted=number == 0)
        rolled_out = run.rollouts.generate(requests, each=pending.add)
        report = pending.finish(rolled_out.groups)
        groups += rolled_out.groups
        failed.update(NOT_REPEATABLE if lost.reason == NOT_REPEATABLE else FAILED for lost in rolled_out.failed)
        rounds.append((sum(map(len, rolled_out.groups)), {**rolled_out.metrics, **report.metrics}))
        ledger = compute_advantages(groups, config, failed)
        drop_untrainable(ledger, config)
        wanted = config.prompts_per_step - len(ledger.trained)
        if not wanted:
            break
        if number + 1 < config.max_rollout_rounds:
            replaced = dict(ledger.dropped)
    if config.max_rollout_rounds > 1:
        ledger.replaced = replaced
        ledger.check()

    measured = run.alarms.measure(groups) if run.alarms is not None else {}
    if run.tracker is not None and (step == 1 or step % run.show_every == 0):
        # One of every group before a second of any: the tracker keeps as many as it is told to.
        every = [trajectory for group in groups for trajectory in group]
        run.tracker.trajectories(step, sorted(every, key=lambda trajectory: trajectory.member))
    return ledger, {**merged(rounds), **measured, **ledger.metrics()}


def merged(rounds: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The metrics of several rounds: seconds and counts added up, everything else a mean weighted by trajectories."""
    if len(rounds) == 1:
        return dict(rounds[0][1])
    names = dict.fromkeys(name for _, metrics in rounds for name in metrics)
    together = {"rollout/rounds": float(len(rounds))}
    for name in names:
        found = [(weight, metrics[name]) for weight, metrics in rounds if name in metrics]
        total = sum(weight for weight, _ in found)
        if name in SUMMED or name.startswith(
            ("time/", "judge/asked", "judge/retried", "rollout/restarts", "rollout/tools/")
        ):
            together[name] = sum(value for _, value in found)
        elif total:
            together[name] = sum(weight * value for weight, value in found) / total
    seconds = together.get("time/rollout")
    if seconds:
        together["rollout/tokens_per_s"] = together.get("rollout/tokens", 0.0) / seconds
    return together
