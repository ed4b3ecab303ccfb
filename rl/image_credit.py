"""Credit for the picture itself: its segment's advantage gains what the picture was worth to the thought.

What a picture was worth is the thought's reward less the one that it earns with another picture in that place, under
the same noise (evals/image_worth.py): a baseline for this one action that the group's other members do not give, since
they differ from the first word on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evals.image_worth import ROUNDING, Swap, swaps_of, worth_by_image
from record.trajectory import Trajectory
from rl.advantages import EPSILON, Worth
from rl.config import GrpoConfig, ImageCreditConfig
from rl.run import Run
from rollout.counterfactuals import counterfactuals

WORTH = "image_worth"  # in Trajectory.info: what each image was worth, by segment


@dataclass(frozen=True)
class ImageCredit:
    """What a step's pictures were worth, and what became of the arms that were asked for."""

    worth: Worth = field(default_factory=dict)
    asked: int = 0  # arms
    account: Mapping[str, int] = field(default_factory=dict)  # arms: measured, unjudged, failed
    metrics: dict[str, float] = field(default_factory=dict)


def credit_images(
    run: Run, groups: Sequence[Sequence[Trajectory]], config: ImageCreditConfig, step: int
) -> ImageCredit:
    """Write and judge the arms of some groups' images, and note in each thought what its pictures were worth.

    Members without a reward have no arms, and neither do groups that fewer than two members of are judged: nothing of
    them is trained.
    """
    assert run.rollouts is not None and run.reward_manager is not None
    judged = [[t for t in group if t.reward is not None] for group in groups]
    trained = [group for group in judged if len(group) > 1]
    asked = counterfactuals(trained, config.arms, config.draws, run.policy, config.members).arms
    if not asked:
        nothing = dict.fromkeys(("measured", "unjudged", "failed"), 0)
        return ImageCredit(account=nothing, metrics={"image_credit/images": 0.0, "image_credit/rollouts": 0.0})
    requests = [one.request for one in asked]
    pending = run.reward_manager.begin(step, [len(request.members) for request in requests], counted=False)
    written = run.rollouts.generate(requests, each=pending.add)
    report = pending.finish(written.groups)
    account = Counter({"measured": 0, "unjudged": 0, "failed": len(written.failed)})
    for group in written.groups:
        account["measured" if any(t.reward is not None for t in group) else "unjudged"] += 1
    swaps = swaps_of(asked, written.groups)
    worth = worth_by_image(swaps)
    for group in trained:
        for trajectory in group:
            if of := worth.get((trajectory.group, trajectory.member)):
                trajectory.info[WORTH] = {str(segment): value for segment, value in of.items()}
    metrics = {
        **written.metrics,
        **{name: value for name, value in report.metrics.items() if name.startswith(("judge/", "time/"))},
        "image_credit/images": float(sum(map(len, worth.values()))),
        "image_credit/rollouts": float(sum(map(len, written.groups))),
        "image_credit/tokens": written.metrics.get("rollout/tokens", 0.0),
        **_mean_worths(swaps),
    }
    return ImageCredit(worth, len(asked), dict(account), metrics)


def _mean_worths(swaps: Sequence[Swap]) -> dict[str, float]:
    """image_credit/worth/<role>/<arm>: means over images and draws, and the share of draws whose reward changed."""
    by_name: dict[str, list[float]] = {}
    for swap in swaps:
        if swap.worth is not None:
            by_name.setdefault(f"{swap.role}/{swap.arm}", []).append(swap.worth)
    metrics = {}
    for name, worths in by_name.items():
        metrics[f"image_credit/worth/{name}"] = math.fsum(worths) / len(worths)
        metrics[f"image_credit/changed/{name}"] = sum(abs(value) > ROUNDING for value in worths) / len(worths)
    return metrics


def added_by_images(credit: ImageCredit, config: GrpoConfig) -> Worth:
    """What each image's advantage gains: weight times its worth, which is divided by the root mean square of the step's
    worths, or with scale_rewards: none by 1. Nothing is taken off: a worth is a difference already."""
    if config.image_credit is None:
        return {}
    values = [value for of in credit.worth.values() for value in of.values()]
    scale = 1.0
    if config.scale_rewards != "none" and values:
        scale = math.sqrt(math.fsum(value**2 for value in values) / len(values)) + EPSILON
    weight = config.image_credit.weight
    return {key: {segment: weight * value / scale for segment, value in of.items()} for key, of in credit.worth.items()}
