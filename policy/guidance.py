"""How guidance combines branches: every known kind is a linear combination of their logits (or velocities).

The formats name the branches in a segment's contexts, the engine samples from the combination, `score` replays it.
Because the combination is linear and an output head without bias is linear too, scoring may combine the hidden states
instead of the logits, at a V-th of the cost.

Branches: "full" sees everything; "unconditional" nothing but what opens the image; "image" the earlier images
only; "negative" a negative prompt; "original" the prompt alone. With f, u, i, n, p for their logits:

    normal  u + s_full (f - u) + s_image (i - u)
    obj     u + s_full (f - u) - s_negative (n - u)
    full    u + s_full (f - i) + s_image (i - u) - s_negative (n - u) + s_original (p - u)
    cfg     u + s_full (f - u)

The first three are those of Thinking with Generated Images (arXiv:2505.22525), `cfg` is classifier-free guidance
(arXiv:2207.12598). A term whose scale is 0 or absent asks for no branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from record.trajectory import Guidance
from runtime.errors import UserError, nearest

BRANCHES = ("full", "unconditional", "image", "negative", "original")
FULL = "full"


class GuidanceError(UserError):
    """A guidance kind, scale or branch that is not known or not there."""


def _normal(full: float, image: float, negative: float, original: float) -> dict[str, float]:
    return {"full": full, "image": image, "unconditional": 1 - full - image}


def _obj(full: float, image: float, negative: float, original: float) -> dict[str, float]:
    return {"full": full, "negative": -negative, "unconditional": 1 - full + negative}


def _full(full: float, image: float, negative: float, original: float) -> dict[str, float]:
    return {
        "full": full,
        "image": image - full,
        "negative": -negative,
        "original": original,
        "unconditional": 1 - image + negative - original,
    }


def _cfg(full: float, image: float, negative: float, original: float) -> dict[str, float]:
    return {"full": full, "unconditional": 1 - full}


KINDS: dict[str, Callable[[float, float, float, float], dict[str, float]]] = {
    "normal": _normal,
    "obj": _obj,
    "full": _full,
    "cfg": _cfg,
}


def branch_weights(guidance: Guidance | None) -> dict[str, float]:
    """The weight of each branch that is needed; they sum to 1 for `normal`, `obj` and `cfg`. No guidance: "full" alone.

    Raises GuidanceError for an unknown kind or scale.
    """
    if guidance is None:
        return {FULL: 1.0}
    if guidance.kind not in KINDS:
        raise GuidanceError(f"guidance: no kind '{guidance.kind}'; {nearest(guidance.kind, KINDS)}")
    known = {"full", "image", "negative", "original"}
    for name in guidance.scales:
        if name not in known:
            raise GuidanceError(f"guidance.scales: no scale '{name}'; {nearest(name, known)}")
    scale = {name: float(guidance.scales.get(name, 0.0)) for name in known}
    weights = KINDS[guidance.kind](scale["full"], scale["image"], scale["negative"], scale["original"])
    return {branch: weight for branch, weight in weights.items() if weight != 0.0}


def combine(branches: Mapping[str, Tensor], guidance: Guidance | None) -> Tensor:
    """The guided logits [..., V] (or velocities) of the branches' own. Raises GuidanceError where one is missing."""
    total: Tensor | None = None
    for branch, weight in branch_weights(guidance).items():
        if branch not in branches:
            kind = guidance.kind if guidance else "none"
            raise GuidanceError(
                f"guidance '{kind}' needs the branch '{branch}'; the segment's contexts have: {', '.join(branches)}"
            )
        total = branches[branch] * weight if total is None else total.add(branches[branch], alpha=weight)
    assert total is not None  # the weights of every kind sum to 1 or more, so one of them is not 0
    return total
