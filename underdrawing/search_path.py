"""Where Python seeks our packages: beside this one, whatever else bears their names.

Names such as `tasks` or `rewards` are common. A folder of that name which comes earlier on the search path hides ours,
and then any import fails with a message about somebody else's file. So the working folder is put last, and a package
that is still found elsewhere is named. Imports nothing of ours: that is what it looks after.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

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
ROOT = Path(__file__).resolve().parent.parent  # where this installation's packages lie


def settle() -> None:
    """Call it before anything of ours is imported. With `python -m` the working folder, which stands first then, goes
    last; a package that is still found elsewhere ends the program with a sentence and exit code 2."""
    running = getattr(sys.modules["__main__"], "__spec__", None)
    by_module = running is not None and running.name.partition(".")[0] == "underdrawing"
    if by_module and not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
        sys.path.append(sys.path.pop(0))
    hidden = hidden_package()
    if hidden is not None:
        print(f"underdrawing: {hidden}", file=sys.stderr)
        sys.exit(2)


def working_folder_last() -> None:
    """A recipe may name functions of modules in the folder one stands in."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def hidden_package() -> str | None:
    """A sentence on the first of our packages that is found elsewhere; None: all are found beside this one."""
    for name in PACKAGES:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # a module without a spec, put there by somebody's hand
            continue
        if spec is None:
            return f"the package '{name}' is missing from {ROOT}; install this toolkit again"
        place = Path(next(iter(spec.submodule_search_locations or ()), None) or spec.origin or "")
        if place.resolve().parent != ROOT:
            return (
                f"the package '{name}' is found at {place}, which hides this toolkit's own in {ROOT}: rename that one, "
                f"or take {place.parent} off Python's search path (PYTHONPATH)"
            )
    return None


def packages_here(folder: Path) -> list[str]:
    """Those of our packages whose names something importable in a folder bears. An installation's own has none."""
    if folder.resolve() == ROOT:
        return []
    return [name for name in PACKAGES if (folder / name / "__init__.py").is_file() or (folder / f"{name}.py").is_file()]
