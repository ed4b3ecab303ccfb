"""From a recipe's sections to the pool that writes its trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from policy.base import Policy
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.pool.contract import Rollouts
from rollout.pool.local import LocalRollouts
from rollout.registry import NATIVE, make_writer
from rollout.spec import engine_spec
from rollout.tools.config import ToolConfig
from rollout.tools.registry import build_tools


def open_rollouts(
    policy: Policy,
    policy_config: Any,
    format_config: Any,
    config: RolloutConfig,
    words: Sequence[str] = (),
    tools: Mapping[str, ToolConfig] | None = None,
    forks: bool = False,
) -> Rollouts:
    """The pool that the recipe asks for: actors that load a policy of their own, or, with `workers: 0`, a writer in
    this process, of which the native one samples with `policy` itself. `forks`: whether members are to go on from
    prefixes (grpo.fork)."""
    if config.workers == 0:
        if config.writer != NATIVE:
            made = make_writer(policy_config, format_config, config, words, build_tools(tools or {}), forks)
            return LocalRollouts(made, config.threads, config.sleep)
        engine = Engine(policy, format_config.build(), config, format_config.constrain, build_tools(tools or {}))
        return LocalRollouts(engine, config.threads, config.sleep)
    from rollout.pool.ray_rollouts import RayRollouts

    return RayRollouts(engine_spec(policy_config, format_config, config, words, tools, forks), config)
