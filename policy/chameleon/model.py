"""transformers' Chameleon with its missing half: a visual tokenizer that draws, and image logits that are not masked.

transformers' forward sets the logits of every visual code to the dtype's minimum, before a loss too, and its
`vqmodel` has no decoder, so it can neither learn nor draw an image. The files are those of the released layout:
config.json, model.safetensors (or shards with their index), the decoder under `model.vqmodel.decoder.*`.

Letters: R rows, T ids, D width, V vocabulary, N decisions, K branches that are combined.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from policy.chameleon.vq import ChameleonVQ
from policy.scoring.logprobs import token_logprobs
from runtime.errors import UserError
from runtime.files import whole_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class ModelFileError(UserError):
    """A file of a model's folder that is missing, corrupt or of another shape than its configuration says."""


@dataclass(frozen=True)
class DecisionBatch:
    """Where in a forward's rows the decisions stand, and under which law they are scored.

    A decision's logits come from the hidden state before it: of one row, or a linear combination over K rows.
    """

    index_KN: Tensor  # int64 into the flattened [L * T]
    weight_KN: Tensor | None  # float32; None: K is 1 and the weight 1
    target_N: Tensor  # int64
    temperature_N: Tensor  # float32
    allowed_N: Tensor  # int64 into sets, -1: everything
    sets: tuple[np.ndarray, ...]
    entropy: bool = False
    chunk: int = 256


class InterleavedChameleon(ChameleonForConditionalGeneration):
    """Chameleon that writes and draws."""

    # A half-precision encoder would give other codes than the released one.
    _keep_in_fp32_modules = ["vqmodel"]
    _keep_in_fp32_modules_strict = ["vqmodel"]

    def __init__(self, config: ChameleonConfig):
        super().__init__(config)
        vq_config: Any = config.vq_config  # a ChameleonVQVAEConfig by now
        self.model.vqmodel = ChameleonVQ(vq_config).requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        decisions: DecisionBatch | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, Tensor | None]:
        """transformers' contract, with the image logits as they are.

        With `decisions`, no logits are returned but (logprob_N, entropy_N or None): the logits exist a chunk at a
        time and at decision positions only. It is a mode of `forward` so that DDP's and FSDP's hooks see it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=False if decisions is not None else use_cache,
            **kwargs,
        )
        hidden_RTD = outputs[0]
        if decisions is not None:
            return self._score(hidden_RTD, decisions)
        keep = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else (slice(None) if isinstance(logits_to_keep, int) else logits_to_keep)
        )
        logits_RTV = self.lm_head(hidden_RTD[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_RTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_RTV,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _score(self, hidden_RTD: Tensor, decisions: DecisionBatch) -> tuple[Tensor, Tensor | None]:
        flat_MD = hidden_RTD.reshape(-1, hidden_RTD.shape[-1])
        if decisions.weight_KN is None:
            hidden_ND = flat_MD[decisions.index_KN[0]]
        else:
            # The head has no bias, so combining hidden states combines logits.
            hidden_KND = flat_MD[decisions.index_KN]
            hidden_ND = (decisions.weight_KN[..., None].to(hidden_KND.dtype) * hidden_KND).sum(0)
        return token_logprobs(
            hidden_ND,
            self.lm_head.weight,
            decisions.target_N,
            decisions.temperature_N,
            decisions.allowed_N,
            decisions.sets,
            decisions.entropy,
            decisions.chunk,
        )


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> InterleavedChameleon:
    """The model of a folder in the released layout, on the CPU.

    Raises ModelFileError naming the file and key that is missing, corrupt or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    _check_weights(folder, config)
    try:
        return InterleavedChameleon.from_pretrained(
            str(folder), config=config, dtype=dtype, attn_implementation=attn_implementation, local_files_only=True
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelFileError(f"{folder}: the weights cannot be loaded ({error})") from error


def read_config(folder: Path) -> ChameleonConfig:
    """The configuration of a folder in the released layout. Raises ModelFileError naming the file and its fault."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise ModelFileError(
            f"{file}: cannot be read ({error.strerror}); policy.path is a folder with config.json, "
            f"{SINGLE} and the tokenizer's files"
        ) from error
    except ValueError as error:
        raise ModelFileError(f"{file}: not valid JSON ({error})") from error
    if values.get("model_type") != "chameleon":
        raise ModelFileError(
            f"{file}: model_type is {values.get('model_type')!r}; the family 'chameleon' reads 'chameleon'"
        )
    if not values.get("vocabulary_map"):
        raise ModelFileError(f"{file}: it has no vocabulary_map, without which no id is known to be a visual code")
    try:
        return ChameleonConfig(**values)
    except Exception as error:  # transformers validates with exceptions of huggingface_hub
        raise ModelFileError(f"{file}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelFileError(f"{index}: cannot be read as a shard index ({error})") from error
        return [folder / name for name in names]
    return [folder / SINGLE]


def _check_weights(folder: Path, config: ChameleonConfig) -> None:
    """Every weight is there, in its shape: read from the files' headers, before anything large is loaded."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in InterleavedChameleon(config).state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    home: dict[str, Path] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - safe_open is no mapping
                    found[key], home[key] = tuple(weights.get_slice(key).get_shape()), file
        except (OSError, SafetensorError) as error:
            raise ModelFileError(f"{file}: cannot be read as safetensors ({error}); copy or save it again") from error
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    missing = [key for key in wanted if key not in found]
    where = folder / INDEX if (folder / INDEX).is_file() else folder / SINGLE
    if missing:
        hint = (
            "; without the decoder nothing can be drawn: take a checkpoint in Anole's layout"
            if all(".decoder." in key for key in missing)
            else ""
        )
        raise ModelFileError(f"{where}: {len(missing)} weights are missing, first '{missing[0]}'{hint}")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise ModelFileError(
                f"{home[key]}: '{key}' has shape {list(found[key])}; config.json asks for {list(shape)}"
            )


def save_model(
    model: InterleavedChameleon,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write the released layout. The folder appears whole or not at all; one that is there is replaced.

    `state`: weights to write in place of the model's own (merged adapters).
    """
    with whole_folder(Path(folder)) as fresh:
        model.save_pretrained(str(fresh), state_dict=state)
        tokenizer.save_pretrained(str(fresh))
