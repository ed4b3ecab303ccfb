"""One step's groups: rolled out, scored, credited; and again for those that were dropped, while rounds are left.

Groups are scored as they finish, while the others are still being written. With grpo.max_rollout_rounds above 1 this is
the dynamic sampling of DAPO (arXiv:2503.14476, section 3.2), bounded: what cannot be trained on is replaced by groups
of the next prompts. With grpo.fork, candidates at states of all that was written follow (forks.py), each set of them a
group more; with grpo.restart some groups begin from stored pictures in place of prompts (restarts.py); with
grpo.image_credit, continuations from other pictures (image_credit.py), which are compared and never
trained on. The ledger accounts for every group of every round, and for every such arm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from record.trajectory import Trajectory
from rl.advantages import compute_advantages
from rl.batches import drop_untrainable
from rl.forks import Forks, roll_out_forks, shown_first
from rl.image_credit import ImageCredit, added_by_images, credit_images
from rl.ledger import FAILED, Ledger
from rl.prompts import PromptCursor
from rl.restarts import keep_pictures, restarts_in, roll_out_restarts
from rl.run import Run
from rollout.pool.contract import NOT_REPEATABLE, FailedGroup
from rollout.requests import RolloutRequest, request_of

SUMMED = ("rollout/trajectories", "rollout/tokens", "rollout/decisions", "rollout/images", "rollout/prompts",
          "rollout/refills", "rollout/reprefills", "rollout/groups", "rollout/groups_failed")  # fmt: skip

OWN_METRICS = ("forks/", "image_credit/", "restart/")  # of rollouts beside those of the prompts


def next_requests(run: Run, cursor: PromptCursor, count: int) -> list[RolloutRequest]:
    """One request a prompt; groups are numbered through the run, which makes their noise their own."""
    members = tuple(range(run.config.num_generations))
    return [request_of(group, record, members, run.seed) for group, record in cursor.take(count)]


def rollout_and_score(run: Run, cursor: PromptCursor, step: int) -> tuple[Ledger, dict[str, float]]:
    """Roll out, score, and compute advantages. The first process does it; `cursor` moves on."""
    assert run.rollouts is not None and run.reward_manager is not None
    config = run.config
    run.keeper.begin(step)
    groups: list[list[Trajectory]] = []
    rounds: list[tuple[int, Mapping[str, float]]] = []  # trajectories, metrics
    restarted = restarts_in(step, config, run.restarts)
    from_prompts = config.prompts_per_step - restarted
    failed, replaced, wanted = Counter[str](), dict[str, int](), from_prompts
    for number in range(config.max_rollout_rounds):
        requests = next_requests(run, cursor, wanted)
        pending = run.reward_manager.begin(step, [len(request.members) for request in requests], counted=number == 0)
        rolled_out = run.rollouts.generate(requests, each=pending.add)
        report = pending.finish(rolled_out.groups)
        lost = {one.index: _reason(one) for one in rolled_out.failed}
        run.keeper.add([len(request.members) for request in requests], lost, rolled_out.groups)
        groups += rolled_out.groups
        failed.update(map(_reason, rolled_out.failed))
        rounds.append((sum(map(len, rolled_out.groups)), {**rolled_out.metrics, **report.metrics}))
        ledger = compute_advantages(groups, config, failed)
        drop_untrainable(ledger, config)
        wanted = from_prompts - len(ledger.trained)
        if not wanted:
            break
        if number + 1 < config.max_rollout_rounds:
            replaced = dict(ledger.dropped)
    forks, credit = Forks([], [], {}), ImageCredit()
    restarts = roll_out_restarts(run, restarted, step)
    failed.update(map(_reason, restarts.failed))
    kept = keep_pictures(run, groups, step)
    if config.fork is not None:
        forks = roll_out_forks(run, groups, config.fork, step)
        lost = {one.index: _reason(one) for one in forks.failed}
        run.keeper.add(forks.asked, lost, forks.sets, forks=True)
        failed.update(map(_reason, forks.failed))
    if config.image_credit is not None:
        credit = credit_images(run, groups, config.image_credit, step)
    if restarted or config.fork is not None or config.image_credit is not None:
        added = added_by_images(credit, config)
        ledger = compute_advantages([*groups, *restarts.groups, *forks.sets], config, failed, added)
        ledger.arms, ledger.arms_in = dict(credit.account), credit.asked
        drop_untrainable(ledger, config)
    if config.fork is not None:
        candidates = {id(members[0]) for members in forks.sets}
        forks.metrics["forks/trained"] = float(sum(id(group[0]) in candidates for group in ledger.trained))
    if config.max_rollout_rounds > 1:
        ledger.replaced = replaced
        ledger.check()

    measured = run.alarms.measure(groups) if run.alarms is not None else {}
    if run.critiques is not None:
        measured |= run.critiques(groups)
    if run.tracker is not None and (step == 1 or step % run.show_every == 0):
        # The tracker keeps as many as it is told to.
        run.tracker.trajectories(step, shown_first([*groups, *restarts.groups], forks.sets))
    metrics: dict[str, float] = merged(rounds)
    for beside in (restarts.metrics, kept, forks.metrics, credit.metrics):
        metrics = with_added(metrics, beside)
    return ledger, {**metrics, **measured, **ledger.metrics()}


def _reason(lost: FailedGroup) -> str:
    """Under what the ledger counts a group that never came back."""
    return NOT_REPEATABLE if lost.reason == NOT_REPEATABLE else FAILED


def with_added(metrics: Mapping[str, float], added: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics with those of what was rolled out beside its prompts: counts and seconds added up; means are of
    what began at a prompt."""
    together = {**metrics, **{name: value for name, value in added.items() if name.startswith(OWN_METRICS)}}
    for name, value in added.items():
        if _is_summed(name):
            together[name] = together.get(name, 0.0) + value
    return _with_rate(together) if added else together


def merged(rounds: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The metrics of several rounds: seconds and counts added up, everything else a mean weighted by trajectories."""
    if len(rounds) == 1:
        return dict(rounds[0][1])
    names = dict.fromkeys(name for _, metrics in rounds for name in metrics)
    together = {"rollout/rounds": float(len(rounds))}
    for name in names:
        found = [(weight, metrics[name]) for weight, metrics in rounds if name in metrics]
        total = sum(weight for weight, _ in found)
        if _is_summed(name):
            together[name] = sum(value for _, value in found)
        elif total:
            together[name] = sum(weight * value for weight, value in found) / total
    return _with_rate(together)


def _is_summed(name: str) -> bool:
    return name in SUMMED or name.startswith(
        ("time/", "judge/asked", "judge/retried", "rollout/restarts", "rollout/tools/")
    )


def _with_rate(metrics: dict[str, float]) -> dict[str, float]:
    seconds = metrics.get("time/rollout")
    if seconds:
        metrics["rollout/tokens_per_s"] = metrics.get("rollout/tokens", 0.0) / seconds
    return metrics
