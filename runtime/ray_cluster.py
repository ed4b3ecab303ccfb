"""Starts Ray for the workers of rollouts and rewards, or joins a cluster that is there. Whoever asks first starts it.

A local one keeps to the loopback interface, writes to a folder of its own and has no dashboard; all its processes bear
a mark, by which they are ended with it. A cluster is joined where the environment's RAY_ADDRESS names one. `import ray`
happens here, inside functions, and nowhere earlier.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.interrupt import STOPS, Stop
from runtime.processes import MARK, bearing, end_tree, guard, how_it_ended, lives, new_mark

logger = logging.getLogger(__name__)

# Ray adds about 60 characters to its folder for its sockets, whose paths Linux limits to 107.
LONGEST_FOLDER = 45
PREFIX = "ud-ray-"
ATTEMPTS = 4
OLD_STACKS = "ud-stack-*"  # files that a worker's stack was written to in release 0.1
DEAF = {signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM}
WITHOUT = "Set rollout.workers: 0 to roll out in this process, and see `underdrawing doctor`"
HEAD_TIMEOUT_S = 20.0  # for the head of a cluster to accept a connection

SERVERS = ("gcs_server", "raylet")  # without either of them a local Ray does nothing more
LOOK_S = 5.0  # between looks at the nodes of a cluster that was joined
STALE_S = 86_400.0  # age from which a file without an owner's number is a killed run's


@dataclass(frozen=True)
class _Local:
    """The Ray that this program runs."""

    folder: Path
    mark: str  # in the environment of its processes
    servers: dict[str, Any]  # psutil.Process by name
    processes: set[Any]  # psutil.Process of all that ran at the start
    guard: subprocess.Popen[bytes]


_local: _Local | None = None
_looked = 0.0  # when the nodes of a joined cluster were last looked at


class ClusterError(UserError):
    """Ray cannot be had, or is gone. Every message says that `rollout.workers: 0` does without it."""


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
        """End a Ray that this call started, with every process of it, and remove its folder. Idempotent."""
        if self.ours and _local is not None and _local.folder == self.folder:
            stop_ray()


def stop_ray() -> None:
    """End the Ray that this program runs, whoever of it started it. Does nothing where there is none."""
    global _local
    local = _local
    if local is None:
        return
    try:
        _shut_down(local.mark, local.processes | bearing(local.mark))
    finally:
        shutil.rmtree(local.folder, ignore_errors=True)
        _local = None
        _dismiss(local.guard)


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    guard.kill()
    guard.wait()


def check_alive(lost: bool = False) -> None:
    """Whether this process's node of Ray lives. Ask before Ray is waited for: it would wait for minutes, or end this
    process. Costs microseconds.

    Args:
        lost: a process of Ray's has just been lost. A node that ends itself is known to be dead before its server is
            gone, so that is asked as well.

    Raises:
        ClusterError: it does not; nothing that was put there can be had any more.
    """
    if _local is None:
        return _check_joined(lost)
    for name in SERVERS:
        server = _local.servers.get(name)
        if server is not None and not lives(server):
            why = _why(name, server.pid)
            raise ClusterError(f"Ray is gone: its {name} (process {server.pid}) has ended, {why}. {WITHOUT}")
    if lost:
        _check_node()


def _check_joined(at_once: bool) -> None:
    global _looked
    import ray

    if ray.is_initialized() and (at_once or time.monotonic() - _looked >= LOOK_S):
        _looked = time.monotonic()
        _check_node()


def _check_node() -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == here and not node["Alive"]:
            why = (node.get("DeathReasonMessage") or "no reason is given").rstrip(".")
            raise ClusterError(f"Ray is gone: this machine's node of it is dead ({why}). {WITHOUT}")


def _why(name: str, pid: int) -> str:
    """What is known of a server's end."""
    import ray

    reason = how_it_ended(pid)
    if name == "raylet" and reason.startswith("exit code"):  # it left by itself, and the other server knows why
        told = next((node.get("DeathReasonMessage") for node in ray.nodes() if not node["Alive"]), "")
        reason += f" ({told})" if told else ""
    return reason


def start_ray(cpus: int, object_store_bytes: int | None = None) -> Cluster:
    """A Ray with room for `cpus` CPUs' worth of workers (counted, not bound: more than the machine has is allowed).

    Args:
        object_store_bytes: shared memory for publications and trajectories; None: Ray's default.

    Raises:
        ClusterError: it did not start, or the cluster at RAY_ADDRESS did not answer.
    """
    global _local
    # Otherwise it would listen on the machine's public address, whatever address it is given. Named for two
    # systems, it holds on all.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    late = "ray" in sys.modules
    import ray

    if ray.is_initialized():
        check_alive()
        return Cluster(_local.folder if _local is not None else None)
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        return _join(address)
    if late:  # the variable is read when Ray is imported
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = False
    _check_port()
    for attempt in range(1, ATTEMPTS + 1):
        folder, mark = _folder(), new_mark()
        watching = guard(mark, folder)
        try:
            with _own_handlers(), _marked(mark):
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
            _local = _Local(folder, mark, _servers(mark), bearing(mark), watching)
            return Cluster(folder, ours=True)
        except BaseException as error:
            try:
                _shut_down(mark, bearing(mark))
            finally:
                _dismiss(watching)
            # Ray raises anything from ValueError to RpcError here, and gives a loaded machine no more than 30 s.
            again = isinstance(error, Exception) and "timed out" in str(error) and attempt < ATTEMPTS
            if again or not isinstance(error, Exception):  # the latter is a signal
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            if again:
                logger.warning("Ray did not start in time; trying again (%d of %d)", attempt + 1, ATTEMPTS)
                continue
            raise ClusterError(
                f"Ray did not start: {_first_line(error)} (logs: {folder}/session_latest/logs). {WITHOUT}"
            ) from error
    raise AssertionError("unreachable")


@contextmanager
def _marked(mark: str) -> Iterator[None]:
    """Within it started processes bear the mark, and are deaf to what a batch system sends to all processes of a job:
    it is the driver's to obey, which needs them to finish its step and ends them by SIGKILL."""
    inherited, blocked = os.environ.get(MARK), signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        if inherited is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = inherited
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Ray's handler of SIGTERM, which leaves whatever it interrupts, is put off again; inside it is a Stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise Stop(signal.SIGTERM) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _shut_down(mark: str, processes: set[Any]) -> None:
    """End the processes, all others that bear the mark, and what this one has of Ray, if it has.

    Ray's own library takes this program's handlers of signals off, SIGTERM's too, before it waits for its processes to
    end: one that came then would end this program in the middle of it.
    """
    import ray

    numbers = [number for number in STOPS if signal.getsignal(number) is not None]
    handlers = {number: signal.getsignal(number) for number in numbers}

    def put_back() -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    node: Any = getattr(getattr(ray._private, "worker", None), "_global_node", None)
    end_processes = getattr(node, "kill_all_processes", None)
    if end_processes is not None:

        def kill_all_processes(*args: Any, **kwargs: Any) -> Any:
            put_back()
            end_tree(None, mark, processes)  # they do not hear its SIGTERM
            return end_processes(*args, **kwargs)

        node.kill_all_processes = kill_all_processes
    try:
        if ray.is_initialized():
            ray.shutdown()  # without its server it takes seconds, and its agents stay
    finally:
        put_back()
        end_tree(None, mark, processes)


def _servers(mark: str) -> dict[str, Any]:
    import psutil

    found = {}
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() in SERVERS and child.environ().get(MARK) == mark:
                found[child.name()] = child
    return found


def _join(address: str) -> Cluster:
    import ray

    try:
        _check_head(address)
        with _own_handlers():
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
    """Remove what our earlier runs left that were killed before they could."""
    for folder in parent.glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and folder.stat().st_uid == os.getuid() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    for file in parent.glob(OLD_STACKS):
        with suppress(OSError):
            if file.stat().st_uid == os.getuid() and time.time() - file.stat().st_mtime > STALE_S:
                file.unlink()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
