"""rollout/engine/sampling.py: what it draws is allowed, distributed as it says, and a function of names."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from formats.base import AllowedSet
from record.trajectory import ranges_of
from rollout.engine.sampling import DeviceMasks, gaussian, hash64, noise_key, sample, uniforms
from rollout.sampling_table import SamplingTable

V = 12


def tensors(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = torch.randn(rows, V, generator=generator) * 4
    allowed_BV = torch.rand(rows, V, generator=generator) < 0.4
    allowed_BV[torch.arange(rows), torch.randint(V, (rows,), generator=generator)] = True
    return logits_BV, allowed_BV


@examples(0.6)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.25, 1.0, 2.0]),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2.0**-53])),
    top_p=st.sampled_from([1.0, 0.7, 0.01]),
    top_k=st.sampled_from([0, 1, 3]),
)
def test_draws_are_allowed_and_logprobs_are_of_the_renormalised_law(seed, temperature, uniform, top_p, top_k):
    logits_BV, allowed_BV = tensors(seed, 5)
    drawn = sample(
        logits_BV,
        torch.full((5,), temperature),
        allowed_BV,
        torch.full((5,), uniform, dtype=torch.float64),
        top_p,
        top_k,
    )
    for b in range(5):
        kept = allowed_BV[b] if drawn.kept_BV is None else drawn.kept_BV[b]
        assert allowed_BV[b, drawn.id_B[b]] and kept[drawn.id_B[b]]
        assert not (kept & ~allowed_BV[b]).any()
        plain = torch.log_softmax((logits_BV[b].double() / temperature)[kept], 0)
        expected = plain[int(kept[: drawn.id_B[b]].sum())]
        assert abs(float(expected) - float(drawn.logprob_B[b])) < 1e-5
        if top_k:
            assert int(kept.sum()) <= top_k


def test_inverse_cdf_by_hand():
    # probabilities 1/2, 1/4, 1/4 after a forbidden id: the borders are 0.5 and 0.75
    logits = torch.tensor([[9.0, 0.0, -np.log(2), -np.log(2)]]).repeat(5, 1)
    allowed = torch.tensor([[False, True, True, True]]).repeat(5, 1)
    at = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76], dtype=torch.float64)
    drawn = sample(logits, torch.ones(5), allowed, at)
    assert drawn.id_B.tolist() == [1, 1, 2, 2, 3]
    np.testing.assert_allclose(drawn.logprob_B.exp(), [0.5, 0.5, 0.25, 0.25, 0.25], rtol=1e-6)


def test_nucleus_by_hand():
    # 0.5, 0.25, 0.25: the nucleus of 0.6 is the first two, renormalised to 2/3 and 1/3
    logits = torch.tensor([[0.0, -np.log(2), -np.log(2)]])
    drawn = sample(logits, torch.ones(1), None, torch.tensor([0.99], dtype=torch.float64), top_p=0.6)
    assert drawn.kept_BV.tolist() == [[True, True, False]]
    assert drawn.id_B.item() == 1 and abs(drawn.logprob_B.exp().item() - 1 / 3) < 1e-6


def test_temperature_zero_takes_the_likeliest_allowed_and_has_no_logprob():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    allowed = torch.tensor([[False, True, True], [False, True, True]])
    drawn = sample(logits, torch.tensor([0.0, 1.0]), allowed, torch.tensor([0.99, 0.99], dtype=torch.float64))
    assert drawn.id_B.tolist() == [1, 2]
    assert torch.isnan(drawn.logprob_B[0]) and not torch.isnan(drawn.logprob_B[1])


def test_frequencies_follow_the_law():
    count = 20_000
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    key = np.full(count, noise_key(0, 3, 1), np.uint64)
    drawn = sample(
        logits[None].repeat(count, 1),
        torch.full((count,), 2.0),
        None,
        torch.from_numpy(uniforms(key, np.arange(count))),
    )
    seen = np.bincount(drawn.id_B.numpy(), minlength=4) / count
    expected = torch.softmax(logits / 2, 0).numpy()
    assert np.abs(seen - expected).max() < 4 * 0.5 / count**0.5


def test_hash_is_splitmix64():
    # the first outputs of the published generator from state 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash64(np.zeros(3, np.uint64), np.arange(3)).tolist() == expected


@examples(0.2)
@given(seed=st.integers(-(2**40), 2**40), group=st.integers(0, 2**40))
def test_uniforms_are_uniform_over_decisions_and_over_members(seed, group):
    over_decisions = uniforms(np.full(4096, noise_key(seed, group, 0), np.uint64), np.arange(4096))
    members = np.array([noise_key(seed, group, m) for m in range(256)], np.uint64)
    over_members = np.concatenate([uniforms(members, np.full(256, n)) for n in range(16)])
    for drawn in (over_decisions, over_members):
        assert drawn.min() >= 0 and drawn.max() < 1
        # chi-square over 64 cells of 64: mean 63, standard deviation 11.2
        counts = np.histogram(drawn, 64, (0, 1))[0]
        assert ((counts - 64) ** 2 / 64).sum() < 63 + 6 * 11.3
    pairs = np.corrcoef(over_decisions[:-1], over_decisions[1:])[0, 1]
    assert abs(pairs) < 6 / 4096**0.5


def test_noise_names_do_not_collide():
    keys = {noise_key(s, g, m) for s in range(10) for g in range(20) for m in range(20)}
    assert len(keys) == 4000
    assert noise_key(1, 0, 0) != noise_key(0, 1, 0) != noise_key(0, 0, 1)


def test_gaussian_is_repeatable_and_standard():
    assert torch.equal(gaussian(7, 3, (4, 5)), gaussian(7, 3, (4, 5)))
    assert not torch.equal(gaussian(7, 3, (4, 5)), gaussian(7, 4, (4, 5)))
    many = torch.stack([gaussian(7, n, (8,)) for n in range(2000)])
    assert abs(float(many.mean())) < 0.04 and abs(float(many.std()) - 1) < 0.03


def test_the_table_keeps_one_mask_for_each_set_and_one_number_for_each_set_and_role():
    words, codes = AllowedSet("words", ranges_of([1, 2, 5])), AllowedSet("codes", ranges_of([6, 7]))
    table = SamplingTable(V, {"default": 1.0, "sketch": 0.5})
    masks = DeviceMasks(table)
    first = table.number(words, "plan")
    assert table.number(words, "plan") == first
    assert masks.of(np.array([first])).nonzero()[:, 1].tolist() == [1, 2, 5]
    second, third = table.number(words, "sketch"), table.number(codes, "sketch")
    assert len({first, second, third}) == 3 and len(table.masks) == 2
    assert table.temperature_L.tolist() == [1.0, 0.5, 0.5]
    assert masks.of(np.array([third, first])).nonzero().tolist() == [[0, 6], [0, 7], [1, 1], [1, 2], [1, 5]]
    assert not table.entries[first].whole
    assert table.entries[table.number(AllowedSet("any", np.array([[0, V]], np.int32)), "plan")].whole


def test_a_set_without_an_id_is_kept_by_set_and_id():
    words, codes = AllowedSet("words", ranges_of([1, 2, 5])), AllowedSet("codes", ranges_of([6, 7]))
    table = SamplingTable(V, {"default": 1.0})
    without_5 = table.without(words, 5)
    assert without_5.ranges.tolist() == [[1, 3]] and table.without(words, 5) is without_5
    assert table.without(words, 1).ranges.tolist() == [[2, 3], [5, 6]]  # another id of the same set
    assert table.without(words, 5) is without_5
    assert table.without(codes, 5) is codes
    assert table.without(AllowedSet("marker", ranges_of([3])), 3).ranges.tolist() == []
