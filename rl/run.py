"""What a GRPO run is given: its built parts. The loop over them is grpo.py, what it must remember is state.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from formats.base import Format
from policy.base import Policy
from record.trajectory import Trajectory
from rewards.alarms import Alarms
from rewards.manager import RewardManager
from rl.config import GrpoConfig
from rl.idle import IdleSteps
from rl.kept_steps import StepKeeper
from rl.restart_buffer import RestartBuffer
from rollout.pool.contract import Rollouts
from training.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What train() needs. From `rollouts` on, what is another's than the first process's is None on the others."""

    policy: Policy  # holding the starting weights, on resuming too: they are the reference
    config: GrpoConfig
    accelerator: Accelerator
    prompts: Sequence[dict[str, Any]]  # training records, each with its `prompt`
    rollouts: Rollouts | None
    reward_manager: RewardManager | None
    tracker: Tracker | None
    folder: Path  # checkpoints/ is made in it
    seed: int = 0  # of the prompts' order and of the sampling noise
    recipe: dict[str, Any] = field(default_factory=dict)  # kept in checkpoints
    weights: Path | str | None = None  # the folder of the starting weights; None: not known
    evaluate: Callable[[int], dict[str, float]] | None = None  # heldout/* after a step
    alarms: Alarms | None = None
    critiques: Callable[[Sequence[Sequence[Trajectory]]], dict[str, float]] | None = None  # calibration/* of a step
    fmt: Format | None = None  # what prompts are laid out by; None: those of a writer are not compared
    show_every: int = 10  # steps between trajectories for people to look at
    changed_prompts: bool = False  # resume with other prompts than the checkpoint's
    read_recipe: Callable[[dict[str, Any]], dict[str, Any]] = dict  # a checkpoint's, by today's names and defaults
    resume_command: str = "give the same command with --resume"
    setup: dict[str, Any] = field(default_factory=dict)  # what it is made with, for kept steps: see StepKeeper
    idle: IdleSteps = field(init=False)
    keeper: StepKeeper = field(init=False)
    restarts: RestartBuffer = field(default_factory=RestartBuffer)  # the first process's; the others' is empty

    def __post_init__(self) -> None:
        self.idle = IdleSteps(self.config.idle_limit)
        self.keeper = StepKeeper(self.folder, self.config, self.recipe, self.setup)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class Stop:
    """Why a run is to end before its last step, and what a person changes who wants it to go on regardless."""

    reason: str
    change: str


def log(run: Run, step: int, metrics: dict[str, Any]) -> Stop | None:
    """Write the step's line, alarms included. Returns why the run is to stop here; None: it goes on."""
    fatal = None
    if run.alarms is not None:
        alarms, new_alarms, fatal = run.alarms.check(metrics)
        metrics = {**metrics, **alarms}
        for sentence in new_alarms:
            logger.warning("step %d: %s", step, sentence)
    if run.tracker is not None:
        run.tracker.log(step, metrics)
    idle = run.idle.after(step, metrics, last=step == run.config.steps)
    if fatal is not None:
        return Stop(fatal, "set rewards.alarms.fatal: false")
    return Stop(f"grpo.idle_limit: {idle}", "raise grpo.idle_limit") if idle is not None else None
