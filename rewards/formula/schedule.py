"""Numbers that change over a run: the recipe's `rewards.schedules`, which `total` and weights name like parts.

schedules:
  w: {0: 1.0, 100: 0.2}                            straight from 1 to 0.2 over the first 100 steps, then 0.2
  strict: {kind: steps, at: {0: 0, 50: 1}}         0 before step 50, 1 from it on
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rewards.limits import LARGEST
from runtime.section import Section

Step = Annotated[int, Field(le=2**53)]  # as far as steps are whole in a float
Value = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


class ScheduleConfig(Section):
    """Values at steps, and what holds between them. `{0: 1.0, 100: 0.2}` alone is `{at: {0: 1.0, 100: 0.2}}`,
    and a number alone holds throughout."""

    at: dict[Step, Value] = Field(
        min_length=1, description="Value by step; before the first step its value, after the last one its."
    )
    kind: Literal["linear", "steps"] = Field(
        "linear", description="Between two steps. linear: straight. steps: the earlier value."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        """A mapping of steps alone, or a number that holds throughout."""
        if isinstance(data, int | float) and not isinstance(data, bool):
            return {"at": {0: data}}
        if isinstance(data, dict) and data and all(_is_step(key) for key in data):
            return {"at": data}
        return data

    @field_validator("at")
    @classmethod
    def _ordered(cls, at: dict[int, float]) -> dict[int, float]:
        if min(at) < 0:
            raise ValueError(f"step {min(at)} comes before the run; steps count from 0")
        return dict(sorted(at.items()))

    def value(self, step: int) -> float:
        """The value at a step.

        linear: v_a + (v_b - v_a) (step - a) / (b - a) between the given steps a <= step <= b.
        """
        before = [at for at in self.at if at <= step]
        after = [at for at in self.at if at > step]
        if not before:
            return self.at[after[0]]
        if not after or self.kind == "steps":
            return self.at[before[-1]]
        a, b = before[-1], after[0]
        return self.at[a] + (self.at[b] - self.at[a]) * (step - a) / (b - a)

    def formula(self) -> str:
        """For a person to read."""
        joint = " -> " if self.kind == "linear" else ", then "
        return joint.join(f"{value:g} at step {step}" for step, value in self.at.items())


def _is_step(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.lstrip("-").isdigit())
