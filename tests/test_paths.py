"""Paths of recipes and of the command: ~ and variables are expanded, files are sought beside the recipe too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from policy.registry import section_of
from runtime.paths import PathError, expand, expand_object, expand_options, find
from underdrawing.cli import main
from underdrawing.recipe import Recipe, RecipeError, check_recipe, dump_recipe, load_recipe

REPOSITORY = Path(__file__).parent.parent
PARTS = {"steps": {"function": "steps"}}
RECIPE: dict[str, Any] = {"name": "mine", "policy": {}, "task": {}, "format": {}, "rewards": {"parts": PARTS}}


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A home, a variable, a working folder, and a folder `recipes` beside it."""
    for name in ("home", "scratch", "work", "recipes"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def recipe_at(folder: Path, *overrides: str, **sections: Any) -> Recipe:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE | sections))
    return load_recipe(path, overrides)


def test_home_and_variables_are_expanded(places):
    for text, right in [
        ("~/x", f"{places}/home/x"),
        ("~", f"{places}/home"),
        ("$SCRATCH/x", f"{places}/scratch/x"),
        ("${SCRATCH}x", f"{places}/scratchx"),
        ("a/$SCRATCH", f"a/{places}/scratch"),
        ("a~b/~", "a~b/~"),
        ("price$$5", "price$5"),
        ("5$", "5$"),
        ("x", "x"),
    ]:
        assert expand(text) == right


@pytest.mark.parametrize(
    "text, words",
    [
        ("$NOWHERE/x", "'$NOWHERE/x': the environment's NOWHERE is not set"),
        ("a${NOWHERE}", "the environment's NOWHERE is not set"),
        ("$EMPTY/x", "the environment's EMPTY is empty"),
        ("${}/x", "the environment's ${} is not set"),
        ("~nobody-of-this-name/x", "there is no user 'nobody-of-this-name'"),
        ("", "is empty; give a path"),
        ("a\0b", "a NUL character"),
        ("a/" + "b" * 256, "longer than the file system takes"),
        ("a/" * 3000, "longer than the file system takes"),
    ],
)
def test_what_is_no_path_is_a_sentence(places, text: str, words: str):
    with pytest.raises(PathError) as caught:
        expand(text)
    assert words in str(caught.value)


def test_a_file_is_found_from_the_working_folder_first(places):
    (places / "recipes/both").write_text("")
    assert find("both", places / "recipes") == f"{places}/recipes/both"
    (places / "work/both").write_text("")
    assert find("both", places / "recipes") == "both"
    assert find("neither", places / "recipes") == "neither"
    assert find("/both", places / "recipes") == "/both"
    assert expand_object("mine.py:f", places / "recipes") == "mine.py:f"
    (places / "recipes/mine.py").write_text("")
    assert expand_object("mine.py:f", places / "recipes") == f"{places}/recipes/mine.py:f"
    assert expand_object("~/mine.py:f") == f"{places}/home/mine.py:f"
    for other in ("steps", "trl.rewards.think_format_reward", "package.module:name"):
        assert expand_object(other, places / "recipes") == other


def test_options_that_hold_paths_are_told_by_name_or_beginning(places):
    (places / "recipes/rows.jsonl").write_text("")
    (places / "recipes/clip").mkdir()
    (places / "recipes/graded").write_text("")
    read = expand_options(
        {
            "prompts_file": "rows.jsonl",
            "path": "clip",
            "model": {"path": "~/model", "name": "clip"},
            "extra": ["$SCRATCH/a", {"folder": "$SCRATCH"}],
            "mode": "graded",
            "pattern": r"^\$(\d+)$",
            "mark": "$x$ ~ $y",
            "processor": None,
            "count": 3,
        },
        places / "recipes",
    )
    assert read == {
        "prompts_file": f"{places}/recipes/rows.jsonl",
        "path": f"{places}/recipes/clip",
        "model": {"path": f"{places}/home/model", "name": "clip"},
        "extra": [f"{places}/scratch/a", {"folder": f"{places}/scratch"}],
        "mode": "graded",
        "pattern": r"^\$(\d+)$",
        "mark": "$x$ ~ $y",
        "processor": None,
        "count": 3,
    }
    with pytest.raises(PathError, match="path: '\\$NOWHERE/x': the environment's NOWHERE is not set"):
        expand_options({"inner": {"path": "$NOWHERE/x"}})


# Every key of a recipe that holds a path: a value with a variable in it, and where it leads.
WRITTEN = {
    "run_dir": "$SCRATCH/run",
    "rewards.judge.cache_dir": "$SCRATCH/cache",
}
READ = {
    "policy.path": "$SCRATCH/model",
    "policy.family": "$SCRATCH/mine.py:f",
    "policy.tiny.vq": "$SCRATCH/vq.safetensors",
    "task.name": "$SCRATCH/mine.py:f",
    "task.options": {"path": "$SCRATCH/rows.jsonl"},
    "format.name": "$SCRATCH/mine.py:f",
    "format.options": {"path": "$SCRATCH/words.txt"},
    "task.dataset.path": "$SCRATCH/rows.jsonl",
    "task.dataset.heldout_path": "$SCRATCH/rows.jsonl",
    "sft.data": "$SCRATCH/stored",
    "sft.critiques.path": "$SCRATCH/stored",
    "rollout.writer": "$SCRATCH/mine.py:f",
    "tools.mine.tool": "$SCRATCH/mine.py:f",
    "rewards.parts.steps.function": "$SCRATCH/mine.py:f",
    "rewards.parts.steps.options": {"path": "$SCRATCH/model"},
    "rewards.detector.path": "$SCRATCH/detector",
    "rewards.detector.colors": {"path": "$SCRATCH/clip"},
}
PATHS = {**WRITTEN, **READ}
JUDGE = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}


def nested(key: str, value: Any) -> dict[str, Any]:
    """A recipe with `value` at a dotted key, and what else that key needs."""
    data: dict[str, Any] = json.loads(json.dumps(RECIPE))
    if key.startswith("rewards.judge"):
        data["rewards"]["judge"] = dict(JUDGE)
    if key.startswith("rewards.detector."):
        data["rewards"]["detector"] = {"backend": "owlv2"}
    if key.startswith("task.dataset."):
        data["task"]["dataset"] = {"path": "rows.jsonl"}
    at = data
    *parents, last = key.split(".")
    for parent in parents:
        at = at.setdefault(parent, {})
    at[last] = value
    return data


def at(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return str(found) if isinstance(found, Path) else found


def swapped(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {name: swapped(item, old, new) for name, item in value.items()}
    return value.replace(old, new)


@pytest.mark.parametrize("key", PATHS)
def test_every_path_of_a_recipe_is_expanded(places, key: str):
    (places / "scratch/mine.py").write_text("")
    path = places / "recipes/mine.yaml"
    for written, real in (("$SCRATCH", f"{places}/scratch"), ("~", f"{places}/home")):
        (places / "home/mine.py").write_text("")
        value = swapped(PATHS[key], "$SCRATCH", written)
        path.write_text(yaml.safe_dump(nested(key, value)))
        read = load_recipe(path)
        assert at(read, key) == swapped(value, written, real)
        # What is resolved is read again as it is, by workers and from the run's own recipe.yaml.
        assert check_recipe(yaml.safe_load(dump_recipe(read)), "again", path) == read
    path.write_text(yaml.safe_dump(nested(key, swapped(PATHS[key], "$SCRATCH", "$NOWHERE"))))
    with pytest.raises(RecipeError, match=f"mine.yaml: {key}: .*the environment's NOWHERE is not set"):
        load_recipe(path)


@pytest.mark.parametrize("key", READ)
def test_every_file_that_a_recipe_reads_is_sought_beside_it(places, key: str):
    value = swapped(READ[key], "$SCRATCH/", "")
    leaf = next(iter(value.values())) if isinstance(value, dict) else value
    (places / "recipes" / leaf.partition(":")[0]).write_text("")
    path = places / "recipes/mine.yaml"
    path.write_text(yaml.safe_dump(nested(key, value)))
    assert at(load_recipe(path), key) == swapped(READ[key], "$SCRATCH", f"{places}/recipes")


@pytest.mark.parametrize("key", WRITTEN)
def test_what_is_written_is_not_sought(places, key: str):
    path = places / "recipes/mine.yaml"
    (places / "recipes/run").mkdir()
    path.write_text(yaml.safe_dump(nested(key, "run")))
    assert at(load_recipe(path), key) == "run"


def path_keys(model: Any, prefix: str = "") -> set[str]:
    """The keys of a recipe whose description speaks of a path, a file or a folder, or whose name does."""
    found = set()
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        section = section_of("chameleon") if key == "policy" else field.annotation  # its family's own
        if getattr(section, "model_fields", None) is not None:
            found |= path_keys(section, f"{key}.")
        elif any(word in f"{name} {field.description}".lower() for word in ("path", "file", "folder", "_dir")):
            found.add(key)
    return found


def test_no_key_that_speaks_of_a_path_is_forgotten():
    told = path_keys(Recipe)
    assert told - {"rewards.detector", "run_dir"} <= set(PATHS), "a key of a recipe that holds a path has no path type"
    assert {"policy.path", "policy.tiny.vq", "sft.data", "task.name"} <= told


def test_the_shapes_tokenizer_is_a_name(places):
    (places / "recipes/shapes").mkdir()
    (places / "work/shapes").mkdir()
    assert recipe_at(places / "recipes", policy={"tiny": {"vq": "shapes"}}).policy.tiny.vq == "shapes"


def test_overrides_are_paths_too(places):
    (places / "recipes/model").mkdir()
    read = recipe_at(places / "recipes", "run_dir=~/run", "policy.path=model", "run_dir=$SCRATCH/run")
    assert read.run_dir == places / "scratch/run" and read.policy.path == f"{places}/recipes/model"
    with pytest.raises(RecipeError, match="run_dir: is empty"):
        recipe_at(places / "recipes", "run_dir=''")


def said(capsys, *arguments: Any) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    "arguments, option",
    [
        (["sft", "$NOWHERE/r.yaml"], "recipe"),
        (["grpo", "r.yaml", "--weights", "$NOWHERE/w"], "--weights"),
        (["rollout", "r.yaml", "--weights", "$NOWHERE/w"], "--weights"),
        (["rollout", "r.yaml", "--out", "$NOWHERE/w"], "--out"),
        (["evaluate", "r.yaml", "--weights", "$NOWHERE/w"], "--weights"),
        (["difficulty", "r.yaml", "--weights", "$NOWHERE/w"], "--weights"),
        (["difficulty", "r.yaml", "--out", "$NOWHERE/w"], "--out"),
        (["evaluate", "geneval", "--images", "$NOWHERE/w"], "--images/--pictures"),
        (["evaluate", "geneval", "--images", "w", "--out", "$NOWHERE/w"], "--out"),
        (["evaluate", "geneval", "--images", "w", "--prompts", "$NOWHERE/w"], "--prompts"),
        (["evaluate", "geneval", "--detections", "$NOWHERE/w"], "--detections"),
        (["view", "$NOWHERE/w"], "folder"),
        (["view", "w", "--out", "$NOWHERE/w"], "--out"),
        (["rewards", "check", "$NOWHERE/w.py:f"], "reward"),
        (["rewards", "explain", "$NOWHERE/w.py:f"], "reward"),
        (["rewards", "check", "w.py:f", "--trajectories", "$NOWHERE/w"], "--trajectories"),
        (["rewards", "try", "$NOWHERE/r.yaml", "--images", "w"], "recipe"),
        (["rewards", "try", "r.yaml", "--images", "$NOWHERE/w"], "--images/--pictures"),
        (["rewards", "try", "r.yaml", "--trajectories", "$NOWHERE/w"], "--trajectories"),
        (["rewards", "try", "r.yaml", "--images", "w", "--out", "$NOWHERE/w"], "--out"),
    ],
)
def test_every_path_of_the_command_is_expanded(capsys, places, arguments, option: str):
    assert said(capsys, *arguments).startswith(f"underdrawing: {option}: '$NOWHERE/")
    assert "the environment's NOWHERE is not set" in said(capsys, *arguments)


def test_the_command_reads_and_writes_where_its_paths_lead(capsys, places):
    (places / "home/ink.py").write_text(
        "def ink(completions, scale=1.0, path='', **columns):\n    return [scale] * len(completions)\n"
    )
    (places / "home/mine.yaml").write_text(
        yaml.safe_dump(nested("rewards.parts.ink", {"function": "ink.py:ink", "options": {"path": "~/x"}}))
    )
    arguments = ["grpo", "~/mine.yaml", "--dry-run", "run_dir=$SCRATCH/run"]
    assert main(arguments) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["run_dir"] == f"{places}/scratch/run"
    assert resolved["rewards"]["parts"]["ink"]["function"] == f"{places}/home/ink.py:ink"
    assert resolved["rewards"]["parts"]["ink"]["options"] == {"path": f"{places}/home/x"}
    assert main(["rewards", "check", "~/ink.py:ink", "--option", "path=~/x"]) == 0
    assert not (places / "work/~").exists() and not (places / "work/$SCRATCH").exists()
    assert f"{places}/home/nothing: " in said(capsys, "view", "~/nothing")


def test_a_worker_reads_the_resolved_recipe(places):
    """A folder whose real name holds a dollar: what is resolved once is not expanded again in another process."""
    name = str(places / "scratch" / "a$b")
    read = recipe_at(places / "recipes", f"policy.path={places}/scratch/a$$b")
    assert read.policy.path == name
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, json; from policy.chameleon.config import ChameleonPolicyConfig\n"
            "print(ChameleonPolicyConfig(**json.loads(sys.argv[1])).path)",
            json.dumps(read.policy.model_dump(mode="json")),
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.stdout.strip() == name, done.stderr
