"""What a dry run finds without weights, and what a job must not write over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.test_cli import QUICKSTART, SMALL, refused
from underdrawing.cli import main


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={folder}"]) == 0
    return folder


def asking(folder: Path, *prompts: str) -> list[str]:
    (folder / "mine.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return [
        QUICKSTART, *SMALL, f"task={{dataset: {{path: {folder}/mine.jsonl, heldout_share: 0.5}}}}",
        "rewards.parts={form: {function: format}}", "rewards.total=form", "grpo.segment_reward_weights={}",
        "rewards.detector=null", f"run_dir={folder}/run",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["--weights", "run_dir", "policy.path"])
def test_prompts_that_cannot_be_asked_are_found_by_the_vocabulary_alone(capsys, tmp_path, warm, where):
    model = warm / "sft/model"
    prompts = ["a red circle", "a blue circle", "a green circle", "a yellow circle"]
    given = {"--weights": ["--weights", str(model)], "policy.path": [f"policy.path={model}"]}.get(where, [])
    fine, long = asking(tmp_path, *prompts), tmp_path / "long"
    assert main(["grpo", *fine, *given, "--dry-run"]) == 0
    long.mkdir()
    bad = asking(long, *(" ".join(["red"] * 9000) + f" {prompt}" for prompt in prompts))
    if where == "run_dir":
        bad[-1] = f"run_dir={warm}"
    capsys.readouterr()
    for command in ("grpo", "rollout", "difficulty"):
        assert "ids, and at most" in refused(capsys, command, *bad, *given, "--dry-run")
    assert not (long / "run").exists()


def test_what_is_no_model_and_what_is_no_folder_are_refused(capsys, tmp_path):
    recipe = asking(tmp_path, "a red circle", "a blue circle")
    for command in ("grpo", "rollout", "difficulty", "evaluate"):
        said = refused(capsys, command, *recipe, "evaluate.prompts=1", "--weights", str(tmp_path), "--dry-run")
        assert f"{tmp_path}: no model here (config.json is missing)" in said
    assert f"run_dir: {tmp_path}/mine.jsonl is a file" in refused(
        capsys, "sft", *recipe, f"run_dir={tmp_path}/mine.jsonl/run", "--dry-run"
    )


def test_an_evaluation_that_nothing_has_is_refused_before_the_first_step(capsys, tmp_path, warm):
    recipe = [*asking(tmp_path, "a red circle", "a blue circle"), "evaluate.by=[rewrd]"]
    assert "no evaluation 'rewrd'; did you mean 'reward'" in refused(capsys, "grpo", *recipe, "--dry-run")
    assert "no evaluation 'rewrd'" in refused(capsys, "grpo", *recipe, "--weights", str(warm / "sft/model"))
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("label", ["../x", "a/b", ".hidden", "..", "", "training-000004"])
def test_a_label_is_a_folder_of_its_own(capsys, warm, label):
    before = sorted(warm.rglob("*"))
    said = refused(capsys, "evaluate", QUICKSTART, *SMALL, f"run_dir={warm}", "evaluate.prompts=2", "--label", label)
    assert f"--label '{label}': " in said and sorted(warm.rglob("*")) == before


def test_a_warm_start_after_grpo_leaves_that_runs_recipe(tmp_path, warm):
    grpo = [QUICKSTART, *SMALL, "grpo.steps=1", "grpo.prompts_per_step=1", "grpo.num_generations=2"]
    grpo += ["rollout.max_tokens=60", f"run_dir={tmp_path}"]
    assert main(["grpo", *grpo, "--weights", str(warm / "sft/model")]) == 0
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={tmp_path}", "grpo.steps=7"]) == 0
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["grpo"]["steps"] == 1
