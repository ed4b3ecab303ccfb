"""A real little world to plan in, for the tests of rewards over plans drawn as images: a walker on a grid with walls.

A record's `grid` is a list of strings: "S" start, "G" goal, "#" wall, "." free. An image has one block of pixels a
cell: white, black walls, and the walker in red.
"""

from __future__ import annotations

from collections import deque

import numpy as np

CELL = 4
WALKER, WALL, FREE = (220, 30, 30), (0, 0, 0), (255, 255, 255)


class GridWorld:
    name = "grid"

    def first_state(self, record):
        return _find(record["grid"], "S") if "grid" in record else None

    def state_in(self, record, image):
        grid = record["grid"]
        if image.shape[:2] != (len(grid) * CELL, len(grid[0]) * CELL):
            return None
        cells = image.reshape(len(grid), CELL, len(grid[0]), CELL, 3).mean((1, 3))
        walkers = np.argwhere(np.abs(cells - WALKER).max(-1) < 40)
        return tuple(int(i) for i in walkers[0]) if len(walkers) == 1 else None

    def next_states(self, record, state):
        grid, (row, column) = record["grid"], state
        near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        return {(r, c) for r, c in near if 0 <= r < len(grid) and 0 <= c < len(grid[0]) and grid[r][c] != "#"}

    def distance(self, record, state):
        far, left = {state: 0}, deque([state])
        while left:
            here = left.popleft()
            if record["grid"][here[0]][here[1]] == "G":
                return far[here]
            for there in self.next_states(record, here):
                if there not in far:
                    far[there] = far[here] + 1
                    left.append(there)
        return None


def draw(grid, *walkers):
    """The grid with a walker in each given cell, uint8 [height, width, 3]."""
    cells = np.array([[WALL if cell == "#" else FREE for cell in row] for row in grid], np.uint8)
    for walker in walkers:
        cells[walker] = WALKER
    return cells.repeat(CELL, 0).repeat(CELL, 1)


def _find(grid, mark):
    return next((r, c) for r, row in enumerate(grid) for c, cell in enumerate(row) if cell == mark)
