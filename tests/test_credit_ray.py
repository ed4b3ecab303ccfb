"""Arms of pictures and restarted groups over Ray are those of one process."""

from __future__ import annotations

import pytest

import rl.grpo
from formats.config import FormatConfig
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from rollout.config import RolloutConfig
from rollout.pool.local import LocalRollouts
from rollout.pool.ray_rollouts import RayRollouts
from rollout.spec import engine_spec
from runtime.ray_cluster import start_ray
from tests.test_grpo import lines
from tests.test_grpo_chameleon import WORDS
from tests.test_restarts import run_of

POLICY = ChameleonPolicyConfig(
    tiny=TinySection(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
)
SAMPLING = RolloutConfig(workers=2, rows=1, max_tokens=60, reproducible=True)  # rows: neighbours decide the last bits
TOLD = ("reward", "groups", "image_credit", "restart", "rollout/trajectories", "rollout/tokens", "rollout/decisions")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_arms_and_restarts_over_ray_are_those_of_one_process(tmp_path):
    spec = engine_spec(POLICY, FormatConfig(max_images=2), SAMPLING, WORDS)
    cluster = start_ray(2, object_store_bytes=100 * 2**20)
    try:
        for name in ("here", "there"):
            credit = {"arms": ["sibling", "blank", "other"], "draws": 2}
            run = run_of(tmp_path / name, image_credit=credit, steps=2)
            run.rollouts = RayRollouts(spec, SAMPLING) if name == "there" else LocalRollouts(spec.build())
            rl.grpo.train(run)
            run.rollouts.close()
        here, there = (
            [{key: value for key, value in row.items() if key.startswith(TOLD)} for row in lines(tmp_path / name)]
            for name in ("here", "there")
        )
        for one, other in zip(here, there, strict=True):
            assert one == pytest.approx(other, abs=1e-6)
            assert one["image_credit/arms_measured"] == one["image_credit/arms_in"]
        assert here[1]["restart/in"] == 2 and sum(row["image_credit/arms_in"] for row in here) > 4
    finally:
        cluster.stop()
