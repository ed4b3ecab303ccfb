"""One writer of metrics: `metrics.jsonl` always, W&B as its mirror, trajectories as images.

A line of metrics.jsonl is {"step": int, name: number or text, ...}, written whole and flushed. Rank 0 alone holds a
Tracker.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from record.trajectory import Trajectory
from runtime.errors import UserError, writing
from runtime.files import write_whole
from runtime.section import Section
from training.wandb_mirror import WandbMirror, wandb_login

logger = logging.getLogger(__name__)


class TrackConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled", "auto"] = Field(
        "auto", description="auto: online with a login, else offline"
    )
    wandb_project: str = Field("underdrawing", description="W&B project")
    wandb_entity: str | None = Field(None, description="W&B team; None: your default")
    trajectories_every: int = Field(10, ge=1, description="steps between stored sets of trajectories")
    trajectories: int = Field(8, ge=0, description="trajectories in a stored set; 0: none")

    @field_validator("wandb_project")
    @classmethod
    def _project_is_one(cls, value: str) -> str:
        if not 1 <= len(value) <= 128 or not value.isprintable() or set(value) & set("/\\#?%:"):
            raise ValueError("W&B takes 1 to 128 characters, and none of / \\ # ? % :")
        return value

    @field_validator("wandb_entity")
    @classmethod
    def _entity_is_one(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", value):
            raise ValueError("the name of a W&B user or team has letters, digits, _, - and . alone")
        return value


RESUME = "mend that and resume", "free some space and resume"  # advice: for any reason, for a full disk


# Metrics by the names that they had in release 0.1: written beside the present ones until release 0.3.
OLD_NAMES = {
    "rollout/reprefills": "rollout/anew",
    "rollout/images": "rollout/pictures",
    "heldout/images": "heldout/pictures",
    "weight_sync/version": "publish/version",
    "weight_sync/bytes": "publish/bytes",
    "weight_sync/gap": "publish/gap",
    "weight_sync/probed": "publish/probed",
    "time/weight_sync": "time/publish",
}


def old_name(name: str) -> str:
    """What release 0.1 called a metric."""
    if name.startswith("reward/") and name.endswith("/wrong_images"):
        return name.removesuffix("images") + "pictures"
    return OLD_NAMES.get(name, name)


class Tracker:
    """metrics.jsonl, W&B and stored trajectories of one run.

    Args:
        run_dir: of the run; metrics.jsonl is appended to, so that a resumed run goes on in the same file.
        config: see TrackConfig.
        name: of the W&B run.
        recipe: the resolved recipe, stored with the W&B run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackConfig | None = None,
        *,
        name: str = "run",
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config or TrackConfig(wandb="disabled")
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "metrics.jsonl"
        with writing(self.path, "choose another run_dir"):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            _drop_half_line(self.path)
            self._file = self.path.open("a")
        self._mirror = self._open_mirror(name, recipe or {})
        self._sampled: dict[int, Sequence[Trajectory]] = {}  # what trajectories() stored, until its step's line
        self.listeners: list[Any] = []  # each with heard(step, metrics): a progress display, say

    def log(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        """Write one line. NaN and infinity are written as null: JSON has no such numbers. Text, such as a fingerprint,
        is shown to no listener."""
        named = {**metrics, **{old_name(name): value for name, value in metrics.items()}}
        row = {"step": step, **{k: _finite(v) for k, v in named.items()}}
        mirror = self._started_mirror()  # with the lines before this one
        self._write(json.dumps(row) + "\n")
        sample = self._sampled.pop(step, None)
        if mirror is not None:
            mirror.log(row, self._stored(step) if sample is None else sample)
        self.show(step, {name: value for name, value in metrics.items() if not isinstance(value, str)})

    def show(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Tell the listeners without writing: for steps between logged ones."""
        for listener in self.listeners:
            listener.on_metrics(step, metrics)

    def trajectories(self, step: int, trajectories: Sequence[Trajectory]) -> Path | None:
        """Store a sample of trajectories under run_dir/trajectories/<step>; the step's line brings them to W&B."""
        sample = list(trajectories)[: self.config.trajectories]
        if not sample:
            return None
        from record.store import save_trajectories

        folder = self._folder(step)
        save_trajectories(sample, folder)
        self._sampled[step] = sample
        return folder

    def rewind(self, step: int, sampled: int | None = None) -> None:
        """Forget every line of a step >= `step`: a resumed run writes them again. Begins or resumes the W&B run.

        Args:
            sampled: the first step whose stored trajectories are forgotten; None: `step`. It is a later one where a
                step was sampled and trained, but not logged.

        Raises:
            UserError: metrics.jsonl cannot be read or written, or W&B cannot be used.
        """
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] < step]
        with writing(self.path, *RESUME):
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file.close()
            self._file = self.path.open("a")
            for later in self._stored_steps():
                if later >= (step if sampled is None else sampled):
                    _discard(self._folder(later))
        if self._mirror is not None and len(kept) < len(rows):
            self._mirror.close()
        self._started_mirror()

    def close(self) -> None:
        with suppress(OSError):  # a full disk has been reported where it was met; closing writes the rest once more
            self._file.close()
        if self._mirror is not None:
            self._mirror.close()

    def _write(self, line: str) -> None:
        with writing(self.path, *RESUME):
            self._file.write(line)
            self._file.flush()

    # ---- the mirror ----

    def _open_mirror(self, name: str, recipe: Mapping[str, Any]) -> WandbMirror | None:
        config = self.config
        if config.wandb == "disabled":
            return None
        mode = config.wandb if config.wandb != "auto" else "online" if wandb_login() else "offline"
        return WandbMirror(
            self.run_dir,
            mode=mode,
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=name,
            recipe=recipe,
        )

    def _started_mirror(self) -> WandbMirror | None:
        """The mirror, brought to where metrics.jsonl is."""
        if self._mirror is not None and not self._mirror.started:
            steps = self._stored_steps()
            self._mirror.start(read_metrics(self.path), ((step, self._stored(step)) for step in steps))
        return self._mirror

    # ---- stored trajectories ----

    def _folder(self, step: int) -> Path:
        return self.run_dir / "trajectories" / f"{step:06d}"

    def _stored_steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.run_dir.glob("trajectories/*") if path.name.isdigit())

    def _stored(self, step: int) -> Sequence[Trajectory]:
        """The trajectories that a step stored; none where it stored none, or where they cannot be read."""
        from record.store import load_trajectories

        folder = self._folder(step)
        try:
            return load_trajectories(folder) if folder.is_dir() else ()
        except UserError as error:  # they are for people to look at: no reason to end a run
            logger.warning("W&B does without the trajectories of step %d: %s", step, error)
            return ()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics.jsonl; a last line that a killed run left half-written is not one.

    Raises:
        UserError: a line before the last is not JSON.
    """
    rows = []
    # What is no UTF-8 becomes a mark, which is no JSON either: the error names its line.
    lines = Path(path).read_text("utf-8", "replace").split("\n") if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number}: not JSON; a metrics file holds one object a line") from None
    return rows


def _drop_half_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _finite(value: float | int | str | None) -> float | int | str | None:
    if value is None or isinstance(value, int | str):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _discard(folder: Path) -> None:
    """Delete stored trajectories under another name: half deleted, they must not pass for whole. A folder that holds
    anything else stays."""
    from record.store import StoreError, check_folder

    try:
        check_folder(folder)
    except StoreError:
        return
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
