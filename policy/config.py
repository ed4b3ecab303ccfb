"""The keys that the recipe's `policy` section has whatever the family. Each family has a model of its own on top, with
the keys that it understands (policy/registry.py says which)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from runtime.paths import ObjectPath, ReadPath
from runtime.section import Section


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


class PolicyConfig(Section):
    """Which model thinks."""

    family: ObjectPath = Field(
        "chameleon",
        description="A known family, or the dotted path of your own: a policy.registry.Family, or a function "
        "(section, words) -> Policy, whose section is that of the family chameleon.",
    )
    path: ReadPath | None = Field(None, description="Folder with the model's files.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the decoder's weights: float32 where they are trained. Adapters are float32 anyway."
    )
    device: str = Field("cpu", description="torch device of the weights, such as 'cpu' or 'cuda'.")

    @property
    def fresh_tags(self) -> list[str]:
        """Tags that a tokenizer built offline makes one token of each; none where the family builds none."""
        return []
