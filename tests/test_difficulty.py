"""The pass rate of each prompt: counted, kept with the records, gone on with after an interruption, selected by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import underdrawing.difficulty as difficulty
from record.trajectory import Trajectory
from runtime.errors import UserError
from tasks import dataset
from tasks.config import DatasetConfig
from tests.test_cli import SMALL
from underdrawing.cli import main
from underdrawing.recipe import load_recipe

QUICKSTART = Path(__file__).parent.parent / "configs/shapes/quickstart.yaml"


def judged(*rewards) -> list[Trajectory]:
    return [Trajectory("", {}, "f", [], reward=reward, rewards={"x": reward}) for reward in rewards]


def test_a_rate_is_of_what_was_judged():
    counts = difficulty._counts(judged(1.0, 0.2, None, 0.9), 0.9, None)
    assert counts == {"pass_rate": 2 / 3, "passes": 2, "samples": 3, "mean_reward": pytest.approx(0.7)}
    assert difficulty._counts(judged(None), 0.9, "x") == {
        "pass_rate": None,
        "passes": 0,
        "samples": 0,
        "mean_reward": None,
    }
    assert difficulty.summary([{"pass_rate": r} for r in (0, 0.5, 1.0, None, 0.0)]) == {
        "never": 2,
        "sometimes": 1,
        "always": 1,
        "unjudged": 1,
    }


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    rows = folder / "prompts.jsonl"
    things = ["red circle", "red square", "red cross", "blue circle", "blue square"]
    rows.write_text("".join(json.dumps({"prompt": f"a {t}", "n": n}) + "\n" for n, t in enumerate(things)))
    (folder / "reward.py").write_text("def odd(completions, n, **c):\n    return [float(x % 2) for x in n]\n")
    overrides = [*SMALL, f"run_dir={folder / 'run'}"]
    assert main(["sft", str(QUICKSTART), *overrides]) == 0
    return folder, rows


def options(warm, out, *more):
    folder, rows = warm
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: d\nrun_dir: {folder / 'run'}\npolicy: {{tiny: {{hidden_size: 32}}}}\n"
        f"task: {{dataset: {{path: {rows}, heldout_share: 0}}}}\nformat: {{name: strokes}}\n"
        "rollout: {workers: 0, rows: 8, max_tokens: 30}\n"
        f'rewards: {{parts: {{odd: {{function: "{folder / "reward.py"}:odd"}}}}}}\n'
    )
    return ["difficulty", str(recipe), "--weights", str(folder / "run/sft/model"), "--samples", "2", "--out", str(out),
            *more]  # fmt: skip


def test_the_command_counts_and_a_recipe_selects_by_it(warm, tmp_path, capsys):
    out = tmp_path / "d.jsonl"
    assert main(options(warm, out)) == 0
    assert "5 prompts in" in (said := capsys.readouterr().out) and "never 3, sometimes 0, always 2" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["pass_rate"] for row in rows] == [0, 1, 0, 1, 0] and all(row["samples"] == 2 for row in rows)
    task = dataset.build(DatasetConfig(path=str(out), where={"pass_rate": (0.5, 1)}, heldout_share=0))
    assert [r["n"] for r in task.prompts("train")] == [1, 3] and task.prompts("train")[0]["passes"] == 2
    assert main(options(warm, out)) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(options(warm, tmp_path / "x.jsonl", "--part", "od")) == 2
    assert main(options(warm, tmp_path / "x.jsonl", "--samples", "1")) == 2
    assert "--samples: 1 is too small; at least 2" in capsys.readouterr().err


def test_what_was_counted_before_an_interruption_is_kept(warm, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    monkeypatch.setattr(difficulty, "CHUNK", 2)
    assert main(options(warm, whole)) == 0
    counted, calls = difficulty._counted, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise UserError("the disk is on fire")
        return counted(*arguments)

    monkeypatch.setattr(difficulty, "_counted", dies)
    assert main(options(warm, broken)) == 2
    partial = tmp_path / "broken.jsonl.part"
    assert len(partial.read_text().splitlines()) == 3  # the settings and two prompts
    with partial.open("a") as file:
        file.write('{"prompt": "a red cr')  # and half of one more, as a killed process leaves it
    assert main(options(warm, broken, "--pass-at", "0.5")) == 2
    assert "was begun with another pass_at" in capsys.readouterr().err
    asked = len(calls)
    assert main(options(warm, broken)) == 0
    assert len(calls) - asked == 2  # the other three prompts, in two chunks
    assert broken.read_text() == whole.read_text() and not partial.exists()


def test_a_part_file_of_other_prompts_is_refused(warm, tmp_path):
    folder, _ = warm
    recipe = load_recipe(options(warm, tmp_path / "d.jsonl")[1])
    settings = {"weights": "w", "samples": 2, "pass_at": 1.0, "part": None, "seed": 0}
    partial = tmp_path / "d.jsonl.part"
    partial.write_text(json.dumps(settings) + "\n" + json.dumps({"prompt": "another"}) + "\n")
    with pytest.raises(UserError, match="d.jsonl.part line 2: the task has another prompt there"):
        difficulty._finished(partial, settings, dataset.build(recipe.task.dataset).prompts("train"))
