"""The recipe's section `rollout`: how trajectories are sampled, and on how many workers.

Which thoughts are possible (format, constraint, number of images) is the section `format`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from formats.roles import DEFAULT, SAMPLED
from runtime.ray_options import RayShare
from runtime.section import Retries, Seconds, Section

Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
    workers: int = Field(0, ge=0, le=65536, description="Ray actors that write trajectories; 0: in this process.")
    threads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="CPU threads of each worker. null: one for a Ray actor, and in this process as many as torch has.",
    )
    gpus: RayShare = Field(0.0, description="GPUs of each worker; a fraction shares one among several.")
    timeout_s: Seconds = Field(600.0, gt=0, description="A worker that is silent for so long is replaced.")
    retries: Retries = Field(2, description="How often a group is rolled out again after a worker failed.")
    reproducible: bool = Field(
        True,
        description="Fix which worker writes which group, and the refill order, so that "
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
