"""The recipe's section `rollout`: how trajectories are sampled, and on how many workers.

Which thoughts are possible (format, constraint, number of images) is the section `format`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RolloutConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rows: int = Field(
        64,
        ge=1,
        description="Rows of the key-value cache of each worker: trajectories written at once, "
        "and their guidance branches.",
    )
    max_tokens: int = Field(
        512, ge=1, description="Longest trajectory, in ids after the prompt. An image that would pass it is not begun."
    )
    temperature: dict[str, Temperature] = Field(
        default_factory=lambda: {"default": 1.0},
        description="Sampling temperature by role; 'default' is for all "
        "others and between segments. 0: the likeliest id, untrained.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus: sample from the likeliest ids that together have this probability. 1: all.",
    )
    top_k: int = Field(0, ge=0, description="Sample from this many likeliest ids. 0: all.")
    guidance: bool = Field(False, description="Guide images by the format's branches (each costs a row of the cache).")
    branches: int = Field(4, ge=1, description="With guidance: rows kept for the branches of each trajectory.")
    workers: int = Field(0, ge=0, description="Ray actors that write trajectories; 0: in this process.")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each worker. null: one for a Ray actor, and in this process as many as torch has.",
    )
    gpus: float = Field(0.0, ge=0, description="GPUs of each worker; a fraction shares one among several.")
    timeout_s: float = Field(600.0, gt=0, description="A worker that is silent for so long is replaced.")
    retries: int = Field(2, ge=0, description="How often a group is rolled out again after a worker failed.")
    reproducible: bool = Field(
        True,
        description="Fix which worker writes which group, and the refill order, so that "
        "the same seed gives the same trajectories (exactly on the CPU).",
    )

    @property
    def actor_threads(self) -> int:
        """CPU threads of a Ray actor, and CPUs that it asks for."""
        return self.threads or 1

    @field_validator("temperature")
    @classmethod
    def _has_default(cls, value: dict[str, float]) -> dict[str, float]:
        return value if "default" in value else {"default": 1.0, **value}
