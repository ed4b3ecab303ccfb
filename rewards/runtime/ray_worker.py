"""What scores in a Ray actor, which may be on another machine and hold a share of a GPU; isolate.py is its like here.

A call that takes too long ends its actor: where it stands is asked first (the actor writes its stack down when
signalled), and the next call starts a fresh one. Ray is imported when a worker starts, never earlier.
"""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import dataclass
from typing import Any

from rewards.contract import RewardError
from rewards.runtime.serving import CallFailed, Server, Worker, read
from runtime.actor_process import ActorProcess, TraceableActor, end_actor
from runtime.output import LIMIT, cap_own_output, dropped_sentence, reached_sentence
from runtime.ray_cluster import check_alive

logger = logging.getLogger(__name__)
LOOK_S = 0.5  # how often a waiting call looks whether it was closed


class RewardActor(TraceableActor):
    """A Server with a process to itself. Messages and answers are pickles, because arrays that Ray unpacks itself are
    read-only and hold on to its shared memory."""

    def __init__(self) -> None:
        super().__init__()
        self._dropped = cap_own_output()
        self._server = Server()

    def answer(self, message: bytes) -> tuple[bytes, int]:
        """The Server's answer, and how many bytes that were printed have been dropped so far."""
        try:
            answer = pickle.dumps(self._server.answer(pickle.loads(message)), protocol=5)
        except Exception as error:  # what it returned does not pickle
            answer = pickle.dumps(("raised", (f"{type(error).__name__}: {error}", "")))
        return answer, self._dropped()


@dataclass
class RayWorker(Worker):
    """A spec loaded in a Ray actor."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._actor: Any = None
        self._process: ActorProcess | None = None
        self._dropped = 0  # bytes of output, by the actor that runs
        self._dropped_before = 0  # by those before it

    def close(self) -> None:
        super().close()
        if self._dropped_before:
            logger.warning("%s", dropped_sentence(f"reward '{self.spec.name}'", LIMIT, self._dropped_before))
            self._dropped_before = 0

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def _running(self) -> bool:
        return self._actor is not None

    def _launch(self) -> None:
        import ray

        check_alive()
        there = ray.cluster_resources()
        for name, asked in (("CPU", self.num_cpus), ("GPU", self.num_gpus)):
            if asked > there.get(name, 0.0):
                raise RewardError(
                    f"'{self.spec.name}': each Ray worker asks for {asked:g} {name}, and the whole "
                    f"cluster has {there.get(name, 0.0):g}; ask for less, or give it more"
                )
        self._actor = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_restarts=0)(RewardActor).remote()
        self._process = ActorProcess(
            *self._wait(
                self._actor.about.remote(),
                self.load_timeout_s,
                f"waiting for {self.num_cpus:g} CPU and {self.num_gpus:g} GPU of the Ray cluster",
            )
        )

    def _exchange(self, message: tuple[Any, ...], timeout_s: float, what: str) -> Any:
        packed = pickle.dumps(message, protocol=5)
        answer, dropped = self._wait(self._actor.answer.remote(packed), timeout_s, what)
        if dropped and not self._dropped + self._dropped_before:
            logger.warning("%s", reached_sentence(f"reward '{self.spec.name}'", LIMIT))
        self._dropped = dropped
        return read(pickle.loads(answer))

    def _wait(self, reference: Any, timeout_s: float, what: str) -> Any:
        import ray

        until = time.monotonic() + timeout_s
        while True:
            left = until - time.monotonic()
            if self._closed:
                self._drop()
                raise CallFailed("crash", "the judge was closed")
            if left <= 0:
                stack = self._process.stack() if self._process is not None else ""
                self._drop()
                raise CallFailed("timeout", f"{what} took longer than {timeout_s:g} s and was stopped", stack)
            check_alive()
            if ray.wait([reference], timeout=min(left, LOOK_S))[0]:
                break
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            ended = next((line for line in str(error).splitlines() if "because" in line), str(error))
            self._drop()
            check_alive(lost=True)
            raise CallFailed(
                "crash", f"its Ray actor ended during {what}: {ended.split(' Some common causes')[0].strip()}"
            ) from None

    def _drop(self) -> None:
        actor, self._actor = self._actor, None
        process, self._process = self._process, None
        self._dropped, self._dropped_before = 0, self._dropped_before + self._dropped
        end_actor(actor, process)
