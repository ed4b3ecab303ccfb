"""What each part of a trajectory is, in a few characters: so that a record that was altered is told by what differs.

A digest is of the values, not of the file that holds them: the same trajectory written again has the same digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from record.trajectory import Trajectory

LENGTH = 16  # hexadecimal digits of a digest
_SEGMENT = ("role", "author", "modality", "trained", "text", "ids", "decisions", "flow", "image", "latent", "contexts",
            "version", "frames")  # fmt: skip
_TRAJECTORY = ("prompt", "record", "format", "seed", "stop", "rewards", "segment_rewards", "reward", "advantage_S",
               "info", "parent", "exact")  # fmt: skip


def digests_of(trajectory: Trajectory) -> dict[str, str]:
    """A digest for each part of a trajectory as it is read from the store, by a name that a person understands:
    'reward', 'segment 2 (sketch): ids'. What a segment does not have has none."""
    found = {name.removesuffix("_S"): digest(getattr(trajectory, name)) for name in _TRAJECTORY}
    for index, segment in enumerate(trajectory.segments):
        parts = {name: getattr(segment, name) for name in _SEGMENT}
        where = f"segment {index} ({segment.role})"
        found |= {f"{where}: {name}": digest(value) for name, value in parts.items() if value is not None}
    return found


def digest(value: Any) -> str:
    """Of numbers, words, arrays, and records, lists and maps of these."""
    known = hashlib.sha256()
    _feed(known, value)
    return known.hexdigest()[:LENGTH]


def altered_parts(trajectory: Trajectory, written: Mapping[str, str]) -> list[str]:
    """The names of the parts that are not as their digests say, in the order of the trajectory."""
    here = digests_of(trajectory)
    return [name for name in dict.fromkeys([*written, *here]) if written.get(name) != here.get(name)]


def _feed(known: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        known.update(f"array {value.dtype} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            known.update(part.name.encode())
            _feed(known, getattr(value, part.name))
    elif isinstance(value, list | tuple):
        known.update(f"list {len(value)} ".encode())
        for item in value:
            _feed(known, item)
    else:
        known.update(json.dumps(value, sort_keys=True, default=_plain).encode() + b" ")


def _plain(item: Any) -> Any:
    if isinstance(item, np.generic):
        return item.item()
    raise TypeError(f"a {type(item).__name__} has no digest")
