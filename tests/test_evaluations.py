"""Evaluations of a run: each has a label of its own, none is lost silently; what cannot be evaluated is a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from evals.kept import SUMMARY, evaluations_of, read
from record.store import load_trajectories
from rollout.pool.local import LocalRollouts
from tasks.registry import get_task
from tests.test_cli import QUICKSTART, SMALL, refused
from training.tracking import read_metrics
from underdrawing.build import build_task
from underdrawing.cli import main
from underdrawing.evaluations import heldout_records, place_of, settings_of, step_of
from underdrawing.recipe import RecipeError, load_recipe

TINY = [*SMALL, "rollout.max_tokens=60", "evaluate.samples=1"]


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *TINY, f"run_dir={run}"]) == 0
    return run


@pytest.fixture
def run(warm, tmp_path) -> Path:
    """A copy of the run, to evaluate in."""
    return Path(shutil.copytree(warm, tmp_path / "run"))


def evaluate(capsys, run: Path, *more: object) -> dict:
    """The command's last line, and what it said besides as `said`."""
    assert main(["evaluate", QUICKSTART, *TINY, f"run_dir={run}", *map(str, more)]) == 0
    said = capsys.readouterr()
    return {**json.loads(said.out.splitlines()[-1]), "said": said.out + said.err}


def labels(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob(f"evaluations/*/{SUMMARY}"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_evaluation_is_taken_as_it_is(capsys, run, monkeypatch, caplog):
    first = evaluate(capsys, run)
    assert first["evaluation"] == str(run / "evaluations/warm_start")
    before = contents(run / "evaluations")
    monkeypatch.setattr(LocalRollouts, "stream", lambda *arguments: pytest.fail("it sampled"))
    again = evaluate(capsys, run)
    assert {k: again[k] for k in ("score", "by_tag", "prompts")} == {
        k: first[k] for k in ("score", "by_tag", "prompts")
    }
    assert contents(run / "evaluations") == before
    assert "warm_start is this evaluation already" in caplog.text


def test_a_summary_says_of_what_it_is(capsys, run):
    evaluate(capsys, run, "evaluate.samples=2")
    summary = json.loads((run / "evaluations/warm_start-samples-2" / SUMMARY).read_text())
    assert summary["weights"] == str(run / "sft/model") and summary["step"] == 0 and summary["fingerprint"]
    settings = summary["settings"]
    assert (settings["samples"], settings["temperature"], settings["number_of_prompts"]) == (2, 1.0, 6)
    assert settings["detector"] == "the task's (shapes)" and len(settings["prompts"]) == 16
    assert len(load_trajectories(run / "evaluations/warm_start-samples-2/trajectories")) == 6


def test_other_settings_than_the_runs_are_in_the_label(capsys, run):
    evaluate(capsys, run)
    evaluate(capsys, run, "evaluate.samples=2")
    evaluate(capsys, run, "evaluate.temperature=0.5", "evaluate.prompts=3")
    evaluate(capsys, run, "format.max_images=1", "rollout.top_k=5")
    names = labels(run)
    assert names[:3] == ["warm_start", "warm_start-prompts-3-temperature-0.5", "warm_start-samples-2"]
    assert names[3].startswith("warm_start-top_k-5-format-") and len(names) == 4


def test_how_images_are_denoised_is_a_setting_of_the_evaluation():
    def settings(*more):
        recipe = load_recipe(QUICKSTART, [*TINY, *more])
        task = build_task(recipe)
        return settings_of(recipe, task, heldout_records(recipe, task))

    usual = settings()
    assert "flow" not in usual  # as evaluations have it that know of no latents
    other = settings("evaluate.flow={sampler: ode, steps: 40}")
    assert {**other, "flow": None} == {**usual, "flow": None}
    assert other["flow"]["sampler"] == "ode" and other["flow"]["steps"] == 40
    assert settings("rollout.flow.steps=7")["flow"]["steps"] == 7
    assert settings("rollout.flow.steps=7", "evaluate.flow={sampler: ode, steps: 40}")["flow"] == other["flow"]
    with pytest.raises(RecipeError, match="evaluate.flow.step: unknown key; did you mean 'steps'"):
        settings("evaluate.flow={sampler: ode, step: 40}")


def test_another_evaluation_of_a_label_is_refused_by_what_differs(capsys, run, monkeypatch, tmp_path):
    evaluate(capsys, run, "--label", "mine")
    before = contents(run / "evaluations")
    monkeypatch.setattr(LocalRollouts, "stream", lambda *arguments: pytest.fail("it sampled"))
    command = ["evaluate", QUICKSTART, *TINY, f"run_dir={run}", "--label", "mine"]
    said = refused(capsys, *command, "evaluate.samples=3", "evaluate.seed=7")
    assert f"{run}/evaluations/mine: another evaluation is kept there: samples 1 there and 3 here, seed 1234" in said
    assert "Give this one a name of its own with --label" in said
    assert "other prompts, number_of_prompts 6 there and 4 here" in refused(capsys, *command, "evaluate.prompts=4")

    shutil.copytree(run / "sft/model", tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "other/model.safetensors", {"format": "pt"})
    said = refused(capsys, *command, "--weights", tmp_path / "other")
    assert f"it is of other weights ({run}/sft/model)" in said
    # One of release 0.1, which wrote neither settings nor weights.
    summary = run / "evaluations/mine" / SUMMARY
    old = {k: v for k, v in json.loads(summary.read_text()).items() if k not in ("settings", "fingerprint")}
    assert contents(run / "evaluations") == before
    summary.write_text(json.dumps(old))
    assert "it does not say of which weights and settings it is" in refused(capsys, *command)


def test_the_same_weights_elsewhere_are_the_same_weights(capsys, run, tmp_path, caplog):
    evaluate(capsys, run, "--label", "mine")
    shutil.copytree(run / "sft/model", tmp_path / "copy")
    evaluate(capsys, run, "--label", "mine", "--weights", tmp_path / "copy")
    assert "mine is this evaluation already" in caplog.text


def test_what_else_lies_in_the_folder_is_not_deleted(capsys, run):
    evaluate(capsys, run, "--label", "mine")
    (run / "evaluations/mine" / SUMMARY).unlink()
    (run / "evaluations/mine/notes.txt").write_text("mine")
    said = refused(capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", "--label", "mine")
    assert "holds 'notes.txt', which is no part of an evaluation and would be deleted" in said
    assert (run / "evaluations/mine/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "weights, label, step",
    [
        ("runs/a/sft/model", "warm_start", 0),
        ("runs/a/checkpoints/step-000040/weights", "step-000040", 40),
        ("runs/b/sft/model", "b-warm_start", 0),
        ("runs/b/checkpoints/step-000040/weights", "b-step-000040", 40),
        ("models/anole", "anole", None),
        ("models/anole/weights", "anole-weights", None),
    ],
)
def test_labels_come_from_where_weights_lie(tmp_path, weights, label, step):
    (tmp_path / weights).mkdir(parents=True)
    assert place_of(tmp_path / "runs/a", tmp_path / weights) == label
    assert step_of(tmp_path / weights) == step


def test_evaluations_during_training_keep_their_scores_by_prompt(capsys, run):
    command = ["grpo", QUICKSTART, *TINY, f"run_dir={run}", "grpo.prompts_per_step=2", "grpo.num_generations=2"]
    command += ["grpo.evaluate_every=1", "grpo.save_every=1", "grpo.keep_checkpoints=3"]
    assert main([*command, "grpo.steps=3"]) == 0
    kept = evaluations_of(run)
    assert [each.label for each in kept] == ["training-000001", "training-000002", "training-000003"]
    rows = read_metrics(run / "metrics.jsonl")
    for each, row in zip(kept, rows, strict=True):
        assert len(each.prompts) == 6 and each.summary["step"] == row["step"]
        assert each.score == pytest.approx(row["heldout/score"])
        assert not (each.folder / "trajectories").exists()
    # A run that goes back forgets those of the steps that it makes again.
    shutil.rmtree(run / "checkpoints/step-000003")
    shutil.rmtree(run / "checkpoints/step-000002")
    assert main([*command, "grpo.steps=2", "--resume"]) == 0
    assert labels(run) == ["training-000001", "training-000002"]


def test_too_many_prompts_are_refused_before_anything_is_sampled(capsys, run, monkeypatch):
    monkeypatch.setattr(LocalRollouts, "stream", lambda *arguments: pytest.fail("it sampled"))
    for command in ("evaluate", "grpo"):
        for more in ([], ["--dry-run"]):
            said = refused(
                capsys, command, QUICKSTART, *TINY, f"run_dir={run}", "grpo.evaluate_every=1", "evaluate.prompts=99999",
                *more,
            )  # fmt: skip
            assert "evaluate.prompts asks for 99999 held-out prompts, and the task has" in said
            assert "give at most" in said
    said = refused(capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", "evaluate.prompts=0")
    assert "evaluate.prompts" in said and "greater than or equal to 1" in said


UNTAGGED = """
from tasks.shapes.task import ShapesTask


class Untagged(ShapesTask):
    def prompts(self, split):
        return [{k: v for k, v in record.items() if k != "tag"} for record in super().prompts(split)]


class Closed(ShapesTask):
    def prompts(self, split):
        return super().prompts(split) if split == "train" else []
"""


def test_prompts_without_tags_are_scored_without_tags(capsys, run, monkeypatch, tmp_path):
    (tmp_path / "untagged.py").write_text(UNTAGGED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = evaluate(capsys, run, "task.name=untagged.Untagged")
    assert found["by_tag"] == {} and found["prompts"] == 6 and 0 <= found["score"] <= 1
    assert "final image" in found["said"] and "mean of tags" not in found["said"]
    said = refused(capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", "task.name=untagged.Closed")
    assert "asks for 6 held-out prompts, and the task has 0; hold some out" in said


def test_prompts_that_no_detector_judges_are_a_sentence(capsys, run, tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"prompt": f"draw {n}"}) + "\n" for n in range(40)))
    said = refused(
        capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", f"task={{dataset: {{path: {tmp_path}/mine.jsonl}}}}",
        "evaluate.prompts=2", "evaluate.by=[geneval]", "grpo.segment_reward_weights={}",
        "rewards.parts={form: {function: format}}", "rewards.total=form",
    )  # fmt: skip
    assert "'geneval' needs a detector" in said


def by_reward(folder: Path, *more: str) -> list[str]:
    """Prompts of one's own, without ground truth, and a reward that needs none."""
    rows = "".join(json.dumps({"prompt": r["prompt"]}) + "\n" for r in get_task("shapes").prompts("heldout")[:8])
    (folder / "mine.jsonl").write_text(rows)
    return [
        f"task={{dataset: {{path: {folder}/mine.jsonl, heldout_share: 0.5}}}}", "evaluate.prompts=3", *more,
        "rewards.parts={form: {function: format}, drawn: {function: steps}}", "rewards.total=2 * form + drawn",
        "grpo.segment_reward_weights={}", "rewards.detector=null",
    ]  # fmt: skip


def test_prompts_without_ground_truth_are_scored_by_the_recipes_reward(capsys, run, tmp_path):
    found = evaluate(capsys, run, *by_reward(tmp_path), "evaluate.samples=2")
    assert found["score_of"] == "reward" and found["by_tag"] == {} and "final_image" not in found
    assert found["score"] == pytest.approx(2 * found["reward/form"] + found["reward/drawn"])
    assert "reward/form" in found["said"] and "3 held-out prompts, 2 answers each" in found["said"]
    kept = read(Path(found["evaluation"]))
    assert kept.settings["reward"].startswith("2 * form + drawn (parts ") and "detector" not in kept.settings
    for answers in load_trajectories(kept.folder / "trajectories"):
        assert answers.rewards.keys() == {"form", "drawn"}


def test_both_measures_can_be_asked_for_and_the_first_is_the_score(capsys, run):
    more = ["rewards.parts={form: {function: format}}", "rewards.total=form", "grpo.segment_reward_weights={}"]
    found = evaluate(capsys, run, "evaluate.by=[reward, geneval]", *more)
    assert found["score_of"] == "reward" and found["score"] == found["reward"] == found["reward/form"]
    assert 0 <= found["first_sketch"] <= 1 and found["by_tag"]
    said = refused(capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", "evaluate.by=[genewal]")
    assert "evaluate.by: no evaluation 'genewal'; did you mean 'geneval'" in said


def test_evaluations_during_training_score_by_the_reward_too(capsys, tmp_path, run):
    weights = ["--weights", str(run / "sft/model")]
    arguments = [QUICKSTART, *TINY, *by_reward(tmp_path), f"run_dir={tmp_path}/run", "grpo.evaluate_every=1"]
    arguments += ["grpo.steps=1", "grpo.prompts_per_step=2", "grpo.num_generations=2"]
    assert main(["grpo", *arguments, *weights]) == 0
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["heldout/score"] == row["heldout/reward"]
    assert row["heldout/score"] == pytest.approx(2 * row["heldout/reward/form"] + row["heldout/reward/drawn"])


OWN = """
from tasks.shapes.task import ShapesTask


class Length:
    name, score = "length", "characters"

    def check(self, records):
        assert all("tag" in record for record in records)

    def __call__(self, trajectories):
        texts = ["".join(segment.text or "" for segment in t.segments if segment.trained) for t in trajectories]
        return {"characters": [float(len(text)) if text else None for text in texts]}


class Measured(ShapesTask):
    def evaluations(self):
        return [Length(), "geneval"]
"""


def test_a_task_brings_measures_of_its_own(capsys, run, monkeypatch, tmp_path):
    (tmp_path / "measuring.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = evaluate(capsys, run, "task.name=measuring.Measured")
    assert found["score_of"] == "characters" and found["score"] > 1 and found["by_tag"] and "final_image" in found
    answers = load_trajectories(Path(found["evaluation"]) / "trajectories")
    assert all({"first image", "final image"} == t.rewards.keys() for t in answers)
    alone = evaluate(capsys, run, "task.name=measuring.Measured", "evaluate.by=[geneval]")
    assert alone["score_of"] == "final_image" and alone["score"] == found["final_image"]
