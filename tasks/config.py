"""The recipe's `task` section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from runtime.paths import ObjectPath, Options


class TaskConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: ObjectPath = Field(
        "shapes",
        description="a task's name, or the dotted path of a class of your own "
        "(package.module.Class) that is built with the options",
    )
    options: Options = Field(default_factory=dict, description="keyword arguments of the task")
