"""What a recipe may ask of Ray: shares of CPUs and GPUs as Ray counts them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

SMALLEST = 1e-4  # Ray counts in ten-thousandths


def _countable(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"{value:g}: above 1 Ray deals out whole ones; round it")
    if 0 < value < SMALLEST:
        raise ValueError(f"{value:g}: the smallest share that Ray knows is {SMALLEST:g}")
    return value


RayShare = Annotated[float, Field(ge=0, le=2**31), AfterValidator(_countable)]
