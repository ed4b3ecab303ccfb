"""`--resume`: from the newest checkpoint, from a step, from a folder; and the way back from a corrupt one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.test_cli import QUICKSTART, SMALL, refused
from training import checkpoint
from training.tracking import read_metrics
from underdrawing import quickstart
from underdrawing.cli import _parser, main
from underdrawing.options import NEWEST, join_resume

GRPO = ["grpo.prompts_per_step=1", "grpo.num_generations=2", "rollout.max_tokens=60", "grpo.warmup_steps=0"]
GRPO += ["grpo.save_every=1", "grpo.keep_checkpoints=9", "grpo.steps=4", "grpo.evaluate_every=null"]
SFT = ["sft.max_steps=6", "sft.save_steps=2", "sft.logging_steps=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A warm start of six steps and a run of four, each with its checkpoints."""
    run = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *SMALL, *SFT, f"run_dir={run}"]) == 0
    assert main(["grpo", QUICKSTART, *SMALL, *GRPO, f"run_dir={run}"]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def grpo(run: Path, *more: str) -> list[str]:
    return ["grpo", QUICKSTART, *SMALL, *GRPO, f"run_dir={run}", *more]


def sft(run: Path, *more: str) -> list[str]:
    return ["sft", QUICKSTART, *SMALL, *SFT, f"run_dir={run}", *more]


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def steps(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl")]


def rewards(run: Path) -> list[float]:
    return [row["rollout/tokens"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("how", ["step", "folder", "folder with a slash"])
def test_a_run_goes_on_from_the_step_that_is_named(run, finished, how):
    where = {
        "step": "2",
        "folder": str(run / "checkpoints/step-000002"),
        "folder with a slash": f"{run}/checkpoints/step-000002/",
    }
    assert main(grpo(run, "--resume", where[how], "grpo.steps=3")) == 0
    assert checkpoint.steps(run / "checkpoints") == [1, 2, 3], "later checkpoints are forgotten"
    assert steps(run) == [1, 2, 3], "and lines of metrics"
    # It does again what it did: the same prompts, noise and weights.
    assert rewards(run) == rewards(finished)[:3]
    ours, theirs = (load_file(f / "checkpoints/step-000003/weights/model.safetensors") for f in (run, finished))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_resume_alone_takes_the_newest(run):
    assert main(grpo(run, "--resume", "grpo.steps=5")) == 0
    assert checkpoint.steps(run / "checkpoints") == [1, 2, 3, 4, 5] and steps(run) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "where, words",
    [
        ("7", "checkpoints: no checkpoint of step 7; there are: 1, 2, 3, 4"),
        ("9" * 30, "no finished checkpoint; name a step (1, 2, 3, 4)"),
        ("nowhere", "nowhere: no finished checkpoint; name a step (1, 2, 3, 4) or a folder, such as "),
        ("{run}/checkpoints", "checkpoints: no finished checkpoint"),
        ("{other}/checkpoints/step-000002", "belongs to another run, and"),
    ],
)
def test_what_is_no_checkpoint_is_a_sentence_and_nothing_is_lost(capsys, run, finished, where, words):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "recipe.yaml"}
    said = refused(capsys, *grpo(run, "--resume", where.format(run=run, other=finished)))
    assert words in said
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != "recipe.yaml"}


def test_a_run_from_given_weights_asks_for_them_again(capsys, finished, tmp_path):
    own, weights = tmp_path / "own", ["--weights", str(finished / "sft/model")]
    assert main(grpo(own, *weights, "grpo.steps=1")) == 0
    again = ["grpo", str(own / "recipe.yaml"), "grpo.steps=2", "--resume", "1"]
    said = refused(capsys, *again)
    assert said.rstrip().endswith(f"policy.path is not set; give them again: --weights {finished}/sft/model")
    assert steps(own) == [1] and main([*again, *weights]) == 0 and steps(own) == [1, 2]
    shutil.copy(own / "recipe.yaml", own / "checkpoints/step-000002/trainer.pt")  # no trainer's state
    assert "give them again: --weights and the folder" in refused(capsys, *again)


def test_a_checkpoint_of_another_run_begins_a_new_one(finished, tmp_path):
    folder = finished / "checkpoints/step-000002"
    weights = ["--weights", str(finished / "sft/model"), "grpo.steps=3"]
    assert main(grpo(tmp_path / "fork", "--resume", str(folder), *weights)) == 0
    assert steps(tmp_path / "fork") == [3] and rewards(tmp_path / "fork") == rewards(finished)[2:3]
    assert checkpoint.steps(finished / "checkpoints") == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["trainer.pt", "state.json", "weights/model.safetensors", "gone"])
def test_a_corrupt_checkpoint_says_the_command_that_takes_the_one_before(capsys, run, name):
    newest = run / "checkpoints/step-000004"
    if name == "gone":
        (newest / "state.json").unlink()
    else:
        spoil(newest / name)
    said = refused(capsys, *grpo(run, "--resume", "grpo.steps=4"))
    assert f"The one before is {run / 'checkpoints/step-000003'}" in said
    command = re.search(r"To go on from that, and forget what came after it: (underdrawing .*)$", said, re.M)
    assert command is not None and command[1].endswith(" --resume 3")
    assert main(shlex.split(command[1])[1:]) == 0, "the command is one that works"
    assert checkpoint.verify(newest)["step"] == 4 and steps(run) == [1, 2, 3, 4]


def test_the_sentence_of_damaged_weights_names_those_before(capsys, run):
    spoil(run / "checkpoints/step-000004/weights/model.safetensors")
    said = refused(capsys, "evaluate", QUICKSTART, *SMALL, f"run_dir={run}", "rollout.max_tokens=60")
    before = run / "checkpoints/step-000003/weights"
    assert f"To take its weights: --weights {before}" in said
    arguments = ["evaluate", QUICKSTART, *SMALL, f"run_dir={run}", "rollout.max_tokens=60", "--weights", str(before)]
    assert main(arguments) == 0


def test_where_there_is_none_before_that_is_said(capsys, run):
    for step in (1, 2, 3):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    spoil(run / "checkpoints/step-000004/trainer.pt")
    said = refused(capsys, *grpo(run, "--resume"))
    assert f"There is none before it; remove {run / 'checkpoints/step-000004'} to start anew" in said


def warm_steps(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "sft/metrics.jsonl")]


@pytest.mark.parametrize("how", ["step", "folder"])
def test_a_warm_start_goes_on_from_the_step_that_is_named(run, finished, how):
    where = {"step": "4", "folder": str(run / "sft/checkpoint-4")}
    assert main(sft(run, "--resume", where[how], "sft.max_steps=5")) == 0
    assert warm_steps(run) == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in (run / "sft").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    losses = [[row["sft/loss"] for row in read_metrics(r / "sft/metrics.jsonl")] for r in (run, finished)]
    assert losses[0][:4] == losses[1][:4]
    assert json.loads((run / "sft/done.json").read_text())["steps"] == 5


def test_a_corrupt_warm_start_says_the_command_too(capsys, run, finished):
    spoil(run / "sft/checkpoint-6/optimizer.pt")
    said = refused(capsys, *sft(run, "--resume"))
    assert f"The one before is {run / 'sft/checkpoint-4'}" in said
    command = re.search(r"forget what came after it: (underdrawing .*)$", said, re.M)
    assert command is not None and command[1].endswith(" --resume 4")
    assert main(shlex.split(command[1])[1:]) == 0
    assert warm_steps(run) == [1, 2, 3, 4, 5, 6]
    ours, theirs = (load_file(r / "sft/model/model.safetensors") for r in (run, finished))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "where, words", [("3", "no checkpoint of step 3; there are: 4, 6"), ("nowhere", "nowhere: no finished")]
)
def test_a_warm_start_of_no_such_step(capsys, run, where, words):
    assert words in refused(capsys, *sft(run, "--resume", where))
    assert (run / "sft/checkpoint-6/whole.json").is_file()


def test_the_quickstart_says_what_to_remove(capsys, finished, tmp_path, monkeypatch):
    def fails(*_):
        raise checkpoint.CheckpointError("x: corrupt", tmp_path / "step-000004", tmp_path / "step-000003")

    monkeypatch.setattr(quickstart, "run", fails)
    assert quickstart.main([]) == 2
    assert f"Remove {tmp_path / 'step-000004'} and give the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, resume, recipe, overrides",
    [
        (["r.yaml"], None, "r.yaml", []),
        (["r.yaml", "--resume"], NEWEST, "r.yaml", []),
        (["--resume", "r.yaml"], NEWEST, "r.yaml", []),
        (["r.yaml", "--resume", "a.b=1"], NEWEST, "r.yaml", ["a.b=1"]),
        (["r.yaml", "a.b=1", "--resume", "--weights", "w"], NEWEST, "r.yaml", ["a.b=1"]),
        (["r.yaml", "--resume", "40"], "40", "r.yaml", []),
        (["--resume", "40", "r.yaml", "a.b=1"], "40", "r.yaml", ["a.b=1"]),
        (["r.yaml", "--resume=40", "a.b=1"], "40", "r.yaml", ["a.b=1"]),
        (["r.yaml", "--resume", "x/step-000040"], "x/step-000040", "r.yaml", []),
        (["r.yaml", "--resume", "a=b"], "a=b", "r.yaml", []),  # a folder of this name is there
        (["r.yaml", "--resume", "~/x"], "{home}/x", "r.yaml", []),
    ],
)
def test_what_follows_resume(tmp_path, monkeypatch, words, resume, recipe, overrides):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a=b").mkdir()
    options, rest = _parser().parse_known_args(["grpo", *join_resume(words)])
    expected = resume and resume.format(home=tmp_path)
    assert (options.resume, str(options.recipe), options.overrides + rest) == (expected, recipe, overrides)
