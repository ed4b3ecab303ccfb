"""`underdrawing evaluate` with a section `scaling`, by the command on tiny policies; bad input is one sentence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from evals.kept import SCALING, SCALING_PLOT, SCALING_THOUGHTS
from evals.scaling_arms import ARMS
from record.store import load_trajectories
from rollout.pool.local import LocalRollouts
from runtime.ray_cluster import stop_ray
from tests.test_cli import QUICKSTART, SMALL, refused
from tests.test_evaluations import by_reward
from underdrawing.cli import main

TINY = [*SMALL, "rollout.max_tokens=110", "evaluate.samples=2", "evaluate.prompts=2"]
BARE = ["sft.role_weights={}", "grpo.role_weights={}"]  # of no format in particular
STUDY = ["scaling.rounds=[1,2]", "scaling.samples=[1,3]"]


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *TINY, f"run_dir={run}"]) == 0
    return run


@pytest.fixture
def run(warm, tmp_path) -> Path:
    return Path(shutil.copytree(warm, tmp_path / "run"))


def evaluate(capsys, run: Path, *more: str) -> tuple[Path, str]:
    """The evaluation's folder, and what was said."""
    assert main(["evaluate", QUICKSTART, *TINY, f"run_dir={run}", *more]) == 0
    said = capsys.readouterr()
    return Path(json.loads(said.out.splitlines()[-1])["evaluation"]), said.out + said.err


def thoughts_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / SCALING_THOUGHTS).read_text().splitlines()]


def test_all_arms_come_of_two_passes_and_stand_beside_the_evaluation(capsys, run, monkeypatch):
    folder, said = evaluate(capsys, run, *STUDY, "--label", "both")
    content = json.loads((folder / SCALING).read_text())
    assert {point["arm"] for point in content["points"]} == {arm.name for arm in ARMS}
    assert content["thoughts_per_prompt"] == {"own_end": 3, "forced": 2} and content["judged"] == 2
    thoughts = thoughts_of(folder)
    for name, count in (("own_end", 6), ("forced", 4)):
        rows = [row for row in thoughts if row["pass"] == name]
        assert len(rows) == count == content["passes"][name]["thoughts"]
        assert sum(row["tokens"] for row in rows) == content["passes"][name]["tokens"]
    forced = [row for row in thoughts if row["pass"] == "forced" and row["stop"] == "end"]
    assert all(len(row["pictures"]) >= 2 for row in forced)
    for kept in load_trajectories(folder / "forced"):
        (row,) = [r for r in thoughts if (r["pass"], r["number"], r["member"]) == ("forced", kept.group, kept.member)]
        assert list(kept.rewards.values()) == [picture["score"] for picture in row["pictures"][:2]]
    # The evaluation's answers are the first of the pass that ends where the policy ends: the same as without scaling.
    alone, _ = evaluate(capsys, run, "--label", "alone")
    assert (alone / "prompts.jsonl").read_text() == (folder / "prompts.jsonl").read_text()
    assert not (alone / SCALING).exists()
    assert "1 round" in said and "3 samples" in said and "by pictures" in said
    assert "oracle" in (folder / SCALING_PLOT).read_text() and (folder / SCALING_PLOT).read_text().endswith("</svg>")
    # Asked for again it is taken as it is; another one of the label is refused by what differs.
    monkeypatch.setattr(LocalRollouts, "stream", lambda *arguments: pytest.fail("it sampled"))
    again, said = evaluate(capsys, run, *STUDY, "--label", "both")
    assert again == folder and "by pictures" in said
    said = refused(capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", "scaling.rounds=[1]", "--label", "both")
    assert "another evaluation is kept there: scaling " in said
    assert main(["view", str(run), "--out", str(run / "page.html")]) == 0
    page = (run / "page.html").read_text()
    assert "Test-time scaling of both" in page and page.count("scaling-plot") > 1
    for content, why in (("{", "Expecting property name"), ("{}", "none that `underdrawing evaluate` wrote")):
        (folder / SCALING).write_text(content)
        said = refused(capsys, "view", run)
        assert f"{folder / SCALING}: cannot be read, it may be cut or altered" in said and why in said
    (folder / SCALING).unlink()
    said = refused(capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", *STUDY, "--label", "both")
    assert "another evaluation is kept there: its scaling.json is missing" in said


def test_a_resolved_recipe_takes_the_section_too(capsys, run):
    from underdrawing.recipe import RecipeError, load_recipe

    assert load_recipe(run / "recipe.yaml").scaling is None
    assert load_recipe(run / "recipe.yaml", ["scaling.rounds=[3,1,3]"]).scaling.rounds == [1, 3]
    with pytest.raises(RecipeError, match="scaling.round: unknown key; did you mean 'rounds'"):
        load_recipe(run / "recipe.yaml", ["scaling.round=[3]"])


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ["scaling.rounds=[1,5]"],
            "scaling.rounds: 5 rounds, and the format 'strokes' allows 4 images; give at most 4",
        ),
        (["scaling.rounds=[]"], "scaling.rounds: List should have at least 1 item"),
        (["scaling.samples=[0]"], "scaling.samples.0: Input should be greater than or equal to 1"),
        (["scaling.rounds=[two]"], "scaling.rounds.0: Input should be a valid integer"),
        (["scaling.fine='['"], "scaling.fine: no regular expression (unterminated character set"),
        (
            ["scaling.roles=[inspekt]"],
            "scaling.roles: the format 'strokes' has no role 'inspekt'; did you mean 'inspect'",
        ),
        (
            ["scaling.rounds=[4]", "rollout.max_tokens=60"],
            "scaling.rounds: 4 rounds take at least 96 tokens (4 images of 18), and rollout.max_tokens is 60; give at "
            "most 2, or raise rollout.max_tokens",
        ),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_sampled(capsys, run, monkeypatch, more, message):
    monkeypatch.setattr(LocalRollouts, "stream", lambda *arguments: pytest.fail("it sampled"))
    assert message in refused(capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", *more)
    assert not list(run.glob("evaluations/*"))


def test_rounds_past_the_images_are_told_dry(capsys, run):
    command = ["evaluate", QUICKSTART, *TINY, f"run_dir={run}", "--dry-run"]
    assert "scaling.rounds: 9 rounds" in refused(capsys, *command, "scaling.rounds=[9]")
    assert main([*command, "scaling={}"]) == 0
    assert "samples:\n  - 1\n  - 2\n  - 4\n  - 8" in capsys.readouterr().out


def test_rounds_past_the_context_are_told(capsys, run):
    config = run / "sft/model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 90}))
    said = refused(capsys, "evaluate", QUICKSTART, *TINY, f"run_dir={run}", "scaling.rounds=[1,4]")
    assert re.search(r"4 rounds take at least 1\d\d slots with the longest prompt \(4 images of 18\)", said)
    assert "the policy's context holds 90; give at most 3" in said


def test_a_format_without_critiques_is_measured_without_them(capsys, run):
    folder, said = evaluate(capsys, run, *STUDY, *BARE, "format={name: subgoals, options: {max_tokens: 4}}")
    content = json.loads((folder / SCALING).read_text())
    assert not any(point["chosen"] in ("critique", "p_fine") for point in content["points"])
    assert "the format 'subgoals' has no role of critiques (scaling.roles), so the arms that go by the policy's" in said
    command = ["evaluate", QUICKSTART, *TINY, *BARE, f"run_dir={run}", "format.name=subgoals", "format.max_images=3"]
    refusal = refused(capsys, *command, "scaling={}")
    assert "scaling.rounds: 4 rounds, and the format 'subgoals' allows 3 images" in refusal


def test_prompts_without_ground_truth_are_scored_by_the_reward_and_critiques_by_an_expression(capsys, run, tmp_path):
    more = [*BARE, "format.name=self_critique", "scaling.fine='red|blue'", "--label", "own"]
    folder, said = evaluate(capsys, run, *by_reward(tmp_path), *STUDY, *more)
    content = json.loads((folder / SCALING).read_text())
    assert content["score_of"] == "reward" and "evaluate.by" not in said
    assert {point["arm"] for point in content["points"]} == {arm.name for arm in ARMS}
    fine = {picture["fine"] for row in thoughts_of(folder) for picture in row["pictures"]}
    assert fine <= {True, False, None} and False in fine


@pytest.mark.slow
def test_workers_write_the_same_thoughts_and_wandb_gets_the_table(capsys, run, monkeypatch):
    here, _ = evaluate(capsys, run, *STUDY, "--label", "here")
    there, _ = evaluate(capsys, run, *STUDY, "rollout.workers=1", "track.wandb=offline", "--label", "there")
    stop_ray()

    def written(folder):
        return [(r["pass"], r["prompt"], r["member"], r["tokens"], r["score"], r["stop"]) for r in thoughts_of(folder)]

    assert written(here) == written(there)
    (table,) = run.glob("wandb/offline-run-*/files/media/table/scaling_*.table.json")
    logged = json.loads(table.read_text())
    points = json.loads((there / SCALING).read_text())["points"]
    assert logged["columns"][:2] == ["arm", "label"] and len(logged["data"]) == len(points)
    assert [row[0] for row in logged["data"]] == [point["arm"] for point in points]
