"""GRPO, whole: prompts, rollouts, judgement, credit, update, publication, log, checkpoint.

Every process runs this same loop. The first one alone talks to rollouts, judge and tracker, and hands the credited
groups to the others; update, publish and checkpoint are collective. underdrawing/build.py builds the parts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from rewards.alarms import AlarmRaised
from rl.advantages import credit
from rl.ledger import Ledger
from rl.prompts import PromptCursor
from rl.publish import Publisher, smallest
from rl.run import Run, begin, keeping, log, put_away
from rl.trainer import Trainer
from rollout.requests import RolloutRequest
from runtime.interrupt import Interrupted, interruptible
from training import checkpoint
from training.ranks import on_first

PROBE_TRAJECTORIES = 2
logger = logging.getLogger(__name__)


def train(run: Run, resume: Path | None = None) -> Trainer:
    """Run to config.steps, from the starting weights or from a checkpoint.

    A run that was killed and resumed does what it would have done: the same prompts, noise, rewards and weights.

    Raises:
        Interrupted: after Ctrl-C, at the next step boundary, once all is saved.
        AlarmRaised: a fatal alarm, likewise.
        UserError: as the parts do.
    """
    config, accelerator = run.config, run.accelerator
    trainer = Trainer(run.policy, config, accelerator, run.weights)
    cursor = PromptCursor(run.prompts, run.seed)
    publisher = Publisher(run.policy, run.rollouts, accelerator, trainer.scorer)
    begun = begin(run, trainer, cursor, resume)
    probe, owed = begun.probe, begun.owed
    if owed is None:
        publisher.publish(trainer.version, probe)
    on_policy = False  # until proven on the first rollouts

    with interruptible(logger.warning) as interruption:
        for step in range(begun.done + (owed is None), config.steps + 1):
            started, last = time.perf_counter(), step == config.steps
            if owed is not None:  # the checkpoint's step, which a fault kept from being finished
                metrics, owed = owed, None
                started -= metrics["time/step"]
            else:
                with keeping(run, trainer, cursor, step - 1, probe):
                    requests = ask(run, cursor)
                    ledger, metrics = on_first(accelerator, lambda: collect(run, requests, step))  # noqa: B023
                    trajectories = [trajectory for group in ledger.trained for trajectory in group]
                    if trajectories and not on_policy:
                        logger.info("on-policy gap: %.2g", trainer.on_policy_gap(trajectories))
                        on_policy = True
                    metrics |= trainer.update(ledger.trained)
                probe = probe or list(smallest(trajectories, PROBE_TRAJECTORIES))
                metrics["time/step"] = time.perf_counter() - started

            with keeping(run, trainer, cursor, step, probe, metrics):
                metrics |= publisher.publish(trainer.version, probe).metrics()
                if config.evaluate_every and (last or step % config.evaluate_every == 0):
                    metrics |= on_first(accelerator, lambda: evaluate(run, step))  # noqa: B023
                metrics["time/step"] = time.perf_counter() - started
                alarm = on_first(accelerator, lambda: log(run, step, metrics))  # noqa: B023

            stop = (on_first(accelerator, lambda: interruption.pressed) or alarm is not None) and not last
            if stop or last or step % config.save_every == 0:
                put_away(run, trainer, cursor, step, probe)
            if stop and alarm is not None:
                raise AlarmRaised(
                    f"stopped after step {step} of {config.steps} by {alarm}. Saved in "
                    f"{checkpoint.latest(run.checkpoints)}; to go on regardless, set "
                    f"rewards.alarms.fatal: false and {run.resume_command}"
                )
            if stop:
                raise Interrupted(
                    f"stopped after step {step} of {config.steps}; saved in "
                    f"{checkpoint.latest(run.checkpoints)}. To go on, {run.resume_command}"
                )
    return trainer


def ask(run: Run, cursor: PromptCursor) -> list[RolloutRequest]:
    """One request a prompt; groups are numbered through the run, which makes their noise their own."""
    members = tuple(range(run.config.num_generations))
    return [
        RolloutRequest(group, record["prompt"], record, members, run.seed)
        for group, record in cursor.take(run.config.prompts_per_step)
    ]


def collect(run: Run, requests: Sequence[RolloutRequest], step: int) -> tuple[Ledger, dict[str, float]]:
    """Roll out, judge and credit. Groups are judged as they finish, while the others are still being written. The
    ledger accounts for every request."""
    assert run.rollouts is not None and run.judge is not None
    judgement = run.judge.begin(step, [len(request.members) for request in requests])
    rolled_out = run.rollouts.generate(requests, each=judgement.add)
    report = judgement.finish(rolled_out.groups)
    measured = run.alarms.measure(rolled_out.groups) if run.alarms is not None else {}
    ledger = credit(rolled_out.groups, run.config, failed=len(rolled_out.failed))
    if run.tracker is not None and (step == 1 or step % run.show_every == 0):
        # One of every group before a second of any: the tracker keeps as many as it is told to.
        every = [trajectory for group in rolled_out.groups for trajectory in group]
        run.tracker.trajectories(step, sorted(every, key=lambda trajectory: trajectory.member))
    return ledger, {**rolled_out.metrics, **report.metrics, **measured, **ledger.metrics()}


def evaluate(run: Run, step: int) -> dict[str, float]:
    return run.evaluate(step) if run.evaluate else {}
