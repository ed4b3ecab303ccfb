"""The recipes on digits: what they watch, and that they run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rewards.alarms import Alarms
from underdrawing.cli import main
from underdrawing.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "configs/digits"
SMALL = [
    "policy.tiny.hidden_size=16",
    "policy.tiny.num_hidden_layers=1",
    "policy.tiny.num_attention_heads=2",
    "policy.tiny.intermediate_size=32",
    "sft.demonstrations=24",
    "sft.max_steps=3",
    "sft.batch_size=4",
    "rollout.workers=0",
    "rollout.rows=8",
    "grpo.steps=3",
    "grpo.prompts_per_step=2",
    "grpo.num_generations=2",
    "evaluate.prompts=2",
    "evaluate.samples=1",
    "track.wandb=disabled",
]


@pytest.mark.parametrize("name, stops", [("hack", False), ("guarded", True)])
def test_a_paid_detector_that_parts_from_the_watched_one_raises_the_alarm(name, stops):
    rewards = load_recipe(FOLDER / f"{name}.yaml").rewards
    assert rewards.parts["truth"].options["detector"] == "digits_exact" and rewards.detector.backend == "digits_learned"
    alarms = Alarms(rewards.alarms, [part for part, of in rewards.parts.items() if of.log_only])
    rng = np.random.default_rng(0)
    sentences, fatal = [], None
    for step in range(60):  # the paid reward rises by 0.3 in all, the watched one falls by 0.3, each with noise
        paid, truth = (start + sign * 0.005 * step + rng.normal(0, 0.03) for start, sign in ((0.4, 1), (0.5, -1)))
        _, new, fatal = alarms.check({"reward/mean": paid, "reward/truth": truth})
        sentences += new
    assert any("alarm 'divergence'" in told and "reward/truth fell" in told for told in sentences)
    assert (fatal is not None) == stops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hack", "guarded"])
def test_both_warm_start_and_take_three_steps(name, tmp_path):
    words = [str(FOLDER / f"{name}.yaml"), f"run_dir={tmp_path}", *SMALL]
    assert main(["sft", *words]) == 0
    assert main(["grpo", *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/truth" in row]
    assert len(steps) == 3 and all(0 <= row["reward/truth"] <= 1 and 0 <= row["reward/graded"] <= 1 for row in steps)
