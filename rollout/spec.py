"""How a writer in another process builds its engine: plain data, so that nothing heavy travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from runtime.loading import load_object


@dataclass(frozen=True)
class EngineSpec:
    """An engine that can be built elsewhere.

    `factory` is the dotted path of a function that takes `options` by keyword and returns an engine.
    """

    options: dict[str, Any] = field(default_factory=dict)
    factory: str = "rollout.spec.build_engine"

    def build(self) -> Engine:
        return load_object(self.factory, f"the engine's factory '{self.factory}'")(**self.options)


def engine_spec(policy: Any, fmt: Any, rollout: RolloutConfig, words: Sequence[str] = ()) -> EngineSpec:
    """The spec of a recipe's sections `policy`, `format` and `rollout`. `words`: of the task's language."""
    return EngineSpec(
        {
            "policy": policy.model_dump(mode="json"),
            "format": fmt.model_dump(mode="json"),
            "rollout": rollout.model_dump(mode="json"),
            "words": list(words),
        }
    )


def build_engine(
    policy: dict[str, Any], format: dict[str, Any], rollout: dict[str, Any], words: Sequence[str]
) -> Engine:
    """The engine of a recipe's sections, as plain data."""
    from formats.config import FormatConfig
    from policy.registry import load_policy, policy_section

    fmt = FormatConfig(**format)
    return Engine(load_policy(policy_section(policy), words), fmt.build(), RolloutConfig(**rollout), fmt.constrain)
