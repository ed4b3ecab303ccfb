"""Weights on the wire: tensors become checksummed chunks and a manifest, and a model takes them whole or not at all.

rl/publish.py packs; workers.py carries the chunks to its workers, each of which receives them with a WeightReceiver
and answers a Probe, which proves that what arrived is what now samples. Knows neither Ray nor trainers.

The tensors lie one after another in one stream of bytes, each beginning at a multiple of ALIGNMENT; the stream is cut
into chunks of equal size, so that a tensor larger than a chunk spans several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from rollout.errors import UserError
from rollout.trajectory import Trajectory

ALIGNMENT = 64
CHUNK_BYTES = 64 * 2**20


class PublicationError(UserError):
    """Weights that did not arrive as they were sent. Rolling out with them would be training on another's thoughts."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the stream."""

    name: str
    dtype: str  # as torch names it, without "torch."
    shape: tuple[int, ...]
    start: int  # in bytes
    size: int  # in bytes
    checksum: int  # xxh3_64 of its bytes


@dataclass(frozen=True)
class Manifest:
    """What a publication holds, checked before any of it is loaded."""

    version: int
    kind: Literal["full", "delta"]  # full: every tensor of the state dict; delta: those that are trained
    tensors: tuple[TensorEntry, ...]
    chunk_sizes: tuple[int, ...]
    chunk_checksums: tuple[int, ...]
    fingerprint: str  # of these tensors: equal if and only if the weights are
    base: str | None  # of all other tensors, which a delta presumes; None in a full publication

    @property
    def num_bytes(self) -> int:
        return sum(self.chunk_sizes)


@dataclass(frozen=True)
class Publication:
    """A numbered version of the weights. `chunks` are uint8 arrays, or whatever a pool carries in their place."""

    manifest: Manifest
    chunks: tuple[Any, ...]

    @property
    def version(self) -> int:
        return self.manifest.version


def pack(tensors: Mapping[str, Tensor], version: int, kind: Literal["full", "delta"] = "full", base: str | None = None,
         chunk_bytes: int = CHUNK_BYTES) -> Publication:
    """Copy tensors into chunks of `chunk_bytes` (rounded up to ALIGNMENT; the last one may be shorter)."""
    if not tensors:
        raise PublicationError(f"version {version} holds no tensor: there is nothing to publish")
    chunk_bytes = _aligned(max(chunk_bytes, 1))
    entries, start = [], 0
    for name in sorted(tensors):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        entries.append(TensorEntry(name, _dtype(tensor), tuple(tensor.shape), start, size, 0))
        start += _aligned(size)
    chunks = [np.zeros(min(chunk_bytes, start - first), np.uint8) for first in range(0, start, chunk_bytes)]
    for number, entry in enumerate(entries):
        content = _content(tensors[entry.name])
        for chunk, inner, outer in _places(entry, chunk_bytes):
            chunks[chunk][inner] = content[outer]
        entries[number] = TensorEntry(entry.name, entry.dtype, entry.shape, entry.start, entry.size, _checksum(content))
    manifest = Manifest(version, kind, tuple(entries), tuple(len(c) for c in chunks), tuple(map(_checksum, chunks)),
                        _fingerprint(entries), base)
    return Publication(manifest, tuple(chunks))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Equal if and only if names, types, shapes and bytes are; that of no tensors is a fingerprint too."""
    return _fingerprint([TensorEntry(name, _dtype(tensors[name]), tuple(tensors[name].shape), 0, 0,
                                     _checksum(_content(tensors[name]))) for name in sorted(tensors)])


class WeightReceiver:
    """One worker's end: verifies a publication against its model, then copies it in.

    Args:
        model: of the worker's policy; its state dict must have the trainer's names.
        name: of the worker, for messages.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.version = -1  # nothing received yet
        self._base: tuple[frozenset[str], str] | None = None  # names left out of deltas, and their fingerprint

    def receive(self, manifest: Manifest, chunks: Sequence[np.ndarray]) -> None:
        """Load a publication. After an error the model is as it was before.

        Raises:
            PublicationError: a version not newer than the last, a chunk or tensor whose checksum differs, names or
                shapes that are not the model's, or a delta to another base.
        """
        if manifest.version <= self.version:
            raise self._error(manifest, f"it already has version {self.version}, and versions only grow")
        state = self.model.state_dict()
        self._check_chunks(manifest, chunks)
        self._check_names(manifest, state)
        for entry in manifest.tensors:
            if _checksum(_gather(entry, chunks, manifest)) != entry.checksum:
                raise self._error(manifest, f"the checksum of tensor '{entry.name}' differs from the manifest's")
        with torch.no_grad():
            for entry in manifest.tensors:
                if not entry.size:
                    continue
                state[entry.name].copy_(_tensor(entry, _gather(entry, chunks, manifest)))
        if manifest.kind == "full":
            self._base = None
        self.version = manifest.version

    def _check_chunks(self, manifest: Manifest, chunks: Sequence[np.ndarray]) -> None:
        if len(chunks) != len(manifest.chunk_sizes):
            raise self._error(manifest, f"{len(chunks)} chunks arrived of {len(manifest.chunk_sizes)}")
        start = 0
        for number, chunk in enumerate(chunks):
            size = manifest.chunk_sizes[number]
            if len(chunk) != size:
                raise self._error(manifest, f"chunk {number} has {len(chunk)} bytes of {size}")
            if _checksum(chunk) != manifest.chunk_checksums[number]:
                inside = [entry.name for entry in manifest.tensors
                          if entry.start < start + size and entry.start + entry.size > start]
                raise self._error(manifest, f"the checksum of chunk {number} differs from the manifest's; it holds "
                                            f"{_some(inside)}")
            start += size

    def _check_names(self, manifest: Manifest, state: Mapping[str, Tensor]) -> None:
        sent = {entry.name: entry for entry in manifest.tensors}
        unknown = sorted(sent.keys() - state.keys())
        if unknown:
            raise self._error(manifest, f"its model has no tensor {_some(unknown)}")
        rest = state.keys() - sent.keys()
        if manifest.kind == "full" and rest:
            raise self._error(manifest, f"tensor {_some(sorted(rest))} of its model is missing from a full publication")
        for name, entry in sent.items():
            if tuple(state[name].shape) != entry.shape:
                raise self._error(manifest, f"tensor '{name}' is {list(entry.shape)}, but {list(state[name].shape)} "
                                            f"in its model")
        if manifest.kind == "delta":
            if self._base is None or self._base[0] != rest:
                self._base = frozenset(rest), fingerprint({name: state[name] for name in rest})
            if self._base[1] != manifest.base:
                raise self._error(manifest, f"the {len(rest)} tensors that are not published (such as "
                                            f"{_some(sorted(rest))}) differ from the trainer's: it was built from "
                                            f"another policy, and a delta on it would be another model")

    def _error(self, manifest: Manifest, what: str) -> PublicationError:
        return PublicationError(f"version {manifest.version} was refused by {self.name}: {what}")


@dataclass(frozen=True)
class Probe:
    """What the trainer's weights say of a few recorded decisions, for a worker to say the same."""

    version: int
    trajectories: tuple[Trajectory, ...]
    expected_N: np.ndarray  # float32, the trainer's log-probs
    tolerance: float  # of the largest difference
    moved: bool  # the trainer's log-probs of these decisions differ from the last version's

    def check(self, worker: str, before_N: np.ndarray | None, after_N: np.ndarray) -> float:
        """The largest difference between the worker's log-probs after loading and the trainer's.

        Args:
            before_N: of the worker's last version; None where it had none.

        Raises:
            PublicationError: it is past the tolerance, or the trainer's moved and the worker's did not.
        """
        if after_N.shape != self.expected_N.shape:
            raise PublicationError(f"version {self.version} on {worker}: it scored {len(after_N)} decisions of the "
                                   f"probe where the trainer scored {len(self.expected_N)}")
        gap_N = np.nan_to_num(np.abs(after_N.astype(np.float64) - self.expected_N), nan=np.inf)
        gap = float(gap_N.max(initial=0.0))
        if gap > self.tolerance:
            n = int(gap_N.argmax())
            raise PublicationError(
                f"version {self.version} on {worker}: its log-probs differ from the trainer's by up to {gap:.3g} "
                f"(decision {n} of the probe: {after_N[n]:.6f}, trainer {self.expected_N[n]:.6f}), over the tolerance "
                f"of {self.tolerance:g}: other weights than the published ones are sampling there")
        if self.moved and before_N is not None and len(after_N) and np.array_equal(before_N, after_N):
            raise PublicationError(
                f"version {self.version} on {worker}: the weights changed, and the trainer's log-probs with them, but "
                f"the worker's are still those of its last version (largest difference to the trainer's: {gap:.3g}): "
                f"it did not take them up")
        return gap


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _content(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor(entry: TensorEntry, content: np.ndarray) -> Tensor:
    return torch.from_numpy(content).view(getattr(torch, entry.dtype)).reshape(entry.shape)


def _places(entry: TensorEntry, chunk_bytes: int) -> Iterable[tuple[int, slice, slice]]:
    """(chunk, slice of the chunk, slice of the tensor's bytes), in order."""
    at = entry.start
    while at < entry.start + entry.size:
        chunk, inner = divmod(at, chunk_bytes)
        size = min(chunk_bytes - inner, entry.start + entry.size - at)
        yield chunk, slice(inner, inner + size), slice(at - entry.start, at - entry.start + size)
        at += size


def _gather(entry: TensorEntry, chunks: Sequence[np.ndarray], manifest: Manifest) -> np.ndarray:
    """A copy of one tensor's bytes: it is writable and aligned, and the chunks are neither for sure."""
    content = np.empty(entry.size, np.uint8)
    for chunk, inner, outer in _places(entry, manifest.chunk_sizes[0]):
        content[outer] = chunks[chunk][inner]
    return content


def _fingerprint(entries: Iterable[TensorEntry]) -> str:
    digest = xxhash.xxh3_128()
    for entry in entries:
        digest.update(f"{entry.name}:{entry.dtype}:{entry.shape}:{entry.checksum};".encode())
    return digest.hexdigest()


def _checksum(content: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(content.data)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _some(names: Sequence[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
