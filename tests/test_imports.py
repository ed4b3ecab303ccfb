"""The import lines of the house: one way, few, and cheap.

    underdrawing -> everything          the shell: recipes, commands, report
    rl           -> rewards, rollout, policy, tasks      evals -> rewards, rollout, policy, tasks
    rewards      -> policy, tasks, the start of Ray      sft   -> policy, tasks
    rollout      -> policy, tasks
    policy, tasks -> the record only

The record (rollout.errors, rollout.trajectory, rollout.formats, rollout.store, rollout.files) may be imported by all.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("underdrawing", "rl", "rewards", "rollout", "sft", "policy", "tasks", "evals")
RECORD = ("rollout.errors", "rollout.trajectory", "rollout.formats", "rollout.store", "rollout.files")
TRAINERS = ("underdrawing.tracking", "underdrawing.interrupt")  # leaves that both trainers stand on

# What each package may import besides itself and the record. A name covers the modules under it.
MAY_IMPORT = {
    "underdrawing": PACKAGES,
    "rl": ("rewards", "rollout", "policy", "tasks", *TRAINERS),
    "evals": ("rewards", "rollout", "policy", "tasks"),
    "sft": ("policy", "tasks", *TRAINERS),
    "rewards": ("policy", "tasks", "rollout.ray_cluster", "rollout.processes"),  # one Ray for all workers
    "rollout": ("policy", "tasks"),
    "policy": (),
    "tasks": (),
}
# Scripts that make something which is then committed: nothing imports them.
SCRIPTS = {"policy.chameleon.train_vq": ("tasks",)}
HEAVY = ("torch", "transformers", "ray", "trl", "peft", "accelerate", "wandb", "deepspeed")


def modules() -> dict[str, Path]:
    """Every module of our packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, functions included; `from a import b` gives a.b where b is a
    module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative imports hide where a name comes from"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if name in MODULES} or {node.module}
    return names


def covers(allowed: tuple[str, ...], name: str) -> bool:
    return any(name == one or name.startswith(one + ".") for one in allowed)


def fresh(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter at the repository's root; its output."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str):
    package = module.split(".")[0]
    allowed = (package, *RECORD, *MAY_IMPORT[package], *SCRIPTS.get(module, ()))
    for name in imports(MODULES[module]):
        if name.split(".")[0] in PACKAGES:
            assert covers(allowed, name), f"{module} imports {name}; {package} may import {allowed[1:]}"


@pytest.mark.parametrize("module", [m for m in MODULES if covers(RECORD, m)])
def test_the_record_imports_nothing_of_ours_but_itself(module: str):
    for name in imports(MODULES[module]):
        if name.split(".")[0] in PACKAGES:
            assert covers(RECORD, name), f"{module} imports {name}"
        assert name.split(".")[0] not in ("ray", "transformers", "trl"), f"{module} imports {name}"


def test_nobody_imports_what_drives():
    # rl and sft stand at the top, beside each other; only the shell starts them. Scripts are run, never imported.
    for module, path in MODULES.items():
        package = module.split(".")[0]
        for name in imports(path):
            if name.split(".")[0] in ("rl", "sft"):
                assert package in ("underdrawing", name.split(".")[0]), f"{module} imports {name}"
            assert not covers(tuple(SCRIPTS), name), f"{module} imports the script {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] == "tasks"])
def test_tasks_import_no_model(module: str):
    for name in imports(MODULES[module]):
        assert name.split(".")[0] not in ("policy", *HEAVY), f"{module} imports {name}"


@pytest.mark.parametrize("package", ["rollout", "rl"])
def test_the_top_of_rollout_and_rl_is_empty(package: str):
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_the_record_losses_and_advantages_start_neither_ray_nor_transformers():
    pure = ["rollout.errors", "rollout.trajectory", "rollout.store", "rl.losses", "rl.advantages",
            *(m for m in MODULES if covers(("rollout.formats",), m))]
    out = fresh(f"import sys, importlib\nfor m in {pure}: importlib.import_module(m)\n"
                "print([m for m in ('ray', 'transformers', 'trl') if m in sys.modules])")
    assert out.strip() == "[]"


def test_the_record_and_the_tasks_load_no_torch():
    light = ["rollout.errors", "rollout.trajectory", "rollout.store",
             *(m for m in MODULES if covers(("rollout.formats", "tasks"), m))]
    out = fresh(f"import sys, importlib\nfor m in {light}: importlib.import_module(m)\n"
                f"print([m for m in {HEAVY} if m in sys.modules])")
    assert out.strip() == "[]"


WATCHED = """
import builtins, importlib, socket, sys

def refuse(self, address, *rest):
    if not (isinstance(address, str) or address[0] in ("127.0.0.1", "::1")):
        raise AssertionError(f"the network was opened: {address}")
    return real(self, address, *rest)

real, socket.socket.connect, socket.socket.connect_ex = socket.socket.connect, refuse, refuse
def no_name(*arguments, **rest): raise AssertionError(f"a name was looked up: {arguments}")
socket.getaddrinfo = no_name

import io, os
plain = io.open
def opened(file, *arguments, **rest):
    if str(file).endswith((".safetensors", ".pt", ".bin", ".ckpt")):
        raise AssertionError(f"weights were loaded: {file}")
    return plain(file, *arguments, **rest)
builtins.open = io.open = opened
import safetensors, safetensors.torch
def no_weights(path, *arguments, **rest): raise AssertionError(f"weights were loaded: {path}")
for place in (safetensors, safetensors.torch):
    place.safe_open = no_weights
safetensors.torch.load_file = no_weights

for module in MODULES:
    importlib.import_module(module)
if "ray" in sys.modules:
    import ray
    assert not ray.is_initialized(), "an import started Ray"
print(len(MODULES))
"""


def test_importing_anything_opens_no_network_starts_no_ray_and_loads_no_weights():
    names = [m for m in MODULES if not m.endswith("__main__")]
    out = fresh(f"MODULES = {names}\n{WATCHED}", WANDB_MODE="disabled")
    assert int(out.split()[-1]) == len(names)


@pytest.mark.parametrize("deed, word", [
    ("import safetensors.torch as s; s.load_file('x.safetensors')", "weights were loaded"),
    ("open('x.pt', 'rb')", "weights were loaded"),
    ("import socket; socket.create_connection(('192.0.2.1', 80))", "a name was looked up"),
    ("import socket; socket.socket().connect(('192.0.2.1', 80))", "the network was opened"),
])
def test_the_watch_sees(tmp_path, deed: str, word: str):
    (tmp_path / "naughty.py").write_text(deed)
    with pytest.raises(AssertionError, match=word):
        fresh(f"MODULES = ['naughty']\n{WATCHED}", PYTHONPATH=str(tmp_path))
