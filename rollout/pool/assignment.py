"""Which worker writes which groups next, and what becomes of the groups of one that failed. ray_workers.py asks.

Pure bookkeeping: groups are indices, workers are slots, and nothing here knows Ray.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """Groups that one worker is asked for at once."""

    groups: tuple[int, ...]
    attempt: int = 0  # failures before this one


class Assignment:
    """The queue of one generation.

    Reproducible: slot s writes the groups s, s + slots, ... in one call, and after a failure the whole call again, so
    that every trajectory meets the same neighbours in the batch, whose number decides the last bits of a matrix
    product. Otherwise a slot takes the next groups when it is free: enough to fill its rows, and half of its even share
    where that is more, so that the last calls are short.

    A group's last attempt is made alone, so that it cannot take its neighbours with it (with 1 retry, that is the only
    repetition, and its last bits may differ).

    Args:
        groups: how many there are.
        fill: how many groups fill one worker's rows.
        retries: attempts after the first.
    """

    def __init__(self, groups: int, slots: int, fill: int, retries: int, reproducible: bool) -> None:
        self.slots, self.fill, self.retries, self.reproducible = slots, max(fill, 1), retries, reproducible
        self.left = set(range(groups))  # neither finished nor dropped
        self._own: list[deque[Call]] = [deque() for _ in range(slots)]
        self._shared: deque[Call] = deque()
        self._fresh: deque[int] = deque()
        if reproducible:
            for slot in range(min(slots, groups)):
                self._own[slot].append(Call(tuple(range(slot, groups, slots))))
        else:
            self._fresh.extend(range(groups))

    def next(self, slot: int) -> Call | None:
        """What this slot does now; None: nothing is left for it at present."""
        if self._own[slot]:
            return self._own[slot].popleft()
        if self._shared:
            return self._shared.popleft()
        if not self._fresh:
            return None
        size = max(self.fill, math.ceil(len(self._fresh) / (2 * self.slots)))
        return Call(tuple(self._fresh.popleft() for _ in range(min(size, len(self._fresh)))))

    def finished(self, group: int) -> bool:
        """Note a complete group; False if it is known already (a call was repeated)."""
        if group not in self.left:
            return False
        self.left.remove(group)
        return True

    def given_up(self, call: Call) -> tuple[int, ...]:
        """Drop what a failed call left undone: it may not be made again. Returns those groups."""
        undone = tuple(group for group in call.groups if group in self.left)
        self.left.difference_update(undone)
        return undone

    def failed(self, slot: int, call: Call) -> tuple[int, ...]:
        """Queue what a failed call left undone. Returns the groups that have no attempt left: they are dropped."""
        undone = tuple(group for group in call.groups if group in self.left)
        attempt = call.attempt + 1
        if attempt > self.retries:
            self.left.difference_update(undone)
            return undone
        queue = self._own[slot] if self.reproducible else self._shared
        if attempt == self.retries:
            queue.extend(Call((group,), attempt) for group in undone)
        elif undone:
            queue.append(Call(call.groups if self.reproducible else undone, attempt))
        return ()
