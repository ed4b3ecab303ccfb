"""The recipe's `policy` section of the family `chameleon`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from policy.config import LoraSection, PolicyConfig
from runtime.paths import ReadPath, read_path
from runtime.section import LARGEST_SEED, Section

SHAPES_VQ, GRID_VQ, DIGITS_VQ = "shapes", "shapes_grid", "digits"  # of policy.tiny.vq: names, and no paths
COMMITTED_VQ = (SHAPES_VQ, GRID_VQ, DIGITS_VQ)


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
        description="Visual tokenizer: 'shapes' or 'digits' (the committed weights of these worlds), 'shapes_grid' (of "
        "the shapes' levels middle and hard, which take it by themselves), a path to a .safetensors file with its "
        ".json, or a mapping of ChameleonVQVAEConfig's keys for random weights.",
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
        return vq if isinstance(vq, dict) or vq in COMMITTED_VQ else read_path(vq, info)

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


class ChameleonPolicyConfig(PolicyConfig):
    """Which model thinks: one of the family chameleon (Anole)."""

    path: ReadPath | None = Field(
        None,
        description="Folder with config.json, model.safetensors and tokenizer files. "
        "None: a tiny model with fresh weights.",
    )
    tiny: TinySection = Field(
        default_factory=lambda: TinySection.model_validate({}),
        description="The tiny model; not read when path is given.",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa",
        description="transformers' attention in scoring and training. With sdpa rows are scored end to end, without "
        "padding; the others pad them to the longest.",
    )
    lora: LoraSection | None = Field(None, description="Train adapters only. None: all weights of the decoder.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    score_chunk: int = Field(256, ge=1, le=2**31, description="Decisions whose logits scoring holds at a time.")

    @property
    def fresh_tags(self) -> list[str]:
        return list(self.tiny.tags)
