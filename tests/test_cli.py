"""The command: bad input ends with exit code 2 and one sentence that names what and where; good input runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from record.store import load_trajectories, save_trajectories
from record.trajectory import Author, Modality, Segment, StopReason, Trajectory
from rewards.manager import RewardManager
from rollout.pool.local import LocalRollouts
from tests.test_recipe import ROOT, SHIPPED
from training import checkpoint
from underdrawing.cli import main
from underdrawing.evaluations import run_evaluate
from underdrawing.recipe import load_recipe

QUICKSTART = str(ROOT / "configs/shapes/quickstart.yaml")
LOOK = str(ROOT / "configs/shapes/look.yaml")
SMALL = [
    "policy.tiny.hidden_size=32",
    "policy.tiny.num_hidden_layers=1",
    "policy.tiny.num_attention_heads=2",
    "policy.tiny.intermediate_size=32",
    "rollout.workers=0",
    "rollout.rows=4",
    "track.wandb=disabled",
    "sft.demonstrations=4",
    "sft.batch_size=2",
    "sft.max_steps=1",
    "sft.warmup_steps=0",
    "evaluate.prompts=6",
]


def refused(capsys, *arguments: object) -> str:
    """The one sentence on stderr of a command that must exit with code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("underdrawing: ")]
    assert len(lines) == 1, said.err
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_shipped_recipe_runs_dry(capsys, path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["grpo", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    resolved = yaml.safe_load(printed)
    assert resolved["grpo"]["epsilon"] == 0.2  # a default that no recipe writes
    assert "# reward = " in printed and "held-out prompts" in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["grpo", "none.yaml"], ["none.yaml: no such recipe", "configs/"]),
        (["grpo", "file.txt/x"], ["file.txt/x: no such recipe"]),
        (["grpo", "empty"], ["empty: a recipe is a YAML text file"]),
        (["grpo", "broken.yaml"], ["broken.yaml: line 2: not YAML"]),
        (["sft", QUICKSTART, "sft.max_step=3"], ["sft.max_step: unknown key", "did you mean 'max_steps'?"]),
        (["sft", QUICKSTART, "sft.max_steps=3.5"], ["sft.max_steps", "integer"]),
        (["sft", QUICKSTART, "sft.max_steps"], ["override 'sft.max_steps'", "section.key=value"]),
        (["evaluate", QUICKSTART], ["sft/model: no warm start there", "underdrawing sft", "--weights"]),
        (["grpo", QUICKSTART], ["sft/model: no warm start there"]),
        (["grpo", QUICKSTART, "--weights", "empty"], ["empty: no model here", "config.json"]),
        (["evaluate", QUICKSTART, "--weights", "half"], ["half/tokenizer.json", "no such file"]),
        (["grpo", QUICKSTART, "policy.path=nowhere"], ["nowhere"]),
        (["grpo", QUICKSTART, "--dry-run", "policy.path=nowhere"], ["policy.path", "nowhere", "config.json"]),
        (["grpo", QUICKSTART, "policy.family=anolle", "--weights", "half"], ["policy.family", "anolle"]),
        (["view", "empty"], ["empty: no run here", "metrics.jsonl"]),
        (["view", "nowhere"], ["nowhere"]),
        (["view", "cut"], ["cut/evaluations/grpo/summary.json: cannot be read", "--label grpo"]),
        (["grpo", QUICKSTART, "--dry-run", "rewards.parts.mine.function=nowhere.py:f"], ["nowhere.py:f", "no file"]),
        (["grpo", QUICKSTART, "--dry-run", "rewards.parts.mine.function=bad.py:f"], ["bad.py:f", "line 2"]),
        (["grpo", QUICKSTART, "--dry-run", "rewards.parts.mine.function=good.py:brigth"], ["good.py", "'bright'"]),
        (["grpo", QUICKSTART, "--dry-run", "rewards.parts.mine.function=good.py"], ["good.py:function"]),
        (["grpo", QUICKSTART, "--dry-run", "rewards.parts.detect.options.mod=graded"], ["parts.detect", "'mode'"]),
        (["grpo", QUICKSTART, "--dry-run", "rollout.writer=natve"], ["rollout.writer", "did you mean 'native'?"]),
        (["grpo", QUICKSTART, "--dry-run", "rollout.writer=vllm.writer"], ["rollout.writer", "no module 'vllm'"]),
        (["grpo", QUICKSTART, "--dry-run", "task.name=shaped"], ["task.name", "did you mean 'shapes'?"]),
        (["grpo", QUICKSTART, "--dry-run", "task.options.mistakes=1"], ["task.options.mistakes"]),
        (["grpo", QUICKSTART, "--dry-run", "format.name=stroke"], ["format.name", "did you mean 'strokes'?"]),
        (["grpo", QUICKSTART, "--dry-run", "format.options.max_image=2"], ["format.options", "max_image"]),
        (["grpo", QUICKSTART, "--dry-run", "tools=[lok]"], ["tools: no tool 'lok'", "did you mean 'look'?"]),
        (["grpo", QUICKSTART, "--dry-run", "tools=[look]"], ["format 'strokes' calls a tool", "'look' would never"]),
        (["grpo", QUICKSTART, "--dry-run", "tools.look.timeout=3"], ["tools.look.timeout", "did you mean 'timeout_s'"]),
        (["grpo", QUICKSTART, "--dry-run", "tools.look.options.sise=3"], ["tools.look.options.sise", "'size'?"]),
        (["grpo", QUICKSTART, "--dry-run", "tools.x.tool=good.py:brigth"], ["tools.x.tool", "'bright'"]),
        (["grpo", LOOK, "--dry-run", "grpo.fork.roles=[skech]"], ["grpo.fork.roles", "did you mean 'sketch'?"]),
        (
            ["grpo", QUICKSTART, "--dry-run", "format={name: look}", "sft.role_weights={}", "grpo.role_weights={}"],
            ["the role 'look' calls a tool", "tools: [look]"],
        ),
        (["grpo", QUICKSTART, "--dry-run", "task.name=dogs.Dogs"], ["'a photo of a dog'", "'dog'", "detector"]),
        (["grpo", QUICKSTART, "--dry-run", "rewards.detector=good.py:bright"], ["good.py:bright"]),
        (["sft", QUICKSTART, "run_dir=file.txt/run"], ["file.txt/run: cannot be written", "run_dir"]),
        (["sft", QUICKSTART, *SMALL, "sft.data=empty"], ["empty"]),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "broken.yaml").write_text("name: [one,\n")
    (tmp_path / "bad.py").write_text("def f(completions, **kwargs):\n    return [1.0 for c in completions\n")
    (tmp_path / "good.py").write_text("def bright(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    (tmp_path / "dogs.py").write_text(
        "from tasks.shapes.task import ShapesTask\n"
        "class Dogs(ShapesTask):\n"
        "    def prompts(self, split):\n"
        "        return [{'tag': 'single_object', 'prompt': 'a photo of a dog', 'include': [{'class': 'dog', "
        "'count': 1}]}]\n"
    )
    (tmp_path / "cut/evaluations/grpo").mkdir(parents=True)
    (tmp_path / "cut/evaluations/grpo/summary.json").write_text('{"score": 0.5, "by_')
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text(json.dumps({"model_type": "chameleon", "vocabulary_map": {"<s>": 0}}))
    said = refused(capsys, *arguments, *([] if arguments[0] == "view" else ["track.wandb=disabled"]))
    for word in words:
        assert word in said


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """A run whose warm start took one step: the smallest real model."""
    run = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={run}"]) == 0
    return run


def test_sft_then_evaluate_rollout_and_view(capsys, warm):
    assert (warm / "sft/model/config.json").is_file()
    assert yaml.safe_load((warm / "recipe.yaml").read_text())["sft"]["max_steps"] == 1

    assert main(["evaluate", QUICKSTART, *SMALL, f"run_dir={warm}", "rollout.max_tokens=60"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["prompts"] == 6 and 0 <= last["score"] <= 1
    assert last == last | {"weights": str(warm / "sft/model")}

    assert main(["rollout", QUICKSTART, *SMALL, f"run_dir={warm}", "rollout.max_tokens=60", "--prompts", "2"]) == 0
    assert "2 trajectories" in capsys.readouterr().out

    assert main(["view", str(warm / "rollout")]) == 0
    page = (warm / "rollout/report.html").read_text()
    assert "data:image/png;base64," in page or "circle" in page or "square" in page


def test_weights_of_a_damaged_checkpoint_are_used_by_no_command(capsys, warm, tmp_path, monkeypatch):
    folder = checkpoint.save(
        tmp_path / "checkpoints",
        3,
        lambda to: shutil.copytree(warm / "sft/model", to / "weights", dirs_exist_ok=True),
        trainer={},
        cursor={},
        recipe={},
    )
    command = ["evaluate", QUICKSTART, *SMALL, f"run_dir={tmp_path}", "rollout.max_tokens=60"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["weights"] == str(folder / "weights")
    weights = folder / "weights" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # still a weight like any other
    weights.write_bytes(content)
    words = "model.safetensors: its checksum is not the one written"
    for more in ([], ["--weights", folder / "weights"]):
        assert words in refused(capsys, *command, *more)
    elsewhere = [QUICKSTART, *SMALL, f"run_dir={tmp_path / 'other'}"]
    assert words in refused(capsys, "grpo", *elsewhere, "--weights", folder / "weights")
    for name in ("grpo", "sft", "evaluate", "rollout"):
        assert words in refused(capsys, name, *elsewhere, f"policy.path={folder / 'weights'}")
    monkeypatch.chdir(folder)
    assert words in refused(capsys, "rollout", *elsewhere, "--weights", "weights")
    with pytest.raises(checkpoint.CheckpointError, match=words):  # as the quickstart evaluates
        run_evaluate(load_recipe(QUICKSTART, elsewhere[1:]), folder / "weights", "grpo")


def test_a_formula_that_fails_loses_no_thought(capsys, warm, tmp_path):
    said = refused(
        capsys,
        "rollout",
        QUICKSTART,
        *SMALL,
        f"run_dir={tmp_path}",
        "rollout.max_tokens=60",
        "--weights",
        warm / "sft/model",
        "--prompts",
        "2",
        "rewards.total=detect / 0",
    )
    assert "divides by zero" in said and f"2 trajectories are saved in {tmp_path / 'rollout'}, 0 of them" in said
    assert len(load_trajectories(tmp_path / "rollout")) == 2


@pytest.fixture
def heeding_ctrl_c():
    """Python's own handler: a test run that was started in the background of a script ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
@pytest.mark.parametrize("finished", [0, 3, 8])
def test_ctrl_c_in_a_rollout_stores_what_is_finished(capsys, warm, tmp_path, monkeypatch, finished: int):
    command = [
        "rollout",
        QUICKSTART,
        *SMALL,
        f"run_dir={tmp_path}",
        "rollout.max_tokens=60",
        "--weights",
        str(warm / "sft/model"),
        "--prompts",
    ]
    assert main([*command, "2"]) == 0
    stream, judge = LocalRollouts.stream, RewardManager.score

    def sampling(self, requests, timeout_s=None):
        for number, group in enumerate(stream(self, requests, timeout_s)):
            if number == finished:
                signal.raise_signal(signal.SIGINT)
            yield group

    def judging(self, groups, step=0):
        signal.raise_signal(signal.SIGINT)
        return judge(self, groups, step)

    monkeypatch.setattr(LocalRollouts, "stream", sampling)
    monkeypatch.setattr(RewardManager, "score", judging)
    capsys.readouterr()
    assert main([*command, "8"]) == 130
    said = capsys.readouterr()
    stored = load_trajectories(tmp_path / "rollout")
    assert said.out == "" and f"stopped after {finished} of 8 prompts" in said.err
    if finished:
        assert f"{finished} trajectories are saved in {tmp_path / 'rollout'}, 0 of them judged" in said.err
        assert len(stored) == finished and [t.group for t in stored] == sorted(t.group for t in stored)
    else:
        assert f"no trajectory was finished, and {tmp_path / 'rollout'} is as it was" in said.err
        assert len(stored) == 2


@pytest.mark.parametrize(
    "out, words",
    [
        ("thesis", "holds 'thesis.tex' and no stored trajectories"),
        (".", "the current folder is there"),
        ("file.txt", "file.txt is a file"),
        ("file.txt/stored", "file.txt is a file"),
    ],
)
def test_a_rollout_deletes_nothing_and_says_so_before_it_samples(capsys, warm, tmp_path, monkeypatch, out, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("mine")
    (tmp_path / "file.txt").write_text("mine")
    monkeypatch.setattr(LocalRollouts, "stream", lambda *arguments: pytest.fail("it sampled"))
    assert words in refused(capsys, "rollout", QUICKSTART, *SMALL, f"run_dir={warm}", "--prompts", "2", "--out", out)
    assert (tmp_path / "thesis/thesis.tex").read_text() == (tmp_path / "file.txt").read_text() == "mine"


def test_a_writer_that_does_not_take_weights_ends_the_run_before_its_first_step(capsys, warm, tmp_path):
    arguments = [*SMALL, f"run_dir={tmp_path}", "rollout.max_tokens=60", "rollout.writer=tests.broken_writers.deaf"]
    said = refused(capsys, "grpo", QUICKSTART, *arguments, "--weights", str(warm / "sft/model"))
    assert "weights do not reach writer 0" in said
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_is_not_resumed_from_other_weights_than_it_started_from(capsys, warm, tmp_path):
    command = [
        "grpo",
        QUICKSTART,
        *SMALL,
        f"run_dir={tmp_path}",
        "grpo.prompts_per_step=1",
        "grpo.num_generations=2",
        "rollout.max_tokens=60",
        "grpo.beta=0.1",
        "grpo.evaluate_every=null",
    ]
    assert main([*command, "grpo.steps=1", "--weights", str(warm / "sft/model")]) == 0
    shutil.copytree(warm / "sft/model", tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "other/model.safetensors", {"format": "pt"})
    said = refused(capsys, *command, "grpo.steps=2", "--resume", "--weights", tmp_path / "other")
    assert f"started from {warm / 'sft/model'} " in said and f"this one from {tmp_path / 'other'} " in said
    assert f"--weights {warm / 'sft/model'}" in said
    assert main([*command, "grpo.steps=2", "--resume", "--weights", str(warm / "sft/model")]) == 0


def test_a_run_that_trains_nothing_stops_at_its_limit(capsys, warm, tmp_path):
    command = ["grpo", QUICKSTART, *SMALL, f"run_dir={tmp_path}", "grpo.prompts_per_step=2", "grpo.num_generations=2"]
    command += ["--weights", warm / "sft/model", "grpo.steps=9", "grpo.idle_limit=2", "grpo.evaluate_every=null"]
    # Five tokens are no image: nothing earns anything.
    said = refused(capsys, *command, "rollout.max_tokens=5", "rewards.total=detect")
    assert "stopped after step 2 of 9 by grpo.idle_limit: 2 steps in a row trained nothing: of 4 groups 4 zero" in said
    assert "100% of the members hit a limit" in said and f"Saved in {tmp_path}/checkpoints/step-000002" in said
    assert (tmp_path / "checkpoints/step-000002/weights").is_dir()


@pytest.mark.parametrize(
    "command, steps, saved",
    [
        ("sft", "sft.max_steps", "sft/checkpoint-*"),
        # By default test_signals.py has the same in its own process.
        pytest.param("grpo", "grpo.steps", "checkpoints/step-*", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_saves_and_says_how_to_go_on(warm, tmp_path, command: str, steps: str, saved: str):
    arguments = [
        command,
        QUICKSTART,
        *SMALL,
        f"run_dir={tmp_path}",
        "sft.logging_steps=1",
        "grpo.prompts_per_step=2",
        "grpo.num_generations=2",
        "rollout.max_tokens=60",
        f"{steps}=100000",
        "grpo.warmup_steps=0",
        *(["--weights", str(warm / "sft/model")] if command == "grpo" else []),
    ]
    run = subprocess.Popen(
        [sys.executable, "-m", "underdrawing", *arguments],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / ("sft/metrics.jsonl" if command == "sft" else "metrics.jsonl")
    until = time.monotonic() + 120
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):  # a step is done, another has begun
            assert run.poll() is None and time.monotonic() < until, "it wrote no second step"
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=120)[1]
    finally:
        run.kill()
    assert run.returncode == 130, said
    assert "Stopping after this step" in said and "Traceback" not in said
    assert "saved in" in said and "To go on, give the same command with --resume" in said
    (kept,) = tmp_path.glob(saved)
    step = len(metrics.read_text().splitlines())
    assert int(kept.name.rpartition("-")[2]) == step


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_corrupt_model_is_named_by_its_file(capsys, warm, tmp_path, name: str):
    broken = tmp_path / "model"
    shutil.copytree(warm / "sft/model", broken)
    (broken / name).write_bytes((broken / name).read_bytes()[:1000])
    said = refused(capsys, "evaluate", QUICKSTART, *SMALL, f"run_dir={tmp_path}", "--weights", broken)
    assert str(broken / name) in said


def test_a_half_written_store_is_named_by_its_file(capsys, tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    segments = [
        Segment("prompt", Author.USER, Modality.TEXT, False, np.array([1, 2], np.int32), "a circle"),
        Segment("sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, np.array([3, 4, 5], np.int32), image=image),
    ]
    save_trajectories([Trajectory("a circle", {}, "strokes", segments, stop=StopReason.END)], tmp_path / "stored")
    assert main(["view", str(tmp_path / "stored")]) == 0
    capsys.readouterr()
    file = tmp_path / "stored/segments.parquet"
    file.write_bytes(file.read_bytes()[:100])
    assert str(file) in refused(capsys, "view", tmp_path / "stored")


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for command in ("sft", "grpo", "rollout", "evaluate", "compare", "view", "doctor"):
        assert f"\n    {command} " in printed


def test_an_unknown_command_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 2
    assert "'train'" in capsys.readouterr().err


def test_the_installed_command(tmp_path):
    script = Path(sys.executable).parent / "underdrawing"
    assert script.is_file(), "install the project: make install"
    done = subprocess.run([script, "view", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr == (
        "underdrawing: nowhere: no run here: metrics.jsonl, sft/metrics.jsonl, evaluations/ and trajectories/ are all "
        "missing\n"
    )
