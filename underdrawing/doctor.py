"""`underdrawing doctor`: what works on this machine, and what to do about what doesn't.

Each check runs the real thing (a matrix product, a Ray actor, a torchvision operator) rather than reading versions.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from runtime.ray_cluster import ClusterError, start_ray
from underdrawing.lock import differing, find_lock, locked_versions

State = Literal["ok", "warning", "broken"]
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "ray",
    "wandb",
    "open_clip_torch",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` is empty where nothing needs doing."""

    name: str
    state: State
    what: str
    advice: str = ""


MENDS = {
    "torch": "pip install --force-reinstall torch torchvision",
    "GPU": "torch's CUDA build does not run on this driver: install the one for the CUDA that nvidia-smi names, or "
    "hide the GPU with CUDA_VISIBLE_DEVICES=",
    "torchvision": "torch and torchvision are of different builds: pip install --force-reinstall torch torchvision, "
    "both from one index",
}


def examine(ray: bool = True) -> list[Finding]:
    """Run every check. ray=False leaves out the one that starts processes (some seconds)."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("packages", _packages),
        ("lock", _lock),
        ("torch", _torch),
        ("GPU", _gpu),
        ("bf16", _bf16),
        ("torchvision", _torchvision),
        ("W&B", _wandb),
        ("memory", _memory),
        ("disk", _disk),
        ("loopback", _loopback),
    ]
    if ray:
        checks.append(("Ray", _ray))
    findings = []
    for name, check in checks:
        try:
            findings.append(check())
        except Exception as error:  # the report is the boundary: a broken check is a finding
            findings.append(
                Finding(
                    name,
                    "broken",
                    f"{type(error).__name__}: {error}",
                    MENDS.get(name, "a fault of this check: please report it with the message"),
                )
            )
    return findings


def print_findings(findings: list[Finding], console: Console | None = None) -> int:
    """Print the table; returns the exit code: 1 if something is broken."""
    table = Table(title="underdrawing doctor", title_justify="left", show_lines=False)
    table.add_column("")
    table.add_column("check", style="bold")
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "broken": "[red]✗[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.name, finding.what, finding.advice)
    (console or Console()).print(table)
    return 1 if any(f.state == "broken" for f in findings) else 0


def _packages() -> Finding:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", "broken", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Finding("packages", "ok", ", ".join(found))


def _lock() -> Finding:
    """Which packages are other than those that the project is tested with."""
    lock = find_lock()
    if lock is None:
        return Finding(
            "lock",
            "ok",
            "there is none: this is an installed package, whose versions are those that its installer chose; a "
            "checkout has requirements.lock, with those that are tested",
        )
    locked = locked_versions(lock)
    here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if not locked:
        return Finding("lock", "warning", f"{lock} has no versions for {here}", "use `make install-newest`")
    others = differing(locked)
    if not others:
        return Finding("lock", "ok", f"all {len(locked)} packages of {lock} are as locked")
    listed = "\n".join(map(str, others))
    return Finding(
        "lock",
        "warning",
        f"{len(others)} of {len(locked)} packages are not as in {lock}:\n{listed}",
        "`make install` installs what is locked",
    )


def _torch() -> Finding:
    import torch

    a = torch.randn(1024, 1024)
    a @ a
    begin = time.perf_counter()
    for _ in range(5):
        a @ a
    gflops = 5 * 2 * 1024**3 / (time.perf_counter() - begin) / 1e9
    return Finding(
        "torch",
        "ok",
        f"{torch.__version__}, {torch.get_num_threads()} threads, {gflops:.0f} GFLOP/s in fp32 on the CPU",
    )


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "warning", "none", "the shapes recipes run on the CPU; full-size models need a GPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    a = torch.randn(256, 256, device="cuda")
    (a @ a).sum().item()
    free, total = torch.cuda.mem_get_info()
    return Finding("GPU", "ok", f"{len(names)} x {names[0]}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")


def _bf16() -> Finding:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(256, 256, device=device).to(dtype)
        a @ a
        begin = time.perf_counter()
        (a @ a).float().sum().item()
        seconds[dtype] = time.perf_counter() - begin
    slower = seconds[torch.bfloat16] / max(seconds[torch.float32], 1e-9)
    if slower > 5:
        return Finding(
            "bf16",
            "warning",
            f"matrix products {slower:.0f} times slower than fp32 on this {device}",
            "set policy.dtype: float32",
        )
    return Finding("bf16", "ok", f"{slower:.1f} times the time of fp32 on this {device}")


def _torchvision() -> Finding:
    import torch
    import torchvision

    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    return Finding("torchvision", "ok", f"{torchvision.__version__}, operators match torch")


def _wandb() -> Finding:
    from training.wandb_mirror import wandb_login

    if wandb_login():
        return Finding("W&B", "ok", "a login was found; runs are mirrored online")
    return Finding(
        "W&B",
        "warning",
        "no login: runs are stored offline under run_dir/wandb",
        "`wandb login`, or `wandb sync <folder>` later",
    )


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    cores = os.cpu_count()
    state: State = "ok" if memory.available > 4 * 2**30 else "warning"
    return Finding(
        "memory",
        state,
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, {cores} cores",
        "" if state == "ok" else "the quickstart needs about 4 GiB",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 2:
        return Finding("disk", "broken", f"{free:.1f} GiB free here", "free some space: checkpoints need it")
    return Finding("disk", "ok", f"{free:.0f} GiB free here")


def _loopback() -> Finding:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return Finding("loopback", "ok", f"a free port was found ({port})")


def _ray() -> Finding:
    """As a run has it: the cluster that the environment names, or a local one."""
    began = time.perf_counter()
    try:
        cluster = start_ray(1, 80 * 2**20)
    except ClusterError as error:
        return Finding("Ray", "broken", str(error), "set rollout.workers: 0 to roll out in process")
    import ray

    where = "a local one" if cluster.folder is not None else f"the cluster at {os.environ.get('RAY_ADDRESS')}"
    try:
        answer = ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote(), timeout=60)
    except ray.exceptions.RayError as error:
        return Finding(
            "Ray",
            "broken",
            f"{ray.__version__}, {where} ran no task ({type(error).__name__}: {str(error).splitlines()[0]})",
            "set rollout.workers: 0 to roll out in process",
        )
    finally:
        cluster.stop()
    assert answer == 42
    return Finding("Ray", "ok", f"{ray.__version__}, {where}, a task ran in {time.perf_counter() - began:.1f} s")
