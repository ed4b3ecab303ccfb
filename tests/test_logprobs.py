"""Chunked log-probs against the plain log-softmax: values, gradients, entropies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from policy.scoring.logprobs import token_logprobs
from record.trajectory import mask_of, ranges_of


def plain(hidden, weight, target, temperature, allowed, sets):
    """log-softmax over all logits at once."""
    logits = hidden @ weight.T / temperature[:, None]
    for n, index in enumerate(allowed):
        if index >= 0:
            banned = torch.from_numpy(~mask_of(sets[index], weight.shape[0]))
            logits = torch.where(banned & (torch.arange(len(allowed)) == n)[:, None], -torch.inf, logits)
    distribution = torch.distributions.Categorical(logits=logits)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0], distribution.entropy()


def test_by_hand():
    # Logits 0, log 2, log 5 over ids 0, 1, 2.
    hidden, weight = torch.tensor([[1.0]] * 3), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    sets = (np.array([[0, 2]], np.int32),)
    logprob, entropy = token_logprobs(
        hidden,
        weight,
        torch.tensor([2, 1, 1]),
        torch.tensor([1.0, 1.0, 0.5]),
        torch.tensor([-1, 0, -1]),
        sets,
        entropy=True,
    )
    # 5/8; 2/3 among the first two; at temperature 1/2 the weights are 1, 4, 25
    torch.testing.assert_close(logprob, torch.tensor([math.log(5 / 8), math.log(2 / 3), math.log(4 / 30)]))
    torch.testing.assert_close(entropy[1], torch.tensor(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)))


@examples(0.4)
@given(st.integers(1, 13), st.integers(1, 6), st.integers(0, 2**31))
def test_values_and_gradients_are_the_plain_ones(count, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    size, width = 11, 5
    hidden = torch.randn(count, width, generator=generator, requires_grad=True)
    weight = torch.randn(size, width, generator=generator, requires_grad=True)
    sets = (ranges_of([0, 1, 2, 7]), ranges_of([4]), ranges_of(list(range(3, 11))))
    allowed = rng.integers(-1, 3, count)
    target = torch.tensor(
        [int(rng.choice(np.flatnonzero(mask_of(sets[index], size)) if index >= 0 else size)) for index in allowed]
    )
    temperature = torch.from_numpy(rng.uniform(0.3, 2.0, count).astype(np.float32))
    upstream = torch.randn(count, generator=generator)

    logprob, entropy = token_logprobs(hidden, weight, target, temperature, torch.from_numpy(allowed), sets, True, chunk)
    expected, expected_entropy = plain(hidden, weight, target, temperature, allowed, sets)
    torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=0)
    assert not entropy.requires_grad
    got = torch.autograd.grad(logprob, (hidden, weight), upstream)
    wanted = torch.autograd.grad(expected, (hidden, weight), upstream)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_frozen_head_asks_for_no_gradient():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    logprob, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1, 2, 3]), chunk=3)
    logprob.sum().backward()
    assert hidden.grad is not None and weight.grad is None and entropy is None


def test_no_chunk_is_larger_than_asked(monkeypatch):
    import policy.scoring.logprobs as module

    seen = []
    made = module._logits
    monkeypatch.setattr(module, "_logits", lambda hidden, *rest: seen.append(len(hidden)) or made(hidden, *rest))
    hidden = torch.randn(10, 3, requires_grad=True)
    token_logprobs(hidden, torch.randn(6, 3), torch.zeros(10, dtype=torch.long), chunk=4)[0].sum().backward()
    assert seen == [4, 4, 2, 4, 4, 2]  # forward, and again backward


def test_half_precision_reduces_in_float32():
    hidden, weight = torch.randn(4, 8), torch.randn(300, 8)
    target = torch.arange(4)
    exact = token_logprobs(hidden, weight, target)[0]
    half = token_logprobs(hidden.bfloat16(), weight.bfloat16(), target)[0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_tiny_benchmark_agrees(rows):
    """The benchmark's two arms compute one number."""
    from benchmarks.scoring import arm

    ours, plain_arm = (
        arm(name, rows, tokens=8, vocabulary=50, width=4, chunk=3, backward=True) for name in ("ours", "plain")
    )
    for key in ("logprob", "hidden_grad", "weight_grad"):
        torch.testing.assert_close(torch.tensor(ours[key]), torch.tensor(plain_arm[key]), atol=1e-5, rtol=0)
