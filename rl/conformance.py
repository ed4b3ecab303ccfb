"""The conformance gate (rollout/conformance/gate.py) over a run's writers, before the first step and after a resume."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from record.trajectory import Trajectory
from rl.forks import states
from rl.prompts import PromptCursor
from rl.rounds import next_requests
from rl.run import Run
from rl.trainer import Trainer
from rl.weight_sync import PROBE_TRAJECTORIES, WeightSynchronizer, smallest
from rollout.conformance.forks import check_prefix
from rollout.conformance.gate import Conformance, Sides, check_sharing, conform, written
from rollout.requests import RolloutRequest
from training.ranks import run_on_main

logger = logging.getLogger(__name__)

PROMPTS, MEMBERS = 2, 4  # what the writers are asked to write


def check_writers(run: Run, trainer: Trainer, weight_sync: WeightSynchronizer) -> Conformance | None:
    """Whether what the writers sample is what the trainer scores. Collective.

    A writer that samples with the trainer's own weights writes nothing for it: `check_first` looks for what is left to
    find in the first rollouts. The run's prompts, noise and versions are as if it had not
    been called, but the writers hold moved weights: the next sync brings the true ones.

    Raises:
        ConformanceError: a writer fails; the sentence names the fault. Nothing has been trained or written.
    """
    if weight_sync.shared():
        return None
    main, rollouts = run.accelerator, run.rollouts
    exact = run_on_main(main, lambda: rollouts is None or rollouts.exact)
    if not exact and run.config.importance_sampling_cap is None and main.is_main_process:
        logger.warning(
            "the writer's log-probs are not the trainer's, and grpo.importance_sampling_cap is null: trajectories are "
            "rescored, and nothing corrects for who sampled them"
        )
    return conform(
        _sides(run, trainer, weight_sync),
        run.policy,
        requests(run),
        run.fmt,
        exact,
        weight_sync.tolerance,
        weight_sync.sampling_tolerance,
        partial(states, config=run.config.fork) if run.config.fork is not None else None,
    )


def check_first(
    run: Run, trainer: Trainer, weight_sync: WeightSynchronizer, trajectories: Sequence[Trajectory]
) -> None:
    """Whether what was sampled is what the trainer scores (Trainer.check_on_policy) and, where the writer says that it
    samples with the trainer's own weights, whether it does and whether children begin with their parents' segments.
    Collective; once in a process's life, on the first trajectories that there are.

    Raises:
        ConformanceError, TrainingError, SamplingGapError: nothing has been trained yet.
    """
    if not trainer.check_on_policy(trajectories) or not weight_sync.shared():
        return
    parents = {(t.group, t.member): t for t in trajectories if t.parent is None}
    for trajectory in trajectories:
        if trajectory.parent is not None and (parent := parents.get((trajectory.group, trajectory.parent[0]))):
            check_prefix(trajectory, parent.segments[: trajectory.parent[1]])
    sides = _sides(run, trainer, weight_sync)
    exact = all(t.exact for t in trajectories)
    probe = smallest(trajectories, PROBE_TRAJECTORIES)
    check_sharing(sides, "the writer", probe, exact, weight_sync.tolerance, weight_sync.sampling_tolerance)


def _sides(run: Run, trainer: Trainer, weight_sync: WeightSynchronizer) -> Sides:
    main, rollouts, policy = run.accelerator, run.rollouts, run.policy

    def generate(asked: Sequence[RolloutRequest]) -> list[Trajectory]:
        def work() -> list[Trajectory]:
            assert rollouts is not None
            return written(rollouts, asked)

        return run_on_main(main, work)

    def probe(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        def work() -> list[np.ndarray]:
            assert rollouts is not None
            return rollouts.probe(trajectories)

        return run_on_main(main, work)

    def score(trajectories: Sequence[Trajectory]) -> np.ndarray:
        """Every process scores them all, which keeps those that share weights together."""
        passes = policy.passes(trajectories, run.config.tokens_per_micro_batch)
        scored = [trainer.score([one]).logprob_N.float().cpu().numpy() for one in passes]
        return np.concatenate(scored) if scored else np.empty(0, np.float32)

    def publish(version: int) -> None:
        weight_sync.sync_weights(version)

    trained = [p for p in policy.model.parameters() if p.requires_grad]
    return Sides(generate, probe, score, publish, trained)


def requests(run: Run) -> list[RolloutRequest]:
    """The run's first prompts, as groups below 0, whose noise no group of the run has."""
    cursor = PromptCursor(run.prompts, run.seed, run.config.shuffle_dataset)
    first = next_requests(run, cursor, min(PROMPTS, len(run.prompts)))
    return [replace(r, group=-1 - number, members=tuple(range(MEMBERS))) for number, r in enumerate(first)]
