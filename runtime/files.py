"""Writing so that what has a finished name is whole, and measuring files so that what was altered is noticed."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name, flush it to the disk and rename it. Raises OSError; `path` stays
    then, and nothing half-written is left."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `folder` once it is whole, in place of one that is there.

    It is written under another name, flushed to the disk and renamed, so that what bears the name is whole, however the
    process ends. After an error nothing half-written is left, and what was there stays.

    Raises OSError.
    """
    temporary, aside = (folder.parent / f".{folder.name}.{suffix}" for suffix in ("part", "old"))
    for leftover in (temporary, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush(temporary)
        if folder.exists():
            os.rename(folder, aside)
        os.rename(temporary, folder)
        flush_one(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        if aside.exists() and not folder.exists():  # broken off between the two renames
            os.rename(aside, folder)
        shutil.rmtree(temporary, ignore_errors=True)


def flush(folder: Path) -> None:
    """Force what a folder holds to the disk: after a rename the content must be there, even if the power goes."""
    for path in [*folder.rglob("*"), folder]:
        flush_one(path)


def flush_one(path: Path) -> None:
    """The same for one file, or for the names in one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Path) -> dict[str, int]:
    """A file's size in bytes and its CRC-32."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}
