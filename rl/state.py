"""What a GRPO run must remember from step to step, and how it is saved and taken up again.

A step has two phases. `training` ends when the weights have moved; `finishing` brings them to the writers, evaluates
and logs. A fault that a user can fix loses no finished phase: the step before, or this step with the metrics that are
still to be logged, is saved first.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from record.store import load_trajectories, save_trajectories
from record.trajectory import Trajectory
from rl.prompts import PromptCursor
from rl.run import Run
from rl.trainer import Trainer
from rl.weight_sync import smallest
from runtime.errors import UserError
from runtime.interrupt import Interrupted
from training import checkpoint
from training.ranks import BrokenOffError, run_on_main
from training.tracking import read_metrics

logger = logging.getLogger(__name__)
T = TypeVar("T")
PROBE_TRAJECTORIES = 2
# In a checkpoint: the metrics of its step, where that is trained but not logged. Release 0.1 wrote the second name.
PENDING_METRICS, OLD_PENDING_METRICS = "pending_metrics.json", "owed.json"
RESTARTS = "restarts"  # in a checkpoint: the pictures that groups may begin from
# Keys of a recipe, sections whole, that may change on resuming without the steps to come being others.
RESUME_SAFE_KEYS = (
    "name",
    "run_dir",
    "track",
    "evaluate",
    "scaling",
    "sft",
    "rewards.alarms",
    "grpo.save_every",
    "grpo.keep_checkpoints",
    "grpo.keep_rollouts",
    "grpo.evaluate_every",
    "grpo.idle_limit",
)


class RunState:
    """Where a run stands: the step at work, its metrics, the prompts to come, the probe that weight syncs answer."""

    def __init__(self, run: Run, trainer: Trainer, resume: Path | None = None) -> None:
        """Take up a checkpoint, or start.

        Lines of metrics and checkpoints of later steps are forgotten: they are about to be made again.

        Raises:
            UserError: the folder already holds a run and none is to be resumed; CheckpointError as checkpoint.load.
        """
        self.run, self.trainer = run, trainer
        self.cursor = PromptCursor(run.prompts, run.seed, run.config.shuffle_dataset)
        self.step = 0  # the last step whose weights these are
        self.probe: list[Trajectory] = []
        self.metrics: dict[str, float] = {}  # of the step at work
        self.pending = False  # the step is trained, and yet to be synced, evaluated and logged
        self._started = 0.0
        if resume is not None:
            self._load(resume)
        run_on_main(run.accelerator, lambda: self._forget_later(resume))

    def steps(self) -> Iterator[int]:
        """The steps to take, beginning with one that was trained but not finished."""
        for step in range(self.step + (not self.pending), self.run.config.steps + 1):
            if not self.pending:
                self.metrics = {}
            self._started = time.perf_counter() - self.metrics.get("time/step", 0.0)
            yield step

    @contextmanager
    def training(self, step: int) -> Iterator[None]:
        """Within it the weights of step - 1 become those of `step`; metrics go into `metrics`."""
        with self._saved_on_error(step - 1):
            yield
            self._take_time()
        self.step, self.pending = step, True

    @contextmanager
    def finishing(self, step: int) -> Iterator[None]:
        """Within it the step's weights are brought to the writers, evaluated and logged."""
        with self._saved_on_error(step):
            yield
        self.pending = False

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first process, on every process. All of them draw prompts on from where it left
        off."""
        found, self.cursor.taken = run_on_main(self.run.accelerator, lambda: (work(), self.cursor.taken))
        return found

    def keep_probe(self, trajectories: Sequence[Trajectory]) -> None:
        """The first trajectories that can serve as a probe do, for the whole run."""
        self.probe = self.probe or list(smallest(trajectories, PROBE_TRAJECTORIES))

    def timed(self) -> dict[str, float]:
        """The step's metrics with its seconds so far."""
        self._take_time()
        return self.metrics

    def save(self) -> Path | None:
        """Write the checkpoint of the last trained step. All processes call it; the first one writes.

        Returns the newest checkpoint.
        """
        trained, run = self.trainer.state(), self.run
        pending = self.metrics if self.pending else None

        def write(folder: Path) -> None:
            run.policy.save(folder / "weights")
            if self.probe:
                save_trajectories(self.probe, folder / "probe")
            run.restarts.save(folder / RESTARTS)
            if pending is not None:
                (folder / PENDING_METRICS).write_text(json.dumps(pending, default=float))

        def save() -> None:
            keep = run.config.keep_checkpoints
            checkpoint.save(run.checkpoints, self.step, write, trained, self.cursor.state(), run.recipe, keep)

        run_on_main(run.accelerator, save)
        return checkpoint.latest(run.checkpoints)

    # ---- inside ----

    def _take_time(self) -> None:
        self.metrics["time/step"] = time.perf_counter() - self._started

    def _load(self, folder: Path) -> None:
        loaded = checkpoint.load(folder)
        self.cursor.load(loaded.cursor, self.run.changed_prompts)
        self.trainer.load(loaded.trainer)
        self.step = loaded.step
        differing = changes(self.run.read_recipe(loaded.recipe), json.loads(json.dumps(self.run.recipe)))
        if differing and self.run.accelerator.is_main_process:
            logger.warning(
                "the recipe is not that of %s, and the run goes on with what it says now: %s",
                folder.name,
                "; ".join(differing),
            )
        if (folder / "probe").is_dir():
            self.probe = load_trajectories(folder / "probe")
        self.run.restarts.load(folder / RESTARTS)
        for name in (PENDING_METRICS, OLD_PENDING_METRICS):
            if (folder / name).is_file():
                self.metrics, self.pending = json.loads((folder / name).read_text()), True

    def _forget_later(self, resume: Path | None) -> None:
        run, logged = self.run, self.step - self.pending
        finished = checkpoint.latest(run.checkpoints)
        if resume is None and finished is not None:
            raise UserError(
                f"{run.folder} already holds a run ({finished.name}). Resume it ({run.resume_command}), or "
                f"choose another run_dir"
            )
        checkpoint.rewind(run.checkpoints, self.step)
        run.keeper.rewind(self.step)
        if run.tracker is not None:
            run.tracker.rewind(logged + 1, sampled=self.step + 1)
        done = [row for row in read_metrics(run.folder / "metrics.jsonl") if row["step"] <= logged]
        run.idle.recall(done)
        if run.alarms is not None:
            run.alarms.recall(done)

    @contextmanager
    def _saved_on_error(self, step: int) -> Iterator[None]:
        """Save `step`, whose weights these are, where a fault that a user can fix ends the run."""
        before, taken = self.cursor.state(), self.trainer.optimizer_steps
        pictures = list(self.run.restarts.pictures)
        try:
            yield
        except BrokenOffError:
            raise
        except UserError as error:
            self.cursor.load(before)
            self.run.restarts.pictures = pictures
            newest = run_on_main(self.run.accelerator, lambda: checkpoint.latest(self.run.checkpoints))
            # Weights between two steps: a run that went on from them would be another.
            if self.trainer.optimizer_steps != taken:
                last = f"it goes on from {newest.name}" if newest else "there is no checkpoint yet"
                error.args = (f"{error}. Step {step + 1} was half trained, so nothing was saved: {last}",)
            elif step:
                then = ". To go on" if isinstance(error, Interrupted) else "; once it is mended"
                error.args = (f"{error}. {self._save_after_fault(step, newest, then)}",)
            elif isinstance(error, Interrupted):
                error.args = (f"{error}. Nothing was saved: no step was finished",)
            raise

    def _save_after_fault(self, step: int, newest: Path | None, then: str) -> str:
        """What became of the finished steps, as a sentence."""
        try:
            if newest is None or newest.name != f"step-{step:06d}":
                self.save()
        except UserError as error:  # the disk is full, say: what ended the run comes first
            return f"The {step} finished step(s) could not be saved: {error}"
        return f"The {step} finished step(s) are saved{then}, {self.run.resume_command}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any], section: str = "") -> list[str]:
    """`key: old -> new` for every dotted key in which two recipes differ, but for the RESUME_SAFE_KEYS ones."""
    found: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        key = f"{section}{name}"
        before, after = old.get(name, "unset"), new.get(name, "unset")
        if key in RESUME_SAFE_KEYS or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changes(before, after, f"{key}.")
        else:
            found.append(f"{key}: {before} -> {after}")
    return found
