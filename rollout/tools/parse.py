"""Which tool a call asks for, and with what: read from the words of the policy's segment.

Three ways to write a call are read, in this order:

    <look> 4 4 20 20 </look>                                   a tag that bears a tool's name
    <tool_call> {"name": "look", "arguments": {...}} </tool_call>    a JSON object, as chat models write it
    <tool_call> {"box": [4, 4, 20, 20]} </tool_call>           arguments alone, where only one tool answers the role
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from formats.base import Format
from record.trajectory import Segment
from rollout.tools.base import ToolCall, ToolError
from runtime.errors import nearest


def parse_call(segment: Segment, fmt: Format, names: Sequence[str]) -> ToolCall:
    """The call that a segment is.

    Args:
        names: of the tools that answer the segment's role.

    Raises:
        ToolError: what is no call, or of none of these tools; in words for the model.
    """
    grammar = getattr(fmt, "grammar", None)
    declared = grammar.by_name.get(segment.role) if grammar is not None else None
    body = segment.text.strip()
    for opening, closing in declared.tags[:1] if declared is not None else ():
        body = body.removeprefix(opening).removesuffix(closing).strip()
        named = opening.strip("<>[]|")
        if named in names:
            return ToolCall(named, arguments_of(body), body, segment.role)
    for name in names:
        tagged = re.search(rf"<{re.escape(name)}>(.*?)</{re.escape(name)}>", body, re.DOTALL)
        if tagged is not None:
            inner = tagged[1].strip()
            return ToolCall(name, arguments_of(inner), inner, segment.role)
    given = arguments_of(body)
    if isinstance(given.get("name"), str):
        if given["name"] not in names:
            raise ToolError(f"there is no tool '{given['name']}'; {nearest(given['name'], names)}")
        arguments = given.get("arguments", {})
        if not isinstance(arguments, dict):
            raise ToolError(f"the arguments of '{given['name']}' are {type(arguments).__name__}; give an object")
        return ToolCall(given["name"], arguments, body, segment.role)
    if len(names) == 1:
        return ToolCall(names[0], given, body, segment.role)
    raise ToolError(f'the call names no tool; write {{"name": ..., "arguments": ...}} with one of {", ".join(names)}')


def arguments_of(body: str) -> dict[str, Any]:
    """The object that the body is; empty where it is words. Raises ToolError for an object that is broken."""
    if not body.startswith("{"):
        return {}
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the call is not JSON: {error}") from None
    assert isinstance(found, dict)
    return found
