"""The driver on the real parts: tiny Chameleon, strokes, engine, publications. What the bigram policy cannot show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import rl.grpo
from formats.registry import get_format
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from policy.config import LoraSection
from policy.registry import load_policy
from record.trajectory import DecisionKind
from rl.config import GrpoConfig
from rl.run import Run
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.pool.local import LocalRollouts
from runtime.errors import UserError
from tests.test_grpo import AtOnce, Judged, lines
from tests.test_trainer_processes import launch
from training import checkpoint
from training.tracking import Tracker

WORDS = "a red blue circle square left of the and fine wrong".split()
PROMPTS = [{"prompt": f"a {color} {shape}"} for color in ("red", "blue") for shape in ("circle", "square")]


class CodeJudge:
    """Pays for visual codes with odd ids: learnable from random weights."""

    def begin(self, step, sizes, counted=True):
        return AtOnce(self, step)

    def score(self, groups, step=0):
        for group in groups:
            for trajectory in group:
                kinds = [s.decisions.kind_N for s in trajectory.segments if s.decisions is not None]
                ids = [s.ids[s.decisions.position_N] for s in trajectory.segments if s.decisions is not None]
                kind_N, id_N = np.concatenate(kinds), np.concatenate(ids)
                trajectory.reward = (
                    float((id_N[kind_N == DecisionKind.CODE] % 2).mean())
                    if (kind_N == DecisionKind.CODE).any()
                    else 0.0
                )
        rewards = [t.reward for group in groups for t in group]
        return Judged({"reward/mean": float(np.mean(rewards))})


def make(folder: Path, lora: bool = False, separate: bool = False, accelerator=None, **config) -> Run:
    accelerator = accelerator or Accelerator(cpu=True)
    tiny = TinySection(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    policy_config = ChameleonPolicyConfig(tiny=tiny, lora=LoraSection(r=4, alpha=8.0) if lora else None)
    torch.manual_seed(0)  # adapters are initialised at random
    policy = load_policy(policy_config, WORDS)
    rollouts = None
    if accelerator.is_main_process:
        writer = load_policy(policy_config, WORDS) if separate else policy
        sampling = RolloutConfig(rows=8, max_tokens=60, temperature={"default": 1.0, "sketch": 0.9})
        rollouts = LocalRollouts(Engine(writer, get_format("strokes", max_images=2), sampling))
    settings = {
        "steps": 3,
        "prompts_per_step": 2,
        "num_generations": 4,
        "learning_rate": 3e-3,
        "save_every": 1,
        "beta": 0.01,
        "tokens_per_micro_batch": 300,
        **config,
    }
    return Run(
        policy,
        GrpoConfig(**settings),
        accelerator,
        PROMPTS,
        rollouts,
        CodeJudge() if rollouts else None,
        Tracker(folder) if rollouts else None,
        folder,
        seed=3,
        show_every=2,
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "published"])
def test_real_parts_resume_as_the_same_run(tmp_path, lora, separate):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer = rl.grpo.train(make(whole, lora, separate))
    rows = lines(whole)
    assert all(row["on_policy_gap"] < 1e-4 and row["trained/code_decisions"] > 0 for row in rows)
    assert rows[-1]["kl"] > 0 and (whole / "trajectories" / "000002").is_dir()
    if separate:
        assert all(row["publish/probed"] > 0 and row["publish/gap"] < 1e-4 for row in rows)

    class PowerCut(Exception):
        pass

    class Stops(CodeJudge):
        def score(self, groups, step=0):
            if step == 3:
                raise PowerCut
            return super().score(groups, step)

    run = make(broken, lora, separate)
    run.reward_manager = Stops()
    with pytest.raises(PowerCut):
        rl.grpo.train(run)
    resumed = rl.grpo.train(make(broken, lora, separate), checkpoint.latest(broken / "checkpoints"))
    assert lines(broken) == rows
    for (name, p), (_, q) in zip(
        trainer.policy.model.named_parameters(), resumed.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name
        if lora:
            assert p.requires_grad == ("lora_" in name)


def test_adapters_go_on_on_the_base_that_they_were_trained_on(tmp_path):
    rl.grpo.train(make(tmp_path, lora=True, steps=1, beta=0))
    last = checkpoint.latest(tmp_path / "checkpoints")
    run = make(tmp_path, lora=True, steps=2, beta=0)
    for name, parameter in run.policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(0.5)  # fresh adapters are chance; those of the checkpoint take their place
    rl.grpo.train(run, last)
    run = make(tmp_path, lora=True, steps=3, beta=0)
    run.policy.core.lm_head.weight.data[3, 3] += 1
    with pytest.raises(UserError, match="not trained are not those .*--weights"):
        rl.grpo.train(run, checkpoint.latest(tmp_path / "checkpoints"))


TWO = """
import sys
from pathlib import Path
from accelerate import Accelerator
import rl.grpo
from tests.test_grpo_chameleon import make
rl.grpo.train(make(Path(sys.argv[1]), lora=sys.argv[2] == "lora", separate=True, accelerator=Accelerator(cpu=True)))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("adapters", ["all", "lora"])
def test_two_processes_give_the_losses_and_weights_of_one(tmp_path, adapters):
    launch(2, TWO, str(tmp_path / "two"), adapters)
    rl.grpo.train(make(tmp_path / "one", adapters == "lora", separate=True))
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, abs=1e-4, rel=1e-3), (one["step"], name)
