"""The recipe's section `tools`: who answers the policy's calls, and within which limits."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from runtime.paths import ObjectPath, Options
from runtime.section import Seconds, Section


class ToolConfig(Section):
    """One tool, under the name by which calls ask for it. What is over a limit becomes an error that names it."""

    tool: ObjectPath | None = Field(
        None,
        description="The dotted path or file of a class of your own (package.module.Class, file.py:Class). null: the "
        "built-in one of that name.",
    )
    options: Options = Field(default_factory=dict, description="Keys of the tool's own section of options.")
    roles: list[str] | None = Field(
        None, min_length=1, description="The policy's roles whose calls it answers. null: all that call a tool."
    )
    timeout_s: Seconds = Field(30.0, gt=0, description="Longest time of a call, opening the session included.")
    concurrency: int = Field(16, ge=1, le=65536, description="Calls at work at once, in each worker.")
    max_segments: int = Field(4, ge=1, le=1024, description="Segments of an answer.")
    max_pixels: int = Field(2**20, ge=1, description="Pixels of an answer, over all its images and frames.")
    max_characters: int = Field(4000, ge=1, description="Characters of an answer, over all its words.")
    answer_ticks: int = Field(
        16,
        ge=1,
        le=2**20,
        description="Under rollout.reproducible an answer is read so many ticks of the engine after its call, early or "
        "late: a tick gives each row one id. Otherwise when it comes.",
    )


def _listed(value: Any) -> Any:
    """A list of names is a map of them with all defaults. Raises ValueError for what is neither."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if isinstance(value, str):
        raise ValueError(
            f"a list of names, as in tools=[{value}], or a map of them to their keys is wanted, not a name"
        )
    if not isinstance(value, dict):
        raise ValueError(
            "a list of names, as in [look], or a map of them to their keys is wanted: {look: {timeout_s: 5}}"
        )
    return value


ToolsConfig = Annotated[dict[str, ToolConfig], BeforeValidator(_listed)]
