"""Trajectories to training rows. What is learned is what the policy itself would have to decide.

Letters: B rows, L lines of a batch, T ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from record.trajectory import Modality, Trajectory
from runtime.errors import UserError

IGNORE = -100


class Row(TypedDict):
    input_ids: list[int]
    labels: list[int]  # the id itself where it is learned, -100 elsewhere; not shifted
    weights: list[float]  # of each id in the cross-entropy
    roles: list[int]  # of each id, into role_names


@dataclass(frozen=True)
class Cut:
    """How a set of rows met the length limit."""

    rows: int
    shortened: int  # rows that lost segments from their end
    dropped: int  # rows in which nothing learnable was left


def role_names(trajectories: Sequence[Trajectory]) -> list[str]:
    """The roles of all segments, sorted: on every process the same."""
    return sorted({segment.role for trajectory in trajectories for segment in trajectory.segments})


def training_rows(
    trajectories: Sequence[Trajectory], max_length: int, role_weights: Mapping[str, float] | None = None
) -> tuple[list[Row], Cut]:
    """One row a trajectory: every segment's ids, labels on trained ones, weights by role (1 where none is given).

    A row longer than `max_length` loses whole segments from its end, so no image is ever cut. The end marker of an
    image is forced in sampling and therefore not learned.

    Raises:
        UserError: nothing is left to learn from.
    """
    rows: list[Row] = []
    number_of = {role: number for number, role in enumerate(role_names(trajectories))}
    shortened = dropped = 0
    for trajectory in trajectories:
        input_ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        roles: list[int] = []
        for segment in trajectory.segments:
            if len(input_ids) + len(segment.ids) > max_length:
                shortened += 1
                break
            ids = [int(i) for i in segment.ids]
            input_ids += ids
            weights += [(role_weights or {}).get(segment.role, 1.0)] * len(ids)
            roles += [number_of[segment.role]] * len(ids)
            if not segment.trained:
                labels += [IGNORE] * len(ids)
            elif segment.modality is Modality.IMAGE_TOKENS:
                labels += [*ids[:-1], IGNORE]
            else:
                labels += ids
        if any(label != IGNORE for label in labels):
            rows.append(Row(input_ids=input_ids, labels=labels, weights=weights, roles=roles))
        else:
            dropped += 1
    if not rows:
        raise UserError(
            f"sft: no demonstration has a trained segment within {max_length} ids; raise sft.max_length "
            "or look at the demonstrations' segments"
        )
    return rows, Cut(len(rows), shortened, dropped)


def rows_after_separator(
    trajectories: Sequence[Trajectory],
    max_length: int,
    separator: int,
    role_weights: Mapping[str, float] | None = None,
) -> tuple[list[Row], Cut]:
    """Rows as the release of Thinking with Generated Images (arXiv:2505.22525) labels them.

    Every id after the separator is learned: observations, mistakes and the forced end marker of an image too. A row
    longer than `max_length` is left out whole; 5119 is the release's limit. One with nothing after its separator
    stays. The release learns padding as well: see `Collator.learn_padding`.

    Raises:
        UserError: a row has no separator or several; no row is left.
    """
    rows: list[Row] = []
    number_of = {role: number for number, role in enumerate(role_names(trajectories))}
    for index, trajectory in enumerate(trajectories):
        input_ids = [int(i) for segment in trajectory.segments for i in segment.ids]
        if len(input_ids) > max_length:
            continue
        if (count := input_ids.count(separator)) != 1:
            raise UserError(
                f"demonstration {index} ({trajectory.prompt!r}): its ids hold the separator (id {separator}) {count} "
                "times; sft.labels=release learns what comes after the only one, which ends the prompt"
            )
        start = input_ids.index(separator) + 1
        weights = [(role_weights or {}).get(segment.role, 1.0) for segment in trajectory.segments for _ in segment.ids]
        roles = [number_of[segment.role] for segment in trajectory.segments for _ in segment.ids]
        rows.append(Row(input_ids=input_ids, labels=[IGNORE] * start + input_ids[start:], weights=weights, roles=roles))
    if not rows:
        raise UserError(f"sft: no demonstration is within {max_length} ids; raise sft.max_length")
    return rows, Cut(len(rows), 0, len(trajectories) - len(rows))


def lines_of(length_B: Sequence[int], capacity: int) -> list[list[int]]:
    """Which rows share a line: best fit, longest first; every line holds at most `capacity` ids."""
    lines: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(length_B)), key=lambda b: -length_B[b]):  # stable: ties keep their order
        fitting = [line for line, left in enumerate(room) if left >= length_B[row]]
        if fitting:
            line = min(fitting, key=lambda line: room[line])
            lines[line].append(row)
            room[line] -= length_B[row]
        else:
            lines.append([row])
            room.append(capacity - length_B[row])
    return lines


@dataclass(frozen=True)
class Collator:
    """Rows to a batch of lines as long as the longest row. Short rows share a line.

    Rows differ threefold in length, so padding each to the longest would spend a third of a step on padding. Rows that
    share a line do not see one another, and positions begin anew in each: the loss is that of rows by themselves, and
    which rows share a step is chance, not length.
    """

    pad: int
    pack: bool = True  # False: one row a line, for attention that takes no mask of pairs (eager, flash)
    # Padding is labelled too, weighs 1 and goes on in the row's positions, as in the release of Thinking with Generated
    # Images; only for one row a line, where all padding is at the end of a row.
    learn_padding: bool = False

    def __post_init__(self) -> None:
        if self.learn_padding and self.pack:
            raise ValueError("padding is learned at the end of a row, so one row a line: pack=False")

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids, labels, weights, roles, position_ids [L, T]; attention_mask bool [L, 1, T, T], unpacked [L, T]."""
        length_B = [len(row["input_ids"]) for row in rows]
        length = max(length_B)
        lines = lines_of(length_B, length) if self.pack else [[b] for b in range(len(rows))]
        input_ids_LT = np.full((len(lines), length), self.pad, np.int64)
        labels_LT = np.full((len(lines), length), IGNORE, np.int64)
        weight_LT = np.zeros((len(lines), length), np.float32)
        role_LT = np.zeros((len(lines), length), np.int64)
        position_LT = np.zeros((len(lines), length), np.int64)
        row_LT = np.full((len(lines), length), -1, np.int64)  # padding is a row of its own: it sees something
        for line, members in enumerate(lines):
            start = 0
            for b in members:
                stop = start + length_B[b]
                input_ids_LT[line, start:stop] = rows[b]["input_ids"]
                labels_LT[line, start:stop] = rows[b]["labels"]
                labels_LT[line, start] = IGNORE  # nothing before it predicts it, least of all its neighbour
                weight_LT[line, start:stop] = rows[b]["weights"]
                role_LT[line, start:stop] = rows[b]["roles"]
                position_LT[line, start:stop] = np.arange(length_B[b])
                row_LT[line, start:stop] = b
                start = stop
            if self.learn_padding:
                labels_LT[line, start:] = self.pad
                weight_LT[line, start:] = 1.0
                position_LT[line] = np.arange(length)
        if self.pack:
            mask = (row_LT[:, :, None] == row_LT[:, None, :]) & np.tri(length, dtype=bool)
            attention_mask = torch.from_numpy(mask)[:, None]
        else:
            attention_mask = torch.from_numpy((row_LT >= 0).astype(np.int64))
        return {
            "input_ids": torch.from_numpy(input_ids_LT),
            "labels": torch.from_numpy(labels_LT),
            "weights": torch.from_numpy(weight_LT),
            "roles": torch.from_numpy(role_LT),
            "position_ids": torch.from_numpy(position_LT),
            "attention_mask": attention_mask,
        }
