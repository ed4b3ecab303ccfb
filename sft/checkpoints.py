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

from runtime.files import flush_one, measure, write_whole
from training.checkpoint import CheckpointError

WHOLE = "whole.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# As torch's zip writer reports a full disk.
_TORCH_WRITE = re.compile(r"PytorchStreamWriter|unexpected pos|iostream|No space left")


class WarmStartCheckpointError(CheckpointError):
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


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(folder.name.rpartition("-")[2])


def newest(output_dir: Path) -> Path | None:
    """The checkpoint to go on from; None: there is none.

    Raises:
        WarmStartCheckpointError: as `verify`.
    """
    finished = finished_checkpoints(output_dir)
    return verify(finished[-1]) if finished else None


def chosen(output_dir: Path, which: str) -> Path:
    """The finished checkpoint that a person names: by its step, or by its folder.

    Raises:
        WarmStartCheckpointError: there is none of that step or in that folder, it is another run's and this one has
            its own, or as `verify`.
    """
    finished = finished_checkpoints(output_dir)
    steps = ", ".join(str(step_of(folder)) for folder in finished) or "none"
    if which.isascii() and which.isdigit() and len(which) < 19:
        found = [folder for folder in finished if step_of(folder) == int(which)]
        if not found:
            raise WarmStartCheckpointError(f"{output_dir}: no checkpoint of step {which}; there are: {steps}")
        return verify(found[0])
    folder = Path(which)
    if _NAME.fullmatch(folder.name) is None or not (folder / WHOLE).is_file():
        raise WarmStartCheckpointError(
            f"{folder}: no finished checkpoint of a warm start; name a step ({steps}) or a folder, such as "
            f"{output_dir / 'checkpoint-200'}"
        )
    if finished and folder.resolve().parent != output_dir.resolve():
        raise WarmStartCheckpointError(
            f"{folder}: belongs to another run, and {output_dir} holds checkpoints of this one; choose another run_dir "
            f"to go on from it there"
        )
    return verify(folder)


def verify(folder: Path) -> Path:
    """The checkpoint itself, every file of it as it was written.

    Raises:
        WarmStartCheckpointError: a file of it is missing, cut short or altered, by name.
    """
    try:
        files = json.loads((folder / WHOLE).read_text())
    except ValueError:
        raise _broken(folder, f"{folder / WHOLE}: not JSON, the checkpoint was altered") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise _broken(folder, f"{path}: missing from the checkpoint")
        if measure(path) != expected:
            raise _broken(
                folder,
                f"{path}: not what was written ({path.stat().st_size} bytes, {expected['bytes']} were written); the "
                f"file was cut or altered",
            )
    return folder


def _broken(folder: Path, message: str) -> WarmStartCheckpointError:
    before = [earlier for earlier in finished_checkpoints(folder.parent) if step_of(earlier) < step_of(folder)]
    if not before:
        return WarmStartCheckpointError(message, folder)
    return WarmStartCheckpointError(f"{message}. The one before is {before[-1]}", folder, before[-1])


def rewind(output_dir: Path, step: int) -> None:
    """Forget the checkpoints after `step`, from which a warm start goes on: it will do otherwise than they did."""
    for folder in finished_checkpoints(output_dir):
        if step_of(folder) > step:
            _discard(folder)


def prune(output_dir: Path, keep: int) -> None:
    """Delete half-written checkpoints and all but the newest `keep` finished ones."""
    finished = finished_checkpoints(output_dir)
    stay = set(finished[-keep:])
    for path in output_dir.iterdir():
        if _NAME.fullmatch(path.name) and path not in stay:
            _discard(path)


def _discard(folder: Path) -> None:
    (folder / WHOLE).unlink(missing_ok=True)  # first: half deleted, it must not pass for a finished one
    shutil.rmtree(folder, ignore_errors=True)


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
