"""Which passes go into one forward, and which forwards each process makes.

A forward's size is what it takes as forwarded (`policy.base.forwarded`): guidance branches and, where a family pads,
padding included. Collective operations inside a module (FSDP) wait for every process, so all make equally many forwards
over equal modules.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from policy.base import Pass, forwarded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forward:
    """One forward of one process. `passes` are numbers."""

    passes: tuple[int, ...]
    modules: frozenset[str]
    padding: bool = False  # made for the others' sake: another forward holds these passes too


def deal(passes: Sequence[Pass], budget: int, processes: int, together: bool = False) -> list[list[Forward]]:
    """By process, its forwards in order. All processes get equally many, the n-th over the same modules and, since
    forwards are dealt by falling size, of nearly the same size.

    Where a process has none left of a kind, it makes the smallest of that kind again. `together`: the passes of one
    trajectory are never parted.
    """
    units = [[number] for number in range(len(passes))]
    if together:
        of: dict[int, list[int]] = {}
        for number, one in enumerate(passes):
            of.setdefault(id(one.trajectory), []).append(number)
        units = list(of.values())
    by_modules: dict[frozenset[str], list[list[int]]] = {}
    for unit in units:
        by_modules.setdefault(modules_of(passes[number] for number in unit), []).append(unit)
    dealt: list[list[Forward]] = [[] for _ in range(processes)]
    for modules in sorted(by_modules, key=sorted):
        alike = by_modules[modules]
        packs = pack([[passes[number] for number in unit] for unit in alike], budget, processes)
        smallest = min(alike, key=lambda unit: forwarded([passes[number] for number in unit]))
        for start in range(0, len(packs), processes):
            for rank in range(processes):
                if start + rank < len(packs):
                    numbers = tuple(number for unit in packs[start + rank] for number in alike[unit])
                    dealt[rank].append(Forward(numbers, modules))
                else:
                    dealt[rank].append(Forward(tuple(smallest), modules, padding=True))
    return dealt


def modules_of(passes: Iterable[Pass]) -> frozenset[str]:
    """Everything that one forward of these passes touches."""
    return frozenset().union(*(one.modules for one in passes))


@dataclass
class _Load:
    """A forward under construction."""

    units: list[int] = field(default_factory=list)
    packed: int = 0  # slots without padding
    rows: int = 0  # that are padded
    longest: int = 0

    def slots(self, unit: Sequence[Pass] = ()) -> int:
        """What it takes, with `unit` added."""
        packed, rows, longest = self._with(unit)
        return packed + rows * longest

    def add(self, number: int, unit: Sequence[Pass]) -> None:
        self.units.append(number)
        self.packed, self.rows, self.longest = self._with(unit)

    def _with(self, unit: Sequence[Pass]) -> tuple[int, int, int]:
        packed = self.packed + sum(one.cost for one in unit if not one.rows)
        rows = self.rows + sum(len(one.rows) for one in unit)
        return packed, rows, max([self.longest, *(max(one.rows) for one in unit if one.rows)])


def pack(units: Sequence[Sequence[Pass]], budget: int, processes: int = 1) -> list[list[int]]:
    """The numbers of the units of each forward, largest forward first: best fit by falling size, so that rows which are
    padded share a forward with rows as long. A unit over the budget is a forward by itself.

    The budget is lowered to a process's fair share, so that a small batch is divided among all of them.
    """
    if not units:
        return []
    size_U = [forwarded(unit) for unit in units]
    key_U = [
        max((row for one in unit for row in one.rows), default=size) for unit, size in zip(units, size_U, strict=True)
    ]
    limit = min(budget, max(-(-sum(size_U) // processes), *size_U))
    loads: list[_Load] = []
    for number in sorted(range(len(units)), key=lambda number: -key_U[number]):  # stable: ties keep their order
        fitting = [(slots, load) for load in loads if (slots := load.slots(units[number])) <= limit]
        if not fitting:
            loads.append(_Load())
            fitting = [(0, loads[-1])]
        max(fitting, key=lambda found: found[0])[1].add(number, units[number])
    packs = [load.units for load in sorted(loads, key=lambda load: -load.slots())]
    while len(packs) < min(processes, len(units)):
        divided = next(units for units in packs if len(units) > 1)
        packs.remove(divided)
        packs += [divided[: len(divided) // 2], divided[len(divided) // 2 :]]
    return packs


def tell_over_budget(passes: Iterable[Pass], budget: int, told: set[tuple[str, ...]]) -> None:
    """Warn of passes that take more than the budget by themselves, by name; `told` are the roles of those that were
    named before. They run all the same: what cannot be divided is not left out, though memory may not hold it."""
    for one in passes:
        roles = tuple(one.trajectory.segments[number].role for number in one.segments)
        if roles in told or (slots := forwarded([one])) <= budget:
            continue
        told.add(roles)
        named = ", ".join(f"{n} ('{role}')" for n, role in zip(one.segments, roles, strict=True))
        logger.warning(
            "trajectory %s: segment%s %s cannot be divided and take%s %d slots in one forward, over "
            "grpo.tokens_per_micro_batch (%d). If memory holds it, raise that key; else shorten contexts or guide with "
            "fewer branches. Passes of the same roles are not named again",
            *(one.trajectory.key, "s" * (len(roles) > 1), named, "s" * (len(roles) == 1)),
            *(slots, budget),
        )
