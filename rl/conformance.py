"""The conformance gate (rollout/conformance/gate.py) over a run's writers, before the first step and after a resume."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from record.trajectory import Trajectory
from rl.prompts import PromptCursor
from rl.rounds import next_requests
from rl.run import Run
from rl.trainer import Trainer
from rl.weight_sync import WeightSynchronizer
from rollout.conformance.gate import Conformance, Sides, conform, written
from rollout.requests import RolloutRequest
from training.ranks import run_on_main

logger = logging.getLogger(__name__)

PROMPTS, MEMBERS = 2, 4  # what the writers are asked to write


def check_writers(run: Run, trainer: Trainer, weight_sync: WeightSynchronizer) -> Conformance | None:
    """Whether what the writers sample is what the trainer scores. Collective.

    A writer that samples with the trainer's own weights has nothing between the two but the engine, which the on-policy
    check compares on the first rollouts: it is not asked. The run's prompts, noise and versions are as if it had not
    been called, but the writers hold moved weights: the next sync brings the true ones.

    Raises:
        ConformanceError: a writer fails; the sentence names the fault. Nothing has been trained or written.
    """
    if weight_sync.shared():
        return None
    main, rollouts, policy = run.accelerator, run.rollouts, run.policy
    exact = run_on_main(main, lambda: rollouts is None or rollouts.exact)
    if not exact and run.config.importance_sampling_cap is None and main.is_main_process:
        logger.warning(
            "the writer's log-probs are not the trainer's, and grpo.importance_sampling_cap is null: trajectories are "
            "rescored, and nothing corrects for who sampled them"
        )

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
    return conform(
        Sides(generate, probe, score, publish, trained),
        policy,
        requests(run),
        run.fmt,
        exact,
        weight_sync.tolerance,
        weight_sync.sampling_tolerance,
    )


def requests(run: Run) -> list[RolloutRequest]:
    """The run's first prompts, as groups below 0, whose noise no group of the run has."""
    cursor = PromptCursor(run.prompts, run.seed, run.config.shuffle_dataset)
    first = next_requests(run, cursor, min(PROMPTS, len(run.prompts)))
    return [replace(r, group=-1 - number, members=tuple(range(MEMBERS))) for number, r in enumerate(first)]
