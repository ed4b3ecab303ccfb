"""What may follow what around an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from policy.chameleon.grammar import ImageGrammar, ImageLogitsProcessor
from policy.chameleon.vocabulary import BOI, EOI, code_table

# Ids 0..9: words 0-3, codes 4-7, EOI 8, BOI 9; two codes an image; rows of 12 ids.
GRAMMAR = ImageGrammar(boi=9, eoi=8, code_ids=torch.tensor([4, 5, 6, 7]), codes_per_image=2, size=10, max_length=12)


def allowed(prefix: list[int]) -> list[int]:
    return GRAMMAR(0, torch.tensor(prefix))


def test_by_hand():
    words = [0, 1, 2, 3]
    assert allowed([1]) == [*words, 9]
    assert allowed([1, 9]) == [4, 5, 6, 7]
    assert allowed([1, 9, 4]) == [4, 5, 6, 7]
    assert allowed([1, 9, 4, 7]) == [8]
    assert allowed([1, 9, 4, 7, 8]) == [*words, 9]
    assert allowed([1] * 8) == [*words, 9]  # BOI, two codes and EOI still fit into 12
    assert allowed([1] * 9) == words


@examples(0.5)
@given(st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_batched_rule_is_the_rule(rows, length):
    ids = torch.tensor(rows)[:, :length]
    scores = ImageLogitsProcessor(GRAMMAR)(ids, torch.zeros(len(rows), 10))
    assert torch.equal(scores == 0, torch.stack([GRAMMAR.allowed(row) for row in ids]))


def test_transformers_generate_draws_whole_images():
    from transformers import LogitsProcessorList

    from policy.chameleon.family import load
    from tests.chameleon_helpers import WORDS, small_config

    policy = load(small_config(), WORDS)
    vocabulary, limit = policy.vocabulary, 80
    grammar = ImageGrammar.of(vocabulary, limit)
    prompt = torch.tensor([[vocabulary.bos, vocabulary.boi], [vocabulary.bos, vocabulary.sep]])
    torch.manual_seed(0)
    processors = LogitsProcessorList([ImageLogitsProcessor(grammar)])
    ids = policy.core.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        max_length=limit,
        eos_token_id=None,
        logits_processor=processors,
    )
    assert ids.shape == (2, limit)
    image = ids[0, 2:18].numpy()
    assert (vocabulary.code_of[image] >= 0).all() and ids[0, 18] == vocabulary.eoi
    outside = ids[0].numpy().copy()
    begins = np.flatnonzero(outside == vocabulary.boi)
    for begin in begins:
        outside[begin : begin + 18] = vocabulary.bos
    assert (vocabulary.code_of[outside] < 0).all() and not (outside == vocabulary.eoi).any()


@pytest.mark.parity
def test_reference_allowed_after_every_prefix(reference_tensors):
    fixture = reference_tensors("chameleon_tiny.pt")
    expected, script, table = fixture["allowed_after_prefix"], fixture["script"], fixture["vocab_map"]
    grammar = ImageGrammar(
        table[BOI],
        table[EOI],
        torch.from_numpy(code_table(table)),
        fixture["indices"].shape[1],
        expected.shape[1],
        fixture["max_length"],
    )
    processor = ImageLogitsProcessor(grammar)
    for length in range(1, len(script)):
        assert torch.equal(grammar.allowed(script[:length]), expected[length - 1]), f"after {length} ids"
        scores = processor(script[None, :length], torch.zeros(1, expected.shape[1]))
        assert torch.equal(scores[0] == 0, expected[length - 1])


@pytest.mark.parity
def test_reference_codes_and_ids(reference_tensors):
    fixture = reference_tensors("chameleon_tiny.pt")
    table = code_table(fixture["vocab_map"])
    assert np.array_equal(table[fixture["indices"].numpy()], fixture["bpe"].numpy())
    assert not np.array_equal(table, np.arange(len(table)) + 4)  # the order of the ids is not that of the codes
