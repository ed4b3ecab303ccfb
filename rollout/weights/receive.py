"""A writer's end of the line: new weights are taken whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rollout.weights.wire import Manifest, WeightSyncError, checksum, fingerprint, gather, some, tensor_of

UNPUBLISHED = -1  # the version of weights that a writer was built with


class WeightReceiver:
    """One worker's end: verifies a publication against its model, then copies it in.

    Args:
        model: of the worker's policy; its state dict must have the trainer's names.
        name: of the worker, for messages.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.version = UNPUBLISHED
        self._base: tuple[frozenset[str], str] | None = None  # names left out of deltas, and their fingerprint

    def receive(self, manifest: Manifest, chunks: Sequence[np.ndarray]) -> None:
        """Load a publication. After an error the model is as it was before.

        Raises:
            WeightSyncError: a version not newer than the last, a chunk or tensor whose checksum differs, names or
                shapes that are not the model's, or a delta to another base.
        """
        if manifest.version <= self.version:
            raise self._error(manifest, f"it already has version {self.version}, and versions only grow")
        state = self.model.state_dict()
        self._check_chunks(manifest, chunks)
        self._check_names(manifest, state)
        for entry in manifest.tensors:
            if checksum(gather(entry, chunks, manifest)) != entry.checksum:
                raise self._error(manifest, f"the checksum of tensor '{entry.name}' differs from the manifest's")
        with torch.no_grad():
            for entry in manifest.tensors:
                if not entry.size:
                    continue
                state[entry.name].copy_(tensor_of(entry, gather(entry, chunks, manifest)))
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
            if checksum(chunk) != manifest.chunk_checksums[number]:
                inside = [
                    entry.name
                    for entry in manifest.tensors
                    if entry.start < start + size and entry.start + entry.size > start
                ]
                raise self._error(
                    manifest, f"the checksum of chunk {number} differs from the manifest's; it holds {some(inside)}"
                )
            start += size

    def _check_names(self, manifest: Manifest, state: Mapping[str, Tensor]) -> None:
        sent = {entry.name: entry for entry in manifest.tensors}
        unknown = sorted(sent.keys() - state.keys())
        if unknown:
            raise self._error(manifest, f"its model has no tensor {some(unknown)}")
        rest = state.keys() - sent.keys()
        if manifest.kind == "full" and rest:
            raise self._error(manifest, f"tensor {some(sorted(rest))} of its model is missing from a full publication")
        for name, entry in sent.items():
            if tuple(state[name].shape) != entry.shape:
                raise self._error(
                    manifest, f"tensor '{name}' is {list(entry.shape)}, but {list(state[name].shape)} in its model"
                )
        if manifest.kind == "delta":
            if self._base is None or self._base[0] != rest:
                self._base = frozenset(rest), fingerprint({name: state[name] for name in rest})
            if self._base[1] != manifest.base:
                raise self._error(
                    manifest,
                    f"the {len(rest)} tensors that are not published (such as "
                    f"{some(sorted(rest))}) differ from the trainer's: it was built from "
                    f"another policy, and a delta on it would be another model",
                )

    def _error(self, manifest: Manifest, what: str) -> WeightSyncError:
        return WeightSyncError(f"version {manifest.version} was refused by {self.name}: {what}")
