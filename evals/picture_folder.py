"""GenEval's folder layout of drawn pictures, read with every way in which such a folder can be wrong.

    <folder>/00000/metadata.jsonl        the prompt's record, one JSON object
    <folder>/00000/samples/0000.png      its pictures (0000.jpg or 0.png as well)
    <folder>/00001/...

Whatever else lies beside them (grid.png, say) is passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from rollout.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class PictureFolderError(UserError):
    """A folder of pictures that cannot be scored as it is."""


@dataclass(frozen=True)
class PromptFolder:
    """One prompt with its pictures."""

    index: int
    folder: Path
    record: dict[str, Any]  # GenEval's: tag, include, exclude, prompt
    samples: tuple[Path, ...]  # by number


def read_picture_folder(root: Path, whole: bool = False) -> list[PromptFolder]:
    """Every prompt of a folder, by its number. No picture is opened: see `read_picture`.

    Args:
        whole: numbers must run from 0 without a gap, as those of a benchmark do.

    Raises:
        PictureFolderError: no such folder, no prompt in it, a prompt without its record or pictures, two files for one
            sample, or (with `whole`) prompts that are missing.
    """
    root = Path(root)
    if not root.is_dir():
        raise PictureFolderError(f"{root}: no such folder; give one in GenEval's layout, with 00000/metadata.jsonl and "
                                 f"00000/samples/0000.png")
    numbered: dict[int, Path] = {}
    for path in sorted(root.iterdir()):
        if path.is_dir() and re.fullmatch(r"\d+", path.name):
            if int(path.name) in numbered:
                raise PictureFolderError(f"{root}: two folders for prompt {int(path.name)}, "
                                         f"{numbered[int(path.name)].name} and {path.name}; keep one")
            numbered[int(path.name)] = path
    if not numbered:
        raise PictureFolderError(f"{root}: no prompts here; GenEval's layout has one folder a prompt, "
                                 f"00000/metadata.jsonl and 00000/samples/0000.png")
    missing = sorted(set(range(max(numbered) + 1)) - set(numbered))
    if whole and missing:
        raise PictureFolderError(f"{root}: {len(missing)} prompt(s) are missing: {_some(missing)}; draw them, or the "
                                 f"score would be of other prompts")
    return [PromptFolder(index, folder, _record(folder), _samples(folder))
            for index, folder in sorted(numbered.items())]


def read_picture(path: Path) -> np.ndarray:
    """uint8 [height, width, 3]. Raises PictureFolderError for a file that is no whole picture."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise PictureFolderError(f"{path}: no such picture") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        said = str(error).replace(f" '{path}'", "")
        raise PictureFolderError(f"{path}: not a whole picture ({said}); draw it again") from None


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "metadata.jsonl"
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        record = json.loads(lines[0]) if len(lines) == 1 else None
    except FileNotFoundError:
        raise PictureFolderError(f"{path}: missing; it holds the prompt's record") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PictureFolderError(f"{path}: not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise PictureFolderError(f"{path}: must hold one JSON object with a 'prompt' (and tag, include, exclude)")
    return record


def _samples(folder: Path) -> tuple[Path, ...]:
    place = folder / "samples"
    found: dict[int, Path] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.suffix.lower() not in SUFFIXES or not re.fullmatch(r"\d+", path.stem):
            continue
        number = int(path.stem)
        if number in found:
            raise PictureFolderError(f"{place}: two files for sample {number}, {found[number].name} and {path.name}; "
                                     f"keep one")
        found[number] = path
    if not found:
        raise PictureFolderError(f"{place}: no pictures; they are named 0000.png, 0001.png ...")
    return tuple(path for _, path in sorted(found.items()))


def _some(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(f"{number:05d}" for number in numbers[:most])
    return shown + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
