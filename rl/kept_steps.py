"""Whole steps of a run on disk: what `underdrawing replay` computes a step again from.

    steps/000011/
        step.json             recipe, setup, account of the rounds, metrics, SHA-256 of every other file
        trajectories/         every trajectory of the step, dropped groups' too (record/store.py)
        decisions.safetensors what the loss took, decision by decision (kept_forwards.py)
        digests.json          a digest of each part of each trajectory, so that an altered one is told by what differs

A folder is written whole or not at all, and the SHA-256 of its step.json stands in the step's line of metrics.jsonl.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from record.digests import altered_parts, digests_of
from record.store import load_trajectories, save_trajectories
from record.trajectory import RecordError, Trajectory
from rl import kept_forwards
from rl.config import GrpoConfig
from rl.kept_forwards import KeptForward, KeptUpdate, Place
from rl.ledger import Group
from runtime.errors import UserError, writing
from runtime.files import whole_folder
from training.ranks import run_on_main
from training.tracking import read_metrics

FORMAT = 1
FINGERPRINT = "kept/sha256"  # in a line of metrics.jsonl
STEP, TRAJECTORIES, DECISIONS, DIGESTS = "step.json", "trajectories", "decisions.safetensors", "digests.json"
PACKAGES = ("underdrawing", "torch", "numpy", "transformers", "accelerate", "peft", "pillow", "scikit-image")
AGAIN = "remove it, and keep the step again by resuming from an earlier checkpoint"


class KeptStepError(UserError):
    """A kept step that is not there, or is not as it was written."""


@dataclass(frozen=True)
class KeptRound:
    """One generation of rollouts: what was asked for, and what came back."""

    asked: Sequence[int]  # members of each request
    came: Sequence[int]  # the requests whose groups came back, ascending
    groups: Sequence[Group]  # those
    failed: Mapping[str, int]  # requests that did not, by reason

    def account(self) -> dict[str, Any]:
        return {"asked": list(self.asked), "came": list(self.came), "failed": dict(self.failed)}


@dataclass(frozen=True)
class KeptStep:
    """A kept step as it is read again, every checksum verified."""

    folder: Path
    step: int
    rounds: Sequence[KeptRound]
    forks: KeptRound | None  # candidates at states; None: the recipe wanted none
    forwards: dict[Place, KeptForward]
    recipe: Mapping[str, Any]
    setup: Mapping[str, Any]  # see setup_of
    weights: str | None  # fingerprint of the trained weights before the step; None: not known
    start: Mapping[str, str | None]  # Trainer.start
    metrics: Mapping[str, float | None]  # of the step's rollouts, rewards, advantages and update

    @property
    def groups(self) -> list[Group]:
        """Those that began at a prompt, then the candidates: the order in which they were credited."""
        rounds = [*self.rounds, *([] if self.forks is None else [self.forks])]
        return [group for one in rounds for group in one.groups]

    @property
    def failed(self) -> dict[str, int]:
        """Groups that never came back, by reason."""
        counts: dict[str, int] = {}
        for one in [*self.rounds, *([] if self.forks is None else [self.forks])]:
            for reason, count in one.failed.items():
                counts[reason] = counts.get(reason, 0) + count
        return counts


def keeps(config: GrpoConfig, step: int) -> bool:
    """Whether the recipe keeps this step. Every K-th counts from the first, so that the weights before a kept step are
    a checkpoint's where save_every divides K."""
    every = config.keep_rollouts
    return every == "all" or every != "none" and (step - 1) % every == 0


@dataclass
class StepKeeper:
    """Gathers what a step consists of while it is made, and writes it once its weights have moved.

    Args:
        folder: of the run.
        recipe: the resolved one.
        setup: what the run is made with, beside what setup_of knows: the lock's SHA-256, say.
    """

    folder: Path
    config: GrpoConfig
    recipe: Mapping[str, Any] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)
    _step: int = field(default=0, init=False)
    _update: KeptUpdate | None = field(default=None, init=False)
    _rounds: list[KeptRound] = field(default_factory=list, init=False)
    _forks: KeptRound | None = field(default=None, init=False)

    def begin(self, step: int) -> None:
        """A step's rollouts begin: what was gathered of another is forgotten."""
        self._step, self._update, self._rounds, self._forks = step, None, [], None

    def add(self, asked: Sequence[int], lost: Mapping[int, str], groups: Sequence[Group], forks: bool = False) -> None:
        """A round of the step came back.

        Args:
            asked: members of each request.
            lost: the requests that did not come back, by number, and why.
            forks: the groups are candidates at states.
        """
        if not keeps(self.config, self._step):
            return
        failed: dict[str, int] = {}
        for reason in lost.values():
            failed[reason] = failed.get(reason, 0) + 1
        came = [number for number in range(len(asked)) if number not in lost]
        kept = KeptRound(list(asked), came, list(groups), failed)
        if forks:
            self._forks = kept
        else:
            self._rounds.append(kept)

    def update(self, step: int) -> KeptUpdate | None:
        """What the step's update is to fill; None: the step is not kept."""
        self._update = KeptUpdate() if keeps(self.config, step) else None
        return self._update

    def keep(
        self, step: int, start: Mapping[str, str | None], metrics: Mapping[str, Any], accelerator: Accelerator
    ) -> dict[str, Any]:
        """Write the step, where it is to be kept and was made in this process's life. Collective.

        Returns the fingerprint and the seconds that it took, for the step's line of metrics.

        Raises:
            UserError: the disk is full or not writable; nothing half-written is left.
        """
        if self._update is None:
            return {}
        began, update = time.perf_counter(), self._update
        forwards: dict[Place, KeptForward] = {}
        for theirs in gather_object([update.forwards]):
            forwards |= theirs
        setup = {**setup_of(accelerator), **self.setup}

        def write() -> dict[str, Any]:
            account = {
                "format": FORMAT,
                "step": step,
                "rounds": [one.account() for one in self._rounds],
                "forks": None if self._forks is None else self._forks.account(),
                "recipe": dict(self.recipe),
                "setup": setup,
                "weights": update.weights,
                "start": dict(start),
                "metrics": {name: _finite(value) for name, value in metrics.items()},
            }
            rounds = [*self._rounds, *([] if self._forks is None else [self._forks])]
            trajectories = [t for one in rounds for group in one.groups for t in group]
            sha256 = _write(_folder(self.folder, step), account, trajectories, forwards)
            return {FINGERPRINT: sha256, "time/keep": time.perf_counter() - began}

        kept = run_on_main(accelerator, write)
        self.begin(step)
        return kept

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`: they are about to be made again."""
        for later in kept_steps(self.folder):
            if later > step:
                _discard(_folder(self.folder, later))


def setup_of(accelerator: Accelerator) -> dict[str, Any]:
    """What the bits of a step depend on beside recipe, weights and trajectories."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "packages": versions,
    }


def kept_steps(run_dir: Path) -> list[int]:
    """The steps that a run has kept, ascending."""
    found = (path.parent for path in (run_dir / "steps").glob(f"*/{STEP}"))
    return sorted(int(path.name) for path in found if path.name.isdigit())


# ---- writing ----


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "steps" / f"{step:06d}"


def _write(
    folder: Path, account: dict[str, Any], trajectories: Sequence[Trajectory], forwards: dict[Place, KeptForward]
) -> str:
    """Returns the SHA-256 of step.json."""
    with writing(folder, "free some space, or set grpo.keep_rollouts=none, and resume"), whole_folder(folder) as fresh:
        save_trajectories(trajectories, fresh / TRAJECTORIES)
        (fresh / DECISIONS).write_bytes(kept_forwards.to_bytes(forwards))
        # Of what is read again, as a replay will.
        read = load_trajectories(fresh / TRAJECTORIES)
        (fresh / DIGESTS).write_text(json.dumps([{"key": t.key, "parts": digests_of(t)} for t in read]))
        account["files"] = {name: _sha256(fresh / name) for name in _files(fresh)}
        content = json.dumps(account, indent=1, allow_nan=False).encode()
        (fresh / STEP).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != STEP)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finite(value: Any) -> Any:
    if value is None or isinstance(value, int | str):
        return value
    return float(value) if math.isfinite(float(value)) else None


def _discard(folder: Path) -> None:
    """Delete a kept step under another name: half deleted, it must not pass for whole."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


# ---- reading ----


def read_step(run_dir: Path, step: int | None = None) -> KeptStep:
    """A kept step, every file of it held to what was written.

    Args:
        step: None: the last one that is kept.

    Raises:
        KeptStepError: the step was not kept, its line of metrics is missing, or something of it was altered: the
            sentence names the file, and where it can be told the trajectory and what differs.
    """
    there = kept_steps(run_dir)
    if not there:
        raise KeptStepError(
            f"{run_dir}: no step is kept there; a run keeps whole steps where its recipe says so, such as "
            "grpo.keep_rollouts=10 (every tenth), or all"
        )
    step = there[-1] if step is None else step
    if step not in there:
        raise KeptStepError(f"{run_dir}: step {step} was not kept; there are: {', '.join(map(str, there))}")
    folder = _folder(run_dir, step)
    row = _row(run_dir / "metrics.jsonl", step)
    account = _account(folder / STEP, row[FINGERPRINT])
    _check_files(folder, account["files"])
    for name, value in account["metrics"].items():
        if not name.startswith("time/") and name in row and row[name] != value:  # a step's time goes on
            raise KeptStepError(
                f"{run_dir / 'metrics.jsonl'}: in the line of step {step} '{name}' is {row[name]}, and it was written "
                f"as {value}; the file was altered"
            )
    trajectories = load_trajectories(folder / TRAJECTORIES)
    rounds = [_round(each, trajectories, folder) for each in account["rounds"]]
    forks = None if account["forks"] is None else _round(account["forks"], trajectories, folder)
    if trajectories:
        raise KeptStepError(f"{folder / TRAJECTORIES}: {len(trajectories)} more than {STEP} accounts for; {AGAIN}")
    return KeptStep(
        folder,
        step,
        rounds,
        forks,
        kept_forwards.from_bytes((folder / DECISIONS).read_bytes(), str(folder / DECISIONS)),
        account["recipe"],
        account["setup"],
        account["weights"],
        account["start"],
        account["metrics"],
    )


def _row(path: Path, step: int) -> dict[str, Any]:
    row = next((row for row in read_metrics(path) if row.get("step") == step), None)
    if row is None:
        raise KeptStepError(f"{path}: no line of step {step}, whose fingerprint the kept step is held to")
    if not isinstance(row.get(FINGERPRINT), str):
        raise KeptStepError(f"{path}: the line of step {step} has no '{FINGERPRINT}'; the file was altered")
    return row


def _account(path: Path, written: str) -> dict[str, Any]:
    content = path.read_bytes()
    here = hashlib.sha256(content).hexdigest()
    if here != written:
        raise KeptStepError(
            f"{path}: its SHA-256 is {here[:12]}, and metrics.jsonl says {written[:12]} ('{FINGERPRINT}'): one of the "
            "two was altered"
        )
    account: dict[str, Any] = json.loads(content)
    if account["format"] != FORMAT:
        raise KeptStepError(f"{path}: written in format {account['format']}; this version reads {FORMAT}")
    return account


def _check_files(folder: Path, written: Mapping[str, str]) -> None:
    for name, sha256 in written.items():
        path = folder / name
        if not path.is_file():
            raise KeptStepError(f"{path}: missing; the kept step is not whole. {AGAIN[0].upper()}{AGAIN[1:]}")
        if _sha256(path) != sha256:
            told = _altered(folder) if name != DIGESTS and name != DECISIONS else ""
            raise KeptStepError(
                f"{path}: its SHA-256 is not the one that was written; the file was altered{told}. A replay of it "
                "would be of another step"
            )


def _altered(folder: Path) -> str:
    """Which trajectory differs and in what, as a clause; empty where nothing can be told."""
    try:
        written = json.loads((folder / DIGESTS).read_text())
        trajectories = load_trajectories(folder / TRAJECTORIES)
    except RecordError as error:
        return f" ({error})"
    except (OSError, ValueError):
        return ""
    if len(written) != len(trajectories):
        return f" ({len(trajectories)} trajectories in it, {len(written)} were written)"
    differing = [
        (trajectory.key, parts)
        for trajectory, was in zip(trajectories, written, strict=True)
        if (parts := altered_parts(trajectory, was["parts"]))
    ]
    if not differing:
        return ", though every trajectory in it reads as it did"
    key, parts = differing[0]
    others = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    return f": trajectory {key}{others}, in its {parts[0]}{more}"


def _round(account: Mapping[str, Any], trajectories: list[Trajectory], folder: Path) -> KeptRound:
    """Takes the round's trajectories off the front of the list."""
    groups: list[list[Trajectory]] = []
    for number in account["came"]:
        size = account["asked"][number]
        groups.append(trajectories[:size])
        del trajectories[:size]
        if len(groups[-1]) < size:
            raise KeptStepError(f"{folder / TRAJECTORIES}: fewer than {STEP} accounts for; {AGAIN}")
    return KeptRound(account["asked"], account["came"], groups, account["failed"])
