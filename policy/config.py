"""The recipe's `policy` section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from runtime.paths import ObjectPath, ReadPath, read_path
from runtime.section import LARGEST_SEED, Section

SHAPES_VQ = "shapes"  # of policy.tiny.vq: a name, and no path


class LoraSection(Section):
    """Low-rank adapters through peft (arXiv:2106.09685); the base weights stay frozen."""

    r: int = Field(16, ge=1, le=65536, description="Rank of the adapters.")
    alpha: int = Field(32, ge=1, le=2**31, description="Scaling numerator: updates are scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input. Not 0: ratios are not 1.")
    target_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="Names of the linear layers that get adapters. The output head cannot be one of them.",
    )

    @model_validator(mode="after")
    def _head_is_frozen(self) -> LoraSection:
        if "lm_head" in self.target_modules:
            raise ValueError(
                "target_modules: 'lm_head' cannot have adapters (scoring reads its weight in chunks); "
                "name layers of the decoder, such as 'q_proj'"
            )
        return self


class TinySection(Section):
    """A small model of the full-size class, built offline with fresh weights."""

    hidden_size: int = Field(128, ge=8, le=65536, description="Width of the decoder.")
    num_hidden_layers: int = Field(5, ge=1, le=1024, description="Layers of the decoder.")
    num_attention_heads: int = Field(4, ge=1, le=4096, description="Query heads.")
    num_key_value_heads: int = Field(
        1, ge=1, le=4096, description="Key-value heads; fewer make decoding on a CPU faster."
    )
    intermediate_size: int = Field(384, ge=8, le=2**20, description="Width of the feed-forward layers.")
    max_position_embeddings: int = Field(512, ge=8, le=2**24, description="Ids that one row can hold.")
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary position embedding.")
    swin_norm: bool = Field(False, description="Normalise after attention and feed-forward (Chameleon-34B's way).")
    vq: str | dict[str, Any] = Field(
        default=SHAPES_VQ,
        description="Visual tokenizer: 'shapes' (the committed weights of the shapes world), a path to a .safetensors "
        "file with its .json, or a mapping of ChameleonVQVAEConfig's keys for random weights.",
    )
    words: list[str] = Field(default=[], description="Words of the text tokenizer beyond those of the task.")
    tags: list[str] = Field(
        default=["<ins>", "</ins>", "<des>", "</des>", "<inspect>", "</inspect>", "<refine>", "</refine>"],
        description="Tags that are one token each.",
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Of the fresh weights.")

    @field_validator("vq")
    @classmethod
    def _found(cls, vq: str | dict[str, Any], info: ValidationInfo) -> str | dict[str, Any]:
        return vq if isinstance(vq, dict) or vq == SHAPES_VQ else read_path(vq, info)

    @model_validator(mode="after")
    def _divisible(self) -> TinySection:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of 2 x num_attention_heads "
                f"({self.num_attention_heads}): rotary embeddings need an even head width"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self


class PolicyConfig(Section):
    """Which model thinks."""

    family: ObjectPath = Field(
        "chameleon", description="A known family, or the dotted path of a function (PolicyConfig, words) -> Policy."
    )
    path: ReadPath | None = Field(
        None,
        description="Folder with config.json, model.safetensors and tokenizer files. "
        "None: a tiny model with fresh weights.",
    )
    tiny: TinySection = Field(
        default_factory=lambda: TinySection.model_validate({}),
        description="The tiny model; not read when path is given.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the decoder's weights: float32 where they are trained. Adapters are float32 anyway."
    )
    device: str = Field("cpu", description="torch device of the weights, such as 'cpu' or 'cuda'.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa",
        description="transformers' attention in scoring and training. With sdpa rows are scored end to end, without "
        "padding; the others pad them to the longest.",
    )
    lora: LoraSection | None = Field(None, description="Train adapters only. None: all weights of the decoder.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    score_chunk: int = Field(256, ge=1, le=2**31, description="Decisions whose logits scoring holds at a time.")
