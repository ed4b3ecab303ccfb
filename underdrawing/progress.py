"""One line a person can follow: step, reward, held-out score, rates, time left. A plain line now and then elsewhere.

In a terminal the line is as wide as there is room: the bar shrinks first, then the last numbers are left out; title,
step and time left stay.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

PLAIN_EVERY_S = 15.0
# (metric, its name in the line), the most telling first: a narrow terminal shows as many as there is room for.
SHOWN = (
    ("reward/mean", "reward"),
    ("heldout/score", "held-out"),
    ("sft/loss", "loss"),
    ("kl", "kl"),
    ("groups/trained", "groups"),
    ("rollout/tokens_per_s", "tok/s"),
    ("sft/tokens_per_s", "tok/s"),
)
COUNTS = ("groups/trained",)
BAR, SMALL_BAR, NARROW = 24, 8, 100  # columns of the bar, and of the terminal below which the small one is drawn
TIME = 7  # columns of the longest time left, 0:00:00


class StepProgress:
    """A listener of a Tracker: `on_metrics(step, metrics)` after every step.

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
                _Bar(self.console),
                MofNCompleteColumn(),
                _Numbers(self.console, title, steps),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=steps, numbers=())

    def on_metrics(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Show a step's numbers; held-out scores stay until the next ones."""
        self._last.update({k: float(v) for k, v in metrics.items() if v is not None})
        numbers = [f"{short} {_short(name, self._last[name])}" for name, short in SHOWN if name in self._last]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if self._first_step is None:
            self._first_step, self._began = step, now
        if step >= self.steps or now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            done = step - self._first_step
            left = (now - self._began) / done * (self.steps - step) if done else None
            eta = [f"{left / 60:.1f} min left"] if left is not None and step < self.steps else []
            line = "  ".join([f"{self.title} {step}/{self.steps}", *numbers, *eta])
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def bar_width(columns: int) -> int:
    """Of a terminal so wide. 0: no bar."""
    return BAR if columns >= NARROW else SMALL_BAR if columns >= NARROW // 2 else 0


def fitting(numbers: Sequence[str], columns: int) -> str:
    """The first numbers that fit side by side into so many columns."""
    line = ""
    for number in numbers:
        longer = f"{line}  {number}" if line else number
        if len(longer) > columns:
            break
        line = longer
    return line


class _Bar(BarColumn):
    def __init__(self, console: Console) -> None:
        super().__init__(bar_width=BAR)
        self.console = console

    def render(self, task: Task):  # type: ignore[no-untyped-def]  # a bar, or nothing
        self.bar_width = bar_width(self.console.width)
        return super().render(task) if self.bar_width else Text("")


class _Numbers(ProgressColumn):
    max_refresh = None

    def __init__(self, console: Console, title: str, steps: int) -> None:
        super().__init__()
        self.console = console
        self.others = len(title) + 2 * len(str(steps)) + 1 + TIME + 4  # and a space between columns

    def render(self, task: Task) -> Text:
        room = self.console.width - self.others - bar_width(self.console.width)
        return Text(fitting(task.fields["numbers"], room), no_wrap=True)


def _short(name: str, value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 and name not in COUNTS else f"{value:,.0f}"
