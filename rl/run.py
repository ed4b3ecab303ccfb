"""The built parts of a GRPO run, and how it is put away and taken up again. The loop is grpo.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from policy.base import Policy
from record.store import load_trajectories, save_trajectories
from record.trajectory import Trajectory
from rl.config import GrpoConfig
from rl.prompts import PromptCursor
from rl.trainer import Trainer
from rollout.pool.contract import Rollouts
from runtime.errors import UserError
from training import checkpoint
from training.ranks import BrokenOffError, on_first
from training.tracking import read_metrics

logger = logging.getLogger(__name__)
OWED = "owed.json"  # in a checkpoint: metrics of its step, where that is trained but not logged
# Keys of a recipe, sections whole, that may change on resuming without the steps to come being others.
INDIFFERENT = (
    "name",
    "run_dir",
    "track",
    "evaluate",
    "sft",
    "rewards.alarms",
    "grpo.save_every",
    "grpo.keep_checkpoints",
    "grpo.evaluate_every",
)


class Report(Protocol):
    metrics: dict[str, float]


class StepsJudgement(Protocol):
    """rewards.pending.Judgement."""

    def add(self, index: int, group: Sequence[Trajectory]) -> None: ...
    def finish(self, groups: Sequence[Sequence[Trajectory]]) -> Report: ...


class JudgeOfGroups(Protocol):
    """rewards.manager.Judge."""

    def begin(self, step: int, sizes: Sequence[int]) -> StepsJudgement: ...


class Watch(Protocol):
    """rewards.alarms.Alarms."""

    def measure(self, groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]: ...
    def recall(self, rows: Iterable[Mapping[str, Any]]) -> None: ...
    def check(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str], str | None]: ...


class Writer(Protocol):
    """training.tracking.Tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def trajectories(self, step: int, trajectories: Sequence[Trajectory]) -> Any: ...
    def rewind(self, step: int) -> None: ...


@dataclass
class Run:
    """What train() needs. Rollouts, judge, tracker, evaluate and alarms are the first process's; None on the others."""

    policy: Policy  # holding the starting weights, on resuming too: they are the reference
    config: GrpoConfig
    accelerator: Accelerator
    prompts: Sequence[dict[str, Any]]  # training records, each with its `prompt`
    rollouts: Rollouts | None
    judge: JudgeOfGroups | None
    tracker: Writer | None
    folder: Path  # checkpoints/ is made in it
    seed: int = 0  # of the prompts' order and of the sampling noise
    recipe: dict[str, Any] = field(default_factory=dict)  # kept in checkpoints
    weights: Path | str | None = None  # the folder of the starting weights; None: not known
    evaluate: Callable[[int], dict[str, float]] | None = None  # heldout/* after a step
    alarms: Watch | None = None
    show_every: int = 10  # steps between trajectories for people to look at
    resume_command: str = "give the same command with --resume"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass
class Begun:
    """Where a run stands as it begins."""

    done: int = 0  # steps whose weights these are
    probe: list[Trajectory] = field(default_factory=list)  # that publications answer
    owed: dict[str, float] | None = None  # metrics of step `done`, which is yet to be published, evaluated and logged


def begin(run: Run, trainer: Trainer, cursor: PromptCursor, resume: Path | None) -> Begun:
    """Take up a checkpoint, or start.

    Lines of metrics and checkpoints of later steps are forgotten: they are about to be made again.

    Raises:
        UserError: the folder already holds a run and none is to be resumed; CheckpointError as checkpoint.load.
    """
    begun = Begun()
    if resume is not None:
        loaded = checkpoint.load(resume)
        cursor.load(loaded.cursor)
        trainer.load(loaded.trainer)
        begun.done = loaded.step
        news = changes(loaded.recipe, json.loads(json.dumps(run.recipe)))
        if news and run.accelerator.is_main_process:
            logger.warning(
                "the recipe is not that of %s, and the run goes on with what it says now: %s",
                resume.name,
                "; ".join(news),
            )
        if (resume / "probe").is_dir():
            begun.probe = load_trajectories(resume / "probe")
        if (resume / OWED).is_file():
            begun.owed = json.loads((resume / OWED).read_text())
    logged = begun.done if begun.owed is None else begun.done - 1

    def forget() -> None:
        finished = checkpoint.latest(run.checkpoints)
        if resume is None and finished is not None:
            raise UserError(
                f"{run.folder} already holds a run ({finished.name}). Resume it ({run.resume_command}), or "
                f"choose another run_dir"
            )
        checkpoint.rewind(run.checkpoints, begun.done)
        if run.tracker is not None:
            run.tracker.rewind(logged + 1)
        if run.alarms is not None:
            run.alarms.recall(row for row in read_metrics(run.folder / "metrics.jsonl") if row["step"] <= logged)

    on_first(run.accelerator, forget)
    return begun


def changes(old: Mapping[str, Any], new: Mapping[str, Any], section: str = "") -> list[str]:
    """`key: old -> new` for every dotted key in which two recipes differ, but for the INDIFFERENT ones."""
    found: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        key = f"{section}{name}"
        before, after = old.get(name, "unset"), new.get(name, "unset")
        if key in INDIFFERENT or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changes(before, after, f"{key}.")
        else:
            found.append(f"{key}: {before} -> {after}")
    return found


@contextmanager
def keeping(
    run: Run,
    trainer: Trainer,
    cursor: PromptCursor,
    step: int,
    probe: Sequence[Trajectory],
    owed: dict[str, float] | None = None,
) -> Iterator[None]:
    """Save the last finished step where a fault that a user can mend ends the run.

    Args:
        step: that the weights are those of: the one before, until they move.
        owed: the metrics of `step` where it is trained but not yet logged; they are saved with it, for begin().
    """
    before, taken = cursor.state(), trainer.optimizer_steps
    try:
        yield
    except BrokenOffError:
        raise
    except UserError as error:
        cursor.load(before)
        newest = on_first(run.accelerator, lambda: checkpoint.latest(run.checkpoints))
        if trainer.optimizer_steps != taken:  # weights between two steps: a run that went on from them would be another
            last = f"it goes on from {newest.name}" if newest else "there is no checkpoint yet"
            error.args = (f"{error}. Step {step + 1} was half trained, so nothing was saved: {last}",)
        elif step:
            error.args = (f"{error}. {_save_after_fault(run, trainer, cursor, step, probe, owed, newest)}",)
        raise


def _save_after_fault(
    run: Run,
    trainer: Trainer,
    cursor: PromptCursor,
    step: int,
    probe: Sequence[Trajectory],
    owed: dict[str, float] | None,
    newest: Path | None,
) -> str:
    """What became of the finished steps, as a sentence."""
    try:
        if newest is None or newest.name != f"step-{step:06d}":
            put_away(run, trainer, cursor, step, probe, owed)
    except UserError as error:  # the disk is full, say: what ended the run comes first
        return f"The {step} finished step(s) could not be saved: {error}"
    return f"The {step} finished step(s) are saved; once it is mended, {run.resume_command}"


def put_away(
    run: Run,
    trainer: Trainer,
    cursor: PromptCursor,
    step: int,
    probe: Sequence[Trajectory],
    owed: dict[str, float] | None = None,
) -> None:
    """Write the checkpoint of a trained step. All processes call it; the first one writes.

    `owed`: metrics of a step that is yet to be published, evaluated and logged; None: it has been.
    """
    state = trainer.state()

    def write(folder: Path) -> None:
        run.policy.save(folder / "weights")
        if probe:
            save_trajectories(probe, folder / "probe")
        if owed is not None:
            (folder / OWED).write_text(json.dumps(owed, default=float))

    on_first(
        run.accelerator,
        lambda: checkpoint.save(
            run.checkpoints, step, write, state, cursor.state(), run.recipe, run.config.keep_checkpoints
        ),
    )


def log(run: Run, step: int, metrics: dict[str, float]) -> str | None:
    """Write the step's line, alarms included. Returns what a fatal alarm says; None: the run goes on."""
    fatal = None
    if run.alarms is not None:
        alarms, news, fatal = run.alarms.check(metrics)
        metrics = {**metrics, **alarms}
        for sentence in news:
            logger.warning("step %d: %s", step, sentence)
    if run.tracker is not None:
        run.tracker.log(step, metrics)
    return fatal
