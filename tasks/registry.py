"""Tasks by name, or by dotted path for a user's own, which needs no registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.errors import UserError, nearest
from runtime.loading import load_object
from runtime.options import make
from tasks.base import Task

_BUILT_IN = {"shapes": "tasks.shapes.task.ShapesTask", "digits": "tasks.digits.task.DigitsTask"}


def known_tasks() -> list[str]:
    return sorted(_BUILT_IN)


def get_task(name: str, /, **options: Any) -> Task:
    """Build a task: one of ours by name, or any class (or function) at `package.module.attribute`.

    Raises:
        UserError: no such name, module or attribute; an option that the task does not take; a task that lacks a part
            of tasks.base.Task.
    """
    task = make(_find(_BUILT_IN.get(name, name)), options, f"task.options: '{name}'")
    missing = [part for part in ("name", "words", "prompts", "demonstrations") if not hasattr(task, part)]
    if missing:
        raise UserError(
            f"task.name: '{name}' gave a value of type {type(task).__name__}, which is no Task: it has no "
            f"'{missing[0]}' (tasks/base.py says what a task offers)"
        )
    return task


def _find(path: str) -> Callable[..., Task]:
    if "." not in path and ":" not in path:
        raise UserError(f"task.name: no task '{path}'; {nearest(path, _BUILT_IN)}")
    found = load_object(path, f"task.name: '{path}'")
    if not callable(found):
        raise UserError(f"task.name: '{path}' is {type(found).__name__}, which makes no task; name a class or function")
    return found
