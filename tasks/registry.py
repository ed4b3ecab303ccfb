"""Tasks by name, or by dotted path for a user's own, which needs no registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.errors import UserError, nearest
from runtime.loading import load_object
from tasks.base import Task

_BUILT_IN = {"shapes": "tasks.shapes.task.ShapesTask"}


def known_tasks() -> list[str]:
    return sorted(_BUILT_IN)


def get_task(name: str, **options: Any) -> Task:
    """Build a task: one of ours by name, or any class (or function) at `package.module.attribute`.

    Raises:
        UserError: no such name, module or attribute; an option that the task does not take; a task that lacks a part
            of tasks.base.Task.
    """
    make = _find(_BUILT_IN.get(name, name))
    try:
        task = make(**options)
    except TypeError as error:
        raise UserError(f"task.options: '{name}' cannot be built with {sorted(options)}: {error}") from error
    missing = [part for part in ("name", "words", "prompts", "demonstrations") if not hasattr(task, part)]
    if missing:
        raise UserError(f"task '{name}' has no '{missing[0]}'; tasks/base.py says what a task offers")
    return task


def _find(path: str) -> Callable[..., Task]:
    if "." not in path and ":" not in path:
        raise UserError(f"task.name: no task '{path}'; {nearest(path, _BUILT_IN)}")
    return load_object(path, f"task.name: '{path}'")
