"""Guidance as linear weights, against hand-worked numbers and the reference implementation's outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats.registry import get_format
from policy.guidance import GuidanceError, branch_weights, combine
from record.trajectory import Author, Guidance, Modality, Segment, Trajectory


def test_weights_by_hand():
    # u + 2 (f - u) + 1.5 (i - u) = 2 f + 1.5 i - 2.5 u
    assert branch_weights(Guidance("normal", {"full": 2.0, "image": 1.5})) == {
        "full": 2.0,
        "image": 1.5,
        "unconditional": -2.5,
    }
    # u + 2 (f - i) + 1 (i - u) - 0.5 (n - u) + 5 (p - u) = 2 f - i - 0.5 n + 5 p - 4.5 u
    assert branch_weights(Guidance("full", {"full": 2.0, "image": 1.0, "negative": 0.5, "original": 5.0})) == {
        "full": 2.0,
        "image": -1.0,
        "negative": -0.5,
        "original": 5.0,
        "unconditional": -4.5,
    }
    assert branch_weights(None) == {"full": 1.0}


def test_scale_one_needs_the_conditional_branch_alone():
    assert branch_weights(Guidance("cfg", {"full": 1.0})) == {"full": 1.0}
    assert branch_weights(Guidance("obj", {"full": 3.0, "negative": 0.0})) == {"full": 3.0, "unconditional": -2.0}


def test_unknown_kind_and_scale_are_named():
    with pytest.raises(GuidanceError, match="no kind 'norml'; did you mean 'normal'"):
        branch_weights(Guidance("norml", {}))
    with pytest.raises(GuidanceError, match="no scale 'imgae'; did you mean 'image'"):
        branch_weights(Guidance("normal", {"imgae": 1.0}))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "branches"),
    [
        ("normal", ["full", "unconditional", "image"]),
        ("obj", ["full", "unconditional", "negative"]),
        ("full", ["full", "image", "unconditional", "negative", "original"]),
    ],
)
def test_reference_combinations(reference_tensors, kind, branches):
    fixture = reference_tensors("chameleon_tiny.pt")
    scales = dict(fixture["cfg_scales"])
    scales["original"] = scales.pop("original_prompt")
    rows = dict(zip(branches, fixture["cfg_logits"], strict=False))  # the rows in the reference's order for each kind
    torch.testing.assert_close(combine(rows, Guidance(kind, scales)), fixture["cfg_out"][kind][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["normal", "obj", "full"])
@pytest.mark.parametrize("scales", [{}, {"image": 0.0}, {"image": 0.0, "original": 0.0}, {"full": 0.0}])
def test_a_format_hands_over_every_branch_that_the_combination_needs(kind, scales):
    fmt = get_format("subgoals", guidance=[kind], scales=scales)
    image = Segment("subgoal", Author.POLICY, Modality.IMAGE_TOKENS, True, np.zeros(3, np.int32))
    words = Segment("prompt", Author.USER, Modality.TEXT, False, np.zeros(2, np.int32), "a circle")
    trajectory = Trajectory("a circle", {}, "subgoals", [words, image, image])
    needed = set(branch_weights(fmt.guidance(trajectory, 2)))
    assert needed <= {context.branch for context in fmt.contexts(trajectory, 2)} | {"full"}
