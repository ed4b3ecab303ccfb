"""Writing so that what has a finished name is whole, and measuring files so that what was altered is noticed."""

from __future__ import annotations

import os
import zlib
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name, flush it to the disk and rename it. Raises OSError; `path` stays then."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
