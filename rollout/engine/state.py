"""What an engine is between and during its calls: policy, format, settings, cache. Its loop (loop.py) works on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from formats.base import Format
from policy.base import Policy
from rollout.config import RolloutConfig
from rollout.requests import RolloutError
from rollout.tools.registry import Tools
from rollout.tools.runner import ToolRunner


@dataclass
class EngineStats:
    """What the last `run` or `stream` did. Tokens are ids after the prompt (or prefix), the environment's left out."""

    trajectories: int = 0
    tokens: int = 0
    decisions: int = 0
    images: int = 0
    ticks: int = 0
    row_ticks: int = 0  # rows stepped, summed over ticks: guidance branches left out
    branch_ticks: int = 0
    prompts: int = 0  # prefilled; the other members of a group are copies
    refills: int = 0  # rows that took another trajectory
    reprefills: int = 0  # rows prefilled because a context did not extend the cache
    seconds: float = 0.0
    draw_seconds: float = 0.0
    tools_parked_seconds: float = 0.0  # that rows waited for a tool, summed over rows
    tools_waited_seconds: float = 0.0  # in which no row could go on
    tool_calls: dict[str, int] = field(default_factory=dict)  # by tool; "unreadable": calls of no tool that there is
    tool_errors: dict[str, int] = field(default_factory=dict)  # those of the calls that were answered with an error

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_rows(self) -> float:
        return self.row_ticks / self.ticks if self.ticks else 0.0

    def count_call(self, tool: str, error: bool, seconds: float) -> None:
        name = tool or "unreadable"
        self.tool_calls[name] = self.tool_calls.get(name, 0) + 1
        self.tool_errors[name] = self.tool_errors.get(name, 0) + error
        self.tools_parked_seconds += seconds

    def counts(self) -> dict[str, float]:
        """Everything that adds up over calls of the engine and over engines; of tools only where any was called."""
        values = {name: float(value) for name, value in asdict(self).items() if not name.startswith("tool")}
        if self.tool_calls:
            values |= {
                "tools/parked_s": self.tools_parked_seconds,
                "tools/waited_s": self.tools_waited_seconds,
                "tools/calls": float(sum(self.tool_calls.values())),
                "tools/errors": float(sum(self.tool_errors.values())),
            }
            values |= {f"tools/calls/{name}": float(count) for name, count in self.tool_calls.items()}
            values |= {f"tools/errors/{name}": float(count) for name, count in self.tool_errors.items()}
        return values

    def metrics(self) -> dict[str, float]:
        values = {**self.counts(), "tokens_per_s": self.tokens_per_s, "mean_rows": self.mean_rows}
        return {f"rollout/{name}": value for name, value in values.items()}


class EngineState:
    """One policy in one format, and the cache that its rows live in.

    `version` is stamped on every segment. Publish new weights between calls, never while `stream` is being read:
    rows that hold keys and values of the old weights are live then, and the engine refuses to go on.

    Args:
        constrain: what decoding is constrained to ("images", or "full": the whole grammar).
        tools: answer wherever the cursor awaits the environment.

    Raises:
        RolloutError: too few rows for one trajectory and its guidance branches.
    """

    def __init__(
        self,
        policy: Policy,
        fmt: Format,
        config: RolloutConfig,
        constrain: str = "images",
        tools: Tools | None = None,
        version: int = 0,
    ):
        self.policy, self.fmt, self.config = policy, fmt, config
        self.constrain, self.tools, self.version = constrain, tools, version
        self.stats = EngineStats()
        self.branches = config.branches if config.guidance else 0
        self.active_rows = config.rows // (1 + self.branches)
        if self.active_rows < 1:
            raise RolloutError(
                f"rollout.rows: {config.rows} rows cannot hold one trajectory and its "
                f"{self.branches} guidance branches; give at least {1 + self.branches}"
            )
        self._cache: Any = None
        self._cache_length = 0
        self._runner: ToolRunner | None = None

    @property
    def runner(self) -> ToolRunner | None:
        """The tools at work, from the first call of the engine on; None: it has no tools."""
        if self._runner is None and self.tools is not None:
            self._runner = ToolRunner(self.tools)
        return self._runner

    def close(self) -> None:
        """End what works beside the engine. It may be used again."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def cache(self, length: int) -> Any:
        """The cache, kept from run to run; allocated anew when rows must be longer than ever before."""
        if self._cache is None or self._cache_length < length:
            self._cache = None  # free the old one first
            rows = self.active_rows * (1 + self.branches) + 1
            self._cache = self.policy.allocate(rows, length)
            self._cache_length = length
        return self._cache

    def free_cache(self) -> None:
        """Give the cache's memory back. Not during a call."""
        self._cache = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def restore_cache(self) -> None:
        """Allocate what was freed, so that memory which others took meanwhile is missed now and not in a rollout."""
        if self._cache_length:
            with torch.inference_mode():
                self.cache(self._cache_length)
