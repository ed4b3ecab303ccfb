"""Benchmarks and experiments start as modules and as files, though some bear our packages' names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_recipe import ROOT

SCRIPTS = sorted(p.relative_to(ROOT) for f in ("benchmarks", "experiments") for p in (ROOT / f).glob("[!_]*.py"))


def run(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """With nothing on the search path but what Python puts there by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def test_the_scripts_are_found():
    assert {Path("benchmarks/rollout.py"), Path("benchmarks/rewards.py"), Path("experiments/train_vq.py")} <= set(
        SCRIPTS
    )


# Each imports torch: every way for the one whose name is a package's, one way for one experiment, the others at night.
STARTS = [
    pytest.param(script, how, id=f"{script}-{how}", marks=() if usual else pytest.mark.slow)
    for script in SCRIPTS
    for how in ("file", "module", "file from elsewhere")
    for usual in [script.name == "rollout.py" or (script.name, how) == ("reward_parts.py", "file from elsewhere")]
]


@pytest.mark.parametrize("script, how", STARTS)
def test_every_script_starts(script: Path, how: str, tmp_path):
    if how == "module":
        done = run(ROOT, "-m", ".".join(script.with_suffix("").parts), "--help")
    else:
        done = run(ROOT if how == "file" else tmp_path, script if how == "file" else ROOT / script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, id=str(s), marks=() if s.name == "rollout.py" else pytest.mark.slow) for s in SCRIPTS],
)
def test_every_script_takes_our_packages_from_its_own_repository(script: Path):
    """Not from an installation elsewhere, and `rollout` not from the folder of the scripts."""
    where = run(ROOT, "-c", f"import runpy; m = runpy.run_path({str(script)!r}); import sys\n"
                "print({sys.modules[n].__file__ for n in ('runtime', 'underdrawing')})")  # fmt: skip
    assert where.stdout.count(str(ROOT)) == 2, where.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_their_numbers_have_bounds(script: Path):
    text = (ROOT / script).read_text()
    assert "type=int" not in text and "type=float" not in text and "type=Path" not in text


def test_a_script_that_starts_itself_again_runs_as_a_file(tmp_path):
    sizes = ["--rows", "1", "--tokens", "64", "--vocabulary", "256", "--width", "16"]
    done = run(tmp_path, ROOT / "benchmarks/scoring.py", *sizes)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ours"] > 0
