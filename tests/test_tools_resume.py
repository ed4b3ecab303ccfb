"""A run with a tool and with candidates at states, on two Ray workers, that is stopped by a signal and taken up again:
it is the run that was never stopped, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from record.store import load_trajectories
from record.trajectory import Author
from tests.test_grpo import lines
from tests.test_look import TINY, numerate_policy
from tests.test_signals import Command
from training import checkpoint
from underdrawing.recipe import check_recipe, dump_recipe

REWARD = '''
import os, signal
from pathlib import Path

def numbers(completions, run, stopped, **columns):
    """The share of the policy's words that are numbers; once, while the second step is judged, the run is stopped."""
    log = Path(run) / "metrics.jsonl"
    if log.exists() and len(log.read_text().splitlines()) == 1 and not Path(stopped).exists():
        Path(stopped).touch()
        os.kill(os.getpid(), signal.SIGTERM)
    words = [" ".join(str(message["content"]) for message in messages).split() for messages in completions]
    return [sum(word.isdigit() for word in row) / (len(row) + 1) for row in words]
'''


def recipe_of(folder: Path, run: Path, stopped: Path) -> Path:
    options = {"run": str(run), "stopped": str(stopped)}
    recipe = check_recipe(
        {
            "name": "look",
            "run_dir": str(run),
            "policy": {"tiny": TINY.model_dump(mode="json")},
            "task": {"dataset": {"path": str(folder / "prompts.jsonl"), "heldout_share": 0.5}},
            "format": {"name": "look", "constrain": "full", "options": {"max_tokens": 4}},
            "tools": ["look"],
            "rollout": {"workers": 2, "rows": 8, "max_tokens": 100},
            "rewards": {
                "parts": {
                    "numbers": {"function": f"{folder / 'numbers.py'}:numbers", "options": options, "isolate": False}
                },
                "total": "numbers",
            },
            "grpo": {
                **{"steps": 4, "prompts_per_step": 2, "num_generations": 4, "learning_rate": 1e-3, "save_every": 4},
                "fork": {"roles": ["sketch", "inspect", "look"], "candidates": 2},
            },
            "track": {"wandb": "disabled", "trajectories_every": 1},
        },
        "recipe",
    )
    file = folder / f"{run.name}.yaml"
    file.write_text(dump_recipe(recipe))
    return file


def told(run: Path) -> list[dict]:
    """What is logged but for the clock's: what the tool and the candidates took, too."""
    return [
        {name: value for name, value in row.items() if not name.endswith("_s") and "/time/" not in name}
        for row in lines(run)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_tools_and_forks_on_ray_resumes_as_the_same(tmp_path):
    (tmp_path / "numbers.py").write_text(REWARD)
    prompts = ("a red circle", "a circle", "red", "a")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    numerate_policy().save(tmp_path / "weights")
    (tmp_path / "never").touch()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipes = {whole: recipe_of(tmp_path, whole, tmp_path / "never")}
    recipes[broken] = recipe_of(tmp_path, broken, tmp_path / "once")

    def run(folder: Path, *more: str) -> tuple[int, str]:
        with Command("grpo", recipes[folder], "--weights", tmp_path / "weights", *more) as command:
            code, said = command.send()
            assert command.left() == ([], []), "no process of Ray's and no folder outlives it"
        return code, said

    assert run(whole)[0] == 0
    code, said = run(broken)
    assert code == 143 and "Stopping after this step" in said
    assert checkpoint.steps(broken / "checkpoints") == [2] and len(lines(broken)) == 2
    assert run(broken, "--resume")[0] == 0

    rows, again = told(whole), told(broken)
    assert len(rows) == 4 and again == rows
    for row in rows:
        assert row["rollout/tools/calls/look"] > row["rollout/tools/errors"] and row["rollout/images"] > 0
        assert row["forks/in"] > 0 and row["groups/trained"] > 0
    ours, theirs = (load_file(run / "checkpoints/step-000004/weights/model.safetensors") for run in (broken, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    start = load_file(tmp_path / "weights/model.safetensors")
    assert any(not theirs[name].equal(start[name]) for name in theirs), "something was learned"
    shown = [load_trajectories(run / "trajectories/000004") for run in (broken, whole)]
    assert [t.key for t in shown[0]] == [t.key for t in shown[1]]
    children = [t for t in shown[0] if t.parent is not None]
    assert any(s.author is Author.ENVIRONMENT for t in children for s in t.segments[: t.parent[1]])
