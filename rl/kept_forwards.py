"""The decisions of an update as its loss took them, kept forward by forward, so that the loss can be computed again
without the weights that scored them.

Letters: P passes of a forward, N its decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from policy.base import Scored
from rl.batches import MicroBatch
from rl.losses import ScoredDecisions
from runtime.errors import UserError

Place = tuple[int, int, int, int]  # iteration, minibatch, process, forward
Key = tuple[int, int]  # group, member


@dataclass(frozen=True)
class KeptForward:
    """One forward of an update, on the CPU."""

    group_P: Tensor  # int64
    member_P: Tensor  # int64
    trajectory_P: Tensor  # int64: which passes are of one trajectory, as the loss counted them
    padding: Tensor  # bool, scalar: made for the other processes' sake, and counted nowhere
    pass_N: Tensor  # int64
    segment_N: Tensor  # int64
    kind_N: Tensor  # int64, DecisionKind
    logprob_N: Tensor  # float32, of the weights before this optimiser step
    log_ratio_N: Tensor  # float32, as the loss took it
    weight_N: Tensor  # float32
    divergence_N: Tensor | None = None  # float32
    behaviour_log_ratio_N: Tensor | None = None  # float32
    entropy_N: Tensor | None = None  # float32

    @classmethod
    def of(cls, batch: MicroBatch, scored: Scored, decisions: ScoredDecisions) -> KeptForward:
        """What the loss is about to take."""
        trajectories = [one.trajectory for one in batch.passes]

        def kept(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().cpu().contiguous().clone()

        def needed(tensor: Tensor) -> Tensor:
            return tensor.detach().cpu().contiguous().clone()

        return cls(
            torch.tensor([t.group for t in trajectories], dtype=torch.int64),
            torch.tensor([t.member for t in trajectories], dtype=torch.int64),
            needed(batch.trajectory_P),
            torch.tensor(batch.padding),
            needed(scored.pass_N),
            needed(scored.segment_N),
            needed(decisions.kind_N),
            needed(scored.logprob_N),
            needed(decisions.log_ratio_N),
            needed(decisions.weight_N),
            kept(decisions.divergence_N),
            kept(decisions.behaviour_log_ratio_N),
            kept(decisions.entropy_N),
        )

    @property
    def keys(self) -> list[Key]:
        """The trajectory of each pass."""
        return list(zip(self.group_P.tolist(), self.member_P.tolist(), strict=True))


@dataclass
class KeptUpdate:
    """What an update leaves for a replay. Filled by Trainer.update."""

    weights: str | None = None  # fingerprint of the trained weights before it; None: they are spread over processes
    forwards: dict[Place, KeptForward] = field(default_factory=dict)


def to_bytes(forwards: dict[Place, KeptForward]) -> bytes:
    """As the content of a safetensors file: arrays named '<iteration>-<minibatch>-<process>-<forward>.<array>'."""
    tensors = {
        f"{'-'.join(map(str, place))}.{part.name}": value
        for place, forward in forwards.items()
        for part in fields(KeptForward)
        if (value := getattr(forward, part.name)) is not None
    }
    return save(tensors)


def from_bytes(content: bytes, source: str) -> dict[Place, KeptForward]:
    """What `to_bytes` wrote, in the order of the places.

    Raises:
        UserError: it is no such file; `source` names it.
    """
    found: dict[Place, dict[str, Any]] = {}
    try:
        for name, tensor in load(content).items():
            place, _, part = name.partition(".")
            iteration, minibatch, process, number = map(int, place.split("-"))
            found.setdefault((iteration, minibatch, process, number), {})[part] = tensor
        return {place: KeptForward(**found[place]) for place in sorted(found)}
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{source}: no kept decisions can be read from it ({error})") from None


def by_step(forwards: dict[Place, KeptForward]) -> list[dict[int, list[KeptForward]]]:
    """The forwards of each optimiser step in their order, by process."""
    steps: dict[tuple[int, int], dict[int, list[KeptForward]]] = {}
    for iteration, minibatch, process, number in sorted(forwards):
        step = steps.setdefault((iteration, minibatch), {})
        step.setdefault(process, []).append(forwards[iteration, minibatch, process, number])
    return list(steps.values())


def first_difference(
    stored: dict[Place, KeptForward], here: dict[Place, KeptForward]
) -> tuple[Key, int, float, float] | None:
    """The first decision whose log-prob is not the kept one: (trajectory, segment, the kept log-prob, the one here).
    None: they are equal to the last bit, or the forwards are not the same ones."""
    if stored.keys() != here.keys():
        return None
    for place in sorted(stored):
        one, other = stored[place], here[place]
        if one.logprob_N.shape != other.logprob_N.shape:
            return None
        differs_N = one.logprob_N != other.logprob_N
        if differs_N.any():
            at = int(differs_N.int().argmax())
            key = one.keys[int(one.pass_N[at])]
            return key, int(one.segment_N[at]), float(one.logprob_N[at]), float(other.logprob_N[at])
    return None
