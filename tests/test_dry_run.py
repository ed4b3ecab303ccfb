"""What a dry run finds without weights, and what a job must not write over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.test_cli import LOOK, QUICKSTART, SMALL, refused
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


# ---- keys about denoised images ----

TINY = ["policy.tiny={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"]


@pytest.mark.parametrize(
    "override, key",
    [
        ("rollout.flow.steps=7", "rollout.flow.steps"),
        ("evaluate.flow={sampler: ode, steps: 40}", "evaluate.flow"),
        ("grpo.flow.ratio=guard", "grpo.flow.ratio"),
        ("grpo.clip_by_kind={flow: 1e-5}", "grpo.clip_by_kind.flow"),
        ("grpo.kind_weights={flow: 0.5}", "grpo.kind_weights.flow"),
    ],
)
def test_a_key_about_denoising_is_refused_where_nothing_is_denoised(capsys, tmp_path, override, key):
    recipe = [QUICKSTART, *TINY, f"run_dir={tmp_path}/run", override]
    for command in ("sft", "grpo", "evaluate"):
        said = refused(capsys, command, *recipe, "--dry-run")
        assert f"{key}: the family 'chameleon' denoises no images, so this would be of no effect; leave it out" in said


def test_a_resolved_recipe_names_every_key_and_is_taken(capsys, tmp_path):
    assert main(["grpo", QUICKSTART, *TINY, f"run_dir={tmp_path}/run", "--dry-run"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert "noise_level" in (tmp_path / "resolved.yaml").read_text()
    assert main(["grpo", str(tmp_path / "resolved.yaml"), "--dry-run"]) == 0


def denoising(folder: Path, flow: str, *more: str, family: str = "DENOISING") -> list[str]:
    policy = f"policy={{family: tests.fake_family.{family}, path: {folder}}}"
    return [QUICKSTART, policy, f"run_dir={folder}/run", f"rollout.flow={flow}", "rollout.workers=0", *more]


@pytest.mark.parametrize(
    "flow, sentence",
    [
        ("{sampler: ode}", "sampler: ode decides nothing, so no image would be trained; choose sde, cps or dance"),
        ("{steps: 1}", "steps: the last step is none to train, and there is no other, so no image would be"),
        ("{noise_level: 0}", "noise_level: 0.0 gives no step of the sampler 'sde' noise, so no image would be trained"),
        (
            "{sampler: cps, window: 1, window_range: [9, 10]}",
            "window_range: none of the steps 9 to 9 gets noise, so no image would be trained; lay it over steps",
        ),
        ("{sampler: cps, steps: 1, window: 1}", "steps: the last step is none to train, and there is no other"),
    ],
)
def test_denoising_of_which_nothing_could_be_trained_is_refused(capsys, tmp_path, flow, sentence):
    said = refused(capsys, "grpo", *denoising(tmp_path, flow), "--dry-run")
    assert f"rollout.flow.{sentence}" in said and "or train words alone (grpo.kind_weights: {flow: 0})" in said
    assert main(["rollout", *denoising(tmp_path, flow), "--dry-run"]) == 0, "what is only sampled may be deterministic"
    assert main(["grpo", *denoising(tmp_path, flow, "grpo.kind_weights={flow: 0}"), "--dry-run"]) == 0


def test_denoising_that_can_be_trained_is_taken_and_a_sampler_that_cannot_be_is_not(capsys, tmp_path):
    for flow in ("{}", "{steps: 2}", "{steps: 1, window: 1}", "{sampler: cps, window: 2, window_range: [8, 10]}"):
        assert main(["grpo", *denoising(tmp_path, flow, "evaluate.flow={sampler: ode, steps: 1}"), "--dry-run"]) == 0
    said = refused(capsys, "rollout", *denoising(tmp_path, "{sampler: cps, noise_level: 1.5}"), "--dry-run")
    assert "sampler 'cps': noise_level is 1.5" in said


def test_a_family_that_does_not_say_what_its_images_are_is_asked_once_it_is_loaded(capsys, tmp_path):
    unsaid = denoising(tmp_path, "{sampler: ode}", family="UNSAID")
    assert main(["grpo", *unsaid, "--dry-run"]) == 0
    assert "rollout.flow.sampler: ode decides nothing" in refused(capsys, "grpo", *unsaid)
    codes = denoising(tmp_path, "{steps: 7}", family="FAMILY")
    assert "rollout.flow.steps: the family 'tests.fake_family.FAMILY' denoises no images" in refused(
        capsys, "grpo", *codes
    )
    assert not (tmp_path / "run/checkpoints").exists()


# ---- what a command does not read ----


def test_data_of_the_warm_start_is_the_warm_starts_to_find(capsys, tmp_path):
    """GRPO begins with weights: where it runs, what they were taught with need not be."""
    recipe = [QUICKSTART, *TINY, f"run_dir={tmp_path}/run", "sft.data=nowhere"]
    assert "nowhere" in refused(capsys, "sft", *recipe, "--dry-run")
    for command in ("grpo", "rollout", "evaluate"):
        assert main([command, *recipe, "--dry-run"]) == 0


def test_tags_that_the_fresh_tokenizer_would_not_know_are_named(capsys, tmp_path, warm):
    look = [LOOK, *TINY, f"run_dir={tmp_path}/run", "policy.tiny.tags=[<ins>, </ins>, <look>, <inspect>, </inspect>]"]
    for command in ("sft", "grpo", "rollout"):
        said = refused(capsys, command, *look, "--dry-run")
        assert "policy.tiny.tags: the format 'look' has the tag '</look>', which the fresh tokenizer would" in said
        assert "add it: ['<ins>', '</ins>', '<look>', '<inspect>', '</inspect>', '</look>']" in said
    strokes = [QUICKSTART, *TINY, f"run_dir={tmp_path}/run"]
    weights = ["--weights", str(warm / "sft/model")]  # which bring a tokenizer of their own
    assert main(["grpo", *strokes, "policy.tiny.tags=[<x>]", *weights, "--dry-run"]) == 0


# ---- factories ----


def three(*_, **__) -> int:
    return 3


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("task={name: tests.test_dry_run.three}", "task.name: 'tests.test_dry_run.three' gave a value of type int, "
         "which is no Task: it has no 'name' (tasks/base.py says what a task offers)"),
        ("format={name: tests.test_dry_run.three}", "format.name: 'tests.test_dry_run.three' gave a int, which is no"),
        ("tools={three: {tool: tests.test_dry_run.three}}", "tools.three.tool: 'tests.test_dry_run.three' gave a value "
         "of type int, which is no Tool: it has no 'open'"),
    ],
)  # fmt: skip
def test_a_factory_that_makes_something_else_is_named_by_a_dry_run(capsys, tmp_path, override, sentence):
    for command in ("grpo", "rollout"):
        recipe = [QUICKSTART, *TINY, f"run_dir={tmp_path}/run", "grpo.fork=null", override]
        assert sentence in refused(capsys, command, *recipe, "--dry-run")


def test_a_factory_that_needs_weights_is_named_before_the_first_step(capsys, tmp_path, warm):
    writer = [QUICKSTART, *SMALL, f"run_dir={tmp_path}/run", "rollout.writer=tests.test_dry_run.three"]
    said = refused(capsys, "grpo", *writer, "--weights", str(warm / "sft/model"))
    assert "rollout.writer: 'tests.test_dry_run.three' gave a value of type int, which is no Writer" in said
    policy = denoising(tmp_path, "{}", family="NO_POLICY")
    said = refused(capsys, "grpo", *policy)
    assert "policy.family: 'tests.fake_family.NO_POLICY' gave a value of type int, which is no Policy" in said
    assert not (tmp_path / "run/checkpoints").exists()
