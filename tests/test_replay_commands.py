"""`underdrawing replay` and `underdrawing diff` on a real run of three steps of the smallest Chameleon."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rl.kept_steps import read_step
from tests.judge_server import JudgeServer
from tests.test_cli import LOOK, QUICKSTART, SMALL, refused
from underdrawing import replay
from underdrawing.cli import main
from underdrawing.diff import DiffError, side_of

OWN = """
import os, random

def length(completions, trajectories, **columns):
    more = os.environ.get("LENGTH_MORE", "0")
    return [t.num_tokens() + (random.random() if more == "random" else float(more)) for t in trajectories]
"""
RUN = [
    *SMALL,
    "rollout.max_tokens=60",
    "grpo.steps=3",
    "grpo.prompts_per_step=2",
    "grpo.num_generations=3",
    "grpo.learning_rate=0.01",
    "grpo.save_every=1",
    "grpo.keep_checkpoints=9",
    "grpo.keep_rollouts=2",
    "grpo.segment_reward_weights={}",
    "rewards.total=length + 0 * format",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that kept its steps 1 and 3."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "own.py").write_text(OWN)
    parts = f"{{length: {{function: '{folder}/own.py:length', isolate: false}}, format: {{function: format}}}}"
    more = [QUICKSTART, *RUN, f"rewards.parts={parts}", f"run_dir={folder / 'run'}"]
    assert main(["sft", *more]) == 0 and main(["grpo", *more]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run, which has so been moved."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def said(capsys, code: int, *arguments: object) -> tuple[dict, str]:
    """The last line of a command that must end with `code`, and all that it printed."""
    assert main([str(argument) for argument in arguments]) == code
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), " ".join(out.split())


def test_a_step_comes_out_equal_to_the_last_bit(capsys, trained):
    last, text = said(capsys, 0, "replay", trained, "--step", "3")
    assert last == last | {"step": 3, "equal": True, "whole": True, "differing": [], "first": None}
    assert last["replayed"] == ["rewards", "advantages", "loss", "update"] and last["metrics"] > 40
    assert "all of them equal to the last bit" in text
    for name in ("reward/length", "groups/trained", "loss/total", "grad_norm"):
        assert name in text
    kept = read_step(trained, 3)
    assert kept.metrics["grad_norm"] > 0 and kept.metrics["kl"] > 0  # the reference is not the weights before it
    assert said(capsys, 0, "replay", trained)[0]["step"] == 3  # the last one
    assert said(capsys, 0, "replay", trained, "--step", "1")[0]["whole"]


def test_a_reward_that_is_not_deterministic_is_told(capsys, trained, monkeypatch):
    monkeypatch.setenv("LENGTH_MORE", "random")
    last, text = said(capsys, 1, "replay", trained)
    assert not last["equal"] and last["first"][0] == "reward/mean" and "loss/total" in last["differing"]
    assert "The reward part 'length' is not deterministic: called twice here it gives two values (trajectory" in text
    assert "The first metric that differs is reward/mean (rewards)" in text and ", length: " in text
    monkeypatch.setenv("LENGTH_MORE", "0.5")  # another function than it was, and one that gives the same twice
    last, text = said(capsys, 1, "replay", trained)
    assert "is not deterministic: called" not in text and "what length computes or reads" in text
    last, text = said(capsys, 0, "replay", trained, "--stored", "length")
    assert last["equal"] and not last["whole"] and "Not called again, stored values stand for it: length" in text


def test_without_the_weights_what_can_be_is_replayed(capsys, run):
    shutil.rmtree(run / "checkpoints/step-000002")
    last, text = said(capsys, 0, "replay", run)
    assert last["equal"] and not last["whole"] and last["replayed"] == ["rewards", "advantages", "loss"]
    assert "The weights before step 3 are not stored (checkpoints: 1, 3)" in text and "grad_norm" not in text
    shutil.rmtree(run / "checkpoints/step-000001")
    shutil.copytree(run / "checkpoints/step-000003", run / "checkpoints/step-000002")
    said_so = refused(capsys, "replay", run)
    assert "checkpoints/step-000002: its weights are not those before step 3 (fingerprint" in said_so


def test_bad_input_is_a_sentence(capsys, run, tmp_path, monkeypatch):
    assert "step 2 was not kept; there are: 1, 3" in refused(capsys, "replay", run, "--step", "2")
    assert "no such folder" in refused(capsys, "replay", tmp_path / "nowhere")
    assert "no step is kept there" in refused(capsys, "replay", tmp_path)
    assert "--stored lenght: no reward part" in refused(capsys, "replay", run, "--stored", "lenght")
    assert "--weights" in refused(capsys, "replay", run, "--weights", tmp_path)
    others = run / "checkpoints/step-000003/weights"
    assert "not the weights that the run started from" in refused(capsys, "replay", run, "--weights", others)
    path = run / "steps/000003/trajectories/trajectories.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    assert "trajectories.parquet: its SHA-256 is not the one" in refused(capsys, "replay", run)
    path.write_bytes(content)
    monkeypatch.setattr(replay, "lock_sha256", lambda: "0" * 64)
    assert "another requirements.lock" in refused(capsys, "replay", run)
    last, _ = said(capsys, 0, "replay", run, "--other-setup")
    assert last["equal"]


def test_what_the_setup_differs_in_is_named():
    packages = {"torch": "2.9.1", "numpy": "2.0"}
    stored = {"threads": 1, "processes": 2, "device": "cuda", "cpu": "AVX2", "python": "3.11.1", "packages": packages}
    here = {**stored, "threads": 4, "processes": 1, "packages": {**packages, "torch": None}, "lock": None}
    refused_for, noted = replay.setup_differences(stored, here)
    assert refused_for == ["torch 2.9.1 (here missing)"]
    assert noted == ["1 CPU threads, here 4", "2 trainer processes, here 1"]


JUDGED = """
from rewards.judge.base import AnswerCheck

def right(trajectories, judge):
    said = judge.agrees([AnswerCheck(t.prompt, f"answer {t.key}", "any") for t in trajectories])
    return [None if verdict is None else float(verdict) for verdict in said]
"""


def test_a_judge_is_asked_again_only_when_told_to(capsys, trained, tmp_path):
    (tmp_path / "asks.py").write_text(JUDGED)
    parts = (
        f"{{length: {{function: '{trained.parent}/own.py:length', isolate: false}}, "
        f"right: {{function: '{tmp_path}/asks.py:right', isolate: false}}}}"
    )
    more = [QUICKSTART, *RUN, f"rewards.parts={parts}", "rewards.total=length * right", f"run_dir={tmp_path / 'run'}"]
    weights = ["--weights", str(trained / "sft/model")]
    with JudgeServer(lambda body, number: "yes") as server:
        judge = f"rewards.judge={{base_url: '{server.url}', model: judge, retries: 0}}"
        assert main(["grpo", *more, *weights, judge, "grpo.steps=1"]) == 0
        capsys.readouterr()
        asked = len(server.requests)
        last, text = said(capsys, 0, "replay", tmp_path / "run")
        assert last["equal"] and not last["whole"] and len(server.requests) == asked
        assert "stored values stand for it: right (--call-judges calls those that ask a judge)" in text
        last, _ = said(capsys, 0, "replay", tmp_path / "run", "--call-judges")
        assert last["equal"] and last["whole"] and len(server.requests) >= asked + 6  # one for each trajectory
    assert said(capsys, 0, "replay", tmp_path / "run")[0]["equal"]  # nobody listens there any more
    assert "rewards.judge" in refused(capsys, "replay", tmp_path / "run", "--call-judges")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_of_workers_on_ray_is_replayed_without_them(capsys, trained, tmp_path, monkeypatch):
    own = f"{{function: '{trained.parent}/own.py:length', workers: {{kind: ray, batch_size: 3}}, scope: group}}"
    more = [QUICKSTART, *RUN, f"rewards.parts={{length: {own}}}", "rewards.total=length", f"run_dir={tmp_path / 'run'}"]
    weights = ["--weights", str(trained / "sft/model")]
    assert main(["grpo", *more, *weights, "rollout.workers=1", "grpo.steps=1", "grpo.keep_rollouts=1"]) == 0
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("the replay started Ray"))
    capsys.readouterr()
    last, _ = said(capsys, 0, "replay", tmp_path / "run")
    assert last["equal"] and last["whole"] and last["replayed"][-1] == "update"


# ---- diff ----

RECIPE = ["--recipe", QUICKSTART, *SMALL, "rollout.max_tokens=60"]


def test_two_checkpoints_side_by_side(capsys, trained, tmp_path):
    page = tmp_path / "page.html"
    sides = [f"{trained}@1", trained]  # and the newest one
    last, text = said(capsys, 0, "diff", *sides, *RECIPE, "--prompts", "6", "--out", page)
    assert last["prompts"] == 6 and last["equal"] + sum(r["pairs"] for r in last["roles"].values()) == 6
    assert last["b"].endswith("step-000003/weights") and last["equal"] < 6
    assert "A: run, step 1" in text and "parts first in" in text
    assert page.read_text().count('class="pair"') == 6 - last["equal"]


def test_equal_weights_differ_in_nothing(capsys, trained, tmp_path):
    weights = trained / "checkpoints/step-000003"
    page = tmp_path / "page.html"
    last, text = said(capsys, 0, "diff", weights, weights / "weights", *RECIPE, "--prompts", "3", "--out", page)
    assert last["equal"] == 3 and last["roles"] == {} and last["score"]["difference"] == 0
    assert "All 3 answers are the same, decision by decision: they are the same weights." in text
    assert "decision by decision" in page.read_text()


def test_what_cannot_be_laid_side_by_side(capsys, run, tmp_path):
    weights = run / "sft/model"
    assert "nowhere: no such folder" in refused(capsys, "diff", "nowhere", weights, *RECIPE)
    assert "no checkpoint of step 9; there are: 1, 2, 3" in refused(capsys, "diff", f"{run}@9", weights, *RECIPE)
    assert "holds neither weights" in refused(capsys, "diff", weights, tmp_path, *RECIPE)
    assert "--out" in refused(capsys, "diff", weights, weights, *RECIPE, "--out", tmp_path)
    kept = run / "steps/000003/trajectories/page.html"
    assert "would lie in stored trajectories" in refused(capsys, "diff", weights, weights, *RECIPE, "--out", kept)
    assert side_of(str(run / "sft/model")).label == "run, warm start"
    with pytest.raises(DiffError, match="holds neither"):
        side_of(str(tmp_path))

    other = Path(shutil.copytree(weights, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "emu3"}))
    assert "of the family 'chameleon' and" in refused(capsys, "diff", weights, other, *RECIPE)
    (other / "config.json").write_text("{")
    assert "config.json: says no model_type" in refused(capsys, "diff", weights, other, *RECIPE)

    (other / "config.json").write_text(json.dumps(config))
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace('"triangle"', '"trapezoid"'))
    assert "other tokenizers: id" in refused(capsys, "diff", weights, other, *RECIPE)

    look = ["--recipe", LOOK, *SMALL, "rollout.max_tokens=60"]
    assert "was trained in the format 'strokes'" in refused(capsys, "diff", weights, f"{run}@1", *look)
