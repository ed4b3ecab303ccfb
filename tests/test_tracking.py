"""One writer of metrics."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from record.trajectory import Author, Frames, Modality, Segment, StopReason, Trajectory
from runtime.errors import UserError
from tests.wandb_server import WandbServer, wandb_server
from training.tracking import TrackConfig, Tracker, read_metrics
from training.wandb_mirror import filmstrip, wandb_login


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


def test_text_is_in_the_line_and_told_to_no_listener(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    class Display:
        def on_metrics(self, step: int, metrics: dict[str, Any]) -> None:
            heard.append(dict(metrics))

    tracker = Tracker(tmp_path)
    tracker.listeners.append(Display())
    tracker.log(1, {"kl": 0.5, "kept/sha256": "ab12"})
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "kl": 0.5, "kept/sha256": "ab12"}]
    assert heard == [{"kl": 0.5}]


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
    identities = []
    for steps in ((1, 2, 3), (4, 5, 6)):
        write(tmp_path, steps, TrackConfig(wandb="auto"))
        identities.append((tmp_path / "wandb_id").read_text())
    assert identities[0] == identities[1]
    # The second folder is the whole run, and a sync finds no other.
    assert history(tmp_path) == [(step, step, step / 4) for step in range(1, 7)]
    assert len(list((tmp_path / "wandb").glob("*/*.wandb"))) == 2  # the run's, and latest-run, which is a link to it
    assert len(list((tmp_path / "wandb" / "superseded").glob("*/*.wandb"))) == 1


def write(folder: Path, steps: Any, config: TrackConfig | None = None, name: str = "run") -> None:
    """A run, or what a resumed one does: go on at the first of `steps`. Every even step stores a trajectory."""
    tracker = Tracker(folder, config or TrackConfig(wandb="offline"), name=name)
    tracker.rewind(steps[0])
    for step in steps:
        if step % 2 == 0 and tracker.config.trajectories:
            tracker.trajectories(step, [drawn_trajectory(f"step {step}")])
        tracker.log(step, {"x": step / 4})
    tracker.close()


def finished_records(folder: Path) -> list[Any]:
    """wandb_records, once W&B's own process has written the log's end, which it does after finish() has returned."""
    deadline = time.monotonic() + 60
    while True:
        records = wandb_records(folder)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, "W&B's log has no end"
        time.sleep(0.05)


def history_rows(records: list[Any]) -> list[dict[str, Any]]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def history(folder: Path) -> list[tuple[int, int, float]]:
    """(W&B's step, ours, x) of every line in what a sync of folder/wandb would send."""
    return [(row["_step"], row["step"], row["x"]) for row in history_rows(finished_records(folder))]


def table_steps(records: list[Any]) -> list[int]:
    """The steps of all rows of all increments of the trajectories' table."""
    steps = []
    for record in records:
        if record.WhichOneof("record_type") == "artifact":
            for entry in record.artifact.manifest.contents:
                if entry.path.endswith("table.json"):
                    steps += [row[0] for row in json.loads(Path(entry.local_path).read_text())["data"]]
    return sorted(steps)


def test_the_mirror_of_a_resumed_or_rewound_run_is_metrics_jsonl(tmp_path: Path) -> None:
    for steps in (range(1, 4), range(4, 8), range(3, 5), range(3, 7)):  # goes on; back to 2; back to 2 once more
        write(tmp_path, steps)
        rows = read_metrics(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps[-1] + 1))
        assert history(tmp_path) == [(row["step"], row["step"], row["x"]) for row in rows]
        assert table_steps(finished_records(tmp_path)) == list(range(2, steps[-1] + 1, 2))


KILLED = """
import os, signal, sys, time
from pathlib import Path
from tests.test_tracking import drawn_trajectory
from training.tracking import TrackConfig, Tracker
folder = Path(sys.argv[1])
tracker = Tracker(folder, TrackConfig(wandb="offline"))
tracker.rewind(1)
tracker.trajectories(1, [drawn_trajectory("step 1")])
tracker.log(1, {"x": 0.25})
time.sleep(2.5)  # more than W&B's log waits
tracker.log(2, {"x": 0.5})
tracker.trajectories(3, [drawn_trajectory("step 3")])
print("there", flush=True)
time.sleep(60)
"""


def test_sigkill_loses_the_mirror_a_second_at_most_and_the_next_start_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("WANDB_SERVICE", None)  # W&B's process of this one, which outlives the killed one
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = history_rows(wandb_records(tmp_path))
    assert kept and (kept[0]["_step"], kept[0]["x"]) == (1, 0.25)
    # Step 3 was trained and sampled, but not logged: its trajectories are not sampled again.
    tracker = Tracker(tmp_path, TrackConfig(wandb="offline"))
    tracker.rewind(3, sampled=4)
    tracker.log(3, {"x": 0.75})
    tracker.close()
    assert history(tmp_path) == [(1, 1, 0.25), (2, 2, 0.5), (3, 3, 0.75)]
    assert table_steps(finished_records(tmp_path)) == [1, 3]


def test_trajectories_of_forgotten_steps_are_forgotten_but_for_what_else_lies_there(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9), TrackConfig(wandb="disabled"))
    (tmp_path / "trajectories" / "000006" / "notes.txt").write_text("mine")
    tracker = Tracker(tmp_path)
    tracker.rewind(4, sampled=5)
    tracker.close()
    assert sorted(path.name for path in (tmp_path / "trajectories").iterdir()) == ["000002", "000004", "000006"]
    assert (tmp_path / "trajectories" / "000006" / "notes.txt").read_text() == "mine"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    import wandb

    with wandb_server() as server:
        wandb.teardown()  # it reads the environment once
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        yield server
        wandb.teardown()


def lines_of(server: WandbServer, folder: Path) -> list[tuple[int, int, float]]:
    lines = server.runs[(folder / "wandb_id").read_text()]
    return [(line["_step"], line["step"], line["x"]) for line in lines]


def sync(folder: Path) -> None:
    finished_records(folder)
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--yes", str(folder / "wandb")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Finished syncing" in done.stderr, done.stderr


def test_a_sync_brings_every_step_once_whatever_was_synced_before(tmp_path: Path, server: WandbServer) -> None:
    config = TrackConfig(wandb="offline", trajectories=0)  # the server takes no artifacts
    write(tmp_path, range(1, 4), config)
    write(tmp_path, range(4, 7), config)
    sync(tmp_path)
    assert lines_of(server, tmp_path) == [(step, step, step / 4) for step in range(1, 7)]
    assert len(server.runs) == 1
    # Back to step 2, when W&B has six steps already.
    first = (tmp_path / "wandb_id").read_text()
    write(tmp_path, range(3, 5), config)
    sync(tmp_path)
    assert lines_of(server, tmp_path) == [(step, step, step / 4) for step in range(1, 5)]
    assert len(server.runs) == 2 and len(server.runs[first]) == 6
    assert server.notes[(tmp_path / "wandb_id").read_text()] == f"goes on after step 2 of W&B run {first}"


def test_online_a_resumed_run_appends_and_a_rewound_one_is_another(
    tmp_path: Path, server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackConfig(wandb="online", trajectories=0)
    write(tmp_path, range(1, 4), config)
    write(tmp_path, range(4, 6), config)
    assert lines_of(server, tmp_path) == [(step, step, step / 4) for step in range(1, 6)]
    first = (tmp_path / "wandb_id").read_text()
    assert list(server.runs) == [first] and "cannot be taken back" not in caplog.text
    write(tmp_path, range(3, 5), config)
    assert lines_of(server, tmp_path) == [(step, step, step / 4) for step in range(1, 5)]
    assert len(server.runs[first]) == 5
    assert f"W&B run {first} has steps after 2, which cannot be taken back there" in caplog.text


def test_online_what_was_written_offline_is_sent_first(tmp_path: Path, server: WandbServer) -> None:
    write(tmp_path, range(1, 4), TrackConfig(wandb="offline", trajectories=0))
    write(tmp_path, range(4, 6), TrackConfig(wandb="online", trajectories=0))
    assert lines_of(server, tmp_path) == [(step, step, step / 4) for step in range(1, 6)]
    assert not list((tmp_path / "wandb").glob("offline-run-*"))  # a sync of it would put step 1 there once more


def test_wandb_that_cannot_be_used_is_one_sentence(tmp_path: Path, server: WandbServer) -> None:
    server.query = lambda name, variables: {"errors": [{"message": "permission denied"}]}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="track.wandb: W&B cannot be used .*set track.wandb=offline and sync later"):
        write(tmp_path, [1], TrackConfig(wandb="online", trajectories=0))


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
    drawn.parent = (2, 2)
    for step in (1, 2):
        tracker.trajectories(step, [drawn])
        tracker.log(step, {"reward/mean": step / 4, "kl": math.nan})
    tracker.close()

    records = finished_records(tmp_path)
    history = history_rows(records)
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
        assert row["continues"] == "continues member 2 after segment 1"
        image = Image.open(files[row["images"]["path"]]).convert("RGB")
        shown = [drawn.segments[0].image, *drawn.segments[1].frames.frames_F]
        assert np.array_equal(np.asarray(image), filmstrip([*shown, *drawn.images()]))
        assert row["images"]["caption"] == "prompt, prompt, prompt, sketch, redraw"


def test_a_filmstrip_shows_every_image_in_order() -> None:
    red, blue = np.full((2, 3, 3), (255, 0, 0), np.uint8), np.full((4, 1, 3), (0, 0, 255), np.uint8)
    strip = filmstrip([red, blue])  # 128 / 4 = 32 times as large
    assert strip.shape == (128, 3 * 32 + 4 + 32, 3)
    assert (strip[:64, :96] == (255, 0, 0)).all() and (strip[64:, :96] == 255).all()
    assert (strip[:, 96:100] == 255).all() and (strip[:, 100:] == (0, 0, 255)).all()
    tall = np.zeros((200, 5, 3), np.uint8)
    assert filmstrip([tall]).shape == (200, 5, 3)


def drawn_trajectory(prompt: str) -> Trajectory:
    """A prompt with an image and frames, and a thought of words and two images, judged."""
    shown = np.full((8, 4, 3), 90, np.uint8)
    frames = Frames(np.full((2, 4, 4, 3), 60, np.uint8), np.arange(2, dtype=np.float32))
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:5, 2:5] = (255, 0, 0)
    segments = [
        Segment("prompt", Author.USER, Modality.IMAGE, False, image=shown),
        Segment("prompt", Author.USER, Modality.VIDEO_FRAMES, False, frames=frames),
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
    with pytest.raises(
        UserError, match=r"file/run/metrics.jsonl: cannot be written \(Not a directory\); choose another run_dir$"
    ):
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
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Is a directory\); mend that and resume$"):
        tracker.rewind(2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    tracker.close()
