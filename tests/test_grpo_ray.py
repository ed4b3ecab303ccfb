"""The driver over Ray: a run whose actor is killed between its steps is the run that it would have been."""

from __future__ import annotations

import os
import signal

import pytest

import rl.grpo
from formats.config import FormatConfig
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from policy.config import LoraSection
from rewards.config import RewardsConfig
from rewards.manager import RewardManager
from rollout.config import RolloutConfig
from rollout.pool.local import LocalRollouts
from rollout.pool.ray_rollouts import RayRollouts
from rollout.spec import engine_spec
from runtime.ray_cluster import start_ray
from tests.test_grpo import lines
from tests.test_grpo_chameleon import WORDS, CodeJudge, make
from training.tracking import read_metrics

TINY = TinySection(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
POLICY = ChameleonPolicyConfig(tiny=TINY, lora=LoraSection(r=4, alpha=8.0))
SAMPLING = RolloutConfig(workers=1, rows=8, max_tokens=60, temperature={"default": 1.0, "sketch": 0.9})


class Killer(CodeJudge):
    """Judges, and in step 1 kills the actor that wrote."""

    def __init__(self, rollouts: RayRollouts):
        self.rollouts = rollouts

    def score(self, groups, step=0):
        if step == 1:
            os.kill(self.rollouts.health()[0].pid, signal.SIGKILL)
        return super().score(groups, step)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_actor_changes_nothing(tmp_path):
    cluster = start_ray(1, object_store_bytes=100 * 2**20)
    try:
        for name in ("whole", "killed"):
            run = make(tmp_path / name, lora=True)
            run.rollouts = RayRollouts(engine_spec(POLICY, FormatConfig(max_images=2), SAMPLING, WORDS), SAMPLING)
            if name == "killed":
                run.reward_manager = Killer(run.rollouts)
            rl.grpo.train(run)
            assert run.rollouts.health()[0].restarts == (name == "killed")
            run.rollouts.close()
        rows, killed = lines(tmp_path / "whole"), lines(tmp_path / "killed")
        assert killed[1].pop("rollout/restarts/crash") == 1  # told with the next rollouts
        assert killed == rows
        assert all(row["publish/probed"] > 0 and row["publish/gap"] < 1e-4 for row in rows)
        assert all(row["on_policy_gap"] < 1e-4 for row in rows)
    finally:
        cluster.stop()


ODD = """
import time
def odd(trajectories):
    time.sleep(0.05)
    ids = [[int(i) for s in t.segments if s.trained for i in s.ids] for t in trajectories]
    return [sum(i % 2 for i in row) / max(len(row), 1) for row in ids]
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rewards_in_actors_beside_rollouts_in_actors_are_those_of_one_process(tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    sampling = SAMPLING.model_copy(update={"rows": 4, "reproducible": True})
    spec = engine_spec(POLICY, FormatConfig(max_images=2), sampling, WORDS)
    cluster = start_ray(3, object_store_bytes=100 * 2**20)
    try:
        for name, workers in (("here", None), ("there", {"kind": "ray", "count": 2, "num_cpus": 0.5})):
            config = RewardsConfig.model_validate(
                {
                    "parts": {
                        "odd": {
                            "function": f"{tmp_path / 'odd.py'}:odd",
                            "scope": "row",
                            "workers": workers,
                            "isolate": None if workers else False,
                        }
                    },
                    "total": "odd - group_mean(odd)",
                }
            )
            run = make(tmp_path / name, lora=True)
            run.rollouts = RayRollouts(spec, sampling) if workers else LocalRollouts(spec.build())
            with RewardManager(config) as run.reward_manager:
                rl.grpo.train(run)
            run.rollouts.close()
        here, there = (
            [
                {key: value for key, value in row.items() if key.startswith(("reward", "groups"))}
                for row in lines(tmp_path / name)
            ]
            for name in ("here", "there")
        )
        assert here == there and "reward/odd" in here[0]
        assert all(row["time/reward/hidden"] > 0 for row in read_metrics(tmp_path / "there" / "metrics.jsonl"))
    finally:
        cluster.stop()
