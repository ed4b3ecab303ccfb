"""This toolkit's own rewards: the name a recipe writes, where the function is, its formula and its source.

Only for these is a name enough; anybody else's function is named by path (loader.py). Where `place` is "driver" a
reward is bounded, makes no network call, and shares one detection of each picture with the others; one that calls a
judge or a library with time limits of its own has the place "process".
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Registered:
    name: str
    function: str  # "module:function"
    formula: str
    source: str
    inputs: str = ""  # the record's columns and what else it reads
    differs: str = ""  # what its variants do differently, where the release departs from the paper or has a known bug
    needs_detector: bool = False
    needs_judge: bool = False
    scope: Literal["row", "group", "batch"] = "row"  # what a value may depend on: its trajectory, its group, the step
    place: Literal["driver", "process"] = "driver"

    def load(self) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


def _by_name(*rewards: Registered) -> dict[str, Registered]:
    return {reward.name: reward for reward in rewards}


REWARDS: dict[str, Registered] = _by_name(
    Registered("geneval", "rewards.geneval:geneval",
               "1 if the final picture meets the record, else 0; graded: the share of it that is met, in [0, 1]",
               "GenEval, arXiv:2310.11513, section 3.2", needs_detector=True),
    Registered("critique_consistency", "rewards.critique_consistency:critique_consistency",
               "mean over inspections of +-min(f, w)/f for pictures that are fine and +-min(f, w)/w for wrong ones, "
               "with f and w their shares in the batch; + where the verdict is right",
               "this project; the weights are those of Youden's J (Cancer 3:32, 1950)", needs_detector=True,
               scope="batch"),
    Registered("improvement", "rewards.improvement:improvement",
               "graded score of the final picture less that of the first, in [-1, 1]",
               "this project", needs_detector=True),
    Registered("steps", "rewards.steps:steps",
               "1 less penalties for pictures and turns outside their limits and for being cut off, at least 0",
               "this project"),
    Registered("format", "rewards.format:format_reward",
               "1 if the thought is a sentence of its format, else 0; graded: the share of well-formed segments",
               "this project; the rule is the ThoughtFormat's own"),
)
