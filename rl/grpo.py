"""GRPO, whole: prompts, rollouts, rewards, advantages, update, weight sync, log, checkpoint.

Every process runs this same loop. The first one alone talks to rollouts, rewards and tracker, and hands the credited
groups to the others; update, weight sync and checkpoint are collective. underdrawing/build.py builds the parts.
"""

from __future__ import annotations

import logging
from pathlib import Path

from rewards.alarms import AlarmRaised
from rl.conformance import check_first, check_writers
from rl.rounds import rollout_and_score
from rl.run import Run, Stop, log
from rl.state import RunState
from rl.trainer import Trainer
from rl.weight_sync import WeightSynchronizer
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
        AlarmRaised: a fatal alarm, or too many steps that trained nothing, likewise.
        UserError: as the parts do.
    """
    config, accelerator = run.config, run.accelerator
    trainer = Trainer(run.policy, config, accelerator, run.weights)
    weight_sync = WeightSynchronizer(
        run.policy, run.rollouts, accelerator, trainer.scorer, sampling_tolerance=config.sampling_tolerance
    )
    state = RunState(run, trainer, resume)
    check_writers(run, trainer, weight_sync)
    if not state.pending:
        weight_sync.sync_weights(trainer.version, state.probe)

    with interruptible(logger.warning) as interruption, interruption.blamed_for(ClusterError, ElsewhereError):
        for step in state.steps():
            if not state.pending:
                with state.training(step):
                    work = interruption.breakable(lambda: rollout_and_score(run, state.cursor, step))  # noqa: B023
                    ledger, state.metrics = state.on_main(work)
                    trajectories = [trajectory for group in ledger.trained for trajectory in group]
                    check_first(run, trainer, weight_sync, trajectories)  # once, on the first that can be scored
                    state.metrics |= trainer.update(ledger.trained, run.keeper.update(step))
                    state.keep_probe(trajectories)

            with state.finishing(step):
                state.metrics |= run.keeper.keep(step, trainer.start, state.metrics, accelerator)
                state.metrics |= weight_sync.sync_weights(trainer.version, state.probe).metrics()
                if config.evaluate_every and (step == config.steps or step % config.evaluate_every == 0):
                    state.metrics |= run_on_main(accelerator, interruption.breakable(lambda: evaluate(run, step)))  # noqa: B023
                halt = run_on_main(accelerator, lambda: log(run, step, state.timed()))  # noqa: B023

            number = signal_anywhere(accelerator, interruption.signal)
            stop = number or halt is not None
            if stop or step == config.steps or step % config.save_every == 0:
                saved = state.save()
            if stop and step < config.steps:
                raise stopped(run, step, saved, halt, number)
    return trainer


def evaluate(run: Run, step: int) -> dict[str, float]:
    return run.evaluate(step) if run.evaluate else {}


def stopped(run: Run, step: int, saved: Path | None, halt: Stop | None, number: int) -> AlarmRaised | Interrupted:
    """What ends a run before its last step, once that step is saved. number: of the signal; 0: there was none."""
    after = f"stopped after step {step} of {run.config.steps}"
    if halt is not None:
        return AlarmRaised(
            f"{after} by {halt.reason}. Saved in {saved}; to go on regardless, {halt.change} and {run.resume_command}"
        )
    return Interrupted(f"{name_of(number)}: {after}; saved in {saved}. To go on, {run.resume_command}", number)
