"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from evals.bootstrap import compare_scores
from evals.heldout import PromptScore
from evals.kept import KeptEvaluation
from underdrawing import progress
from underdrawing.cli import StderrHandler
from underdrawing.progress import StepProgress, fitting
from underdrawing.tables import print_comparison, print_evaluation


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_a_line_comes_every_while_and_at_the_end(clock, capsys):
    shown = StepProgress("GRPO", 10, Console(file=io.StringIO()))
    for step in range(1, 11):
        clock.now += 4.0
        shown.on_metrics(step, {"reward/mean": step / 10, "unheard of": 1.0})
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    # The first at least 15 s after the start: step 4, 3 steps after the first one that was timed, 4 s each.
    assert lines == [
        "GRPO 4/10  reward 0.400  0.4 min left",
        "GRPO 8/10  reward 0.800  0.1 min left",
        "GRPO 10/10  reward 1.000",
    ]


def test_a_held_out_score_stays_until_the_next_and_nothing_is_no_number(clock, capsys):
    shown = StepProgress("GRPO", 3, Console(file=io.StringIO()))
    for step, metrics in enumerate(({"heldout/score": 0.25}, {"kl": None, "rollout/tokens_per_s": 12345.6}), 1):
        clock.now += 20.0
        shown.on_metrics(step, metrics)
    assert capsys.readouterr().err.splitlines()[-1] == "GRPO 2/3  held-out 0.250  tok/s 12,346  0.3 min left"


def test_a_resumed_run_times_its_own_steps_only(clock, capsys):
    shown = StepProgress("GRPO", 100, Console(file=io.StringIO()))
    for step in (51, 52):  # 20 s a step, 48 steps are left
        clock.now += 20.0
        shown.on_metrics(step, {})
    assert capsys.readouterr().err.splitlines()[-1] == "GRPO 52/100  16.0 min left"


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    shown = StepProgress("warm start", 4, console)
    shown.on_metrics(4, {"sft/loss": 0.5})
    shown.close()
    printed = console.file.getvalue()
    assert "warm start" in printed and "4/4" in printed and "loss 0.500" in printed


FIVE = {
    "reward/mean": 0.875,
    "heldout/score": 0.75,
    "kl": 0.003,
    "groups/trained": 16.0,
    "rollout/tokens_per_s": 3920.0,
}


def last_line(printed: str) -> str:
    """What stands on the terminal's line in the end, without colors."""
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", printed).replace("\r", "\n")
    return [line.rstrip() for line in plain.split("\n") if line.strip()][-1]


@pytest.mark.parametrize(
    "width, numbers",
    [
        (30, ""),
        (50, "reward 0.875"),
        (80, "reward 0.875  held-out 0.750  kl 0.003"),
        (140, "reward 0.875  held-out 0.750  kl 0.003  groups 16  tok/s 3,920"),
    ],
)
def test_a_narrow_terminal_loses_numbers_and_never_the_step_or_the_time(width, numbers):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    shown = StepProgress("GRPO", 1000, console)
    shown.on_metrics(120, FIVE)
    shown.close()
    line = last_line(console.file.getvalue())
    assert line.startswith("GRPO ") and " 120/1000" in line and "\u2026" not in line and len(line) <= width
    assert re.search(r"120/1000 +" + re.escape(numbers) + r" +(-|\d)[-:\d]*$", line), line


def test_the_first_numbers_that_fit():
    assert fitting(["ab 1", "cd 2"], 10) == "ab 1  cd 2" and fitting(["ab 1", "cd 2"], 9) == "ab 1"
    assert fitting(["ab 1", "c"], 3) == fitting([], 80) == ""


def test_a_message_goes_above_the_bar_and_not_into_it(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger, handler = logging.getLogger("rl.test"), StderrHandler()
    logger.addHandler(handler)
    try:
        shown = StepProgress("GRPO", 9, Console(stderr=True, force_terminal=True, width=80))
        shown.on_metrics(3, {})
        logger.warning("step 3: three steps in a row trained nothing")
        shown.on_metrics(4, {})
        shown.close()
    finally:
        logger.removeHandler(handler)
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue().replace("\r", "\n")).split("\n")
    assert "step 3: three steps in a row trained nothing" in [line.rstrip() for line in lines]


@pytest.mark.parametrize("width", [50, 80, 140])
def test_tables_are_whole_on_narrow_terminals(width, tmp_path):
    folder = tmp_path / "a-run-with-a-long-name" / "evaluations" / "step-000040-temperature-0.5"
    scores = [
        PromptScore(str(n), tag, {"final_image": n / 4, "first_sketch": 0.5})
        for n, tag in enumerate(("color_attr", "single_object"))
    ]
    kept = KeptEvaluation(folder, scores, {"by_tag": {"color_attr": 0.0, "single_object": 0.25}})
    console = Console(file=io.StringIO(), width=width)
    print_evaluation(console, kept)
    print_comparison(console, kept, kept, compare_scores(scores, scores), ["seed is 1 and 2"])
    printed = console.file.getvalue()
    assert "\u2026" not in printed
    assert f"kept in {folder}\n" in printed and f"A: {folder}\n" in printed  # one line each: a terminal folds them
    for words in ("color_attr", "single_object", "what refining adds", "first image alone", "0.125", "+0.000"):
        assert words in printed
