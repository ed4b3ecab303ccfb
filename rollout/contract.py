"""What a family must keep in the engine, whoever wrote it. Run it on your own: `check_family(policy, fmt, requests)`.

Sampling is a function of (seed, group, member, decision): which rows, neighbours and refills a trajectory had changes
nothing. A failure is an AssertionError whose first words are the family and the promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from formats.base import Format
from policy.base import Policy, score_trajectories
from policy.contract import TOLERANCE, check_policy
from record.trajectory import Trajectory
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from rollout.tools.registry import Tools


def check_family(
    policy: Policy,
    fmt: Format,
    requests: Sequence[RolloutRequest],
    config: RolloutConfig | None = None,
    *,
    constrain: str = "images",
    tools: Tools | None = None,
    load: Callable[[Path], Policy] | None = None,
    tolerance: float = TOLERANCE,
) -> list[Trajectory]:
    """Sample the requests in several layouts of rows, then hold the family to policy/contract.py on what came.

    The layouts: one row that is refilled, two, seven, as many as there are trajectories, each trajectory alone, and the
    requests in reverse, which gives each other neighbours.

    Args:
        requests: a few groups with some members each; with media, where the family sees any.
        config: sampling as a recipe would have it; its number of rows is not used.
        tools: answer where the format has the environment speak.
        load: makes the policy of a folder that `save` wrote; None: saving is not checked.
        tolerance: largest difference of two log-probs, in nats.

    Returns:
        The trajectories, in order.

    Raises:
        AssertionError: a promise is broken; the message names the family, the promise and where.
    """
    config = config or RolloutConfig()
    each = 1 + (config.branches if config.guidance else 0)
    orders = [(r, m) for r in requests for m in r.members]

    def run(rows: int, asked: Sequence[RolloutRequest]) -> list[Trajectory]:
        rows_config = config.model_copy(update={"rows": rows * each})
        engine = Engine(policy, fmt, rows_config, constrain, tools)
        try:
            return engine.run(asked)
        finally:
            engine.close()

    whole = run(len(orders), requests)
    _same_law(policy, "all at once", whole, tolerance)
    for rows in (1, 2, 7):
        _same(policy, f"in {rows} row(s)", run(rows, requests), whole, tolerance)
    alone = [run(1, [replace(request, members=(member,))])[0] for request, member in orders]
    _same(policy, "each alone", alone, whole, tolerance)
    place = {(r.group, m): n for n, (r, m) in enumerate(orders)}
    reversed_ = sorted(run(3, list(requests)[::-1]), key=lambda trajectory: place[trajectory.group, trajectory.member])
    _same(policy, "in reverse", reversed_, whole, tolerance)
    check_policy(policy, whole, load=load, tolerance=tolerance)
    return whole


def _same(policy: Policy, layout: str, got: list[Trajectory], whole: list[Trajectory], tolerance: float) -> None:
    _same_law(policy, layout, got, tolerance)
    for ours, theirs in zip(got, whole, strict=True):
        for n in range(max(len(ours.segments), len(theirs.segments))):
            here = [t.segments[n] if n < len(t.segments) else None for t in (ours, theirs)]
            a, b = here
            same = a is not None and b is not None and a.role == b.role and np.array_equal(a.ids, b.ids)
            role = next(s.role for s in here if s is not None)
            where = f"trajectory {theirs.key}, segment {n} ('{role}')"
            assert same, f"{policy.family}: layout: sampled {layout}, {where} is another than all at once"
            if a is not None and b is not None and a.latent is not None and b.latent is not None:
                # Rounding grows over the steps of a latent, so it is no more than near.
                off = float(np.abs(a.latent - b.latent).max() / max(1.0, float(np.abs(b.latent).max())))
                assert off <= 10 * tolerance, (
                    f"{policy.family}: layout: denoised {layout}, {where} is another than all at once; off by {off:.2g}"
                )


def _same_law(policy: Policy, layout: str, trajectories: list[Trajectory], tolerance: float) -> None:
    with torch.no_grad():
        scored = score_trajectories(policy, trajectories)
    off_N = scored.log_ratio_N.abs()
    if not len(off_N):
        return
    worst = int(off_N.argmax())
    trajectory, n = trajectories[int(scored.pass_N[worst])], int(scored.segment_N[worst])
    assert float(off_N[worst]) <= tolerance, (
        f"{policy.family}: layout: sampled {layout}, segment {n} ('{trajectory.segments[n].role}') of trajectory "
        f"{trajectory.key} is scored {float(off_N[worst]):.2g} nats from what was sampled"
    )
