"""One writer of metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rollout.errors import UserError
from underdrawing.tracking import TrackConfig, Tracker, read_metrics, wandb_login


def test_metrics_are_lines_of_json_and_no_number_is_null(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(0, {"reward/mean": 0.25, "kl": math.nan, "groups/trained": 3})
    tracker.log(1, {"reward/mean": 0.5, "kl": None})
    tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 0, "reward/mean": 0.25, "kl": None, "groups/trained": 3},
                    {"step": 1, "reward/mean": 0.5, "kl": None}]


def test_rewind_forgets_the_steps_that_a_resumed_run_writes_again(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in range(5):
        tracker.log(step, {"x": step})
    tracker.rewind(3)
    tracker.log(3, {"x": 30})
    tracker.close()
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [(0, 0), (1, 1), (2, 2),
                                                                                            (3, 30)]


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
    (tmp_path / "metrics.jsonl.tmp").mkdir()  # what it would write first
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Is a directory\); free some space and"):
        tracker.rewind(2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    tracker.close()
