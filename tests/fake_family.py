"""A policy family of somebody's own, with a section of its own in a recipe."""

from __future__ import annotations

from pydantic import Field

from policy.config import PolicyConfig
from policy.registry import Family
from runtime.errors import UserError
from tests.fakes import FakePolicy


class FakeConfig(PolicyConfig):
    """Which model thinks: a fake one."""

    layers: int = Field(2, ge=1)
    tower: dict[str, int] = {}


def load(config: FakeConfig, words=()) -> FakePolicy:
    policy = FakePolicy(seed=config.layers)
    policy.words = list(words)
    return policy


def check(config: FakeConfig, words, trains: bool) -> None:
    if trains and config.layers > 9:
        raise UserError(f"policy.layers: {config.layers} do not fit; at most 9")


def load_denoising(config: FakeConfig, words=()) -> FakePolicy:
    return FakePolicy(seed=config.layers, flow=True)


FAMILY = Family(FakeConfig, load, check)
OWN = "tests.fake_family.FAMILY"
LAZY = Family("tests.fake_family.FakeConfig", "tests.fake_family.load")
DENOISING = Family(FakeConfig, load_denoising, denoises=True)
UNSAID = Family(FakeConfig, load_denoising)  # what its images are is known once it is loaded
NO_POLICY = Family(FakeConfig, lambda config, words: 3)
