"""`underdrawing why`: planted runs, whose gains are known, and what cannot be explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.answers import Answer
from evals.gains import by_image, by_part, by_role, by_tag, changed, pairs_of
from evals.heldout import Heldout, PromptScore
from evals.kept import ANSWERS, Evaluated, keep
from evals.windows import SPREAD, part_gains, role_gains, windows
from rewards.formula.expression import Expression
from tests.rewards_helpers import trajectory_of
from tests.test_cli import refused
from underdrawing.cli import main
from underdrawing.report.page import report_data, write_report

RECIPE = """
rewards:
  parts:
    good: {function: geneval}
    neat: {function: format}
    other: {function: steps, log_only: true}
  total: good * (1 + neat)
"""
TAGS = ["color"] * 10 + ["counting"] * 10


def evaluation(
    run: Path,
    label: str,
    step: int,
    good: Any,
    neat: Any,
    truth: Any,
    other: Any = 0.5,
    by: str = "final_image",
    **settings: Any,
) -> None:
    """Write an evaluation of 20 prompts in two tags, two answers each, with these values of parts and truth."""
    rng = np.random.default_rng(3)  # prompts differ, in every evaluation alike
    hard = rng.uniform(-0.05, 0.05, (20, 2))
    hard -= hard.mean()
    answers = []
    for prompt in range(20):
        for sample in range(2):
            g, n, t, o = (np.broadcast_to(x, 20)[prompt] + (hard[prompt, sample] if x is not other else 0)
                          for x in (good, neat, truth, other))  # fmt: skip
            measures = {"final_image": t, "reward": g * (1 + n), "reward/good": g, "reward/neat": n, "reward/other": o}
            credit = {"good": {"sketch": g / 4, "redraw": 3 * g / 4}}
            answers.append(Answer(prompt, sample, {k: float(v) for k, v in measures.items()}, credit))
    prompts = []
    for number, tag in enumerate(TAGS):
        its = answers[2 * number : 2 * number + 2]
        prompts.append(
            PromptScore(f"p{number}", tag, {m: float(np.mean([a.measures[m] for a in its])) for m in its[0].measures})
        )
    thoughts = [[trajectory_of({"prompt": p.prompt})] * 2 for p in prompts]
    heldout = Heldout(prompts, thoughts, {}, by, None, answers, {"total": "good * (1 + neat)", "schedules": {}})
    keep(heldout, run / "evaluations" / label, Evaluated({"seed": 1, **settings}, "w", label, step), answers=0)


def planted(run: Path, good=(0.4, 0.8), neat=(0.5, 0.5), truth=(0.4, 0.8), other=(0.5, 0.5), metrics=True) -> Path:
    """A run whose parts and truth moved as they say."""
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(RECIPE)
    for place, (label, step) in enumerate((("before", 0), ("after", 40))):
        evaluation(run, label, step, good[place], neat[place], truth[place], other[place])
    if metrics:
        rows = []
        for step in range(1, 41):
            at = (step - 1) / 39
            g, n = (low + at * (high - low) for low, high in (good, neat))
            rows.append({"step": step, "reward/mean": g * (1 + n), "reward/good": g, "reward/neat": n})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def told(capsys, run: Path, *more: str) -> dict[str, Any]:
    assert main(["why", str(run), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_true_gain_is_not_flagged(capsys, tmp_path):
    found = told(capsys, planted(tmp_path / "run"))
    assert not found["flagged"] and found["trained"]["interval"][0] > 0
    [truth, other] = [each for each in found["watched"]]
    assert (truth["name"], truth["moved"]) == ("final_image", "rose") and other["constant"]
    assert "final_image, watched beside it, rose with it" in " ".join(found["verdict"])
    assert (found["from"], found["to"]) == ("before (step 0)", "after (step 40)")


@pytest.mark.parametrize(
    ("truth", "moved", "words"),
    [((0.6, 0.4), "fell", "FELL from 0.600 to 0.400"), ((0.5, "noise"), "flat", "did NOT rise with it")],
)
def test_a_planted_hack_is_flagged_in_words(capsys, tmp_path, truth, moved, words):
    noise = 0.5 + np.resize([0.1, -0.1], 20)  # as many prompts up as down, and as much
    found = told(capsys, planted(tmp_path / "run", truth=[noise if value == "noise" else value for value in truth]))
    assert found["flagged"] and found["watched"][0]["moved"] == moved
    sentence = found["verdict"][1]
    assert words in sentence and "may have found what the reward overlooks" in sentence


def test_an_unpaid_part_is_flagged_only_where_it_falls(capsys, tmp_path):
    moves = np.resize([0.4, 0.6], 20)
    flat = told(capsys, planted(tmp_path / "flat", other=(0.5, moves)))
    assert not flat["flagged"] and "reward/other, which is not paid, stayed where it was" in flat["verdict"][2]
    assert told(capsys, planted(tmp_path / "fell", other=(0.5, moves - 0.3)))["flagged"]


@pytest.mark.parametrize("level, watched", [("trajectory", True), ("segment", False), ("reward_to_go", False)])
def test_a_part_that_credits_segments_is_paid(capsys, tmp_path, level, watched):
    run = planted(tmp_path / "run")
    recipe = RECIPE.replace("good * (1 + neat)", "good") + f"grpo: {{advantage_level: {level}}}\n"
    (run / "recipe.yaml").write_text(recipe)
    found = told(capsys, run)
    assert ("reward/neat" in {each["name"] for each in found["watched"]}) == watched


def test_a_reward_that_did_not_rise_explains_nothing_away(capsys, tmp_path):
    found = told(capsys, planted(tmp_path / "run", good=(0.4, 0.4), truth=(0.6, 0.4)))
    assert not found["flagged"] and found["verdict"][0].startswith("The trained reward did not rise beyond chance")


def test_every_table_adds_up_to_its_whole(capsys, tmp_path):
    found = told(capsys, planted(tmp_path / "run", neat=(0.5, 0.8)))
    for table in (*found["parts"], *found["roles"], found["by_image"]):
        if table is not None:
            whole = table["whole"]
            assert sum(line["gain"] for line in table["lines"]) == pytest.approx(whole["gain"], abs=1e-9)
            assert whole["to"] - whole["from"] == pytest.approx(whole["gain"], abs=1e-9)
    assert sum(line["gain"] for line in found["by_tag"]) == pytest.approx(found["score"]["gain"], abs=1e-9)
    [share] = [each for each in found["changed"] if each["measure"] == "reward"]
    assert share["gained"] + share["lost"] == pytest.approx(found["trained"]["gain"], abs=1e-9)
    assert (share["up"], share["down"], share["same"]) == (20, 0, 0)
    heldout, training = found["parts"]
    # Of the product good * (1 + neat) good's change 0.4 counts times the mean of 1 + neat, neat's 0.3 times good's.
    by_name = {line["name"]: line["gain"] for line in heldout["lines"]}
    assert by_name == pytest.approx({"good": 0.4 * 1.65, "neat": 0.3 * 0.6}, abs=0.02)
    assert training["name"] == "training reward by part" and found["roles"][0]["name"] == "good"


def test_it_is_printed_and_shown(capsys, tmp_path):
    run = planted(tmp_path / "run", truth=(0.6, 0.4))
    assert main(["why", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "reward by part" in printed and "'good' by role" in printed and "held-out score by tag" in printed
    assert "20 of 20 prompts gained" in printed
    page = write_report(report_data(run), run / "report.html").read_text()
    assert "Why the reward went up" in page and '<p class="note">final_image, watched beside it, FELL' in page


def test_steps_of_training_alone(capsys, tmp_path):
    run = planted(tmp_path / "run")
    found = told(capsys, run, "--from", "1", "--to", "20")
    assert found["score"] is None and found["notes"] == ["training: steps 1 to 10 against steps 11 to 20"]
    # good goes from 0.4 to 0.8 in 39 steps: ten steps apart by 4 / 39, times 1.5.
    assert found["trained"]["gain"] == pytest.approx(4 / 39 * 1.5)
    assert (
        told(capsys, run, "--from", "0", "--to", "40")["score"]["name"] == "final_image"
    )  # evaluations of those steps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "befor"], "--from befor: no evaluation 'befor'; did you mean 'before'? Known: after, before"),
        (["--to", "99"], "--to 99: no evaluation is of that step, and metrics.jsonl has steps 1 to 40"),
        (["--from", "after", "--to", "after"], "--from and --to are the same; name two of before, after"),
        (["--to", "7"], "--to names a step of training; give --from too"),
    ],
)
def test_ends_that_are_none_are_named(capsys, tmp_path, arguments, words):
    assert words in refused(capsys, "why", planted(tmp_path / "run"), *arguments)


def test_what_cannot_be_explained_is_a_sentence(capsys, tmp_path):
    assert "no such folder; give a run's" in refused(capsys, "why", tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    said = refused(capsys, "why", empty)
    assert "no evaluation there; run `underdrawing evaluate RECIPE run_dir=" in said and "--from" not in said
    (empty / "metrics.jsonl").write_text('{"step": 3}\n{"step": 9}\n')
    assert "or give two steps of its training: --from 3 --to 9" in refused(capsys, "why", empty)
    said = refused(capsys, "why", empty, "--from", 3, "--to", 9)
    assert "2 steps of training are between those ends, and two windows of them need at least 4" in said
    (empty / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(3, 10)))
    assert "nothing there has the parts of the reward" in refused(capsys, "why", empty, "--from", 3, "--to", 9)

    bare = planted(tmp_path / "bare", metrics=False)
    for label in ("before", "after"):
        (bare / "evaluations" / label / ANSWERS).unlink()
    assert "evaluate both with evaluate.by=[geneval,reward]" in refused(capsys, "why", bare)

    cut = planted(tmp_path / "cut")
    (cut / "evaluations/after" / ANSWERS).write_text('{"prompt": 0}\n')
    assert "answers.jsonl line 1: not a row of answers" in refused(capsys, "why", cut)


def test_evaluations_that_do_not_compare_are_refused(capsys, tmp_path):
    run = planted(tmp_path / "run")
    evaluation(run, "warmer", 50, 0.5, 0.5, 0.5, temperature=2.0)
    evaluation(run, "colder", 60, 0.5, 0.5, 0.5, temperature=0.5)
    assert "do not compare: temperature is 2.0 and 0.5" in refused(
        capsys, "why", run, "--from", "warmer", "--to", "colder"
    )
    assert told(capsys, run)["from"] == "before (step 0)"  # which says no temperature
    alone = tmp_path / "alone"
    alone.mkdir()
    evaluation(alone, "only", 0, 0.5, 0.5, 0.5)
    assert "'only' is its only evaluation" in refused(capsys, "why", alone)


def test_another_formula_than_the_recorded_rewards_is_refused(capsys, tmp_path):
    run = planted(tmp_path / "run")
    path = run / "evaluations/after/summary.json"
    summary = json.loads(path.read_text())
    summary["formula"]["total"] = "good + neat"
    path.write_text(json.dumps(summary))
    assert "the formula 'good + neat' gives another gain of the recorded parts" in refused(capsys, "why", run)
    summary["formula"] = {"total": "good"}
    path.write_text(json.dumps(summary))
    assert "has no formula that can be read" in refused(capsys, "why", run)


def test_answers_that_one_side_did_not_judge_are_left_out_and_told(capsys, tmp_path):
    run = planted(tmp_path / "run")
    path = run / "evaluations/after" / ANSWERS
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["measures"]["reward"] = rows[0]["measures"]["reward/good"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "reward by part: over the 39 of 40 answers that both evaluations have judged" in told(capsys, run)["notes"]


def test_without_its_recipe_a_run_tells_what_it_can(capsys, tmp_path):
    run = planted(tmp_path / "run")
    (run / "recipe.yaml").write_text("rewards: [")
    found = told(capsys, run)
    assert [table["name"] for table in found["parts"]] == ["reward by part"]
    assert "recipe.yaml cannot be read" in " ".join(found["notes"])


# ---- by hand ------------------------------------------------------------------------------------------------------


def scores(*rows):
    return [PromptScore(str(n), tag, {"first_sketch": a, "final_image": b}) for n, (tag, a, b) in enumerate(rows)]


def test_tags_images_and_prompts_by_hand():
    before = scores(("a", 0.0, 0.5), ("a", 0.0, 0.0), ("b", 0.5, 0.5))
    after = scores(("a", 1.0, 1.0), ("a", 0.0, 0.5), ("b", 0.5, 0.25))
    pairs = pairs_of(before, after, "final_image")
    # a: 0.25 -> 0.75, b: 0.5 -> 0.25; of the mean of two tags half of each: 0.25 - 0.125.
    assert [(x.name, x.before, x.after, x.gain.difference) for x in by_tag(pairs, 100)] == [
        ("a", 0.25, 0.75, 0.25),
        ("b", 0.5, 0.25, -0.125),
    ]
    found = by_image(before, after, 100)
    # First sketches: a 0 -> 0.5, b 0.5 -> 0.5: 0.25. Refining: a 0.25 -> 0.25, b 0 -> -0.25: -0.125.
    assert [line.gain.difference for line in (found.whole, *found.lines)] == [0.125, 0.25, -0.125]
    share = changed("final_image", pairs)
    assert (share.up, share.down, share.same, share.gained, share.lost) == (2, 1, 0, 0.25, -0.125)


def test_parts_and_roles_by_hand():
    def answers(*rows):
        return [
            Answer(n, 0, {"reward": a * b, "reward/a": a, "reward/b": b}, {"a": of})
            for n, (a, b, of) in enumerate(rows)
        ]

    before = answers((1.0, 3.0, {"x": 1.0}), (0.0, 1.0, {"x": 0.0}))
    after = answers((2.0, 5.0, {"x": 0.5, "y": 1.5}), (0.0, 1.0, {"x": 0.0}))
    found = by_part(Expression("a * b", ["a", "b"]), before, after, ["t", "t"], resamples=50)
    # The first prompt as in tests/test_attribution.py, 4 and 3; the second none: means 2 and 1.5.
    assert [(x.name, x.before, x.after, x.gain.difference) for x in found.lines] == [
        ("a", 0.5, 1.0, 2.0),
        ("b", 2.0, 3.0, 1.5),
    ]
    assert (found.whole.before, found.whole.after, found.whole.gain.difference) == (1.5, 5.0, 3.5)
    [role] = by_role(before, after, ["t", "t"], 50)
    assert [(x.name, x.gain.difference) for x in role.lines] == [("x", -0.25), ("y", 0.75)]
    assert role.whole.gain.difference == 0.5


def test_windows_by_hand():
    def row(step, a, b, reward):
        return {"step": step, "reward/mean": reward, "reward/a": a, "reward/b": b, "reward/a/role/x": a / 2,
                "reward/a/role/y": a / 2}  # fmt: skip

    rows = [row(1, 1, 2, 2.0), row(2, 3, 2, 6.0), row(3, 9, 9, 9.0), row(4, 4, 2, 9.0), row(5, 4, 4, 17.0)]
    first, last = windows(rows, 2)
    assert [r["step"] for r in first] == [1, 2] and [r["step"] for r in last] == [4, 5]
    assert windows(rows, 2, start=3) is None and len(windows(rows, 9, end=4)[0]) == 2
    found = part_gains(Expression("a * b", ["a", "b"]), first, last, resamples=20)
    # At the means a * b goes from 2 * 2 to 4 * 3: a's 2 times 2.5, b's 1 times 3; the mean reward from 4 to 13.
    gains = {line.name: line.gain.difference for line in found.lines}
    assert gains == pytest.approx({"a": 5.0, "b": 3.0, SPREAD: 1.0}) and found.whole.gain.difference == 9.0
    linear = part_gains(Expression("a + b", ["a", "b"]), *([{**r, "reward/mean": r["reward/a"] + r["reward/b"]}
                                                            for r in side] for side in (first, last)))  # fmt: skip
    assert {line.name for line in linear.lines} == {"a", "b"}
    [role] = role_gains(first, last)
    assert role.whole.gain.difference == 2.0 and [line.gain.difference for line in role.lines] == [1.0, 1.0]
