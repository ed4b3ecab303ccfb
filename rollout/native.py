"""The native writer: an engine over a policy of this process, and its end of the weights' way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from formats.config import FormatConfig
from policy.base import Policy
from policy.config import PolicyConfig
from policy.registry import load_policy
from record.trajectory import Trajectory
from rollout.capabilities import Capabilities
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from rollout.tools.registry import Tools
from rollout.weights.receive import WeightReceiver
from rollout.weights.wire import Manifest
from rollout.writer import Writer


class NativeWriter:
    """An engine as a Writer (writer.py). It scores with the policy's own `score`, so it is exact."""

    exact = True
    capabilities = Capabilities()

    def __init__(self, engine: Engine, name: str = "the writer in this process") -> None:
        self.engine = engine
        engine.policy.model.eval()
        self.receiver = WeightReceiver(engine.policy.model, name)
        self._writing = self._asleep = False

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def name(self) -> str:
        return self.receiver.name

    @name.setter
    def name(self, name: str) -> None:
        self.receiver.name = name

    @property
    def version(self) -> int:
        return self.receiver.version

    @version.setter
    def version(self, version: int) -> None:
        self.receiver.version = self.engine.version = version

    def stream(self, requests: Sequence[RolloutRequest]) -> Iterator[Trajectory]:
        if self._asleep:
            raise RuntimeError(f"{self.name} sleeps: wake() comes before stream()")
        self._writing = True
        try:
            yield from self.engine.stream(requests)
        finally:
            self._writing = False

    def take(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        """The engine's next call prefills every row anew, so no keys or values of the old weights live on."""
        self.receiver.receive(manifest, tensors)
        self.engine.version = manifest.version

    def logprobs(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        with torch.no_grad():  # a pass at a time: what fits a rollout need not fit in one forward
            scored = [self.policy.score([one]).logprob_N.float().cpu() for one in self.policy.passes(trajectories)]
        return torch.cat(scored).numpy().copy() if scored else np.empty(0, np.float32)

    def sleep(self) -> None:
        """The cache goes. The weights stay: where they are the trainer's own there is no copy to put away."""
        if self._writing:
            raise RuntimeError(f"{self.name} is writing: its stream is read to the end or closed before it sleeps")
        self.engine.free_cache()
        self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self.engine.restore_cache()
        self._asleep = False

    def stats(self) -> dict[str, float]:
        return self.engine.stats.counts()

    def shares(self, policy: Policy) -> bool:
        return self.policy is policy

    def close(self) -> None:
        """End the tools, and give the cache back."""
        self.engine.close()
        self.engine.free_cache()


def native(
    policy: PolicyConfig, fmt: FormatConfig, rollout: RolloutConfig, words: Sequence[str], tools: Tools | None = None
) -> NativeWriter:
    """The native writer of a recipe's sections, with a policy of its own."""
    return NativeWriter(Engine(load_policy(policy, words), fmt.build(), rollout, fmt.constrain, tools))


def as_writer(made: Engine | Writer) -> Writer:
    """An engine is what the native writer is made of."""
    return NativeWriter(made) if isinstance(made, Engine) else made
