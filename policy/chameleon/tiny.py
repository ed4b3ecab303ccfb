"""The tiny preset: the classes of the 7B model with a small configuration, built offline with fresh weights.

The text tokenizer is word-level over the task's words, with each tag one token; visual codes and markers bear the
released names. The visual tokenizer is the committed one of the shapes world unless the recipe says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import ChameleonConfig, PreTrainedTokenizerFast

from policy.chameleon.config import DIGITS_VQ, SHAPES_VQ, TinySection
from policy.chameleon.model import InterleavedChameleon
from policy.chameleon.vocabulary import BOI, BOS, EOI, EOS, IMAGE, PAD, SEP, UNK, VocabularyError, code_name
from policy.chameleon.vq import ChameleonVQ, TokenizerError, load_digits_vq, load_shapes_vq, load_vq, vq_config
from runtime.errors import UserError, first_line

# What torch and transformers raise for sizes and kinds that make no network.
UNMAKEABLE = (RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError, IndexError, AttributeError)


def tiny_tokenizer(words: Sequence[str], tags: Sequence[str], codes: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with `codes` visual codes. Words are what white space and tags separate.

    Raises VocabularyError for a word that text would not yield as one token.
    """
    unique = list(dict.fromkeys(words))
    for word in unique:
        if word.split() != [word] or any(tag in word for tag in tags):
            raise VocabularyError(f"the word {word!r} is no single word: it may hold neither white space nor a tag")
    # Released ids are by name too, so that nobody can take id - 4 for the code.
    names = [BOS, PAD, EOS, UNK, *sorted(code_name(code) for code in range(codes)), EOI, BOI, SEP, IMAGE]
    table = {name: id for id, name in enumerate(dict.fromkeys([*names, *tags, *unique]))}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # a hyphen ends no word
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, eos_token=EOS, unk_token=UNK, sep_token=SEP
    )


def tiny_vq(section: TinySection) -> ChameleonVQ:
    """The visual tokenizer that the section names.

    Raises TokenizerError for a file that is none, and for keys of which no tokenizer can be made.
    """
    if isinstance(section.vq, dict):
        config = vq_config(section.vq, "policy.tiny.vq")
        try:
            with torch.device("meta"):  # shapes alone, to see how large it is
                size = 4 * sum(p.numel() for p in ChameleonVQ(config).parameters())
            if size > (there := psutil.virtual_memory().total):
                raise MemoryError(f"{size / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}")
            return ChameleonVQ(config).requires_grad_(False)
        except UNMAKEABLE as error:
            raise TokenizerError(
                f"policy.tiny.vq: no tokenizer can be made of these keys ({first_line(error)})"
            ) from None
    committed = {SHAPES_VQ: load_shapes_vq, DIGITS_VQ: load_digits_vq}
    return committed[section.vq]() if section.vq in committed else load_vq(Path(section.vq))


def tiny_config(section: TinySection, tokenizer: PreTrainedTokenizerFast, vq: ChameleonVQ) -> ChameleonConfig:
    """The configuration of the whole model."""
    vocabulary_map = tokenizer.get_vocab()
    return ChameleonConfig(
        vocab_size=len(vocabulary_map),
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.num_hidden_layers,
        num_attention_heads=section.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads,
        max_position_embeddings=section.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
        swin_norm=section.swin_norm,
        bos_token_id=vocabulary_map[BOS],
        pad_token_id=vocabulary_map[PAD],
        eos_token_id=vocabulary_map[EOS],
        vq_config=vq.config.to_dict(),
        vocabulary_map=vocabulary_map,
    )


def tiny_model(section: TinySection, words: Sequence[str]) -> tuple[InterleavedChameleon, PreTrainedTokenizerFast]:
    """The model with fresh weights, a function of `section.seed`, and its tokenizer.

    Raises UserError where the machine's memory does not hold it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        vq = tiny_vq(section)
        tokenizer = tiny_tokenizer([*words, *section.words], section.tags, vq.config.num_embeddings)
        try:
            model = InterleavedChameleon(tiny_config(section, tokenizer, vq))
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"policy.tiny: the model cannot be made ({first_line(error)})") from None
        model.model.vqmodel.load_state_dict(vq.state_dict())
    return model, tokenizer
