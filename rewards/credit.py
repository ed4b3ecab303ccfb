"""How the value of a reward part that credits segments divides among roles.

A part's value for a trajectory is the mean over the segments that it credits. A role's share of it is the sum over the
role's segments, divided by the number of all credited ones, so the shares of a trajectory add up to its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from record.trajectory import Trajectory


def role_shares(trajectory: Trajectory) -> dict[str, dict[str, float]]:
    """By part, the share of each role; parts that credit no segment of this trajectory are left out."""
    credited = dict(trajectory.segment_rewards)
    for part, logged in (trajectory.info.get("rewards") or {}).items():  # of log-only parts
        if isinstance(logged, dict) and isinstance(logged.get("segments"), dict):
            credited.setdefault(part, {int(segment): value for segment, value in logged["segments"].items()})
    shares: dict[str, dict[str, float]] = {}
    for part, values in credited.items():
        given = {segment: value for segment, value in values.items() if value is not None}
        by_role: dict[str, list[float]] = {}
        for segment, value in given.items():
            by_role.setdefault(trajectory.segments[segment].role, []).append(value)
        if by_role:
            shares[part] = {role: math.fsum(found) / len(given) for role, found in by_role.items()}
    return shares


def mean_shares(trajectories: Sequence[Trajectory]) -> dict[str, dict[str, float]]:
    """By part, the mean share of each role over the trajectories of which the part credits any segment."""
    found: dict[str, list[dict[str, float]]] = {}
    for trajectory in trajectories:
        for part, shares in role_shares(trajectory).items():
            found.setdefault(part, []).append(shares)
    return {
        part: {
            role: math.fsum(shares.get(role, 0.0) for shares in rows) / len(rows)
            for role in sorted({role for shares in rows for role in shares})
        }
        for part, rows in found.items()
    }
