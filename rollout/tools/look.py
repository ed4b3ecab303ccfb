"""The tool `look`: an enlarged crop of the policy's own last picture, so that it can inspect what it drew.

The zoom of DeepEyes (arXiv:2505.14362) and Pixel Reasoner (arXiv:2505.15966), turned on a picture that was generated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from record.trajectory import Trajectory
from rollout.tools.base import Reply, ToolCall, ToolError
from runtime.section import Section
from tasks.crop import crop


class LookOptions(Section):
    """The options of `look`."""

    frame: Literal["pixels", "fractions"] = Field(
        "pixels", description="In what a box is given: pixels of the picture, or fractions of its sides."
    )
    outside: Literal["clamp", "error"] = Field(
        "clamp", description="What becomes of a box that reaches out of the picture: it is cut to it, or refused."
    )
    smallest: int = Field(4, ge=1, le=4096, description="Shortest side of a box, in pixels of the picture.")
    size: int = Field(32, ge=1, le=4096, description="Side of the pictures, from which a tiny tokenizer gets numbers.")
    step: int = Field(4, ge=1, le=4096, description="Such a tokenizer knows every so-many-th number of pixels.")


class Look:
    """`<look> x0 y0 x1 y1 </look>`, or JSON with `box` (DeepEyes' `bbox_2d` is understood too)."""

    name = "look"
    repeatable = True
    Options = LookOptions

    def __init__(self, options: LookOptions) -> None:
        self.options = options
        numbers = range(0, options.size + 1, options.step)
        pixels = options.frame == "pixels"
        self.words = [str(n) if pixels else f"{n / options.size:g}" for n in numbers]
        self.words += ["look", "no", "picture", "box"]

    def open(self, trajectory: Trajectory) -> Look:
        return self  # nothing is kept from call to call

    def call(self, call: ToolCall, trajectory: Trajectory) -> Sequence[Reply]:
        drawn = trajectory.images()
        if not drawn:
            raise ToolError("no picture to look at: draw one first")
        return [crop(drawn[-1], self._box(call, drawn[-1]))]

    def close(self) -> None:
        """Nothing was opened."""

    def _box(self, call: ToolCall, image: np.ndarray) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in whole pixels, half-open. Raises ToolError for what is no box of the picture."""
        height, width = image.shape[:2]
        x0, y0, x1, y1 = _four(call)
        if self.options.frame == "fractions":
            x0, y0, x1, y1 = x0 * width, y0 * height, x1 * width, y1 * height
        if x0 >= x1 or y0 >= y1:
            raise ToolError("the box is empty: it is x0 y0 x1 y1 with x0 < x1 and y0 < y1")
        if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
            if self.options.outside == "error":
                sides = "1 by 1" if self.options.frame == "fractions" else f"{width} by {height}"
                raise ToolError(f"the box reaches out of the picture, which is {sides}")
            x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        box = (int(np.floor(x0)), int(np.floor(y0)), int(np.ceil(x1)), int(np.ceil(y1)))
        if min(box[2] - box[0], box[3] - box[1]) < self.options.smallest:
            raise ToolError(f"the box is too small: each side has at least {self.options.smallest} pixels")
        return box


def _four(call: ToolCall) -> list[float]:
    """The box's numbers. Raises ToolError where they are not four."""
    given: Any = call.arguments.get("box", call.arguments.get("bbox_2d"))
    if not call.arguments:
        given = [word for word in re.split(r"[\s,;()\[\]]+", call.body) if word]
    try:
        numbers = [float(number) for number in given]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 4 or not np.isfinite(numbers).all():
        raise ToolError("look wants a box of four numbers: x0 y0 x1 y1")
    return numbers
