"""Starts Ray for the workers of rollouts and rewards, or joins a cluster that is there. Whoever asks first starts it.

A local one keeps to the loopback interface, writes to a folder of its own and has no dashboard. A cluster is joined
where the environment's RAY_ADDRESS names one. `import ray` happens here, inside functions, and nowhere earlier.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

logger = logging.getLogger(__name__)

# Ray adds about 60 characters to its folder for its sockets, whose paths Linux limits to 107.
LONGEST_FOLDER = 45
PREFIX = "ud-ray-"
ATTEMPTS = 4
HEAD_TIMEOUT_S = 20.0  # for the head of a cluster to accept a connection

_started: set[Path] = set()  # folder of the Ray that this program runs, if it does


class ClusterError(UserError):
    """Ray cannot be had. Every message says that `rollout.workers: 0` does without it."""


@dataclass(frozen=True)
class Cluster:
    """What was started or joined."""

    folder: Path | None  # where a local one writes; None: a cluster that this program did not start
    ours: bool = False  # started by this call, so it is this call's to stop

    def log_tail(self, pid: int, lines: int = 12) -> str:
        """The last lines that a worker process wrote to stderr; empty where that cannot be known."""
        if self.folder is None:
            return ""
        for file in self.folder.glob(f"session_latest/logs/worker-*-{pid}.err"):
            written = file.read_text(errors="replace").strip().splitlines()
            return "\n".join(line for line in written[-lines:] if not line.startswith(":"))
        return ""

    def stop(self) -> None:
        if self.ours and self.folder is not None:
            import ray

            ray.shutdown()
            _started.discard(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)


def start_ray(cpus: int, object_store_bytes: int | None = None) -> Cluster:
    """A Ray with room for `cpus` CPUs' worth of workers (counted, not bound: more than the machine has is allowed).

    Args:
        object_store_bytes: shared memory for publications and trajectories; None: Ray's default.

    Raises:
        ClusterError: it did not start, or the cluster at RAY_ADDRESS did not answer.
    """
    # Otherwise it would listen on the machine's public address, whatever address it is given. Named for two
    # systems, it holds on all.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    late = "ray" in sys.modules
    import ray

    if ray.is_initialized():
        return Cluster(next(iter(_started), None))
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        return _join(address)
    if late:  # the variable is read when Ray is imported
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = False
    _check_port()
    for attempt in range(1, ATTEMPTS + 1):
        folder = _folder()
        try:
            ray.init(
                address="local",
                num_cpus=max(cpus, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
                ignore_reinit_error=True,
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
            )
            _started.add(folder)
            return Cluster(folder, ours=True)
        except BaseException as error:
            _end_processes(folder)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            # Ray raises anything from ValueError to RpcError here, and gives a loaded machine no more than 30 s.
            if "timed out" in str(error) and attempt < ATTEMPTS:
                logger.warning("Ray did not start in time; trying again (%d of %d)", attempt + 1, ATTEMPTS)
                shutil.rmtree(folder, ignore_errors=True)
                continue
            raise ClusterError(
                f"Ray did not start: {_first_line(error)} (logs: {folder}/session_latest/logs). Set "
                "rollout.workers: 0 to roll out in this process, and see `underdrawing doctor`"
            ) from error
    raise AssertionError("unreachable")


def _end_processes(folder: Path) -> None:
    """What a start that failed half-way left running: children of ours that name its folder."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            if any(str(folder) in word for word in child.cmdline()):
                child.kill()
        except psutil.Error:
            pass  # it has ended by itself


def _join(address: str) -> Cluster:
    import ray

    try:
        _check_head(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {_first_line(error)}. Unset it to "
            "start a local one, or set rollout.workers: 0 to roll out in this process"
        ) from error
    logger.info("joined the Ray cluster at %s", address)
    return Cluster(None)


def _check_head(address: str) -> None:
    """Raises OSError where nothing listens at host:port; Ray would try for minutes. It reads other addresses itself."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_TIMEOUT_S).close()


def _check_port() -> None:
    """Ray waits half a minute before it says so itself."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        raise ClusterError(
            f"Ray finds no free port on 127.0.0.1 ({error.strerror}). End programs that hold ports, or "
            "set rollout.workers: 0 to roll out in this process"
        ) from error


def _folder() -> Path:
    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_FOLDER - len(f"/{PREFIX}1234567-12345678"):
        parent = "/tmp"
    try:
        _sweep(Path(parent))
        return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
    except OSError as error:
        raise ClusterError(
            f"Ray needs a folder for its sockets, and {parent} takes none ({error.strerror}). Set "
            "TMPDIR to a short path, or rollout.workers: 0 to roll out in this process"
        ) from error


def _sweep(parent: Path) -> None:
    """Remove the folders of our earlier runs that were killed before they could."""
    for folder in parent.glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and folder.stat().st_uid == os.getuid() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
