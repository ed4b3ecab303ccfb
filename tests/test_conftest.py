"""conftest.py, by running pytest on small files beside a copy of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FIRST, LONG_FILES, RAY_FILES

HERE = Path(__file__).parent
PROPERTY = """
from hypothesis import given, strategies as st
from pathlib import Path

SEEN = Path(__file__).with_name("seen.txt").open("a")

@given(st.integers(0, 10**12))
def test_numbers(number):
    print(number, file=SEEN)
"""


@pytest.fixture
def run(tmp_path):
    """(source of one test file, environment) -> exit code and output of pytest on it."""
    (tmp_path / "tests").mkdir()
    shutil.copy(HERE / "conftest.py", tmp_path / "tests")
    # Markers as in the project, and a repository's root that is this one.
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers =\n    parity: reads reference numbers\n")

    def pytest_on(source, **environment):
        (tmp_path / "tests/test_one.py").write_text(source)
        kept = {k: v for k, v in os.environ.items() if k not in ("HYPOTHESIS_PROFILE", "UNDERDRAWING_FIXTURES", "CI")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "tests"],
            cwd=tmp_path,
            env={**kept, "PYTHONPATH": str(HERE.parent), **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        return done.returncode, done.stdout + done.stderr

    return pytest_on


def test_ci_tries_the_same_examples_in_every_run_and_nightly_others_and_more(run, tmp_path):
    def numbers(**environment):
        assert run(PROPERTY, **environment)[0] == 0
        seen = tmp_path / "tests/seen.txt"
        lines = seen.read_text().splitlines()
        seen.unlink()
        return lines

    first = numbers()
    assert first == numbers() == numbers(HYPOTHESIS_PROFILE="ci")
    one, other = (numbers(HYPOTHESIS_PROFILE="nightly") for _ in range(2))
    assert one != other and len(one) > len(first)


def test_a_failure_of_the_nightly_run_prints_the_line_that_repeats_it(run, tmp_path):
    failing = PROPERTY + "    assert number % 7 != 3\n"
    code, said = run(failing, HYPOTHESIS_PROFILE="nightly")
    line = re.search(r"@reproduce_failure\(.*\)", said)
    assert code == 1 and line, said
    example = re.search(r"number=([\d_]+)", said)
    number = int(example[1])  # 1_000_000 is one too
    assert number % 7 == 3
    (tmp_path / "tests/seen.txt").unlink()
    code, said = run(failing.replace("@given", f"from hypothesis import reproduce_failure\n{line[0]}\n@given"))
    assert code == 1 and example[0] in said, said
    assert set((tmp_path / "tests/seen.txt").read_text().split()) == {str(number)}


def test_an_unknown_profile_is_named(run):
    code, said = run(PROPERTY, HYPOTHESIS_PROFILE="nigthly")
    assert code == 4 and "HYPOTHESIS_PROFILE is 'nigthly'; known: ci, nightly" in said


READS = """
import pytest

@pytest.mark.parity
def test_reads(reference_records):
    assert reference_records("some/rows.jsonl") == [{"a": 1}, {"a": 2}]
"""


def test_reference_records_are_read_from_the_folder_that_is_named_and_skipped_without_it(run, tmp_path):
    code, said = run(READS)
    where = tmp_path.parent / "shared/fixtures/some/rows.jsonl"
    assert code == 0 and "1 skipped" in said
    assert f"no reference numbers at {where}; UNDERDRAWING_FIXTURES names their folder" in re.sub(r"\s+", " ", said)

    (tmp_path / "mine/some").mkdir(parents=True)
    rows = tmp_path / "mine/some/rows.jsonl"
    rows.write_text("".join(json.dumps({"a": n}) + "\n" for n in (1, 2)) + "\n")
    for named in (str(tmp_path / "mine"), "mine"):  # a relative one starts at the root
        code, said = run(READS, UNDERDRAWING_FIXTURES=named)
        assert code == 0 and "1 passed" in said, said
    rows.write_text("\n")
    code, said = run(READS, UNDERDRAWING_FIXTURES="mine")
    assert code == 1 and "holds no record" in said


def test_what_reads_reference_numbers_is_marked(run):
    code, said = run(READS.replace("@pytest.mark.parity", ""))
    assert code == 1 and "is marked parity" in said


def test_ray_writes_into_the_runs_own_folder_and_is_not_left_running(run, tmp_path):
    code, said = run("""
import os, tempfile
from pathlib import Path
from runtime.ray_cluster import start_ray

def test_starts_it():
    folder = start_ray(1).folder
    Path(__file__).with_name("folder.txt").write_text(str(folder))
    assert folder.parent == Path(tempfile.gettempdir()) == Path(os.environ["TMPDIR"])
    assert folder.parent.name == f"ud-t-{os.getpid()}"
""")
    folder = Path((tmp_path / "tests/folder.txt").read_text())
    assert code == 1 and "1 passed, 1 error" in said and "test_one.py leaves Ray running" in said, said
    assert not folder.parent.exists()


SAYS_WHO = """
import os
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range(3))
def test_says_who(number):
    with Path(__file__).with_name("who.txt").open("a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], Path(__file__).name, file=file)
"""


def test_one_worker_runs_all_that_starts_a_ray_and_long_files_come_first(run, tmp_path):
    others = ["test_aa.py", LONG_FILES[1], LONG_FILES[0]]
    for name in (*others, RAY_FILES[0], RAY_FILES[2]):
        (tmp_path / "tests" / name).write_text(SAYS_WHO)
    code, said = run(SAYS_WHO, PYTEST_ADDOPTS="-n 2 --dist loadfile")
    assert code == 0 and "18 passed" in said, said
    told = [line.split() for line in (tmp_path / "tests/who.txt").read_text().splitlines()]
    (by_ray,) = {worker for worker, name in told if name in RAY_FILES}
    for first, mine in ((RAY_FILES[0], True), (LONG_FILES[0], False)):
        names = [name for worker, name in told if (worker == by_ray) == mine]
        places = [FIRST.get(name, len(FIRST)) for name in names]
        assert names[0] == first and places == sorted(places)


def test_the_files_that_start_a_ray_are_known():
    assert all((HERE / name).is_file() for name in (*RAY_FILES, *LONG_FILES))
    start_it = {path.name for path in HERE.glob("test_*.py") if "start_ray(" in path.read_text()}
    assert start_it - {"test_grpo_ray.py", "test_credit_ray.py"} <= set(RAY_FILES)  # all tests of those two are slow


def test_a_cluster_of_the_readers_is_not_joined(run):
    code, said = run("import os\ndef test_it(): assert 'RAY_ADDRESS' not in os.environ\n", RAY_ADDRESS="127.0.0.1:1")
    assert code == 0, said
