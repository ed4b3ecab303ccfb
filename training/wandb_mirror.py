"""The W&B mirror of a run: every line of metrics.jsonl and every stored trajectory, each once.

W&B's own step is the run's step, and one line is one step, so a mirror can be compared with metrics.jsonl and built
again from it.

Offline, W&B cannot resume: each start makes a new folder, and of two folders that bear one id a sync keeps the last, or
mixes both. So the first thing a resumed run does is to write all its lines so far into its new folder, and the earlier
folders go to wandb/superseded/, where `wandb sync RUN_DIR/wandb` does not look. One sync of what lies in wandb/ then
brings the whole run, whatever was killed or rewound before. Where W&B has the run already (a folder was synced,
or it was online), the whole run goes there as another one.

Online, a run is resumed under its id, and lines that the server lacks (written offline, or lost in a crash) are sent
first. What the server has cannot be taken back: a run that goes on from before the last step that the server has (an
earlier checkpoint; a crash some steps after the last one) becomes another W&B run, which begins with all its lines so
far. W&B's own rewind is not used, since servers offer it on request only.

A run that becomes another W&B run names the one before in its notes. That one stays as it was.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from record.trajectory import Author, Segment, Trajectory
from runtime.errors import UserError, writing
from runtime.files import write_whole

logger = logging.getLogger(__name__)
STRIP_HEIGHT, STRIP_GAP = 128, 4  # px
SHOWN_FRAMES = 4  # of a video
SUPERSEDED = "superseded"
# Seconds after which a line is in W&B's offline log; W&B's own 15 are lost when the process is killed.
FLUSH_S = 1.0

Samples = Iterable[tuple[int, Sequence[Trajectory]]]  # step, trajectories


class WandbMirror:
    """One W&B run. Rank 0 alone holds one, and tells it what metrics.jsonl holds before it tells it more.

    Args:
        run_dir: W&B's files go to run_dir/wandb, its run's id to run_dir/wandb_id.
        recipe: stored as the W&B run's config.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        name: str,
        recipe: Mapping[str, Any],
    ) -> None:
        self.run_dir, self.mode, self.name = run_dir, mode, name
        self._common: dict[str, Any] = {"project": project, "entity": entity, "config": dict(recipe)}
        self._run: Any = None
        self._table: Any = None

    @property
    def started(self) -> bool:
        return self._run is not None

    def start(self, rows: Sequence[Mapping[str, Any]], samples: Samples) -> None:
        """Begin or resume the W&B run, and bring it to where metrics.jsonl is.

        Args:
            rows: the lines of metrics.jsonl, steps ascending.
            samples: the stored trajectories of those steps.

        Raises:
            UserError: W&B refuses the login, or cannot be reached.
        """
        last = rows[-1]["step"] if rows else -1
        identity, earlier = self._identity(), ""
        with writing(self.run_dir / "wandb"):
            known = self._set_aside(identity)
        if self.mode == "offline" and known:
            earlier, identity = identity, self._new_identity()
        self._run = self._begin(identity, earlier, last)
        if self._run.starting_step > last + 1:
            self._run.finish()
            earlier, identity = identity, self._new_identity()
            logger.warning(
                "W&B run %s has steps after %d, which cannot be taken back there: this run goes on as W&B run %s, with "
                "all its lines so far",
                earlier,
                last,
                identity,
            )
            self._run = self._begin(identity, earlier, last)
        missing = [row for row in rows if row["step"] >= self._run.starting_step]
        for step, sample in samples if missing else ():
            if missing[0]["step"] <= step <= last:
                self._add(step, sample)
        for row in missing:
            self._send(row, with_table=self._table is not None and row is missing[-1])

    def log(self, row: Mapping[str, Any], sample: Sequence[Trajectory] = ()) -> None:
        """Mirror one line, with the trajectories that its step stored."""
        if sample:
            self._add(row["step"], sample)
        self._send(row, with_table=bool(sample))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = self._table = None

    def _identity(self) -> str:
        marker = self.run_dir / "wandb_id"
        return marker.read_text().strip() if marker.exists() else self._new_identity()

    def _new_identity(self) -> str:
        identity, marker = uuid.uuid4().hex[:12], self.run_dir / "wandb_id"
        with writing(marker):
            write_whole(marker, identity)
        return identity

    def _begin(self, identity: str, earlier: str, last: int) -> Any:
        if self.mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or W&B reports its own use over the network
        import wandb

        try:
            run = wandb.init(
                **self._common,
                name=self.name,
                notes=f"goes on after step {last} of W&B run {earlier}" if earlier else None,
                dir=str(self.run_dir),
                mode=self.mode,
                id=identity,
                # Offline nobody can tell what the server has, and W&B warns of it.
                resume="allow" if self.mode == "online" else None,
                settings=wandb.Settings(console="off", silent=True, x_transaction_log_flush_interval=FLUSH_S),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"track.wandb: W&B cannot be used ({str(error).strip()}); log in, or set track.wandb=offline and "
                f"sync later with `wandb sync {self.run_dir / 'wandb'}`"
            ) from error
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _set_aside(self, identity: str) -> bool:
        """Move earlier offline folders of the run out of a sync's way. Returns whether W&B may know the run: it was
        online, or one of them was synced."""
        folder = self.run_dir / "wandb"
        known = any(folder.glob(f"run-*-{identity}"))
        for earlier in sorted(folder.glob(f"offline-run-*-{identity}")):
            known |= any(earlier.glob("*.wandb.synced"))
            to = folder / SUPERSEDED / earlier.name
            to.parent.mkdir(exist_ok=True)
            number = 1
            while to.exists():  # two starts within a second
                number += 1
                to = to.with_name(f"{earlier.name}-{number}")
            os.rename(earlier, to)
        return known

    def _send(self, row: Mapping[str, Any], with_table: bool) -> None:
        data = {name: value for name, value in row.items() if value is not None}
        if with_table:
            data["trajectories"] = self._table
        self._run.log(data, step=row["step"], commit=True)

    def _add(self, step: int, sample: Sequence[Trajectory]) -> None:
        """Add rows to the table. It is one table that grows: tables of one key replace each other (trl#2045)."""
        import wandb

        if self._table is None:
            columns: list[str | int] = ["step", "prompt", "thought", "images", "reward", "parts", "stop", "continues"]
            self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL")
        for t in sample:
            # One image a cell, which every view of W&B shows.
            shown = [(segment.role, picture) for segment in t.segments for picture in pictures_of(segment)]
            images = (
                wandb.Image(filmstrip([image for _, image in shown]), caption=", ".join(role for role, _ in shown))
                if shown
                else None
            )
            written = [segment for segment in t.segments if segment.author is not Author.USER]
            trajectory = "\n".join(f"[{s.role}] {s.text}" for s in written)
            values = (t.prompt, trajectory, images, t.reward, json.dumps(t.rewards), str(t.stop), t.continues)
            self._table.add_data(step, *values)


def pictures_of(segment: Segment) -> list[np.ndarray]:
    """What a segment shows: its image, or a few of its frames at equal distances. Empty where it is words."""
    if segment.image is not None:
        return [segment.image]
    if segment.frames is None:
        return []
    frames_F = segment.frames.frames_F
    count = min(len(frames_F), SHOWN_FRAMES)
    return [frames_F[len(frames_F) * n // count] for n in range(count)]


def filmstrip(images: Sequence[np.ndarray], height: int = STRIP_HEIGHT) -> np.ndarray:
    """uint8 [height, width, 3]: images side by side in their order, enlarged by a whole factor up to `height` px."""
    tall = max(image.shape[0] for image in images)
    times = max(1, height // tall)
    frames = [
        np.pad(
            image.repeat(times, 0).repeat(times, 1),
            ((0, (tall - image.shape[0]) * times), (0, STRIP_GAP), (0, 0)),
            constant_values=255,
        )
        for image in images
    ]
    return np.concatenate(frames, 1)[:, :-STRIP_GAP]


def wandb_login() -> bool:
    """Whether a W&B key is at hand: in the environment or in netrc. Opens no network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.exists() and "wandb" in netrc.read_text(errors="ignore")
