"""Weights on the wire: tensors become checksummed chunks and a manifest, and a model takes them whole or not at all.

rl/weight_sync.py packs; a pool carries the chunks to its writers, unpacks them there, and has each answer a Probe,
which proves that what arrived is what now samples. Knows neither Ray nor trainers.

The tensors lie one after another in one stream of bytes, each beginning at a multiple of ALIGNMENT; the stream is cut
into chunks of equal size, so that a tensor larger than a chunk spans several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from runtime.errors import UserError

ALIGNMENT = 64
CHUNK_BYTES = 64 * 2**20


class WeightSyncError(UserError):
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
class WeightUpdate:
    """A numbered version of the weights. `chunks` are uint8 arrays, or whatever a pool carries in their place."""

    manifest: Manifest
    chunks: tuple[Any, ...]

    @property
    def version(self) -> int:
        return self.manifest.version


def pack(
    tensors: Mapping[str, Tensor],
    version: int,
    kind: Literal["full", "delta"] = "full",
    base: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> WeightUpdate:
    """Copy tensors into chunks of `chunk_bytes` (rounded up to ALIGNMENT; the last one may be shorter)."""
    if not tensors:
        raise WeightSyncError(f"version {version} holds no tensor: there is nothing to publish")
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
        entries[number] = TensorEntry(entry.name, entry.dtype, entry.shape, entry.start, entry.size, checksum(content))
    manifest = Manifest(
        version,
        kind,
        tuple(entries),
        tuple(len(c) for c in chunks),
        tuple(map(checksum, chunks)),
        _fingerprint(entries),
        base,
    )
    return WeightUpdate(manifest, tuple(chunks))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Equal if and only if names, types, shapes and bytes are; that of no tensors is a fingerprint too."""
    return _fingerprint(
        [
            TensorEntry(
                name, _dtype(tensors[name]), tuple(tensors[name].shape), 0, 0, checksum(_content(tensors[name]))
            )
            for name in sorted(tensors)
        ]
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _content(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tensor_of(entry: TensorEntry, content: np.ndarray) -> Tensor:
    return torch.from_numpy(content).view(getattr(torch, entry.dtype)).reshape(entry.shape)


def _places(entry: TensorEntry, chunk_bytes: int) -> Iterable[tuple[int, slice, slice]]:
    """(chunk, slice of the chunk, slice of the tensor's bytes), in order."""
    at = entry.start
    while at < entry.start + entry.size:
        chunk, inner = divmod(at, chunk_bytes)
        size = min(chunk_bytes - inner, entry.start + entry.size - at)
        yield chunk, slice(inner, inner + size), slice(at - entry.start, at - entry.start + size)
        at += size


def gather(entry: TensorEntry, chunks: Sequence[np.ndarray], manifest: Manifest) -> np.ndarray:
    """A copy of one tensor's bytes: it is writable and aligned, and the chunks are neither for sure."""
    content = np.empty(entry.size, np.uint8)
    for chunk, inner, outer in _places(entry, manifest.chunk_sizes[0]):
        content[outer] = chunks[chunk][inner]
    return content


class UnpackedTensors(Mapping[str, Tensor]):
    """The tensors of a publication by name, each copied out of the chunks when it is asked for."""

    def __init__(self, manifest: Manifest, chunks: Sequence[np.ndarray]) -> None:
        self.manifest, self._chunks = manifest, chunks
        self._entries = {entry.name: entry for entry in manifest.tensors}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return tensor_of(entry, gather(entry, self._chunks, self.manifest))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def unpack(manifest: Manifest, chunks: Sequence[np.ndarray], name: str) -> UnpackedTensors:
    """What arrived, once every checksum is the manifest's.

    Args:
        name: of who received it, for the message.

    Raises:
        WeightSyncError: a chunk is missing or altered, or a tensor lies elsewhere than the manifest says.
    """
    if len(chunks) != len(manifest.chunk_sizes):
        raise refusal(manifest, name, f"{len(chunks)} chunks arrived of {len(manifest.chunk_sizes)}")
    start = 0
    for number, chunk in enumerate(chunks):
        size = manifest.chunk_sizes[number]
        if len(chunk) != size:
            raise refusal(manifest, name, f"chunk {number} has {len(chunk)} bytes of {size}")
        if checksum(chunk) != manifest.chunk_checksums[number]:
            inside = [e.name for e in manifest.tensors if e.start < start + size and e.start + e.size > start]
            raise refusal(
                manifest, name, f"the checksum of chunk {number} differs from the manifest's; it holds {some(inside)}"
            )
        start += size
    for entry in manifest.tensors:
        if checksum(gather(entry, chunks, manifest)) != entry.checksum:
            raise refusal(manifest, name, f"the checksum of tensor '{entry.name}' differs from the manifest's")
    return UnpackedTensors(manifest, chunks)


def refusal(manifest: Manifest, name: str, what: str) -> WeightSyncError:
    """Why a publication was not taken."""
    return WeightSyncError(f"version {manifest.version} was refused by {name}: {what}")


def _fingerprint(entries: Iterable[TensorEntry]) -> str:
    digest = xxhash.xxh3_128()
    for entry in entries:
        digest.update(f"{entry.name}:{entry.dtype}:{entry.shape}:{entry.checksum};".encode())
    return digest.hexdigest()


def checksum(content: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(content.data)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def some(names: Sequence[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
