"""How a writer is built in another process: plain data, so that nothing heavy travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.config import RolloutConfig
from rollout.native import as_writer
from rollout.tools.config import ToolConfig
from rollout.tools.registry import build_tools
from rollout.writer import Writer
from runtime.loading import load_object


@dataclass(frozen=True)
class EngineSpec:
    """A writer that can be built elsewhere.

    `factory` is the dotted path of a function that takes `options` by keyword and returns a writer, or an engine, of
    which the native one is made. `repeatable`: whether a group may be written again after a worker was lost; not where
    its tools left something behind.
    """

    options: dict[str, Any] = field(default_factory=dict)
    factory: str = "rollout.spec.build_writer"
    repeatable: bool = True

    def build(self) -> Writer:
        return as_writer(load_object(self.factory, f"the writer's factory '{self.factory}'")(**self.options))


def engine_spec(
    policy: Any,
    fmt: Any,
    rollout: RolloutConfig,
    words: Sequence[str] = (),
    tools: Mapping[str, ToolConfig] | None = None,
    forks: bool = False,
) -> EngineSpec:
    """The spec of a recipe's sections `policy`, `format`, `rollout` and `tools`. `words`: of the task's language.
    `forks`: whether members are to go on from prefixes (grpo.fork)."""
    built = build_tools(tools or {})
    return EngineSpec(
        {
            "policy": policy.model_dump(mode="json"),
            "format": fmt.model_dump(mode="json"),
            "rollout": rollout.model_dump(mode="json"),
            "words": list(words),
            "tools": {name: config.model_dump(mode="json") for name, config in (tools or {}).items()},
            "forks": forks,
        },
        repeatable=built is None or built.repeatable,
    )


def build_writer(
    policy: dict[str, Any],
    format: dict[str, Any],
    rollout: dict[str, Any],
    words: Sequence[str],
    tools: Mapping[str, dict[str, Any]] | None = None,
    forks: bool = False,
) -> Writer:
    """The writer that a recipe's sections, as plain data, ask for."""
    from formats.config import FormatConfig
    from policy.registry import policy_section
    from rollout.registry import make_writer

    return make_writer(
        policy_section(policy),
        FormatConfig(**format),
        RolloutConfig(**rollout),
        words,
        build_tools({name: ToolConfig(**config) for name, config in (tools or {}).items()}),
        forks,
    )
