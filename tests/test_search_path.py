"""Other packages with our packages' names: the working folder comes last, and what hides ours is named."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.loading import LoadError, load_object
from tests.test_cli import QUICKSTART, refused
from tests.test_imports import PACKAGES
from tests.test_recipe import ROOT
from underdrawing import search_path

SCRIPT = Path(sys.executable).parent / "underdrawing"
DRY = ["grpo", QUICKSTART, "--dry-run", "rollout.workers=0"]


def run(folder: Path, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """A command in a folder, with the repository on the search path and, before it, `path`."""
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}" if path else str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def package(folder: Path, name: str, text: str = "") -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return folder / name


def test_the_packages_are_ours():
    assert search_path.PACKAGES == PACKAGES and search_path.ROOT == ROOT
    assert search_path.hidden_package() is None


@pytest.mark.parametrize("command", [[SCRIPT], [sys.executable, "-m", "underdrawing"]], ids=["script", "module"])
def test_the_working_folder_is_sought_last_and_is_sought(tmp_path, command):
    """`python -m` puts the working folder first on the path, and the command moves it behind its own packages and
    everybody's, but seeks a function of the user's there."""
    for name in PACKAGES:
        if name != "underdrawing" or command == [SCRIPT]:
            package(tmp_path, name, "raise ImportError('another package')")
    (tmp_path / "yaml.py").write_text("raise ImportError('not the YAML that you want')")
    (tmp_path / "mine.py").write_text("def f(completions, **columns):\n    return [1.0] * len(completions)\n")
    own = ["rewards.parts={r: {function: mine.f}}", "rewards.total=r", "grpo.segment_reward_weights={}"]
    done = run(tmp_path, *command, *DRY, *own)
    assert done.returncode == 0 and "held-out prompts" in done.stdout, done.stderr


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "underdrawing"])
def test_every_package_that_hides_ours_is_named(tmp_path, name):
    place = package(tmp_path, name)
    done = run(tmp_path, sys.executable, "-m", "underdrawing", "doctor", path=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"underdrawing: the package '{name}' is found at {place}, which hides this toolkit's own in {ROOT}: rename "
        f"that one, or take {tmp_path} off Python's search path (PYTHONPATH)\n"
    )


def test_a_module_hides_as_a_package_does_whatever_is_run(tmp_path):
    (tmp_path / "tasks.py").write_text("")
    for command in (
        [SCRIPT, "doctor"],
        [sys.executable, "-m", "underdrawing.quickstart"],
        [sys.executable, "-m", "underdrawing.cli"],
    ):
        done = run(tmp_path, *command, path=str(tmp_path))
        assert done.returncode == 2 and f"the package 'tasks' is found at {tmp_path}/tasks.py" in done.stderr


def test_a_folder_that_is_no_package_hides_nothing(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.txt").write_text("")
    assert run(tmp_path, SCRIPT, "view", "nowhere", path=str(tmp_path)).stderr.startswith(
        "underdrawing: nowhere: no run"
    )


def test_rays_workers_are_not_led_astray(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package(tmp_path, "tasks")
    said = refused(capsys, "grpo", QUICKSTART, "--dry-run")
    assert f"{tmp_path}/tasks bears the name of a package of this toolkit, and Ray's workers would import it" in said
    assert search_path.packages_here(ROOT) == [] and search_path.packages_here(tmp_path) == ["tasks"]


@pytest.mark.parametrize(
    "spec, file",
    [
        ("tasks.mine.Mine", "tasks/mine.py"),
        ("rewards.ink:ink", "rewards/ink/__init__.py"),
        ("evals.Mine", "evals.py"),
        ("tasks.base.Mine", "tasks/base.py"),
    ],
)
def test_a_module_of_ones_own_that_ours_hides_is_named(tmp_path, monkeypatch, spec, file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    importlib.import_module(spec.split(".")[0])
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("class Mine: pass\n")
    with pytest.raises(LoadError) as caught:
        load_object(spec, f"task.name: '{spec}'")
    first = spec.split(".")[0]
    assert (
        f"{tmp_path / file} is not seen, for the package '{first}' in {ROOT / first} hides it: name it as a file, "
        f"'{tmp_path / file}:...', or rename it"
    ) in str(caught.value)


def test_what_is_simply_missing_gets_no_such_hint():
    with pytest.raises(LoadError, match="no module 'tasks.mine' on the path$"):
        load_object("tasks.mine.Mine", "x")
    with pytest.raises(LoadError, match="has no function 'ShapesTsk'; did you mean 'ShapesTask'"):
        load_object("tasks.shapes.task.ShapesTsk", "x")
