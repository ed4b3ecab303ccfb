"""Engines for tests of the workers: the fakes' policy, and trouble where a request's record asks for it.

A record may hold `trouble`: "die", "hang", "raise" or "refuse"; with `once` (a file's path) it comes only while that
file is absent. `slow` is a pause in seconds before each of the request's trajectories is handed over.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.tools.config import ToolConfig
from rollout.tools.registry import build_tools
from runtime.errors import UserError
from tests.fakes import FakeFormat, FakePolicy


class TroubledEngine(Engine):
    def stream(self, requests):
        by_group = {request.group: request.record for request in requests}
        for trajectory in super().stream(requests):
            record = by_group[trajectory.group]
            time.sleep(record.get("slow", 0.0))
            once = record.get("once")
            if "trouble" in record and not (once and Path(once).exists()):
                if once:
                    Path(once).touch()
                self.trouble(record["trouble"], trajectory.group)
            yield trajectory

    def trouble(self, kind: str, group: int) -> None:
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            hang_here()
        elif kind == "raise":
            raise ValueError(f"group {group} is poison")
        else:
            raise UserError(f"group {group}: the prompt is too long")


def hang_here() -> None:
    while True:
        time.sleep(60)


def engine(rollout: dict, seed: int = 0) -> Engine:
    return TroubledEngine(FakePolicy(seed=seed), FakeFormat(), RolloutConfig(**rollout))


def deaf_engine(rollout: dict, seed: int = 0) -> Engine:
    """Its model takes new weights into copies that nobody samples with."""
    made = engine(rollout, seed)
    model = made.policy.model
    model.state_dict = lambda *args, **kwargs: {name: p.detach().clone() for name, p in model.named_parameters()}
    return made


def frozen_engine(rollout: dict, seed: int = 0) -> Engine:
    """Only `head` and `mix` are trained."""
    made = engine(rollout, seed)
    for name, parameter in made.policy.model.named_parameters():
        parameter.requires_grad_(name in ("head", "mix"))
    return made


def broken_engine(rollout: dict) -> Engine:
    raise RuntimeError("this engine has no cylinders")


def wrong_engine(rollout: dict) -> Engine:
    raise UserError("policy.path: no such folder")


def nudge(policy, scale: float = 0.05, seed: int = 0) -> None:
    """An update: every trained weight moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def calling_engine(rollout: dict, tool: dict) -> Engine:
    """Its format calls the tool `file` after each of its first two sentences."""
    tools = build_tools({"file": ToolConfig(tool="tests.tool_helpers.FileTool", options=tool)})
    return Engine(FakePolicy(), FakeFormat(asks=2), RolloutConfig(**rollout), tools=tools)
