"""The import lines of the house: down the list of packages, never up, never in a circle, and cheap."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.test_compare import write as write_evaluation

ROOT = Path(__file__).parent.parent
# The house (docs/architecture.md), from the top down: a package imports itself and what stands below it.
PACKAGES = (
    "underdrawing",
    "rl",
    "sft",
    "evals",
    "training",
    "rewards",
    "rollout",
    "tasks",
    "policy",
    "formats",
    "record",
    "runtime",
)
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


def ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def fresh(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter at the repository's root; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str):
    package = module.split(".")[0]
    below = PACKAGES[PACKAGES.index(package) :]
    for name in imports(MODULES[module]):
        assert not ours(name) or name.split(".")[0] in below, f"{module} imports {name}, which stands above {package}"


def test_no_circle_of_modules():
    assert_no_circle({module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_folders(package: str):
    """A package's folders are rooms too: what stands in one imports another's one way only."""

    def room(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2]) if (ROOT.joinpath(*parts[:2])).is_dir() else module

    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if module.split(".")[0] == package:
            inside = {room(name) for name in imports(path) if name in MODULES and name.split(".")[0] == package}
            graph.setdefault(room(module), set()).update(inside - {room(module)})
    assert_no_circle(graph)


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_circle_is_seen():
    with pytest.raises(pytest.fail.Exception, match="b imports a imports b|a imports b imports a"):
        assert_no_circle({"a": {"b"}, "b": {"a"}})


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] in ("record", "runtime", "formats")])
def test_the_ground_floor_imports_no_framework(module: str):
    for name in imports(MODULES[module]):
        light = ("torch", "transformers", "trl") if module == "runtime.ray_cluster" or "actor" in module else HEAVY
        assert name.split(".")[0] not in light, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] == "tasks"])
def test_tasks_import_no_model(module: str):
    for name in imports(MODULES[module]):
        assert name.split(".")[0] not in ("policy", *HEAVY), f"{module} imports {name}"


@pytest.mark.parametrize("package", [p for p in PACKAGES if p != "underdrawing"])
def test_the_top_of_a_package_is_empty(package: str):
    for path in (ROOT / package).rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        assert all(isinstance(node, ast.Expr) for node in body), (
            f"{path.relative_to(ROOT)}: only a docstring may stand here"
        )


def test_the_record_losses_and_advantages_start_neither_ray_nor_transformers():
    pure = [
        "runtime.errors",
        "record.trajectory",
        "record.store",
        "rl.losses",
        "rl.advantages",
        *(m for m in MODULES if covers(("formats",), m)),
    ]
    out = fresh(
        f"import sys, importlib\nfor m in {pure}: importlib.import_module(m)\n"
        "print([m for m in ('ray', 'transformers', 'trl') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_the_record_and_the_tasks_load_no_torch():
    light = [
        "runtime.errors",
        "record.trajectory",
        "record.store",
        *(m for m in MODULES if covers(("formats", "tasks"), m)),
    ]
    out = fresh(
        f"import sys, importlib\nfor m in {light}: importlib.import_module(m)\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_a_run_is_read_shown_and_compared_without_a_framework(tmp_path):
    """Each of these would wait for torch and transformers longer than for its own work."""
    a, b = (str(write_evaluation(tmp_path / "evaluations" / label, seed)) for seed, label in enumerate("ab"))
    commands = (["view", str(tmp_path)], ["compare", a, b], ["rewards", "list"])
    out = fresh(
        "import sys\nfrom underdrawing.cli import main\n"
        f"print([main(words) for words in {commands}], [m for m in {HEAVY} if m in sys.modules])"
    )
    assert out.splitlines()[-1] == "[0, 0, 0] []"


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


SEEN = """
for module in DEEDS:
    try:
        importlib.import_module(module)
    except AssertionError as error:
        print(error)
"""


def test_the_watch_sees(tmp_path):
    deeds = {
        "import safetensors.torch as s; s.load_file('x.safetensors')": "weights were loaded",
        "open('x.pt', 'rb')": "weights were loaded",
        "import socket; socket.create_connection(('192.0.2.1', 80))": "a name was looked up",
        "import socket; socket.socket().connect(('192.0.2.1', 80))": "the network was opened",
    }
    names = [f"naughty{number}" for number in range(len(deeds))]
    for name, deed in zip(names, deeds, strict=True):
        (tmp_path / f"{name}.py").write_text(deed)
    out = fresh(f"MODULES, DEEDS = [], {names}\n{WATCHED}\n{SEEN}", PYTHONPATH=str(tmp_path))
    assert [line.partition(":")[0] for line in out.splitlines()] == ["0", *deeds.values()]
