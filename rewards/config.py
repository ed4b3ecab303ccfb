"""The section `rewards` of a recipe: which parts there are and how they make the reward.

    rewards:
      parts:
        result: {function: geneval, options: {mode: graded}}
        consistency: {function: critique_consistency}
        bright: {function: my_rewards.py:brightness, timeout_s: 20}
      total: result * (1 + 0.5 * coalesce(consistency, 0)) + 0.1 * bright
"""

from __future__ import annotations

import keyword
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rewards.detectors.registry import DetectorConfig
from rewards.expression import FUNCTIONS, Expression
from rewards.loader import check_exists, is_own


class PartConfig(BaseModel):
    """One reward part."""

    model_config = ConfigDict(extra="forbid")

    function: str = Field(description="A registered name, 'package.module.function', or 'path/to/file.py:function'.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further keyword arguments of the function.")
    factory: bool = Field(False, description="The function makes the reward when called with the options, as TRL's "
                                             "get_soft_overlong_punishment does.")
    weight: float | None = Field(None, description="Factor of the part in the sum, where `total` is not given; None: "
                                                   "1. A part of weight 0 is computed and logged, never paid.")
    completions: Literal["auto", "interleaved", "text"] = Field(
        "auto", description="What `completions` holds. interleaved: words and PIL pictures. text: the words as one "
        "string, for rewards written for text. auto: text for TRL's own functions, else interleaved.")
    isolate: bool | None = Field(None, description="Run in a process of its own, which is killed on a timeout. None: "
                                                   "yes, except for this toolkit's own rewards.")
    timeout_s: float = Field(60.0, gt=0, description="Seconds one call may take (isolated parts).")
    load_timeout_s: float = Field(300.0, gt=0, description="Seconds that importing the function may take.")
    retries: int = Field(1, ge=0, description="Further calls after one that raised, hung, crashed or gave NaN; then "
                                              "the rows are None.")
    retry_wait_s: float = Field(0.5, ge=0, description="Seconds before the first retry; doubled at each further one.")

    @property
    def isolated(self) -> bool:
        return self.isolate if self.isolate is not None else not is_own(self.function)


class RewardsConfig(BaseModel):
    """All parts, the formula over them, and how much failure the run bears."""

    model_config = ConfigDict(extra="forbid")

    parts: dict[str, PartConfig] = Field(min_length=1, description="Reward parts by the names that `total` uses.")
    total: str | None = Field(None, description="Formula over the parts: + - * / % **, comparisons, `a if b else c`, "
                              "min, max, abs, clip(x, low, high), coalesce(x, d). None anywhere makes it None, except "
                              "inside coalesce. Not given: the sum of weight * part.")
    none_limit: int = Field(3, ge=1, description="The run stops when this many steps in a row had a part fail for "
                            "over half of its rows, or had no trajectory with a reward.")
    detector: DetectorConfig | str | None = Field(
        None, description="One of the toolkit's (backend: mask2former, grounding_dino, owlv2, shapes; path ...), or the "
                          "dotted path or file of a function or class that makes a Detector; None: the task's own.")

    @model_validator(mode="after")
    def _consistent(self) -> RewardsConfig:
        for name, part in self.parts.items():
            if not name.isidentifier() or keyword.iskeyword(name) or name in FUNCTIONS:
                raise ValueError(f"parts.{name}: a part's name stands in a formula, so it must be a plain word and "
                                 f"none of {', '.join(FUNCTIONS)}")
            check_exists(part.function)
            if self.total is not None and part.weight is not None:
                raise ValueError(f"parts.{name}.weight has no use beside `total`; write the factor into the formula")
            if part.isolate and is_own(part.function):
                raise ValueError(f"parts.{name}.isolate: '{part.function}' shares the driver's detector and cannot "
                                 f"run in a process of its own")
            if part.factory and is_own(part.function):
                raise ValueError(f"parts.{name}.factory: '{part.function}' is no factory")
        self.expression()
        return self

    def formula(self) -> str:
        """`total`, or the weighted sum that stands for it."""
        if self.total is not None:
            return self.total
        weights = {name: 1.0 if part.weight is None else part.weight for name, part in self.parts.items()}
        return " + ".join(name if w == 1 else f"{w:g} * {name}" for name, w in weights.items() if w != 0) or "0"

    def expression(self) -> Expression:
        return Expression(self.formula(), self.parts)

    def refuse_constant_format(self, format_config: Any) -> None:
        """Refuse a recipe that pays for `format` while decoding admits nothing but well-formed thoughts.

        Raises ValueError: under full constraint the part is 1 for everybody, which moves no advantage.
        """
        if not format_config.form_is_constant:
            return
        paid = self.expression().names
        for name, part in self.parts.items():
            if part.function == "format" and name in paid:
                raise ValueError(f"rewards.parts.{name} pays for the format, but format.constrain is 'full', so every "
                                 f"thought is well-formed and the part is a constant; set format.constrain: images, "
                                 f"or take '{name}' out of rewards.total")
