"""Steps that trained nothing: told now and then with the reasons by count, and at the end; past a limit they end a run.

The account is read from the lines of metrics.jsonl, so that a resumed run goes on counting.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rl.ledger import CUT_OFF, FAILED, GREEDY, UNJUDGED, ZERO_VARIANCE

logger = logging.getLogger(__name__)
FIRST_TOLD = 3  # steps in a row; told again whenever there are twice as many
MEANING = {
    ZERO_VARIANCE: "every member earned the same",
    UNJUDGED: "fewer than two members have a reward",
    FAILED: "the rollouts never came back whole",
    CUT_OFF: "all members hit a limit, and grpo.mask_truncated_completions leaves those out",
    GREEDY: "nothing was sampled: temperature 0 has no density to train",
}


class IdleSteps:
    """How long a run has been without an optimiser step, and why.

    Args:
        limit: steps in a row without one after which `after` says to stop; None: never.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.steps = self.idle = self.in_a_row = 0
        self._reasons: Counter[str] = Counter()  # of the groups of all idle steps
        self._row: Counter[str] = Counter()  # of those in a row
        self._cut_off: list[float] = []  # share of the members that hit a limit, by step in a row
        self._told = False

    def recall(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take up the lines of metrics.jsonl of the steps that are done."""
        for row in rows:
            self._count(row)

    def after(self, step: int, metrics: Mapping[str, Any], last: bool = False) -> str | None:
        """Count a step, and warn where it is time. Returns a sentence where the limit is reached; None: go on.

        Args:
            last: the run ends with this step: the account of all its steps is told where they were idle too often.
        """
        self._count(metrics)
        stop = self.limit is not None and self.in_a_row >= self.limit
        row = f"{self.in_a_row} step{'s' if self.in_a_row > 1 else ''} in a row trained nothing: {self._why()}"
        if self.in_a_row and not stop and _told_at(self.in_a_row):
            logger.warning("step %d: %s", step, row)
        if last and self.idle and (self._told or self.idle == self.steps):
            moved = "the weights are those that the run started from" if self.idle == self.steps else ""
            logger.warning(
                "%d of %d steps trained nothing%s: %s",
                self.idle,
                self.steps,
                f", and {moved}" if moved else "",
                told(self._reasons),
            )
        return row if stop else None

    def _count(self, row: Mapping[str, Any]) -> None:
        self.steps += 1
        if row.get("optimizer_steps"):
            self.in_a_row = 0
            self._row.clear()
            self._cut_off.clear()
            return
        self.idle += 1
        self.in_a_row += 1
        self._told |= self.in_a_row >= FIRST_TOLD
        reasons = {
            name.removeprefix("groups/dropped/"): int(count)
            for name, count in row.items()
            if name.startswith("groups/dropped/") and count
        }
        self._row.update(reasons)
        self._reasons.update(reasons)
        self._cut_off.append(float(row.get("groups/cut_off") or 0.0))

    def _why(self) -> str:
        cut_off = sum(self._cut_off) / len(self._cut_off) if self._cut_off else 0.0
        hint = f"; {cut_off:.0%} of the members hit a limit (rollout.max_tokens, say)" if cut_off >= 0.5 else ""
        return told(self._row) + hint


def told(reasons: Mapping[str, int]) -> str:
    """Groups by reason, the most frequent first, in words."""
    ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    each = [f"{count} {name}" + (f" ({MEANING[name]})" if name in MEANING else "") for name, count in ordered]
    return f"of {sum(reasons.values())} groups {', '.join(each)}" if each else "there were no groups"


def _told_at(in_a_row: int) -> bool:
    """FIRST_TOLD, and every doubling of it."""
    times, rest = divmod(in_a_row, FIRST_TOLD)
    return not rest and times & (times - 1) == 0
