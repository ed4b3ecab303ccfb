"""The recipe's section `format`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from formats.base import Format
from formats.registry import get_format
from runtime.errors import UserError
from runtime.paths import ObjectPath, Options
from runtime.section import Section


class FormatConfig(Section):
    name: ObjectPath = Field(
        "strokes",
        description="The way of thinking: strokes, subgoals, self_critique, look, direct (one "
        "image without words), a registered name, or the dotted path of a factory.",
    )
    max_images: int | None = Field(
        None, ge=1, description="At most so many images a trajectory; none: the format's own limit."
    )
    min_images: int | None = Field(
        None,
        ge=0,
        description="The policy cannot end a trajectory before it has drawn so many images; none: the format's own "
        "limit, as a rule 0.",
    )
    constrain: Literal["images", "full"] = Field(
        "images",
        description="images: an image is exactly its codes, words are free, so that well-formed tags are "
        "learned and can be rewarded. full: only well-formed thoughts can be sampled.",
    )
    options: Options = Field(
        default_factory=dict,
        description="Handed to the format: max_tokens by role (or one number), "
        "instruction, guidance, scales, negative_prompt, or what your own takes.",
    )

    def build(self) -> Format:
        """The format. Raises UserError naming the wrong key."""
        limits = {key: value for key in ("max_images", "min_images") if (value := getattr(self, key)) is not None}
        for key in limits:
            if key in self.options:
                raise UserError(f"format.{key} and format.options.{key} are both set; keep the first")
        return get_format(self.name, **{**limits, **self.options})

    @property
    def form_is_constant(self) -> bool:
        """Every thought that ends by itself is well formed, so that a reward for the form pays a constant."""
        return self.constrain == "full"
