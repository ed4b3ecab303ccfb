"""Prompts without a tag: scored by one mean over all, wherever tags are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evals import kept
from evals.bootstrap import compare, refinement
from evals.heldout import Heldout, PromptScore, mean_of_tags, spread_over_tags, tag_of
from tests.test_cli import QUICKSTART, SMALL, refused
from training.tracking import read_metrics
from underdrawing.cli import main
from underdrawing.report.page import report_data, write_report

CIRCLE = [{"class": "circle", "count": 1}]
RECORDS = [{"prompt": f"a {color} circle", "include": CIRCLE} for color in ("red", "blue", "green", "yellow", "purple")]


def score(prompt: str, tag: str, final: float, first: float = 0.0) -> PromptScore:
    return PromptScore(prompt, tag, {"final_image": final, "first_sketch": first, "images": 1.0})


def test_scores_without_tags_are_one_mean():
    heldout = Heldout([score("a", "", 1.0, 1.0), score("b", "", 0.0), score("c", "", 0.5)], [], {}, "final_image")
    assert heldout.score == 0.5 and heldout.means["first_sketch"] == pytest.approx(1 / 3)
    assert heldout.tags == {} and not any(name.startswith("heldout/tag/") for name in heldout.as_metrics())


def test_where_some_have_tags_the_others_are_one_more_kind():
    # 'x' has the mean 1, the untagged 0.25: their mean is 0.625
    heldout = Heldout([score("a", "x", 1.0), score("b", "", 0.0), score("c", "", 0.5)], [], {}, "final_image")
    assert heldout.score == 0.625 == mean_of_tags([1.0, 0.0, 0.5], ["x", "", ""])
    assert heldout.tags == {"x": 1.0}


def test_a_tag_is_a_word_or_none():
    assert [tag_of(record) for record in ({}, {"tag": None}, {"tag": "x"}, {"tag": 3})] == ["", "", "x", "3"]


def test_records_without_tags_are_spread_evenly():
    records = [{"prompt": str(n)} for n in range(10)]
    assert [r["prompt"] for r in spread_over_tags(records, 5)] == ["0", "2", "4", "6", "8"]


def test_the_bootstrap_of_scores_without_tags():
    before = [score(str(n), "", 0.0) for n in range(20)]
    after = [score(str(n), "", float(n % 2), 0.5) for n in range(20)]
    gain = compare(before, after)
    assert gain.difference == 0.5 and 0.2 < gain.low < 0.5 < gain.high < 0.8
    assert refinement(after).difference == pytest.approx(0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={folder}"]) == 0
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def recipe(folder: Path, *more: str, file: str = "rows.jsonl") -> list[str]:
    return [
        QUICKSTART,
        *SMALL,
        f"task={{dataset: {{path: '{folder}/{file}', heldout_share: 0.5}}}}",
        "rewards.detector={backend: shapes}",
        "rewards.parts={detect: {function: geneval}}",
        "rewards.total=detect",
        "grpo.segment_reward_weights={}",
        "rollout.max_tokens=60",
        "evaluate.prompts=2",
        f"run_dir={folder}",
        *more,
    ]


def test_evaluate_and_report_without_tags(capsys, run):
    assert main(["evaluate", *recipe(run)]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["by_tag"] == {} and 0 <= said["score"] <= 1 and said["prompts"] == 2
    (folder,) = run.glob("evaluations/*/")
    scores = kept.read(folder).prompts
    assert [s.tag for s in scores] == ["", ""] and said["score"] == np.mean([s.measures["final_image"] for s in scores])
    assert write_report(report_data(run), run / "report.html").stat().st_size > 1000


def test_a_run_evaluates_without_tags(run, tmp_path):
    steps = ["grpo.steps=1", "grpo.prompts_per_step=1", "grpo.num_generations=2", "grpo.warmup_steps=0"]
    arguments = recipe(run, *steps, "grpo.evaluate_every=1", "evaluate.samples=1", f"run_dir={tmp_path}")
    assert main(["grpo", *arguments, "--weights", str(run / "sft/model")]) == 0
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 <= row["heldout/score"] <= 1 and not any(name.startswith("heldout/tag/") for name in row)


@pytest.mark.parametrize(
    "record, words",
    [
        ({}, "has no `include`, by which GenEval's rule scores an image"),
        ({"include": []}, "has no `include`"),
        ({"include": 3}, "include has 3; it is a list of {class, count from 1, color?, size?, position?}"),
        ({"include": [{"count": 1}]}, "include has {'count': 1}"),
        ({"include": CIRCLE, "exclude": ["circle"]}, "exclude has 'circle'"),
        ({"include": [{"class": "dog", "count": 1}]}, "'dog'"),
    ],
)
def test_what_cannot_be_scored_is_no_zero(capsys, run, tmp_path, record, words):
    """A record that GenEval's rule cannot score is refused before a thought is written, by what it lacks."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": r["prompt"], **record}) + "\n" for r in RECORDS))
    data = f"task={{dataset: {{path: '{tmp_path}/rows.jsonl', heldout_share: 0.5}}}}"
    weights = ["--weights", str(run / "sft/model"), "evaluate.by=[geneval]"]
    assert words in refused(capsys, "evaluate", *recipe(run, data, f"run_dir={tmp_path}"), *weights)
    if words.startswith("has no"):
        steps = ["grpo.steps=9", "grpo.evaluate_every=9", "evaluate.samples=1", "rewards.parts={s: {function: steps}}"]
        arguments = recipe(run, data, *steps, "rewards.total=s", f"run_dir={tmp_path}/grpo")
        assert words in refused(capsys, "grpo", *arguments, *weights)
        assert not (tmp_path / "grpo/checkpoints").exists()
