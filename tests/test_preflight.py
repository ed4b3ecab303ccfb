"""What a recipe asks of this machine and of the libraries: a dry run refuses what cannot be had, in a sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from underdrawing.cli import main

# The cheapest whole recipe: its parts run in the driver, its rollouts in this process.
RECIPE = {
    "name": "tiny",
    "policy": {"tiny": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}},
    "task": {"name": "shapes"},
    "format": {"name": "strokes", "max_images": 2},
    "rollout": {"workers": 0, "rows": 4},
    "rewards": {
        "parts": {"detect": {"function": "geneval", "options": {"mode": "graded"}}, "form": {"function": "format"}},
        "total": "detect + 0.1 * form",
    },
    "track": {"wandb": "disabled"},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"run_dir": str(tmp_path / "run")}))
    return path


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("underdrawing: ") and "Traceback" not in said.err
    return said.err


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
no_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["policy.device=gpu"], "policy.device: 'gpu' cannot be used here (torch knows no such device); there is cpu"),
        (["policy.device=cuda:99"], "policy.device: 'cuda:99' cannot be used here"),
        (["policy.device=meta"], "policy.device: 'meta' cannot be used here (it holds shapes without numbers)"),
        pytest.param(["policy.device=cuda"], "policy.device: 'cuda' cannot be used here", marks=no_gpu),
        pytest.param(
            ["policy.attn_implementation=flash_attention_2"],
            "flash_attention_2 runs on CUDA devices alone, and policy.device is cpu; set policy.device: cuda, "
            "or set policy.attn_implementation: sdpa",
            marks=no_flash,
        ),
        (["policy.attn_implementation=flash_attention_3"], "did you mean 'flash_attention_2'?"),
        (["policy.dtype=float8"], "policy.dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        (["sft.lr_scheduler_type=cosin"], "sft.lr_scheduler_type: Input should be 'constant_with_warmup'"),
        (["sft.lr_scheduler_type=cosin"], "did you mean 'cosine'?"),
        (["grpo.lr_scheduler_type=cosin"], "did you mean 'cosine'?"),
        (["sft.lr_scheduler_type=polynomial", "sft.learning_rate=1e-8"], "lr_scheduler_type: polynomial ends at 1e-07"),
        (["grpo.lr_scheduler_type=polynomial", "grpo.learning_rate=1e-8"], "polynomial ends at 1e-07"),
        (["seed=5000000000"], "seed: Input should be less than or equal to 4294967295 (given: 5000000000)"),
        (["evaluate.seed=-1"], "evaluate.seed: Input should be greater than or equal to 0"),
        (["policy.tiny.seed=5000000000"], "policy.tiny.seed: Input should be less than or equal to 4294967295"),
        (["policy.lora={target_modules: [q_prj]}"], "the model has no linear layer 'q_prj'; did you mean 'q_proj'?"),
        (["rollout.gpus=1.5"], "rollout.gpus: 1.5: above 1 Ray deals out whole ones; round it"),
        (["rollout.gpus=1e-6"], "rollout.gpus: 1e-06: the smallest share that Ray knows is 0.0001"),
        (["track.wandb_entity=a team"], "track.wandb_entity: the name of a W&B user or team has letters, digits"),
        (["track.wandb_project=a/b"], "track.wandb_project: W&B takes 1 to 128 characters, and none of"),
    ],
)
@pytest.mark.parametrize("command", ["sft", "grpo", "rollout", "evaluate"])
def test_what_cannot_be_had_is_refused_by_the_dry_run(capsys, recipe, command, overrides, words):
    assert words in refused(capsys, command, recipe, "--dry-run", *overrides)
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_half_precision_is_refused_where_weights_are_trained(capsys, recipe, command):
    said = refused(capsys, command, recipe, "--dry-run", "policy.dtype=bfloat16")
    assert "policy.dtype: weights in bfloat16 are to be trained" in said and "set policy.dtype: float32" in said
    assert main([command, str(recipe), "--dry-run", "policy.dtype=bfloat16", "policy.lora={r: 4}"]) == 0
    assert main(["rollout", str(recipe), "--dry-run", "policy.dtype=bfloat16"]) == 0


def test_forks_and_tools_are_refused_where_the_writer_has_none(capsys, recipe):
    file = recipe.parent / "own.py"
    file.write_text(
        "from rollout.capabilities import Capabilities\n"
        "def words(policy, fmt, rollout, words):\n"
        "    raise AssertionError('it was built')\n"
        "words.capabilities = Capabilities(forks=False, tools=False)\n"
    )
    writer, forks = f"rollout.writer={file}:words", "grpo.fork={roles: [sketch], candidates: 2}"
    said = refused(capsys, "grpo", recipe, "--dry-run", writer, forks)
    assert said.startswith(f"underdrawing: grpo.fork: the writer '{file}:words' cannot go on from a trajectory's first")
    assert main(["rollout", str(recipe), "--dry-run", writer, forks]) == 0  # it forks nothing
    said = refused(capsys, "rollout", recipe, "--dry-run", writer, "tools={look: {tool: look}}")
    assert f"tools: the writer '{file}:words' calls none, and the recipe names 'look'; leave the section out" in said
