"""What flow_grpo trains against: the reward server's graded GenEval score, by name.

Source: Liu et al., arXiv:2505.05470; yifan123/reward-server, reward_server/gen_eval.py. The formula is geneval.py's
`flow_grpo_score`: it has no lower bound, and a wrong place costs half of what a missing one does. For training,
`geneval` with mode graded or graded_strict is bounded and pays no wrong place. flow_grpo's other parts are `pickscore`
(with its divisor of 26) and `clip_similarity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from record.trajectory import Trajectory
from rewards.contract import RewardContext
from rewards.functions.geneval import COUNTING_THRESHOLD, SCORE_THRESHOLD, geneval


def flow_grpo_geneval(
    trajectories: Sequence[Trajectory],
    context: RewardContext,
    log_extra: Any = None,
    image: Literal["final", "first", "each"] = "final",
    threshold: float = SCORE_THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
    detector: str | None = None,
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """At most 1, unbounded below; 0 without an image; None for a record without `include`. Options are `geneval`'s."""
    return geneval(trajectories, context, log_extra, image, "flow_grpo", threshold, counting_threshold, detector)
