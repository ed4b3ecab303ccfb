"""A run's state on disk: weights, optimiser, random states, data cursor, version, recipe; whole or not at all.

    checkpoints/step-000040/
        weights/       the policy's own layout (policy.save), so that any command can start from it
        probe/         the trajectories that publications are proven with
        owed.json      where a fault kept the step from being published, evaluated or logged: its metrics so far
        trainer.pt     trained parameters, optimiser, schedule, version, random states (tensors and plain values only)
        state.json     step, cursor, recipe, size and CRC-32 of every other file, and the CRC-32 of all this

A checkpoint is written under another name, flushed to the disk and renamed, so that a folder called step-* is a
finished one, however the process that wrote it ended. Metrics need no place here: the tracker rewinds to the step.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from runtime.errors import UserError
from runtime.files import measure, whole_folder

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_KEYS = {"format": int, "step": int, "cursor": dict, "recipe": dict, "files": dict}
_OWN = "crc32"  # of the rest of state.json; those written before had none


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or not be trusted.

    `broken`: the folder of one that is not as it was written. `earlier`: the finished one before it, where there is
    one; whoever knows the command says how to take that.
    """

    def __init__(self, message: str, broken: Path | None = None, earlier: Path | None = None) -> None:
        super().__init__(message)
        self.broken, self.earlier = broken, earlier


@dataclass(frozen=True)
class Checkpoint:
    """What a finished checkpoint holds."""

    folder: Path
    step: int  # the last finished step
    cursor: dict[str, Any]
    trainer: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.folder / "weights"


def save(
    root: Path,
    step: int,
    write: Callable[[Path], Any],
    trainer: dict[str, Any],
    cursor: dict[str, Any],
    recipe: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write checkpoints/step-<step> under `root` and delete all but the newest `keep`.

    Args:
        root: the run's folder `checkpoints`.
        write: writes weights/ and whatever else into the folder that it is given.
        trainer: Trainer.state().

    Raises:
        CheckpointError: the disk is full or not writable. Nothing half-written is left, and earlier checkpoints are as
            they were.
    """
    root = Path(root)
    final = root / f"step-{step:06d}"
    try:
        for leftover in root.glob(".step-*"):
            shutil.rmtree(leftover)
        with whole_folder(final) as fresh:  # one is there where a run resumed from an earlier step comes past again
            (fresh / "weights").mkdir()
            write(fresh)
            _write_tensors(trainer, fresh / "trainer.pt")
            files = {str(path.relative_to(fresh)): measure(path) for path in _files(fresh)}
            state = {"format": FORMAT, "step": step, "cursor": cursor, "recipe": recipe, "files": files}
            (fresh / "state.json").write_text(json.dumps({**state, _OWN: _checksum(state)}, indent=1))
    except (OSError, SafetensorError, UserError) as error:
        raise CheckpointError(_cannot_write(root, step, error)) from error
    for old in steps(root)[:-keep]:
        _discard(root, old)
    return final


def steps(root: Path) -> list[int]:
    """Steps of the finished checkpoints, ascending."""
    if not Path(root).is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in Path(root).iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder bears a finished checkpoint's name."""
    return _NAME.fullmatch(folder.name) is not None and folder.is_dir()


def latest(root: Path) -> Path | None:
    """The newest finished checkpoint; None: there is none."""
    finished = steps(root)
    return Path(root) / f"step-{finished[-1]:06d}" if finished else None


def chosen(root: Path, which: str) -> Path:
    """The finished checkpoint that a person names: by its step, or by its folder.

    Args:
        root: the run's folder `checkpoints`.

    Raises:
        CheckpointError: there is none of that step or in that folder, or it is another run's and this one has its own.
    """
    finished = ", ".join(map(str, steps(root))) or "none"
    if which.isascii() and which.isdigit() and len(which) < 19:
        folder = Path(root) / f"step-{int(which):06d}"
        if not is_checkpoint(folder):
            raise CheckpointError(f"{root}: no checkpoint of step {which}; there are: {finished}")
        return folder
    folder = Path(which)
    if not is_checkpoint(folder):
        raise CheckpointError(
            f"{folder}: no finished checkpoint; name a step ({finished}) or a folder, such as "
            f"{Path(root) / 'step-000040'}"
        )
    if steps(root) and folder.resolve().parent != Path(root).resolve():
        raise CheckpointError(
            f"{folder}: belongs to another run, and {root} holds checkpoints of this one; choose another run_dir to go "
            f"on from it there"
        )
    return folder


def rewind(root: Path, step: int) -> None:
    """Forget the checkpoints after `step`, from which a run goes on: they belong to what it will do otherwise."""
    for later in steps(root):
        if later > step:
            _discard(Path(root), later)


def _discard(root: Path, step: int) -> None:
    """Delete a finished checkpoint under another name: half deleted, it must not pass for one.

    What a killed process leaves of it is swept by the next save().
    """
    aside = root / f".step-{step:06d}.old"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(root / f"step-{step:06d}", aside)
    shutil.rmtree(aside, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every file of it against its size and checksum.

    Raises:
        CheckpointError: a file is missing, cut short or altered, by name; or the folder is no checkpoint.
    """
    folder = Path(folder)
    state = verify(folder)
    try:
        trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise _broken(folder, f"{folder / 'trainer.pt'}: cannot be read ({error})") from None
    return Checkpoint(folder, state["step"], state["cursor"], trainer, state["recipe"])


def started_from(folder: Path) -> str | None:
    """Where the weights came from that the checkpoint's run started from; None where that is not known. Nothing is
    checked, and no tensor is read."""
    try:
        trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        return trainer["start"]["source"]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError):
        return None


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its size and checksum, and return its state.json.

    Raises:
        CheckpointError: a file is missing, cut short or altered, by name; or the folder is no checkpoint.
    """
    state = _read_state(folder)
    for name, expected in state["files"].items():
        path = folder / name
        if not path.is_file():
            raise _broken(folder, f"{path}: missing; the checkpoint is incomplete")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _broken(
                folder, f"{path}: {size} bytes where {expected['bytes']} were written; the file was cut or altered"
            )
        if measure(path) != expected:
            raise _broken(folder, f"{path}: its checksum is not the one written; the file is corrupt")
    return state


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise _broken(
            folder,
            f"{folder}: no checkpoint: it has no state.json. A checkpoint is a folder checkpoints/step-* of a run",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _broken(folder, f"{path}: not JSON ({error}); the file was cut or altered") from None
    except OSError as error:
        raise _broken(folder, f"{path}: cannot be read ({error.strerror or error})") from None
    missing = set(_KEYS) - set(state if isinstance(state, dict) else ())
    if missing:
        raise _broken(folder, f"{path}: no key '{sorted(missing)[0]}'; the file was altered")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path}: written in format {state['format']}; this version reads {FORMAT}")
    unknown = set(state) - set(_KEYS) - {_OWN}  # its own checksum under an altered name, say
    if unknown:
        raise _broken(folder, f"{path}: unknown key '{sorted(unknown)[0]}'; the file was altered")
    if _OWN in state and state.pop(_OWN) != _checksum(state):
        raise _broken(folder, f"{path}: its checksum is not the one written; the file is corrupt")
    for key, kind in _KEYS.items():
        if not isinstance(state[key], kind):
            raise _broken(folder, f"{path}: '{key}' is no {kind.__name__}; the file was altered")
    for name, written in state["files"].items():
        if not (isinstance(written, dict) and all(isinstance(written.get(key), int) for key in ("bytes", "crc32"))):
            raise _broken(folder, f"{path}: 'files' tells no size and checksum of '{name}'; the file was altered")
    return state


def _checksum(state: dict[str, Any]) -> int:
    """CRC-32 of what state.json says, however it is laid out."""
    plain = json.loads(json.dumps(state))  # as it is read again: keys that are numbers become words
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def _broken(folder: Path, message: str) -> CheckpointError:
    """The error of a checkpoint that is not as it was written, with the one before it."""
    match = _NAME.fullmatch(folder.name)
    before = [number for number in steps(folder.parent) if match and number < int(match[1])]
    if not before:
        return CheckpointError(message, folder)
    earlier = folder.parent / f"step-{before[-1]:06d}"
    return CheckpointError(f"{message}. The one before is {earlier}", folder, earlier)


def _write_tensors(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # as torch reports a full disk
        raise OSError(f"{path.name}: {str(error).splitlines()[0]}") from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _cannot_write(root: Path, step: int, error: Exception) -> str:
    try:
        free = f" {shutil.disk_usage(root).free / 2**20:.0f} MiB are free there."
    except OSError:
        free = ""
    kept = latest(root)
    safe = f"The last checkpoint is whole: {kept}" if kept else "There is no earlier checkpoint"
    return f"{root}: the checkpoint of step {step} cannot be written ({error}).{free} {safe}"
