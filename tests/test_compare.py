"""`underdrawing compare`: numbers worked by hand, and what does not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.bootstrap import compare_scores
from evals.heldout import Heldout, PromptScore
from evals.kept import Evaluated, keep
from record.trajectory import Author, Modality, Segment, Trajectory
from tests.test_cli import refused
from underdrawing.cli import main

SETTINGS: dict[str, Any] = {
    "prompts": "0123456789abcdef",
    "samples": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "detector": "shapes",
    "seed": 1234,
    "max_tokens": 200,
}
# (prompt, tag), then first and final image of A and of B.
ROWS = [
    (("one", "color"), (0.0, 0.5), (0.5, 1.0)),
    (("two", "color"), (0.0, 0.0), (0.0, 0.5)),
    (("three", "counting"), (1.0, 1.0), (0.5, 0.5)),
]


def write(folder: Path, which: int, rows: Any = ROWS, of: Evaluated | None = None, **settings: Any) -> Path:
    prompts = [
        PromptScore(p, tag, dict(final_image=pair[which][1], first_sketch=pair[which][0], images=1.0))
        for (p, tag), *pair in rows
    ]
    samples = settings.get("samples", SETTINGS["samples"])
    answers = [
        [Trajectory(p.prompt, {}, "strokes", [Segment("prompt", Author.USER, Modality.TEXT, False)])] * samples
        for p in prompts
    ]
    keep(
        Heldout(prompts, answers, {}, "final_image"),
        folder,
        of or Evaluated({**SETTINGS, **settings}, "w", "print"),
        answers=0,
    )
    return folder


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[dict[str, Any]], str]:
    assert main(["compare", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1])["comparisons"], printed


def test_every_score_is_compared(tmp_path, capsys):
    a, b = write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    [found], printed = compared(capsys, a, b)
    # color: A (0.5 + 0) / 2 = 0.25, B 0.75; counting: A 1, B 0.5. Mean of tags: 0.625 and 0.625. Both color prompts
    # gain 0.5 and the only counting one loses 0.5, so no resample differs.
    assert found["score"] == {"a": 0.625, "b": 0.625, "difference": 0.0, "interval": [0.0, 0.0]}
    assert found["by_tag"]["color"] == {"a": 0.25, "b": 0.75, "difference": 0.5, "interval": [0.5, 0.5]}
    assert found["by_tag"]["counting"] == {"a": 1.0, "b": 0.5, "difference": -0.5, "interval": [-0.5, -0.5]}
    # First images: A (0 + 1) / 2, B (0.25 + 0.5) / 2; color's gain is 0.5 and 0, so a resample's lies in 0 to 0.5.
    first = found["first_sketch"]
    assert (first["a"], first["b"], first["difference"]) == (0.5, 0.375, -0.125)
    assert first["interval"] == [-0.25, 0.0]
    # Refining adds 0.5 and 0 to A's colors, 0.5 and 0.5 to B's, nothing to counting.
    refinement = found["refinement"]
    assert (refinement["a"], refinement["b"], refinement["difference"]) == (0.125, 0.25, 0.125)
    assert found["prompts"] == 3 and found["notes"] == ["both are of the same weights"]
    assert "mean of tags" in printed and "95% interval" in printed and "-0.250 to +0.000" in printed


def test_the_interval_is_the_paired_bootstraps():
    """Gains of +1 and -1 by halves over 400 prompts: a standard error of 1 / 20, so 95% lies within 0.098."""
    a = [PromptScore(str(n), "", {"final_image": n % 2, "first_sketch": 0.0}) for n in range(400)]
    b = [PromptScore(str(n), "", {"final_image": 1 - n % 2, "first_sketch": 0.0}) for n in range(400)]
    found = compare_scores(a, b)
    assert found.by_tag == {} and found.score.a == found.score.b == 0.5
    assert found.score.interval.high == pytest.approx(0.098, abs=0.006)


def test_of_a_run_the_newest_counts_and_labels_can_be_chosen(tmp_path, capsys):
    for run, labels in (("r", ("warm_start", "z", "grpo")), ("s", ("warm_start", "grpo", "extra"))):
        for number, label in enumerate(labels):
            folder = write(tmp_path / run / "evaluations" / label, int(run == "s"))
            summary = json.loads((folder / "summary.json").read_text())
            (folder / "summary.json").write_text(json.dumps({**summary, "time": f"2026-01-0{number + 1}"}))
    r, s = tmp_path / "r", tmp_path / "s"
    [found], _ = compared(capsys, r, s)
    assert (found["a"], found["b"]) == (str(r / "evaluations/grpo"), str(s / "evaluations/extra"))
    [found], _ = compared(capsys, r, s, "--label", "warm_start")
    assert (found["a"], found["b"]) == (str(r / "evaluations/warm_start"), str(s / "evaluations/warm_start"))
    found, _ = compared(capsys, r, s, "--all")
    assert [Path(each["a"]).name for each in found] == ["warm_start", "grpo"]
    [found], _ = compared(capsys, r / "evaluations/warm_start", s)
    assert (found["a"], found["b"]) == (str(r / "evaluations/warm_start"), str(s / "evaluations/extra"))
    assert "no evaluation 'grpi'; did you mean 'grpo'?" in refused(capsys, "compare", r, s, "--label", "grpi")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"samples": 4}, "samples is 1 and 4; give both the same evaluate.samples"),
        ({"temperature": 0.5}, "temperature is 1.0 and 0.5; give both the same evaluate.temperature"),
        ({"top_p": 0.9}, "top_p is 1.0 and 0.9; give both the same rollout.top_p"),
        ({"detector": "mask2former"}, "detector is shapes and mask2former"),
        ({"prompts": "f" * 16}, "the prompts' columns differ; evaluate both on the same held-out prompts"),
    ],
)
def test_what_was_sampled_otherwise_does_not_compare(tmp_path, capsys, settings, words):
    a, b = write(tmp_path / "a", 0), write(tmp_path / "b", 1, **settings)
    said = refused(capsys, "compare", a, b)
    assert f"{a} and {b} do not compare: " in said and words in said


def test_other_prompts_do_not_compare(tmp_path, capsys):
    a = write(tmp_path / "a", 0)
    b = write(tmp_path / "b", 1, ROWS[:2])
    assert f"{a} is of 3 prompts and {b} of 2: evaluate both on the same" in refused(capsys, "compare", a, b)
    c = write(tmp_path / "c", 1, [*ROWS[:2], (("four", "counting"), (1.0, 1.0), (0.5, 0.5))])
    assert "number 3 is 'three' in the first and 'four' in the second" in refused(capsys, "compare", a, c)


def test_what_may_differ_is_told(tmp_path, capsys):
    a = write(tmp_path / "a", 0)
    b = write(tmp_path / "b", 1, of=Evaluated({**SETTINGS, "seed": 7, "max_tokens": 300}, "v", "another"))
    [found], printed = compared(capsys, a, b)
    assert found["notes"] == ["seed is 1234 and 7", "max_tokens is 200 and 300"] and "seed is 1234 and 7" in printed
    c = write(tmp_path / "c", 1, of=Evaluated({}))  # as release 0.1 wrote them
    [found], _ = compared(capsys, a, c)
    assert found["notes"] == [f"{c} does not say at which temperature it was sampled"]


def test_missing_evaluations_are_named_with_what_to_run(tmp_path, capsys):
    a = write(tmp_path / "a", 0)
    (tmp_path / "run").mkdir()
    assert "run: no evaluation there; run `underdrawing evaluate RECIPE run_dir=" in refused(
        capsys, "compare", a, tmp_path / "run"
    )
    (tmp_path / "run/recipe.yaml").write_text("")
    assert f"evaluate {tmp_path}/run/recipe.yaml run_dir={tmp_path}/run`" in refused(
        capsys, "compare", tmp_path / "run", a
    )
    assert f"{tmp_path}/nowhere: no such folder" in refused(capsys, "compare", tmp_path / "nowhere", a)
    assert "is one evaluation; --label and --all" in refused(capsys, "compare", a, a, "--all")
    other = write(tmp_path / "other/evaluations/x", 0).parents[1]
    mine = write(tmp_path / "mine/evaluations/y", 0).parents[1]
    assert "no label in common (y; x)" in refused(capsys, "compare", mine, other, "--all")
    (a / "prompts.jsonl").write_text("")
    assert "a/prompts.jsonl: no scores in it" in refused(capsys, "compare", a, a)
    (a / "prompts.jsonl").write_bytes(b"\xff\n")
    assert "a/prompts.jsonl: cannot be read, it may be cut or altered" in refused(capsys, "compare", a, a)
    (a / "prompts.jsonl").unlink()
    assert f"a/prompts.jsonl: missing, though summary.json is beside it; remove {a}" in refused(capsys, "compare", a, a)
    (a / "summary.json").write_text('{"score": 0.5, "by_')
    assert "a/summary.json: cannot be read, it may be cut or altered" in refused(capsys, "compare", a, a)
    (a / "summary.json").unlink()
    (a / "prompts.jsonl").write_text("")
    assert f"{a}: no evaluation there (summary.json is missing)" in refused(capsys, "compare", a, a)
