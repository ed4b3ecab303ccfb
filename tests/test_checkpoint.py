"""training/checkpoint.py and rl/prompts.py: whole or not at all, and errors that name the file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rl.prompts import PromptCursor
from runtime.errors import UserError
from training import checkpoint
from training.checkpoint import CheckpointError

TRAINER = {"optimizer": {"state": {0: {"exp_avg": torch.arange(5.0)}}, "param_groups": [{"lr": 0.5}]}, "version": 3}
CURSOR = {"taken": 32, "seed": 0, "identity": "abc"}


def write_weights(folder):
    (folder / "weights" / "model.bin").write_bytes(b"\x01" * 5000)


def save(root, step, **kwargs):
    options = dict(write=write_weights, trainer=TRAINER, cursor=CURSOR, recipe={"name": "run"})
    return checkpoint.save(root, step, **{**options, **kwargs})


def test_what_was_saved_comes_back(tmp_path):
    folder = save(tmp_path, 4)
    loaded = checkpoint.load(folder)
    assert (loaded.step, loaded.cursor, loaded.recipe) == (4, CURSOR, {"name": "run"})
    assert loaded.trainer["version"] == 3
    assert torch.equal(loaded.trainer["optimizer"]["state"][0]["exp_avg"], torch.arange(5.0))
    assert (loaded.weights / "model.bin").read_bytes() == b"\x01" * 5000


def test_keeps_the_newest_and_finds_the_latest(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None and checkpoint.latest(tmp_path) is None
    for step in (9, 10, 11, 100):
        save(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [11, 100]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000100"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000011", "step-000100"]


def test_a_step_that_was_saved_before_is_replaced(tmp_path):
    save(tmp_path, 5)
    folder = save(tmp_path, 5, cursor={"taken": 1})
    assert checkpoint.load(folder).cursor == {"taken": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


@pytest.mark.parametrize("name", ["state.json", "trainer.pt", "weights/model.bin"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_file_is_named_and_the_one_before_offered(tmp_path, name, damage):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    path = folder / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(b"\xff" + content[1:])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name.rsplit("/", 1)[-1]) as raised:
        checkpoint.load(folder)
    assert raised.value.exit_code == 2
    if not (name == "state.json" and damage == "remove"):
        assert "step-000001" in str(raised.value)


def test_going_back_forgets_what_came_after(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    checkpoint.rewind(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [1]


def test_keys_and_formats_are_checked(tmp_path):
    folder = save(tmp_path, 2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="written in format 99"):
        checkpoint.load(folder)
    (folder / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k != "cursor"}))
    with pytest.raises(CheckpointError, match="no key 'cursor'"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "alter, words",
    [
        ({"files": None}, "'files' is no dict"),
        ({"files": [1]}, "'files' is no dict"),
        ({"files": {"trainer.pt": 3}}, "no size and checksum of 'trainer.pt'"),
        ({"files": {"trainer.pt": {"bytes": 3}}}, "no size and checksum of 'trainer.pt'"),
        ({"files": {"trainer.pt": {"bytes": "3", "crc32": 1}}}, "no size and checksum of 'trainer.pt'"),
        ({"cursor": 3}, "'cursor' is no dict"),
        ({"step": "2"}, "'step' is no int"),
    ],
)
def test_a_malformed_state_is_named(tmp_path, alter, words):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    state = {**json.loads((folder / "state.json").read_text()), **alter}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="state.json: its checksum is not the one written.*step-000001"):
        checkpoint.verify(folder)
    del state["crc32"]  # as they were written before
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=f"state.json: .*{words}.*step-000001"):
        checkpoint.verify(folder)


@pytest.mark.parametrize(
    "old, new",
    [
        ('"taken": 32', '"taken": 33'),
        ('"name": "run"', '"name": "ruin"'),
        ('"step": 2', '"step": 3'),
        ('\n "crc32"', '\n "crc31"'),
    ],
)
def test_no_altered_state_goes_unnoticed(tmp_path, old, new):
    folder = save(tmp_path, 2)
    text = (folder / "state.json").read_text()
    assert text.count(old) == 1
    (folder / "state.json").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match="state.json: (its checksum is not the one written|unknown key 'crc31')"):
        checkpoint.load(folder)


def test_a_state_without_a_checksum_of_its_own_is_read(tmp_path):
    folder = save(tmp_path, 2, recipe={"name": "run", "weights": {1: 0.1, "a": float("nan")}})
    checkpoint.load(folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(dict(reversed(state.items()))))  # laid out otherwise
    checkpoint.load(folder)
    del state["crc32"]
    (folder / "state.json").write_text(json.dumps(state))
    assert checkpoint.load(folder).cursor == CURSOR


@pytest.mark.parametrize("limit", [100, 6000])  # within the weights, and within trainer.pt
def test_a_full_disk_leaves_what_was_there(tmp_path, limit):
    """A limit on the size of a file makes the kernel refuse the write, as a full disk does."""
    save(tmp_path, 1)
    big = {**TRAINER, "more": torch.zeros(10_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="step 2 cannot be written.*MiB are free.*step-000001"):
            save(tmp_path, 2, trainer=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    checkpoint.load(tmp_path / "step-000001")
    save(tmp_path, 2, trainer=big)  # and once there is room, all is well


@pytest.mark.parametrize(
    "error, raised", [(UserError("weights: disk full"), CheckpointError), (KeyError("a bug"), KeyError)]
)
def test_whatever_breaks_off_a_save_leaves_nothing_half_written(tmp_path, error, raised):
    save(tmp_path, 1)

    def breaks(folder):
        write_weights(folder)
        raise error

    with pytest.raises(raised, match="disk full|a bug"):
        save(tmp_path, 2, write=breaks)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoints: the checkpoint of step 1 cannot be written"):
        save(tmp_path / "checkpoints", 1)


WRITER = """
import sys
from pathlib import Path
import torch
from tests.test_checkpoint import save
for step in range(1, 100_000):
    save(Path(sys.argv[1]), step, trainer={"a": torch.zeros(50_000)})
"""


def test_killed_at_any_moment_a_folder_with_a_finished_name_is_whole(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    for delay in (0.0, 0.007, 0.05):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environment)
        while checkpoint.latest(tmp_path) is None:
            assert writer.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        writer.kill()
        writer.wait()
        finished = checkpoint.steps(tmp_path)
        assert finished
        for step in finished:
            assert checkpoint.load(tmp_path / f"step-{step:06d}").step == step
        for step in finished:
            shutil.rmtree(tmp_path / f"step-{step:06d}")
    save(tmp_path, 10_000)
    assert not list(tmp_path.glob(".step-*"))  # what the killed ones left is swept


@pytest.mark.parametrize("delete", [lambda root: save(root, 3, keep=2), lambda root: checkpoint.rewind(root, 2)])
def test_killed_while_it_deletes_a_checkpoint_the_rest_is_no_checkpoint(tmp_path, monkeypatch, delete):
    for step in (1, 2):
        save(tmp_path, step)
    if "rewind" in delete.__code__.co_names:
        save(tmp_path, 3, keep=3)
    remove = shutil.rmtree

    def dies(folder, ignore_errors=False):
        if (Path(folder) / "state.json").is_file():
            (Path(folder) / "state.json").unlink()
            raise KeyboardInterrupt
        remove(folder, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        delete(tmp_path)
    monkeypatch.undo()
    assert len(finished := checkpoint.steps(tmp_path)) == 2
    for step in finished:
        assert checkpoint.load(tmp_path / f"step-{step:06d}").step == step
    save(tmp_path, 4)
    assert not list(tmp_path.glob(".step-*"))


RECORDS = [{"prompt": f"prompt {number}"} for number in range(7)]


def test_cursor_draws_every_prompt_once_an_epoch_and_resumes():
    whole = PromptCursor(RECORDS, seed=1)
    drawn = whole.take(21)
    assert [group for group, _ in drawn] == list(range(21))
    prompts = [record["prompt"] for _, record in drawn]
    assert len(set(prompts[:7])) == 7 and len(set(prompts[7:14])) == 7 and prompts[:7] != prompts[7:14]
    assert prompts != [record["prompt"] for _, record in PromptCursor(RECORDS, seed=2).take(21)]

    first, second = PromptCursor(RECORDS, seed=1), PromptCursor(RECORDS, seed=1)
    head = first.take(10)
    second.load(json.loads(json.dumps(first.state())))
    assert head + second.take(11) == drawn


def test_cursor_refuses_another_data_set_or_seed():
    state = PromptCursor(RECORDS, seed=1).state()
    with pytest.raises(UserError, match="training prompts are not these"):
        PromptCursor(RECORDS[::-1], seed=1).load(state)
    with pytest.raises(UserError, match="has seed 1, not 2"):
        PromptCursor(RECORDS, seed=2).load(state)
    with pytest.raises(UserError, match="no training prompts"):
        PromptCursor([], seed=0)
