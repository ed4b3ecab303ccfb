"""What every test shares: how many random examples properties try, a temp dir of this run's own, the reference records;
and which worker runs which files, in which order.

Environment variables:

    HYPOTHESIS_PROFILE     `ci` (the default): the same examples in every run; `nightly`: random ones, and more of them.
                           A failure of either prints the example, and the line that runs it again.
    UNDERDRAWING_FIXTURES  the folder of reference numbers, which parity tests read; a relative one starts at the
                           repository's root. Default: ../shared/fixtures.
    OMP_NUM_THREADS        torch's threads in each process. Default: 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Each of two workers computes on one of two cores: torch's threads would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A tiny model or a data set that asks the hub for anything is a fault of the test. Libraries read this as they are
# imported.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
REFERENCES = (ROOT / os.environ.get("UNDERDRAWING_FIXTURES", "../shared/fixtures")).resolve()

# ---- hypothesis ---------------------------------------------------------------------------------------------------

PROFILES = ("ci", "nightly")
# deadline None: a busy machine is not a slow test. print_blob: the @reproduce_failure line of what was random.
settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-profile"):
        return
    name = os.environ.get("HYPOTHESIS_PROFILE", "ci")
    if name not in PROFILES:
        raise pytest.UsageError(f"HYPOTHESIS_PROFILE is '{name}'; known: {', '.join(PROFILES)}")
    settings.load_profile(name)


# ---- Ray and temporary files --------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def own_temp_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """This process's own temp dir, for what it starts too: Ray's folder and sockets lie in it, and go with it.

    Its path is short, for a socket's is limited. Those of test runs that were killed are removed.
    """
    tmp_path_factory.getbasetemp()  # pytest's stay where they are: a failed test's are kept to be looked at
    for left in Path("/tmp").glob("ud-t-*"):
        with contextlib.suppress(FileNotFoundError):  # another run is removing it
            if left.stat().st_uid == os.getuid() and not Path(f"/proc/{left.name.removeprefix('ud-t-')}").exists():
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(f"/tmp/ud-t-{os.getpid()}")
    folder.mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.delenv("RAY_ADDRESS", raising=False)  # a cluster of the reader's is not joined
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def no_ray_stays_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a file of tests that leaves Ray running, whose workers the next file would share."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail(f"{request.node.name} leaves Ray running; close what started it")


# ---- which files are run first, and by whom -------------------------------------------------------------------------

# Of the tests that are run by default, those that start a Ray. Two at once on two cores thrash, so that one worker runs
# all of them, one after the other.
RAY_FILES = (
    "test_workers.py",
    "test_rewards_workers.py",
    "test_reward_processes.py",
    "test_ray_gone.py",
    "test_rewards_ray_gpus.py",
    "test_conftest.py",
    "test_doctor.py",
    "test_inexact.py",
    "test_tools_workers.py",
)
# The longest of the others, which the workers begin with: at the end there are short ones to share out.
LONG_FILES = (
    "test_cli.py",
    "test_engine.py",
    "test_scripts.py",
    "test_grpo.py",
    "test_judge_client.py",
    "test_recipe_hostile.py",
    "test_resume.py",
    "test_evaluations.py",
    "test_grpo_judge.py",
    "test_rewards_judge.py",
    "test_imports.py",
    "test_sft.py",
    "test_search_path.py",
    "test_check_reward.py",
    "test_rewards_columns.py",
    "test_signals.py",
    "test_train_vq.py",
    "test_tracking.py",
)
FIRST = {name: place for place, name in enumerate((*RAY_FILES, *LONG_FILES))}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.get(item.path.name, len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, files go to workers in the order above, and those that start a Ray all to one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneRayAtATime(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "Ray" if Path(file).name in RAY_FILES else file

    config.option.loadscopereorder = False  # by the number of tests
    return OneRayAtATime(config, log)


# ---- reference records --------------------------------------------------------------------------------------------


@pytest.fixture
def reference_file(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """name -> path of a file of reference numbers. Skips the test where it is absent; the test is marked `parity`."""
    assert request.node.get_closest_marker("parity"), "a test that reads reference numbers is marked parity"

    def find(name: str) -> Path:
        path = REFERENCES / name
        if not path.is_file():
            pytest.skip(f"no reference numbers at {path}; UNDERDRAWING_FIXTURES names their folder")
        return path

    return find


@pytest.fixture
def reference_records(reference_file: Callable[[str], Path]) -> Callable[[str], list[dict[str, Any]]]:
    """name -> the records of a JSONL file of reference numbers, of which there is at least one."""

    def read(name: str) -> list[dict[str, Any]]:
        path = reference_file(name)
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert found, f"{path} holds no record"
        return found

    return read


@pytest.fixture
def reference_tensors(reference_file: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    """name -> what a .pt file of reference numbers holds. It is read once; a test leaves it as it is."""
    return lambda name: _tensors(reference_file(name))


@cache
def _tensors(path: Path) -> dict[str, Any]:
    import torch

    return torch.load(path, weights_only=True)
