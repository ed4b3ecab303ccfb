"""What a warm start leaves on the disk: whole checkpoints, told from half-written ones, and errors as sentences.

sft/checkpoint-200/       transformers' files (weights, optimiser, schedule, random states, trainer_state.json)
    progress.pt           what the next line of metrics has gathered so far; the visual loss's projection or table
    whole.json            written last: size and CRC-32 of every other file
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from runtime.errors import UserError
from runtime.files import flush_one, measure, write_whole

WHOLE = "whole.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# As torch's zip writer reports a full disk.
_TORCH_WRITE = re.compile(r"PytorchStreamWriter|unexpected pos|iostream|No space left")


class WarmStartCheckpointError(UserError):
    """A warm start's checkpoint that cannot be written, or not be trusted."""


def write_manifest(folder: Path) -> None:
    """Say that a checkpoint is whole. Its files are on the disk before whole.json is."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        flush_one(path)
        files[str(path.relative_to(folder))] = measure(path)
    write_whole(folder / WHOLE, json.dumps(files, indent=1))


def finished_checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints, oldest first. What a killed run left half-written is none."""
    if not output_dir.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in output_dir.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / WHOLE).is_file()
    ]
    return [path for _, path in sorted(found)]


def newest(output_dir: Path) -> Path | None:
    """The checkpoint to go on from; None: there is none.

    Raises:
        WarmStartCheckpointError: a file of it is missing, cut short or altered, by name.
    """
    finished = finished_checkpoints(output_dir)
    if not finished:
        return None
    folder = finished[-1]
    advice = (
        f"; delete {folder} to go on from {finished[-2].name}"
        if len(finished) > 1
        else f"; delete {folder} to start anew"
    )
    try:
        files = json.loads((folder / WHOLE).read_text())
    except ValueError:
        raise WarmStartCheckpointError(f"{folder / WHOLE}: not JSON, the checkpoint was altered{advice}") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise WarmStartCheckpointError(f"{path}: missing from the checkpoint{advice}")
        if measure(path) != expected:
            raise WarmStartCheckpointError(
                f"{path}: not what was written ({path.stat().st_size} bytes, {expected['bytes']} were "
                f"written); the file was cut or altered{advice}"
            )
    return folder


def prune(output_dir: Path, keep: int) -> None:
    """Delete half-written checkpoints and all but the newest `keep` finished ones."""
    finished = finished_checkpoints(output_dir)
    stay = set(finished[-keep:])
    for path in output_dir.iterdir():
        if _NAME.fullmatch(path.name) and path not in stay:
            (path / WHOLE).unlink(missing_ok=True)  # first: half deleted, it must not pass for a finished one
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it a disk that is full or not writable is a WarmStartCheckpointError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and not _TORCH_WRITE.search(str(error)):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise WarmStartCheckpointError(
            f"{path}: cannot be written ({reason}); free some space or choose another run_dir, then "
            "resume. Checkpoints written before are as they were"
        ) from error
