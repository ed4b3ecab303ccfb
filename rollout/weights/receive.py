"""A writer's end of the line: new weights are taken whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rollout.weights.wire import Manifest, WeightSyncError, fingerprint, refusal, some

# Versions below 0 are no step's: the conformance gate rehearses with two publications before the first one that counts.
REHEARSAL, REHEARSAL_MOVED = -2, -1
UNPUBLISHED = -3  # the version of weights that a writer was built with


class WeightReceiver:
    """One writer's end: holds a publication to its model, then copies it in.

    Args:
        model: of the writer's policy; its state dict must have the trainer's names.
        name: of the writer, for messages.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.version = UNPUBLISHED
        self._base: tuple[frozenset[str], str] | None = None  # names left out of deltas, and their fingerprint

    def receive(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        """Load a publication (`unpack` has verified its bytes). After an error the model is as it was before.

        Raises:
            WeightSyncError: a version not newer than the last, names or shapes that are not the model's, or a delta to
                another base.
        """
        if manifest.version <= self.version:
            raise self._error(manifest, f"it already has version {self.version}, and versions only grow")
        state = self.model.state_dict()
        self._check_names(manifest, state)
        with torch.no_grad():
            for entry in manifest.tensors:
                if entry.size:
                    state[entry.name].copy_(tensors[entry.name])
        if manifest.kind == "full":
            self._base = None
        self.version = manifest.version

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
        return refusal(manifest, self.name, what)
