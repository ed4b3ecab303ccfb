"""GRPO runs on the fakes with writers of their own, and a writer whose log-probs are another engine's."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from rl.config import GrpoConfig
from rl.run import Run
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.native import NativeWriter
from rollout.weights.receive import WeightReceiver
from tests.fakes import FakeFormat, FakePolicy
from tests.test_grpo import AtOnce, Judged
from training.tracking import Tracker

ROLLOUT = {"rows": 16, "max_tokens": 16}
PROMPTS = [{"prompt": prompt} for prompt in ("a red dot", "a blue dot", "big red", "small blue", "left")]


class TrainedFake(FakePolicy):
    """A fake that a checkpoint can hold."""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "model.pt")


def fake_engine(rollout: dict | None = None, seed: int = 0, view: str = "plain") -> Engine:
    policy = TrainedFake(flow=view == "flow", seed=seed)
    return Engine(policy, FakeFormat(view, max_images=1), RolloutConfig(**{**ROLLOUT, **(rollout or {})}))


class RoundedWriter(NativeWriter):
    """Another engine of lower precision: it samples from bfloat16's rounding of the weights, and reports what those
    say."""

    exact = False

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.whole = copy.deepcopy(engine.policy.model)
        self.receiver = WeightReceiver(self.whole, self.name)
        self.round()

    def take(self, manifest, tensors) -> None:
        super().take(manifest, tensors)
        self.round()

    def round(self) -> None:
        rounded = {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in self.whole.state_dict().items()}
        self.policy.model.load_state_dict(rounded)


def rounded(rollout: dict | None = None, seed: int = 0) -> RoundedWriter:
    """A factory for EngineSpec."""
    return RoundedWriter(fake_engine(rollout, seed))


class WordJudge:
    """Pays for five of the ten words: learnable from random weights in a few steps."""

    def begin(self, step, sizes, counted=True):
        return AtOnce(self, step)

    def score(self, groups, step=0):
        for group in groups:
            for trajectory in group:
                written = np.concatenate([s.ids for s in trajectory.segments[1:]])
                trajectory.reward = float(((written >= 6) & (written < 11)).mean())
        rewards = [t.reward for group in groups for t in group]
        return Judged({"reward/mean": float(np.mean(rewards))})


def fake_run(folder: Path, rollouts, seed: int = 0, policy: FakePolicy | None = None, **config) -> Run:
    settings = {
        "steps": 8,
        "prompts_per_step": 3,
        "num_generations": 4,
        "learning_rate": 0.04,
        "save_every": 100,
        **config,
    }
    return Run(
        policy or TrainedFake(seed=seed),
        GrpoConfig(**settings),
        Accelerator(cpu=True),
        PROMPTS,
        rollouts=rollouts,
        reward_manager=WordJudge(),
        tracker=Tracker(folder),
        folder=folder,
        seed=5,
        show_every=100,
    )
