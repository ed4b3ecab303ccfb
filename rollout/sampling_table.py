"""Under which parameters each decision is sampled, by number: an allowed set and a role's temperature.

The engine writes the number beside each id; writing.py turns numbers into the record's sampling parameters.

Letters: V vocabulary, L entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from formats.base import AllowedSet
from record.trajectory import mask_of, ranges_of


@dataclass(frozen=True)
class SamplingEntry:
    """One pair of allowed set and temperature that some decision was sampled under."""

    allowed: AllowedSet
    mask: int  # index into SamplingTable.masks
    whole: bool  # the allowed set is the whole vocabulary
    temperature: float


class SamplingTable:
    """Every entry met so far, by number: one cached mask for each AllowedSet, one temperature for each role.

    The engine calls `number` for each row of each tick, so it is a dictionary look-up and nothing more.
    """

    def __init__(self, size: int, temperature: dict[str, float]):
        self.size = size
        self.temperature = temperature
        self.entries: list[SamplingEntry] = []
        self._number: dict[tuple[AllowedSet, str], int] = {}
        self._mask: dict[AllowedSet, int] = {}
        self._without: dict[tuple[AllowedSet, int], AllowedSet] = {}
        self.masks: list[np.ndarray] = []  # bool [V] each, one an allowed set
        self.mask_L = np.empty(0, np.int64)  # index into masks, by number
        self.temperature_L = np.empty(0, np.float32)

    def number(self, allowed: AllowedSet, role: str) -> int:
        found = self._number.get((allowed, role))
        return self._add(allowed, role) if found is None else found

    def _add(self, allowed: AllowedSet, role: str) -> int:
        if allowed not in self._mask:
            mask_V = mask_of(allowed.ranges, self.size)
            if not mask_V.any():
                raise ValueError(f"allowed set '{allowed.name}' is empty: the cursor should have stopped")
            self._mask[allowed] = len(self.masks)
            self.masks.append(mask_V)
        temperature = self.temperature.get(role, self.temperature["default"])
        mask = self._mask[allowed]
        self.entries.append(SamplingEntry(allowed, mask, bool(self.masks[mask].all()), temperature))
        self.mask_L = np.append(self.mask_L, mask)
        self.temperature_L = np.append(self.temperature_L, np.float32(temperature))
        self._number[(allowed, role)] = number = len(self.entries) - 1
        return number

    def without(self, allowed: AllowedSet, id: int) -> AllowedSet:
        """The same set less one id (an image marker that has no room). It may be empty: see its ranges."""
        if (allowed, id) not in self._without:
            keep_V = mask_of(allowed.ranges, self.size)
            if keep_V[id]:
                keep_V[id] = False
                name = f"{allowed.name}, no room for an image"
                self._without[allowed, id] = AllowedSet(name, ranges_of(np.flatnonzero(keep_V)))
            else:
                self._without[allowed, id] = allowed
        return self._without[allowed, id]
