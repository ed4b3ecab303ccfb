"""Writers by name: the toolkit's own, and anybody's by dotted path.

A writer's factory is `(policy, fmt, rollout, words) -> Writer`: the recipe's sections PolicyConfig, FormatConfig and
RolloutConfig, and the words of the task's language; where the recipe names tools, `tools=` too. It runs in the process
that will write. An attribute `capabilities` on it lets a recipe be refused before any process is started.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from formats.base import Format
from formats.config import FormatConfig
from policy.config import PolicyConfig
from rollout.capabilities import WriterError, check_capabilities
from rollout.config import RolloutConfig
from rollout.native import as_writer
from rollout.tools.registry import Tools
from rollout.writer import Writer
from runtime.errors import nearest
from runtime.loading import LoadError, load_object
from runtime.options import make

NATIVE = "native"
WRITERS = {NATIVE: "rollout.native.native"}  # dotted, so that asking for one imports no other
_NEEDED = (
    *("name", "version", "exact", "capabilities"),
    *("stream", "take", "logprobs", "sleep", "wake", "stats", "shares", "close"),
)


def writer_factory(name: str) -> Callable[..., Any]:
    """What builds the writer that a recipe names.

    Raises:
        WriterError: no such writer, or a dotted path that leads nowhere; it names the nearest.
    """
    if name not in WRITERS and "." not in name and ":" not in name:
        raise WriterError(
            f"rollout.writer: no '{name}'; {nearest(name, WRITERS)}, or the dotted path of a function that builds one"
        )
    try:
        found = load_object(WRITERS.get(name, name), f"rollout.writer: '{name}'")
    except LoadError as error:
        raise WriterError(str(error)) from error.__cause__
    if not callable(found):
        raise WriterError(f"rollout.writer: '{name}' is {type(found).__name__}, and no function that builds a writer")
    return found


def _takes_tools(factory: Callable[..., Any]) -> bool:
    try:
        taken = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return True  # it will say so itself
    return "tools" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())


def check_writer_config(
    config: RolloutConfig, fmt: Format, constrain: str, forks: bool = False, tools: Collection[str] = ()
) -> None:
    """What can be known to be wrong before a process is started.

    Args:
        forks: whether members are to go on from prefixes (grpo.fork).
        tools: names of the recipe's tools.

    Raises WriterError.
    """
    can = getattr(writer_factory(config.writer), "capabilities", None)
    if can is not None:
        check_capabilities(config.writer, can, fmt, constrain, config, forks=forks, tools=tools)


def make_writer(
    policy: PolicyConfig,
    fmt: FormatConfig,
    config: RolloutConfig,
    words: Sequence[str] = (),
    tools: Tools | None = None,
    forks: bool = False,
) -> Writer:
    """The writer that the recipe names.

    Args:
        forks: whether members are to go on from prefixes (grpo.fork).

    Raises:
        WriterError: as `writer_factory`; what the factory returns is no writer; or it cannot do what the recipe asks.
    """
    factory, where = writer_factory(config.writer), f"rollout.writer: '{config.writer}'"
    if config.writer in WRITERS:
        made = factory(policy, fmt, config, words, tools)
    elif tools is None:
        made = make(lambda: factory(policy, fmt, config, words), {}, where)
    elif _takes_tools(factory):
        made = make(lambda: factory(policy, fmt, config, words, tools=tools), {}, where)
    else:
        raise WriterError(
            f"{where} takes no tools, and the recipe names {', '.join(tools.by_name)}: give its function an argument "
            "`tools`, leave the section tools out, or set rollout.writer: native"
        )
    writer = as_writer(made)
    missing = [name for name in _NEEDED if not hasattr(writer, name)]
    if missing:
        raise WriterError(
            f"{where} gave a value of type {type(writer).__name__}, which is no Writer: it has no '{missing[0]}' "
            "(rollout/writer.py lists what it must offer)"
        )
    check_capabilities(
        *(config.writer, writer.capabilities, fmt.build(), fmt.constrain, config),
        forks=forks,
        tools=() if tools is None else tools.by_name,
    )
    return writer
