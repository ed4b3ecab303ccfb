"""doctor holds what is installed to requirements.lock."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

import pytest

from runtime.errors import UserError
from tests.test_recipe import ROOT
from underdrawing import doctor, lock
from underdrawing.lock import Differing, differing, find_lock, locked_versions

NUMPY, YAML = (importlib.metadata.version(name) for name in ("numpy", "pyyaml"))


def written(folder: Path, text: str) -> Path:
    (folder / "requirements.lock").write_text(text)
    return folder / "requirements.lock"


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout whose lock is ours to write."""
    monkeypatch.setattr(lock, "LOCK", tmp_path / "requirements.lock")
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    return tmp_path


def test_the_projects_own_lock_is_read_whole():
    """Every package that pyproject.toml asks for, and as many as the file has lines with a version."""
    locked = locked_versions(ROOT / "requirements.lock")
    text = (ROOT / "requirements.lock").read_text()
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert {"torch", "ray", "trl", "pydantic", "packaging", "ruff"} <= set(locked)
        assert all(f"{name}==" in text for name in locked)
    assert find_lock() == ROOT / "requirements.lock"


def test_markers_hashes_and_continuations(tmp_path):
    path = written(
        tmp_path,
        "# by uv\n"
        "--index-url https://example.org\n"
        f"numpy=={NUMPY} ; python_full_version >= '3.8' and sys_platform == '{sys.platform}' \\\n"
        "    --hash=sha256:aa \\\n"
        "    --hash=sha256:bb\n"
        "numpy==0.0.1 ; python_full_version < '3.8'\n"
        "colorama==0.4.6 ; sys_platform == 'win32' \\\n    --hash=sha256:cc\n"
        "\n"
        "pyyaml[extra]==6.0.0  # a remark\n",
    )
    path.write_text(path.read_text().replace("  # a remark", ""))
    assert locked_versions(path) == {"numpy": NUMPY, "pyyaml": "6.0.0"}


@pytest.mark.parametrize("line", ["numpy", "numpy>=2", "numpy==2,<3", "=== what", "numpy @ file:///x"])
def test_a_line_that_pins_nothing_is_named(tmp_path, line):
    path = written(tmp_path, f"# one\n{line} \\\n  --hash=sha256:aa\n")
    with pytest.raises(UserError, match="requirements.lock line 2: pins no version"):
        locked_versions(path)


def test_what_differs_and_what_is_missing():
    found = differing({"pyyaml": "0.0.1", "numpy": NUMPY, "no-such-package": "1.2"})
    assert found == [Differing("no-such-package", None, "1.2"), Differing("pyyaml", YAML, "0.0.1")]
    assert [str(one) for one in found] == ["no-such-package: missing, locked 1.2", f"pyyaml: {YAML}, locked 0.0.1"]


@pytest.mark.parametrize(
    "installed, locked, same",
    [
        ("2.14.0+cpu", "2.14.0", True),
        ("2.14.0", "2.14.0+cpu", False),
        ("2.14.0+cpu", "2.14.0+cpu", True),
        ("2.14", "2.14.0", True),
        ("2.14.1", "2.14.0", False),
        ("1.0rc1", "1.0", False),
        ("weird", "weird", True),
        ("weird", "1.0", False),
    ],
)
def test_versions_are_compared_as_pip_does(installed, locked, same):
    assert lock._same(installed, locked) is same


def test_the_finding_lists_them(checkout):
    written(checkout, f"numpy=={NUMPY}\npyyaml==0.0.1\nno-such-package==1.2\n")
    finding = doctor._lock()
    assert finding.state == "warning" and finding.advice == "`make install` installs what is locked"
    assert finding.what.splitlines() == [
        f"2 of 3 packages are not as in {checkout}/requirements.lock:",
        "no-such-package: missing, locked 1.2",
        f"pyyaml: {YAML}, locked 0.0.1",
    ]
    written(checkout, f"numpy=={NUMPY}\npyyaml=={YAML}\n")
    assert doctor._lock() == doctor.Finding(
        "lock", "ok", f"all 2 packages of {checkout}/requirements.lock are as locked"
    )


def test_a_lock_for_other_machines_says_so(checkout):
    written(checkout, "numpy==1.0 ; sys_platform == 'win32'\n")
    finding = doctor._lock()
    assert finding.state == "warning" and f"no versions for Python {platform.python_version()}" in finding.what


def test_an_installed_package_has_no_lock_and_says_so(checkout):
    assert find_lock() is None
    finding = doctor._lock()
    assert finding.state == "ok" and finding.what.startswith("there is none: this is an installed package")
    # A file of that name in site-packages would be somebody else's.
    written(checkout, "pyyaml==0.0.1\n")
    (checkout / "pyproject.toml").unlink()
    assert find_lock() is None
