"""The recipe's `task` section."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class TaskConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        "shapes",
        description="a task's name, or the dotted path of a class of your own "
        "(package.module.Class) that is built with the options",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the task")
