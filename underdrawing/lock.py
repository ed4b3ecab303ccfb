"""What is installed against requirements.lock, the versions that the project is tested with."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from runtime.errors import UserError
from underdrawing.search_path import ROOT

LOCK = ROOT / "requirements.lock"


@dataclass(frozen=True)
class Differing:
    """A package that is not as locked. installed: its version; None: it is missing."""

    name: str
    installed: str | None
    locked: str

    def __str__(self) -> str:
        return f"{self.name}: {self.installed or 'missing'}, locked {self.locked}"


def find_lock() -> Path | None:
    """The lock of the checkout that this is; None in an installed wheel, which has none."""
    return LOCK if LOCK.is_file() and (ROOT / "pyproject.toml").is_file() else None


def lock_sha256() -> str | None:
    """Of the checkout's lock; None in an installed wheel, which has none."""
    lock = find_lock()
    return None if lock is None else hashlib.sha256(lock.read_bytes()).hexdigest()


def locked_versions(lock: Path) -> dict[str, str]:
    """The version of each package that the lock has for this machine, its markers considered.

    Raises:
        UserError: a line that pins no version.
    """
    versions = {}
    for number, line in _logical_lines(lock):
        text = line.partition(" --hash")[0].strip()
        if not text or text.startswith(("#", "-")):
            continue
        try:
            requirement = Requirement(text)
            (pin,) = requirement.specifier
            if pin.operator != "==":
                raise ValueError
        except (InvalidRequirement, ValueError):
            raise UserError(f"{lock} line {number}: pins no version; write it again with `make lock`") from None
        if requirement.marker is None or requirement.marker.evaluate():
            versions[requirement.name] = pin.version
    return versions


def differing(locked: dict[str, str]) -> list[Differing]:
    """The packages that are missing, or of another version than the locked one, by name."""
    found = []
    for name, version in sorted(locked.items()):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Differing(name, None, version))
            continue
        if not _same(installed, version):
            found.append(Differing(name, installed, version))
    return found


def _same(installed: str, locked: str) -> bool:
    """As pip reads `==`: a build's own mark, as in 2.14.0+cpu, counts only where the lock names one."""
    try:
        ours, theirs = Version(installed), Version(locked)
    except InvalidVersion:
        return installed == locked
    return ours == theirs if theirs.local else Version(ours.public) == theirs


def _logical_lines(lock: Path) -> list[tuple[int, str]]:
    """Lines with their continuations joined, each with the number of its first."""
    lines: list[tuple[int, str]] = []
    going_on = False
    for number, line in enumerate(lock.read_text(encoding="utf-8").splitlines(), 1):
        part = line.rstrip().removesuffix("\\").rstrip()
        if going_on:
            lines[-1] = (lines[-1][0], f"{lines[-1][1]} {part.strip()}")
        else:
            lines.append((number, part))
        going_on = line.rstrip().endswith("\\")
    return lines
