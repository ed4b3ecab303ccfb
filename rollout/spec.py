"""How a writer in another process builds its engine: plain data, so that nothing heavy travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.tools.config import ToolConfig
from rollout.tools.registry import build_tools
from runtime.loading import load_object


@dataclass(frozen=True)
class EngineSpec:
    """An engine that can be built elsewhere.

    `factory` is the dotted path of a function that takes `options` by keyword and returns an engine. `repeatable`:
    whether a group may be written again after a worker was lost; not where its tools left something behind.
    """

    options: dict[str, Any] = field(default_factory=dict)
    factory: str = "rollout.spec.build_engine"
    repeatable: bool = True

    def build(self) -> Engine:
        return load_object(self.factory, f"the engine's factory '{self.factory}'")(**self.options)


def engine_spec(
    policy: Any,
    fmt: Any,
    rollout: RolloutConfig,
    words: Sequence[str] = (),
    tools: Mapping[str, ToolConfig] | None = None,
) -> EngineSpec:
    """The spec of a recipe's sections `policy`, `format`, `rollout` and `tools`. `words`: of the task's language."""
    built = build_tools(tools or {})
    return EngineSpec(
        {
            "policy": policy.model_dump(mode="json"),
            "format": fmt.model_dump(mode="json"),
            "rollout": rollout.model_dump(mode="json"),
            "words": list(words),
            "tools": {name: config.model_dump(mode="json") for name, config in (tools or {}).items()},
        },
        repeatable=built is None or built.repeatable,
    )


def build_engine(
    policy: dict[str, Any],
    format: dict[str, Any],
    rollout: dict[str, Any],
    words: Sequence[str],
    tools: Mapping[str, dict[str, Any]] | None = None,
) -> Engine:
    """The engine of a recipe's sections, as plain data."""
    from formats.config import FormatConfig
    from policy.config import PolicyConfig
    from policy.registry import load_policy

    fmt = FormatConfig(**format)
    return Engine(
        load_policy(PolicyConfig(**policy), words),
        fmt.build(),
        RolloutConfig(**rollout),
        fmt.constrain,
        build_tools({name: ToolConfig(**config) for name, config in (tools or {}).items()}),
    )
