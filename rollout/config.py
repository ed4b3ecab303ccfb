"""The recipe's section `rollout`: how trajectories are sampled, and on how many workers.

Which thoughts are possible (format, constraint, number of images) is the section `format`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from formats.roles import DEFAULT, SAMPLED
from runtime.paths import ObjectPath
from runtime.ray_options import RayShare
from runtime.section import Retries, Seconds, Section

if TYPE_CHECKING:
    from policy.scoring.flow import Sampler

Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FlowConfig(Section):
    """How images are denoised, in families that denoise them."""

    sampler: Literal["sde", "cps", "dance", "ode"] = Field(
        "sde",
        description="sde: Flow-GRPO's step; cps: coefficients-preserving (Flow-CPS); dance: DanceGRPO's; ode: "
        "deterministic, which trains nothing and is for evaluations.",
    )
    noise_level: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Of the stochastic steps. null: the sampler's own default."
    )
    variant: Literal["repaired", "release"] = Field(
        "repaired", description="Of the sampler. release: as its authors' code has it, faults included."
    )
    steps: int = Field(10, ge=1, le=1000, description="Denoising steps of an image.")
    schedule: Literal["uniform", "sd3"] = Field(
        "uniform", description="uniform: equal steps, shifted (BAGEL, FLUX); sd3: that of Stable Diffusion 3."
    )
    shift: float = Field(3.0, gt=0, allow_inf_nan=False, description="More of the steps at high noise. 1: equal steps.")
    window: int | None = Field(
        None,
        ge=1,
        description="How many consecutive steps are stochastic and trained; each group has its window at a place drawn "
        "for it (Flow-GRPO-Fast, MixGRPO). null: all but the last.",
    )
    window_range: tuple[int, int] | None = Field(
        None, description="Steps between which a window lies, the second not included. null: all."
    )
    initial_noise: Literal["independent", "shared"] = Field(
        "independent", description="shared: the members of a group begin from the same noise (DanceGRPO)."
    )

    @model_validator(mode="after")
    def _window_fits(self) -> FlowConfig:
        low, high = self.window_range or (0, self.steps)
        if not 0 <= low < high <= self.steps:
            raise ValueError(f"window_range is [{low}, {high}]; it lies between 0 and the {self.steps} steps")
        if self.window_range is not None and self.window is None:
            raise ValueError(f"window_range is [{low}, {high}], and no window lies in it: give window its steps, too")
        if self.window is not None and self.window > high - low:
            raise ValueError(f"a window of {self.window} steps does not fit between steps {low} and {high}")
        return self

    def build_sampler(self, second_time: float) -> Sampler:
        """Raises UserError for a noise level that the sampler has no step for."""
        from policy.scoring.flow import SAMPLERS  # torch, which a recipe is read without

        values: dict[str, Any] = {"variant": self.variant}
        if self.noise_level is not None and self.sampler != "ode":
            values["noise_level"] = self.noise_level
        if self.sampler == "sde":
            values["sigma_at_one"] = second_time
        return SAMPLERS[self.sampler](**values)


class RolloutConfig(Section):
    rows: int = Field(
        64,
        ge=1,
        le=2**24,
        description="Rows of the key-value cache of each worker: trajectories written at once, "
        "and their guidance branches.",
    )
    max_tokens: int = Field(
        512,
        ge=1,
        le=2**24,
        description="Longest trajectory, in ids after the prompt. An image that would pass it is not begun.",
    )
    temperature: Annotated[dict[str, Temperature], SAMPLED] = Field(
        default_factory=lambda: {DEFAULT: 1.0},
        description="Sampling temperature by role; 'default' is for all "
        "others and between segments. A number alone is for all. 0: the likeliest id, untrained.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus: sample from the likeliest ids that together have this probability. 1: all.",
    )
    top_k: int = Field(0, ge=0, description="Sample from this many likeliest ids. 0: all.")
    guidance: bool = Field(False, description="Guide images by the format's branches (each costs a row of the cache).")
    branches: int = Field(4, ge=1, le=64, description="With guidance: rows kept for the branches of each trajectory.")
    flow: FlowConfig = Field(default_factory=FlowConfig, description="How images are denoised.")
    writer: ObjectPath = Field(
        "native",
        description="What writes trajectories. native: the toolkit's own engine; or the dotted path of a function that "
        "builds another writer (docs/writers.md).",
    )
    sleep: bool = Field(
        False,
        description="Free the writers' caches between generations, for the trainer to have that memory.",
    )
    workers: int = Field(0, ge=0, le=65536, description="Ray actors that write trajectories; 0: in this process.")
    threads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="CPU threads of each worker. null: one for a Ray actor, and in this process as many as torch has.",
    )
    gpus: RayShare = Field(0.0, description="GPUs of each worker; a fraction shares one among several.")
    timeout_s: Seconds = Field(600.0, gt=0, description="A worker that is silent for so long is replaced.")
    retries: Retries = Field(
        2,
        description="How often a group is rolled out again after a worker failed; never where one of its tools "
        "is not repeatable.",
    )
    reproducible: bool = Field(
        True,
        description="Fix which worker writes which group, the refill order, and when a tool's answer is read, so that "
        "the same seed gives the same trajectories (exactly on the CPU).",
    )

    @field_validator("temperature", mode="before")
    @classmethod
    def _of_all(cls, value: Any) -> Any:
        return {DEFAULT: value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def actor_threads(self) -> int:
        """CPU threads of a Ray actor, and CPUs that it asks for."""
        return self.threads or 1

    @field_validator("temperature")
    @classmethod
    def _has_default(cls, value: dict[str, float]) -> dict[str, float]:
        return value if DEFAULT in value else {DEFAULT: 1.0, **value}
