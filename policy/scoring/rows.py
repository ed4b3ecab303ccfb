"""Which causal rows score a trajectory, for policies whose segments enter contexts as ids.

Pure: arrays in, arrays out. Consecutive segments whose recorded contexts extend one another share one row, so a plain
trajectory is scored in one forward; a planner that sees its last frame only, a window, or a guidance branch begins a
new row where its context is no continuation.

Letters: T ids of a row, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from record.trajectory import Context, Piece, RecordError, Trajectory


@dataclass(frozen=True)
class Row:
    """One causal sequence of a trajectory under one guidance branch."""

    trajectory: int
    branch: str
    ids_T: np.ndarray  # int32
    position_T: np.ndarray  # int32 position ids
    offsets: dict[int, int]  # scored segment -> index in the row of its first id

    def __len__(self) -> int:
        return len(self.ids_T)


def piece_ids(trajectory: Trajectory, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a piece and their position ids; `piece.start` is the position of the first id that is kept.

    Raises RecordError for another form than "ids", a segment that is not there, or a range outside it.
    """
    if piece.form != "ids":
        raise RecordError(
            f"trajectory {trajectory.key}: segment {piece.segment} was seen as '{piece.form}'; "
            "a policy over tokens sees 'ids'"
        )
    if not 0 <= piece.segment < len(trajectory.segments):
        raise RecordError(
            f"trajectory {trajectory.key}: a context names segment {piece.segment} of {len(trajectory.segments)}"
        )
    ids = trajectory.segments[piece.segment].ids
    start, stop = piece.keep if piece.keep is not None else (0, len(ids))
    if not 0 <= start <= stop <= len(ids):
        raise RecordError(
            f"trajectory {trajectory.key}: a context keeps ids {start} to {stop} of segment "
            f"{piece.segment}, which has {len(ids)}"
        )
    return ids[start:stop], np.arange(piece.start, piece.start + stop - start, dtype=np.int32)


def context_ids(trajectory: Trajectory, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """All ids of a context in order, int32 [T], and their position ids, int32 [T]."""
    parts = [piece_ids(trajectory, piece) for piece in context.pieces]
    if not parts:
        return np.empty(0, np.int32), np.empty(0, np.int32)
    ids, positions = zip(*parts, strict=True)
    return np.concatenate(ids).astype(np.int32), np.concatenate(positions)


@dataclass
class _Open:
    """A row under construction: the pieces it holds so far."""

    pieces: list[tuple[int, int, int, int]] = field(default_factory=list)  # segment, position, range
    offsets: dict[int, int] = field(default_factory=dict)
    length: int = 0

    def add(self, piece: tuple[int, int, int, int]) -> None:
        self.pieces.append(piece)
        self.length += piece[3] - piece[2]


def rows_of(trajectory: Trajectory, index: int, wanted: Iterable[tuple[int, str]]) -> list[Row]:
    """The fewest rows in order that hold each wanted (segment, branch) after its recorded context.

    A branch's row is continued only by the same branch. Raises RecordError where a context is not recorded.
    """
    rows: list[tuple[str, _Open]] = []
    latest: dict[str, _Open] = {}
    for segment, branch in wanted:
        context = _recorded(trajectory, segment, branch)
        pieces = [_whole(trajectory, piece) for piece in context.pieces]
        pieces = [piece for piece in pieces if piece[3] > piece[2]]
        row = latest.get(branch)
        if row is None or row.pieces != pieces[: len(row.pieces)]:
            row = latest[branch] = _Open()
            rows.append((branch, row))
        for piece in pieces[len(row.pieces) :]:
            row.add(piece)
        row.offsets[segment] = row.length
        row.add((segment, context.start, 0, len(trajectory.segments[segment].ids)))
    return [_close(trajectory, index, branch, row) for branch, row in rows]


def _recorded(trajectory: Trajectory, segment: int, branch: str) -> Context:
    contexts = trajectory.segments[segment].contexts
    for context in contexts:
        if context.branch == branch:
            return context
    have = ", ".join(context.branch for context in contexts) or "none"
    raise RecordError(
        f"trajectory {trajectory.key}: segment {segment} ('{trajectory.segments[segment].role}') has no "
        f"recorded context for the branch '{branch}'; it has: {have}"
    )


def _whole(trajectory: Trajectory, piece: Piece) -> tuple[int, int, int, int]:
    piece_ids(trajectory, piece)  # checks it
    start, stop = piece.keep if piece.keep is not None else (0, len(trajectory.segments[piece.segment].ids))
    return piece.segment, piece.start, start, stop


def _close(trajectory: Trajectory, index: int, branch: str, row: _Open) -> Row:
    ids = [trajectory.segments[segment].ids[start:stop] for segment, _, start, stop in row.pieces]
    positions = [np.arange(at, at + stop - start, dtype=np.int32) for _, at, start, stop in row.pieces]
    return Row(index, branch, np.concatenate(ids).astype(np.int32), np.concatenate(positions), row.offsets)
