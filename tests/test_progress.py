"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from underdrawing import progress
from underdrawing.progress import StepProgress


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
    assert capsys.readouterr().err.splitlines()[-1] == "GRPO 52/100    16.0 min left"


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    shown = StepProgress("warm start", 4, console)
    shown.on_metrics(4, {"sft/loss": 0.5})
    shown.close()
    printed = console.file.getvalue()
    assert "warm start" in printed and "4/4" in printed and "loss 0.500" in printed
