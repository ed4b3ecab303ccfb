"""Which prompts come next: a seeded permutation an epoch, and a place in it that a checkpoint can hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.errors import UserError


class PromptCursor:
    """Draws records without repeating one before all others were drawn.

    Args:
        records: the task's training prompts.
        seed: of the permutations; epoch e's depends on (seed, e) alone.
        shuffle: False keeps the records' own order in every epoch.

    Attributes:
        taken: records drawn so far, which numbers groups through the whole run.
    """

    def __init__(self, records: Sequence[dict[str, Any]], seed: int, shuffle: bool = True) -> None:
        if not records:
            raise UserError("the task has no training prompts")
        self.records, self.seed, self.shuffle, self.taken = records, seed, shuffle, 0
        self.identity = identity(records)
        self._epoch, self._order = -1, np.empty(0, int)

    def take(self, count: int) -> list[tuple[int, dict[str, Any]]]:
        """The next `count` records, each with its group's number."""
        drawn = [(group, self.records[self._at(group)]) for group in range(self.taken, self.taken + count)]
        self.taken += count
        return drawn

    def _at(self, group: int) -> int:
        epoch, position = divmod(group, len(self.records))
        if not self.shuffle:
            return position
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
        return int(self._order[position])

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "seed": self.seed, "identity": self.identity}

    def load(self, state: dict[str, Any], changed: bool = False) -> None:
        """Take up a state() again.

        Args:
            changed: go on with other prompts than the state was taken of. Groups are numbered on, so that no noise is
                drawn twice, and the position in the epoch is that of the new prompts.

        Raises:
            UserError: the state was taken of other prompts, or with another seed: it would not be the same run.
        """
        if state["identity"] != self.identity and not changed:
            raise UserError(
                "the checkpoint's training prompts are not these: the task, its split or its version "
                "changed since. Resume with the recipe of that run, or go on with the new prompts by --changed-prompts"
            )
        if state["seed"] != self.seed:
            raise UserError(
                f"the checkpoint's run has seed {state['seed']}, not {self.seed}. Resume with the recipe of that run"
            )
        self.taken = int(state["taken"])


def identity(records: Sequence[dict[str, Any]]) -> str:
    """A fingerprint of the records and of their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]
