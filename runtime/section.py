"""What every section of a recipe is built on: unknown keys are refused, and numbers that no library counts with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LARGEST_SEED = 2**32 - 1  # numpy's
LARGEST_COUNT = LARGEST_SEED  # libraries count in 64 bits, and multiply
LARGEST_NUMBER = 1e30  # well inside of float32
HANDED_ON = ("options", "extra_body")  # keys whose values are for somebody else to understand
LONGEST_WAIT_S = 1e9  # 31 years; threads, sockets and Ray count nanoseconds in 64 bits
Seconds = Annotated[float, Field(le=LONGEST_WAIT_S)]
BatchSize = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Retries = Annotated[int, Field(ge=0, le=100)]  # the wait doubles from one to the next


class Section(BaseModel):
    """A model of a recipe's keys."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _countable(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name not in HANDED_ON:
            check_numbers(value)
        return value


def check_numbers(value: Any) -> None:
    """Raises ValueError for a number beyond those that libraries count with, also inside of lists and maps."""
    if isinstance(value, Mapping):
        for inner in value.values():
            check_numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_numbers(inner)
    elif isinstance(value, int) and abs(value) > LARGEST_COUNT:
        raise ValueError(f"whole numbers end at {LARGEST_COUNT}")
    elif isinstance(value, float) and abs(value) > LARGEST_NUMBER:
        raise ValueError(f"numbers end at {LARGEST_NUMBER:g}")
