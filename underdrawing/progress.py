"""One line a person can follow: step, reward, held-out score, rates, time left. A plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 15.0
SHOWN = (
    ("reward/mean", "reward"),
    ("heldout/score", "held-out"),
    ("sft/loss", "loss"),
    ("kl", "kl"),
    ("groups/trained", "groups"),
    ("rollout/tokens_per_s", "tok/s"),
    ("sft/tokens_per_s", "tok/s"),
)


class StepProgress:
    """A listener of a Tracker: `heard(step, metrics)` after every logged step.

    Args:
        title: of the job.
        steps: how many there are.
    """

    def __init__(self, title: str, steps: int, console: Console | None = None) -> None:
        self.title, self.steps = title, steps
        self.console = console or Console(stderr=True)
        self._last: dict[str, float] = {}
        self._printed = self._began = time.monotonic()
        self._first_step: int | None = None
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=steps, shown="")

    def on_metrics(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Show a step's numbers; held-out scores stay until the next ones."""
        self._last.update({k: float(v) for k, v in metrics.items() if v is not None})
        shown = "  ".join(f"{short} {_short(self._last[name])}" for name, short in SHOWN if name in self._last)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
            return
        now = time.monotonic()
        if self._first_step is None:
            self._first_step, self._began = step, now
        if step >= self.steps or now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            done = step - self._first_step
            left = (now - self._began) / done * (self.steps - step) if done else None
            eta = f"  {left / 60:.1f} min left" if left is not None and step < self.steps else ""
            print(f"{self.title} {step}/{self.steps}  {shown}{eta}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
