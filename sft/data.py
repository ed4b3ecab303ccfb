"""Trajectories to training rows. What is learned is what the policy itself would have to decide.

Letters: B rows, T ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from rollout.errors import UserError
from rollout.trajectory import Modality, Trajectory

IGNORE = -100


class Row(TypedDict):
    input_ids: list[int]
    labels: list[int]  # the id itself where it is learned, -100 elsewhere; not shifted


@dataclass(frozen=True)
class Cut:
    """How a set of rows met the length limit."""

    rows: int
    shortened: int  # rows that lost segments from their end
    dropped: int  # rows in which nothing learnable was left


def training_rows(trajectories: Sequence[Trajectory], max_length: int) -> tuple[list[Row], Cut]:
    """One row a trajectory: every segment's ids, labels on trained ones.

    A row longer than `max_length` loses whole segments from its end, so no image is ever cut. The end marker of an
    image is forced in sampling and therefore not learned.

    Raises:
        UserError: nothing is left to learn from.
    """
    rows: list[Row] = []
    shortened = dropped = 0
    for trajectory in trajectories:
        input_ids: list[int] = []
        labels: list[int] = []
        for segment in trajectory.segments:
            if len(input_ids) + len(segment.ids) > max_length:
                shortened += 1
                break
            ids = [int(i) for i in segment.ids]
            input_ids += ids
            if not segment.trained:
                labels += [IGNORE] * len(ids)
            elif segment.modality is Modality.IMAGE_TOKENS:
                labels += [*ids[:-1], IGNORE]
            else:
                labels += ids
        if any(label != IGNORE for label in labels):
            rows.append(Row(input_ids=input_ids, labels=labels))
        else:
            dropped += 1
    if not rows:
        raise UserError(f"sft: no demonstration has a trained segment within {max_length} ids; raise sft.max_length "
                        "or look at the demonstrations' segments")
    return rows, Cut(len(rows), shortened, dropped)


@dataclass(frozen=True)
class Collator:
    """Rows to a right-padded batch."""

    pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        input_ids_BT = np.full((len(rows), length), self.pad, np.int64)
        labels_BT = np.full((len(rows), length), IGNORE, np.int64)
        attention_mask_BT = np.zeros((len(rows), length), np.int64)
        for b, row in enumerate(rows):
            n = len(row["input_ids"])
            input_ids_BT[b, :n] = row["input_ids"]
            labels_BT[b, :n] = row["labels"]
            attention_mask_BT[b, :n] = 1
        return {"input_ids": torch.from_numpy(input_ids_BT), "labels": torch.from_numpy(labels_BT),
                "attention_mask": torch.from_numpy(attention_mask_BT)}
