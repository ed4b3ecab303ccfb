"""The account of groups: what went in was trained or dropped, and every drop has its reason.

Made by advantages.py, read by the driver, which logs it as groups/*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from record.trajectory import Trajectory

Group = Sequence[Trajectory]

UNJUDGED = "unjudged"  # fewer than two members have a reward
ZERO_VARIANCE = "zero_variance"  # every member deserves the same, so nothing can be learned
FAILED = "failed"  # the rollouts never came back whole
CUT_OFF = "cut_off"  # every member hit a limit, and mask_truncated_completions leaves those out of the loss
GREEDY = "greedy"  # no decision was sampled, as at temperature 0


class LedgerError(RuntimeError):
    """Groups went in that came out neither trained nor dropped: a bug, never the user's doing."""


@dataclass
class Ledger:
    groups_in: int
    trained: list[Group] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # by reason
    replaced: dict[str, int] = field(default_factory=dict)  # those of the dropped in whose place others were rolled out
    cut_off: float = 0.0  # share of the members that hit a limit
    rescored: int = 0  # trained trajectories whose recorded log-probs are not the scorer's
    arms: dict[str, int] = field(default_factory=dict)  # of grpo.image_credit, by what became of them
    arms_in: int = 0  # that were asked for
    corrected: int = 0  # those of the rescored whose loss is weighted by importance sampling

    def drop(self, reason: str, count: int = 1) -> None:
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def check(self) -> None:
        """Raises LedgerError unless groups in = groups trained + groups dropped, and what was replaced was dropped."""
        out = len(self.trained) + sum(self.dropped.values())
        if out != self.groups_in:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "none"
            raise LedgerError(f"{self.groups_in} groups in, but {len(self.trained)} trained and dropped: {reasons}")
        for reason, count in self.replaced.items():
            if count > self.dropped.get(reason, 0):
                raise LedgerError(
                    f"{count} groups replaced for {reason}, but {self.dropped.get(reason, 0)} dropped for it"
                )
        if sum(self.arms.values()) != self.arms_in:
            raise LedgerError(f"{self.arms_in} arms of images asked for, but of these came: {self.arms}")
        if not self.corrected <= self.rescored <= sum(map(len, self.trained)):
            raise LedgerError(
                f"{self.corrected} trajectories corrected of {self.rescored} rescored, of {sum(map(len, self.trained))}"
            )

    def metrics(self) -> dict[str, float]:
        """groups/in, groups/trained, groups/cut_off, groups/dropped/<reason>. The usual reasons are always there.
        trajectories/rescored and trajectories/corrected where a writer's log-probs are not the scorer's."""
        dropped = {reason: 0 for reason in (FAILED, UNJUDGED, ZERO_VARIANCE)} | self.dropped
        return {
            "groups/in": float(self.groups_in),
            "groups/trained": float(len(self.trained)),
            "groups/cut_off": self.cut_off,
            **{f"groups/dropped/{reason}": float(count) for reason, count in dropped.items()},
            **{f"groups/replaced/{reason}": float(count) for reason, count in self.replaced.items()},
            **({"image_credit/arms_in": float(self.arms_in)} if self.arms else {}),
            **{f"image_credit/arms_{what}": float(count) for what, count in self.arms.items()},
            **(
                {"trajectories/rescored": float(self.rescored), "trajectories/corrected": float(self.corrected)}
                if self.rescored
                else {}
            ),
        }
