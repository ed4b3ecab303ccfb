"""Ids, words and pieces of tiny and byte-level Chameleon tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from policy.chameleon.tiny import tiny_tokenizer
from policy.chameleon.vocabulary import (
    BOI,
    BOS,
    EOI,
    EOS,
    IMAGE,
    PAD,
    SEP,
    UNK,
    ChameleonVocabulary,
    VocabularyError,
    code_name,
    code_table,
    load_tokenizer,
)

WORDS = ["a", "red", "circle", "top-left", "of", "2", ",", "."]
TAGS = ["<ins>", "</ins>"]


def tiny(codes: int = 16) -> ChameleonVocabulary:
    return ChameleonVocabulary(tiny_tokenizer(WORDS, TAGS, codes), codes_per_image=4)


def byte_level() -> ChameleonVocabulary:
    """A tokenizer of the released kind: byte-level BPE in which no tag is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [BOS, PAD, EOS, UNK, *(code_name(code) for code in (1, 0, 3, 2)), EOI, BOI, SEP, IMAGE]
    merges = [("i", "n"), ("<", "in"), ("Ġ", "r")]
    entries = [*names, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: id for id, name in enumerate(entries)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, eos_token=EOS)
    return ChameleonVocabulary(fast, codes_per_image=4, size=400)


def test_codes_are_found_by_name():
    assert code_name(120) == "IMGIMGBCAZ"
    assert code_table({"IMGIMGAZ": 9, "IMGIMGBZ": 4, "word": 1}).tolist() == [9, 4]
    vocabulary = tiny(codes=16)
    # Sorted by name: AZ (0), BAZ (10), ..., BFZ (15), BZ (1), ...
    assert vocabulary.code_ids[10] == 5 and vocabulary.code_ids[1] == 11
    assert np.array_equal(vocabulary.to_codes(vocabulary.to_ids(np.arange(16))), np.arange(16))
    assert sorted(vocabulary.code_ids) == list(range(4, 20))


def test_a_gap_in_the_codes_is_named():
    with pytest.raises(VocabularyError, match="2 visual codes, but none is named 'IMGIMGBZ'"):
        code_table({"IMGIMGAZ": 0, "IMGIMGCZ": 1})
    with pytest.raises(VocabularyError, match="no visual codes"):
        code_table({"word": 0})


def test_markers_have_their_ids():
    vocabulary = tiny()
    names = [
        vocabulary.tokenizer.convert_ids_to_tokens(id)
        for id in (vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.boi, vocabulary.eoi, vocabulary.sep)
    ]
    assert names == [BOS, PAD, EOS, BOI, EOI, SEP]
    assert all(vocabulary.piece(id) == "" for id in (vocabulary.boi, vocabulary.eos, int(vocabulary.code_ids[3])))


def test_each_tag_is_one_token_and_text_returns():
    vocabulary = tiny()
    text = "<ins>red circle , top-left of 2 .</ins>"
    ids = vocabulary.encode(text)
    assert len(ids) == 9
    assert vocabulary.decode([vocabulary.bos, *ids, vocabulary.eos]) == text
    assert "".join(map(vocabulary.piece, ids)) == "<ins> red circle , top-left of 2 .</ins>"


@examples(0.6)
@given(st.lists(st.sampled_from(WORDS + TAGS), max_size=12))
def test_decoded_ids_encode_to_themselves(tokens):
    vocabulary = tiny()
    ids = [vocabulary.map[token] for token in tokens]
    assert vocabulary.encode(vocabulary.decode(ids)) == ids


def test_unknown_word_and_marker_are_named():
    vocabulary = tiny()
    with pytest.raises(VocabularyError, match="no word for 'bench' in"):
        vocabulary.encode("a red bench")
    with pytest.raises(VocabularyError, match="marker '<eoss>'"):
        vocabulary.encode("a red <eoss>")
    with pytest.raises(VocabularyError, match="'top left' is no single word"):
        tiny_tokenizer(["top left"], [], 4)


def test_byte_level_pieces_hold_tags_verbatim():
    vocabulary = byte_level()
    text = "see <ins>two réd 🟥</ins> circles"
    ids = vocabulary.encode(text)
    assert not any("<ins>" in vocabulary.piece(id) for id in ids)  # the tag is in parts
    joined = "".join(map(vocabulary.piece, ids))
    assert "<ins>two r" in joined and "</ins> circles" in joined
    assert vocabulary.decode([*ids, vocabulary.eos]) == text
    assert np.array_equal(vocabulary.to_ids(np.array([0, 1])), [5, 4])
    assert vocabulary.size == 400 and vocabulary.piece(399) == ""


def test_tokenizer_files_round_trip(tmp_path):
    vocabulary = tiny()
    vocabulary.tokenizer.save_pretrained(tmp_path)
    again = ChameleonVocabulary(load_tokenizer(tmp_path), codes_per_image=4)
    assert again.map == vocabulary.map and again.sep == vocabulary.sep
    assert again.encode("<ins> red circle .") == vocabulary.encode("<ins> red circle .")
    assert [again.piece(id) for id in range(again.size)] == [vocabulary.piece(id) for id in range(again.size)]


def test_missing_and_corrupt_tokenizer_files_are_named(tmp_path):
    with pytest.raises(VocabularyError, match="tokenizer.json: there is no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(VocabularyError, match="tokenizer.json: cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
