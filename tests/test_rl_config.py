"""rl/config.py: TRL's names and meanings, and sentences for what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from record.trajectory import DecisionKind
from rl.config import GrpoConfig
from rl.losses import ClipRange
from rl.trainer import loss_settings


def test_clip_ranges_by_kind():
    config = GrpoConfig(epsilon=0.1, delta=4.0, clip_by_kind={"code": {"epsilon": 0.02, "epsilon_high": 0.05}})
    clip = loss_settings(config).clip
    assert clip[DecisionKind.WORD] == ClipRange(0.1, 0.1, 4.0)
    assert clip[DecisionKind.CODE] == ClipRange(0.02, 0.05, None)


def test_scale_rewards_takes_trls_booleans():
    assert [GrpoConfig(scale_rewards=v).scale_rewards for v in (True, False, "batch")] == ["group", "none", "batch"]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"epsilon_low": 0.1}, "Extra inputs are not permitted"),
        ({"loss_type": "gspo"}, "'segment', 'modality'"),
        ({"num_generations": 1}, "greater than or equal to 2"),
        ({"num_minibatches": 20}, "num_minibatches is 20, but a step has only 16 groups"),
        ({"fork": {"roles": ["a"], "members": 9}}, "fork.members is 9, but a group has only 8"),
        ({"role_weights": {"plan": -1.0}}, "role_weights.plan is negative"),
        ({"segment_reward_weights": {"detect": 2.0}}, "needs advantage_level: segment"),
        ({"clip_by_kind": {"pixel": {}}}, "'word', 'code' or 'flow'"),
    ],
)
def test_what_is_wrong_is_named(wrong, sentence):
    with pytest.raises(ValidationError, match=sentence):
        GrpoConfig(**wrong)


def test_the_pure_parts_import_neither_ray_nor_transformers():
    code = "import sys, rl.losses, rl.advantages; assert not {'ray', 'transformers', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
