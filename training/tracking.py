"""One writer of metrics: `metrics.jsonl` always, W&B as its mirror on its own step axis, trajectories as images.

A line of metrics.jsonl is {"step": int, name: number, ...}, written whole and flushed. Rank 0 alone holds a Tracker.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from record.trajectory import Trajectory
from runtime.errors import UserError, writing
from runtime.files import write_whole
from runtime.section import Section


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


RESUME = "free some space and resume"
STRIP_HEIGHT, STRIP_GAP = 128, 4  # px


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
        self._wandb = _start_wandb(self.config, self.run_dir, name, recipe)
        self._table: Any = None
        self.listeners: list[Any] = []  # each with heard(step, metrics): a progress display, say

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Write one line. NaN and infinity are written as null: JSON has no such numbers."""
        named = {**metrics, **{old_name(name): value for name, value in metrics.items()}}
        row = {"step": step, **{k: _finite(v) for k, v in named.items()}}
        self._write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log({"step": step, **{k: v for k, v in row.items() if v is not None}})
        self.show(step, metrics)

    def show(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Tell the listeners without writing: for steps between logged ones."""
        for listener in self.listeners:
            listener.on_metrics(step, metrics)

    def trajectories(self, step: int, trajectories: Sequence[Trajectory]) -> Path | None:
        """Store a sample of trajectories under run_dir/trajectories/<step> and mirror them as a W&B table."""
        sample = list(trajectories)[: self.config.trajectories]
        if not sample:
            return None
        from record.store import save_trajectories

        folder = self.run_dir / "trajectories" / f"{step:06d}"
        save_trajectories(sample, folder)
        if self._wandb is not None:
            self._log_table(step, sample)
        return folder

    def rewind(self, step: int) -> None:
        """Forget every line of a step >= `step`: a resumed run writes them again."""
        kept = [row for row in read_metrics(self.path) if row["step"] < step]
        with writing(self.path, RESUME):
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file.close()
            self._file = self.path.open("a")

    def close(self) -> None:
        with suppress(OSError):  # a full disk has been reported where it was met; closing writes the rest once more
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, line: str) -> None:
        with writing(self.path, RESUME):
            self._file.write(line)
            self._file.flush()

    def _log_table(self, step: int, sample: Sequence[Trajectory]) -> None:
        import wandb

        # One table that grows: tables logged under one key replace each other (trl#2045).
        columns: list[str | int] = ["step", "prompt", "thought", "images", "reward", "parts", "stop"]
        if self._table is None:
            self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL")
        for t in sample:
            # One image a cell, which every view of W&B shows.
            shown = [(segment.role, segment.image) for segment in t.segments if segment.image is not None]
            images = (
                wandb.Image(filmstrip([image for _, image in shown]), caption=", ".join(role for role, _ in shown))
                if shown
                else None
            )
            trajectory = "\n".join(f"[{s.role}] {s.text}" for s in t.segments[1:])
            self._table.add_data(step, t.prompt, trajectory, images, t.reward, json.dumps(t.rewards), str(t.stop))
        self._wandb.log({"step": step, "trajectories": self._table})


def filmstrip(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [height, width, 3]: images side by side in their order, small ones enlarged by a whole factor."""
    tall = max(image.shape[0] for image in images)
    times = max(1, STRIP_HEIGHT // tall)
    frames = [
        np.pad(
            image.repeat(times, 0).repeat(times, 1),
            ((0, (tall - image.shape[0]) * times), (0, STRIP_GAP), (0, 0)),
            constant_values=255,
        )
        for image in images
    ]
    return np.concatenate(frames, 1)[:, :-STRIP_GAP]


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


def _finite(value: float | int | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _start_wandb(config: TrackConfig, run_dir: Path, name: str, recipe: Mapping[str, Any] | None) -> Any:
    mode = config.wandb
    if mode == "disabled":
        return None
    import wandb

    if mode == "auto":
        mode = "online" if wandb_login() else "offline"
    # The id is the run directory's, so that a resumed run goes on in the same W&B run.
    marker = run_dir / "wandb_id"
    with writing(marker):
        identity = marker.read_text().strip() if marker.exists() else uuid.uuid4().hex[:12]
        marker.write_text(identity)
    run = wandb.init(
        project=config.wandb_project,
        entity=config.wandb_entity,
        name=name,
        dir=str(run_dir),
        mode=mode,
        id=identity,
        resume="allow",
        config=dict(recipe or {}),
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def wandb_login() -> bool:
    """Whether a W&B key is at hand: in the environment or in netrc. Opens no network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.exists() and "wandb" in netrc.read_text(errors="ignore")
