"""A detector that runs in workers (`rewards.detector_workers`), for the parts that stand in the driver.

Images go out in batches over all workers at once; what comes back is in their order. serving.py has the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewards.detectors.base import Detections
from rewards.runtime.serving import CallFailed
from rewards.runtime.workers import Executor


class ServedDetector:
    """A Detector over workers. `introduce` must be called once they are started.

    A call that hangs, or crashes twice, raises CallFailed in the part that asked, which is tried again as the recipe
    says; the worker is a fresh one by then.
    """

    def __init__(self, workers: Sequence[Any], batch_size: int | None) -> None:
        self.workers, self.batch_size = list(workers), batch_size
        self._lane = Executor("detector", self.workers)
        self.classes: tuple[str, ...] = ()
        self.open_vocabulary = False
        self.sees_colors = True
        self.colors: tuple[str, ...] = ()
        self.sizes: tuple[str, ...] = ()

    def introduce(self) -> None:
        """Ask a worker what the detector is."""
        about = self.workers[0]("about")
        self.classes, self.open_vocabulary = about["classes"], about["open_vocabulary"]
        self.sees_colors, self.colors, self.sizes = about["sees_colors"], about["colors"], about["sizes"]
        if "name_colors" in about["has"]:  # CachedDetector looks for the member
            self.name_colors = self._name_colors
        if "require_colors" in about["has"]:
            self.require_colors = self._require_colors

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        return self._spread("detect", images)

    def detect_phrases(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        return self._spread("detect_phrases", images, phrases)

    def close(self) -> None:
        self._lane.stop()
        for worker in self.workers:  # a call that it is in ends with it
            worker.close()
        self._lane.close()

    def _name_colors(self, images: Sequence[np.ndarray], objects: Sequence[Any]) -> list[Any]:
        return self._spread("name_colors", images, objects)

    def _require_colors(self, where: str) -> None:
        for worker in self.workers:  # each loads what names colors
            worker("require_colors", where)

    def _spread(self, member: str, *columns: Sequence[Any]) -> list[Any]:
        """Call a member on batches of rows, and put the answers together."""
        rows = len(columns[0])
        each = self.batch_size or max(1, -(-rows // len(self.workers)))
        waiting = [
            self._lane.submit(_job(member, [list(column[at : at + each]) for column in columns]))
            for at in range(0, rows, each)
        ]
        try:
            return [answer for future in waiting for answer in future.result()]
        except BaseException:
            for future in waiting:
                future.cancel()
            raise


def _job(member: str, columns: list[list[Any]]) -> Callable[[Any], Any]:
    def job(worker: Any) -> Any:
        try:
            return worker(member, *columns)
        except CallFailed as failure:
            if failure.kind != "crash":
                raise
            return worker(member, *columns)  # it may have died long ago, which is only seen now; this one is fresh

    return job
