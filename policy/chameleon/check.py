"""What a recipe's section `policy` asks of this family, held to what is here before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available

from policy.chameleon.config import ChameleonPolicyConfig
from policy.chameleon.model import InterleavedChameleon, read_config
from policy.chameleon.tiny import tiny_config, tiny_tokenizer, tiny_vq
from policy.chameleon.vocabulary import ChameleonVocabulary, load_tokenizer
from policy.config import LoraSection
from policy.devices import check_device
from runtime.errors import UserError, nearest


def check(config: ChameleonPolicyConfig, words: Sequence[str], trains: bool) -> None:
    """The family's check in policy/registry.py.

    Args:
        words: of the task's language.
        trains: whether the weights are to be trained, not only sampled with.

    Raises:
        UserError: naming the key, and what would be right.
    """
    check_device(config.device, "policy.device")
    _check_attention(config)
    if trains and config.dtype != "float32" and config.lora is None:
        raise UserError(
            f"policy.dtype: weights in {config.dtype} are to be trained, in which small steps are rounded away and "
            f"nothing is learned; set policy.dtype: float32, or train adapters (policy.lora), which are float32"
        )
    if config.path is None:
        vq = tiny_vq(config.tiny)
        tokenizer = tiny_tokenizer([*words, *config.tiny.words], config.tiny.tags, vq.config.num_embeddings)
        model_config = tiny_config(config.tiny, tokenizer, vq)
    else:
        load_tokenizer(config.path)
        model_config = read_config(Path(config.path))
    with torch.device("meta"):  # shapes alone
        model = InterleavedChameleon(model_config)
    if config.path is None:
        _check_fits(model)
    if config.lora is not None:
        check_adapters(model, config.lora)


def vocabulary(config: ChameleonPolicyConfig) -> tuple[ChameleonVocabulary, int]:
    """The vocabulary and the context's length of the model at config.path, which is read without its weights."""
    assert config.path is not None
    tokenizer, model_config = load_tokenizer(config.path), read_config(Path(config.path))
    with torch.device("meta"):
        codes = InterleavedChameleon(model_config).model.vqmodel.codes_per_image
    length = int(model_config.max_position_embeddings)
    return ChameleonVocabulary(tokenizer, codes, model_config.vocab_size), length


def check_adapters(model: InterleavedChameleon, lora: LoraSection) -> None:
    """Raises UserError for a target that no linear layer of the decoder is called."""
    known = {
        name.rpartition(".")[2] for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)
    }
    for target in lora.target_modules:
        if target not in known:
            raise UserError(
                f"policy.lora.target_modules: the model has no linear layer '{target}'; {nearest(target, known)}"
            )


def _check_fits(model: InterleavedChameleon) -> None:
    """Fresh weights are made in this machine's memory, in float32."""
    size, there = 4 * sum(p.numel() for p in model.parameters()), psutil.virtual_memory().total
    if size > there:
        raise UserError(
            f"policy.tiny: the weights take {size / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}; give a "
            "smaller hidden_size, intermediate_size or num_hidden_layers"
        )


def _check_attention(config: ChameleonPolicyConfig) -> None:
    if config.attn_implementation != "flash_attention_2":
        return
    instead = "or set policy.attn_implementation: sdpa"
    if not config.device.startswith("cuda"):
        raise UserError(
            f"policy.attn_implementation: flash_attention_2 runs on CUDA devices alone, and policy.device is "
            f"{config.device}; set policy.device: cuda, {instead}"
        )
    if config.dtype == "float32":
        raise UserError(
            f"policy.attn_implementation: flash_attention_2 computes in 16 bits, and policy.dtype is float32; set "
            f"policy.dtype: bfloat16, {instead}"
        )
    if not is_flash_attn_2_available():
        raise UserError(
            f"policy.attn_implementation: flash_attention_2 needs the package flash-attn, which is not installed here; "
            f"pip install flash-attn, {instead}"
        )
