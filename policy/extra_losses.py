"""Losses of a family's own that a warm start adds to the cross-entropy, and the keys of a recipe that ask for them.

The cross-entropy is minus the log-probs of `Policy.score`. What a family learns from beside it (the codebook's
distances, a flow's velocities) it offers by name:

    extra_losses(asked: ExtraLosses) -> list[ExtraLoss]

A family without that method has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, field_validator

from record.trajectory import Trajectory
from runtime.errors import nearest
from runtime.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class VisualLossConfig(Section):
    """The loss that holds visual codes to their codebook, beside the cross-entropy (family chameleon)."""

    kind: Literal["twgi", "mvot"] = Field(
        "twgi",
        description="twgi: a projection of the hidden state is to be the code's codebook vector (Thinking with "
        "Generated Images, arXiv:2505.22525). mvot: probability on another code costs its distance from the right one "
        "in the codebook (token discrepancy of MVoT, arXiv:2501.07542)",
    )
    weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="times the loss, beside the cross-entropy; 0: none. Both papers: 1"
    )
    variant: Literal["default", "release"] = Field(
        "default",
        description="default: at the position that predicts a learned code, in float32. release: as the paper's code "
        "has it, in bfloat16; twgi at the code's own position, with a projection that is never trained, mvot with "
        "distances by code against probabilities by id",
    )

    @field_validator("kind", "variant", mode="before")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        known = {"kind": ("twgi", "mvot"), "variant": ("default", "release")}[info.field_name]
        if value not in known:
            raise ValueError(f"no such {info.field_name} of visual loss; {nearest(str(value), known)}")
        return value


class FlowLossConfig(Section):
    """The velocity loss of flow matching (arXiv:2210.02747), by which families that denoise learn images."""

    weight: float = Field(1.0, ge=0, description="times the loss, beside the cross-entropy; 0: images are not learned")
    times: Literal["logit_normal", "uniform"] = Field(
        "logit_normal",
        description="distribution of the times. logit_normal: the sigmoid of a normal number (arXiv:2403.03206)",
    )
    mean: float = Field(0.0, description="of the normal number")
    std: float = Field(1.0, gt=0, description="of the normal number")
    shift: float = Field(
        1.0, gt=0, description="moves times towards noise: t becomes shift t / (1 + (shift - 1) t); as the sampler's"
    )


@dataclass(frozen=True)
class ExtraLosses:
    """What a recipe asks for."""

    visual: VisualLossConfig
    flow: FlowLossConfig
    padding: bool = False  # learn the padding behind short rows, as the release of arXiv:2505.22525 does
    seed: int = 0  # of fresh weights in a loss


class ExtraLoss(Protocol):
    """One loss while a warm start runs."""

    name: str  # logged as loss_<name>; asked for by sft.<name>_loss
    weight: float
    form: str  # which of its forms it is: a checkpoint goes on with the same

    def attach(self) -> None:
        """Before the first step: what it trains becomes part of the policy's model, so that the optimiser, checkpoints
        and every wrapper see it."""
        ...

    def detach(self) -> None:
        """After the last step: the model is again what it was."""
        ...

    def loss(self, trajectories: Sequence[Trajectory]) -> Tensor | None:
        """A number with gradient, asked for after `score` of the same trajectories. None: it has none of its own."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it beside the model's weights."""
        ...

    def load(self, state: dict[str, Any]) -> None: ...
