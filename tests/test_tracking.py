"""One writer of metrics."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from record.trajectory import Author, Modality, Segment, StopReason, Trajectory
from runtime.errors import UserError
from training.tracking import TrackConfig, Tracker, filmstrip, read_metrics, wandb_login


def test_metrics_are_lines_of_json_and_no_number_is_null(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(0, {"reward/mean": 0.25, "kl": math.nan, "groups/trained": 3})
    tracker.log(1, {"reward/mean": 0.5, "kl": None})
    tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 0, "reward/mean": 0.25, "kl": None, "groups/trained": 3},
        {"step": 1, "reward/mean": 0.5, "kl": None},
    ]


def test_rewind_forgets_the_steps_that_a_resumed_run_writes_again(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in range(5):
        tracker.log(step, {"x": step})
    tracker.rewind(3)
    tracker.log(3, {"x": 30})
    tracker.close()
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
    ]


def test_a_half_written_last_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": 1}\n{"step": 1, "x"')
    assert [row["step"] for row in read_metrics(path)] == [0]
    tracker = Tracker(tmp_path)
    tracker.log(1, {"x": 2})
    tracker.close()
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_wandb_offline_mirrors_and_resumes_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert not wandb_login()
    for first in (True, False):
        tracker = Tracker(tmp_path, TrackConfig(wandb="auto"), name="test", recipe={"seed": 0})
        tracker.log(0 if first else 1, {"reward/mean": 0.5})
        identity = (tmp_path / "wandb_id").read_text()
        tracker.close()
    assert (tmp_path / "wandb_id").read_text() == identity
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 1


def wandb_records(run_dir: Path) -> list[Any]:
    """Every record that W&B keeps of offline runs, read from its own log: 7 bytes of file header, then chunks (crc,
    length, type) in blocks of 32 KiB, as LevelDB's."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        raw, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if 2**15 - at % 2**15 < 7:
                at += 2**15 - at % 2**15
                continue
            length, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
            if at + 7 + length > len(raw):  # still being written
                break
            whole += raw[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, last
                record = Record()
                record.ParseFromString(whole)
                records.append(record)
                whole = b""
    return records


def test_wandb_mirrors_every_step_on_its_own_axis_and_a_table_with_images(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackConfig(wandb="offline", trajectories=3), name="mirrored", recipe={"seed": 7})
    drawn = drawn_trajectory("a red circle")
    for step in (1, 2):
        tracker.log(step, {"reward/mean": step / 4, "kl": math.nan})
        tracker.trajectories(step, [drawn])
    tracker.close()

    deadline = time.monotonic() + 60
    while True:  # W&B's own process writes the log's end after finish() has returned
        records = wandb_records(tmp_path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        assert time.monotonic() < deadline, "W&B's log has no end"
        time.sleep(0.05)
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    metrics = [row for row in history if "reward/mean" in row]
    assert [(row["step"], row["reward/mean"]) for row in metrics] == [(1, 0.25), (2, 0.5)]
    assert not any("kl" in row for row in history)  # no number
    axes = {
        (r.metric.name or r.metric.glob_name): r.metric.step_metric
        for r in records
        if r.WhichOneof("record_type") == "metric"
    }
    assert axes["*"] == "step"
    config = {
        item.key: json.loads(item.value_json)
        for r in records
        if r.WhichOneof("record_type") == "run"
        for item in r.run.config.update
    }
    assert config["seed"] == 7

    # A table travels as an artifact: its rows, and the images that they name.
    artifacts = [
        {entry.path: Path(entry.local_path) for entry in r.artifact.manifest.contents}
        for r in records
        if r.WhichOneof("record_type") == "artifact"
    ]
    assert len(artifacts) == 2
    for step, files in enumerate(artifacts, 1):
        table = json.loads(next(file for name, file in files.items() if name.endswith(".table.json")).read_text())
        row = dict(zip(table["columns"], *table["data"], strict=True))
        assert row["step"] == step and row["prompt"] == "a red circle" and row["reward"] == 0.5
        assert row["thought"].startswith("[plan] draw it\n[sketch]")
        assert json.loads(row["parts"]) == {"detect": 1.0} and row["stop"] == "end"
        image = Image.open(files[row["images"]["path"]]).convert("RGB")
        assert np.array_equal(np.asarray(image), filmstrip(drawn.images()))
        assert row["images"]["caption"] == "sketch, redraw"


def test_a_filmstrip_shows_every_image_in_order() -> None:
    red, blue = np.full((2, 3, 3), (255, 0, 0), np.uint8), np.full((4, 1, 3), (0, 0, 255), np.uint8)
    strip = filmstrip([red, blue])  # 128 / 4 = 32 times as large
    assert strip.shape == (128, 3 * 32 + 4 + 32, 3)
    assert (strip[:64, :96] == (255, 0, 0)).all() and (strip[64:, :96] == 255).all()
    assert (strip[:, 96:100] == 255).all() and (strip[:, 100:] == (0, 0, 255)).all()
    tall = np.zeros((200, 5, 3), np.uint8)
    assert filmstrip([tall]).shape == (200, 5, 3)


def drawn_trajectory(prompt: str) -> Trajectory:
    """A thought of words and one image, judged."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:5, 2:5] = (255, 0, 0)
    segments = [
        Segment("prompt", Author.USER, Modality.TEXT, False, np.array([1, 2], np.int32), prompt),
        Segment("plan", Author.POLICY, Modality.TEXT, True, np.array([3, 4], np.int32), "draw it"),
        Segment("sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, np.arange(6, dtype=np.int32), image=image),
        Segment(
            "redraw",
            Author.POLICY,
            Modality.IMAGE_TOKENS,
            True,
            np.arange(6, dtype=np.int32),
            image=image[::-1].copy(),
        ),
    ]
    trajectory = Trajectory(prompt, {}, "strokes", segments, 0)
    trajectory.reward, trajectory.rewards, trajectory.stop = 0.5, {"detect": 1.0}, StopReason.END
    return trajectory


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/metrics.jsonl: cannot be written \(Not a directory\)"):
        Tracker(tmp_path / "file" / "run")


def test_a_full_disk_is_one_sentence_even_while_closing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker._file = open("/dev/full", "a")  # every write to it finds no space
    with pytest.raises(UserError, match="cannot be written .No space left on device.; free some space and resume"):
        tracker.log(1, {"a": 1.0})
    tracker.close()


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe{\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl line 2: not JSON"):
        read_metrics(path)


def test_a_rewind_that_cannot_be_written_leaves_the_file(tmp_path):
    tracker = Tracker(tmp_path)
    for step in (1, 2):
        tracker.log(step, {"a": 1.0})
    (tmp_path / ".metrics.jsonl.part").mkdir()  # what it would write first
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Is a directory\); free some space and"):
        tracker.rewind(2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    tracker.close()
