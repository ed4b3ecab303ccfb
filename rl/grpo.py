"""GRPO, whole: prompts, rollouts, rewards, advantages, update, weight sync, log, checkpoint.

Every process runs this same loop. The first one alone talks to rollouts, rewards and tracker, and hands the credited
groups to the others; update, weight sync and checkpoint are collective. underdrawing/build.py builds the parts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rewards.alarms import AlarmRaised
from rl.advantages import compute_advantages
from rl.ledger import Ledger
from rl.prompts import PromptCursor
from rl.run import Run, log
from rl.state import RunState
from rl.trainer import Trainer
from rl.weight_sync import WeightSynchronizer
from rollout.requests import RolloutRequest
from runtime.interrupt import Interrupted, interruptible, name_of
from runtime.ray_cluster import ClusterError
from training.ranks import ElsewhereError, run_on_main, signal_anywhere

logger = logging.getLogger(__name__)


def train(run: Run, resume: Path | None = None) -> Trainer:
    """Run to config.steps, from the starting weights or from a checkpoint.

    A run that was killed and resumed does what it would have done: the same prompts, noise, rewards and weights.

    Raises:
        Interrupted: after a signal, once the step is finished and saved. Where rollouts outlast the grace time they are
            broken off: what was trained before is saved, and a resumed run makes them again.
        AlarmRaised: a fatal alarm, likewise.
        UserError: as the parts do.
    """
    config, accelerator = run.config, run.accelerator
    trainer = Trainer(run.policy, config, accelerator, run.weights)
    weight_sync = WeightSynchronizer(run.policy, run.rollouts, accelerator, trainer.scorer)
    state = RunState(run, trainer, resume)
    if not state.pending:
        weight_sync.sync_weights(trainer.version, state.probe)

    with interruptible(logger.warning) as interruption, interruption.blamed_for(ClusterError, ElsewhereError):
        for step in state.steps():
            if not state.pending:
                with state.training(step):
                    requests = next_requests(run, state.cursor)
                    work = interruption.breakable(lambda: rollout_and_score(run, requests, step))  # noqa: B023
                    ledger, state.metrics = run_on_main(accelerator, work)
                    trajectories = [trajectory for group in ledger.trained for trajectory in group]
                    trainer.check_on_policy(trajectories)  # once, on the first that can be scored
                    state.metrics |= trainer.update(ledger.trained)
                    state.keep_probe(trajectories)

            with state.finishing(step):
                state.metrics |= weight_sync.sync_weights(trainer.version, state.probe).metrics()
                if config.evaluate_every and (step == config.steps or step % config.evaluate_every == 0):
                    state.metrics |= run_on_main(accelerator, interruption.breakable(lambda: evaluate(run, step)))  # noqa: B023
                alarm = run_on_main(accelerator, lambda: log(run, step, state.timed()))  # noqa: B023

            number = signal_anywhere(accelerator, interruption.signal)
            stop = number or alarm is not None
            if stop or step == config.steps or step % config.save_every == 0:
                saved = state.save()
            if stop and step < config.steps:
                raise stopped(run, step, saved, alarm, number)
    return trainer


def next_requests(run: Run, cursor: PromptCursor) -> list[RolloutRequest]:
    """One request a prompt; groups are numbered through the run, which makes their noise their own."""
    members = tuple(range(run.config.num_generations))
    return [
        RolloutRequest(group, record["prompt"], record, members, run.seed)
        for group, record in cursor.take(run.config.prompts_per_step)
    ]


def rollout_and_score(run: Run, requests: Sequence[RolloutRequest], step: int) -> tuple[Ledger, dict[str, float]]:
    """Roll out, score, and compute advantages. Groups are scored as they finish, while the others are still being
    written. The ledger accounts for every request."""
    assert run.rollouts is not None and run.reward_manager is not None
    pending = run.reward_manager.begin(step, [len(request.members) for request in requests])
    rolled_out = run.rollouts.generate(requests, each=pending.add)
    report = pending.finish(rolled_out.groups)
    measured = run.alarms.measure(rolled_out.groups) if run.alarms is not None else {}
    ledger = compute_advantages(rolled_out.groups, run.config, failed=len(rolled_out.failed))
    if run.tracker is not None and (step == 1 or step % run.show_every == 0):
        # One of every group before a second of any: the tracker keeps as many as it is told to.
        every = [trajectory for group in rolled_out.groups for trajectory in group]
        run.tracker.trajectories(step, sorted(every, key=lambda trajectory: trajectory.member))
    return ledger, {**rolled_out.metrics, **report.metrics, **measured, **ledger.metrics()}


def evaluate(run: Run, step: int) -> dict[str, float]:
    return run.evaluate(step) if run.evaluate else {}


def stopped(run: Run, step: int, saved: Path | None, alarm: str | None, number: int) -> AlarmRaised | Interrupted:
    """What ends a run before its last step, once that step is saved. number: of the signal; 0: there was none."""
    after = f"stopped after step {step} of {run.config.steps}"
    if alarm is not None:
        return AlarmRaised(
            f"{after} by {alarm}. Saved in {saved}; to go on regardless, set rewards.alarms.fatal: false and "
            f"{run.resume_command}"
        )
    return Interrupted(f"{name_of(number)}: {after}; saved in {saved}. To go on, {run.resume_command}", number)
