"""The recipe's section `scaling`: which test-time compute an evaluation compares."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from runtime.section import Section

Budget = Annotated[int, Field(ge=1, le=65536)]


class ScalingConfig(Section):
    rounds: list[Budget] = Field(
        default_factory=lambda: [1, 2, 3, 4],
        min_length=1,
        description="limits of rounds (a picture and its critique each) that one thought may take; at most "
        "format.max_images. Each prompt has evaluate.samples thoughts, whose scores are averaged",
    )
    samples: list[Budget] = Field(
        default_factory=lambda: [1, 2, 4, 8],
        min_length=1,
        description="how many independent thoughts, or first pictures, one is chosen from",
    )
    roles: list[str] | None = Field(
        None,
        min_length=1,
        description="of the words that criticise the picture before them. Default: those of inspect and critique that "
        "the format has; without any, arms that go by the policy's own critique are left out",
    )
    fine: str | None = Field(
        None,
        description="a regular expression: critiques in which it is found approve of their picture, all others do not. "
        "Default: as the task reads them (`claims`)",
    )

    @field_validator("rounds", "samples")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        return sorted(set(value))

    @field_validator("fine")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"no regular expression ({error})") from None
        return value
