"""Writers by name: the toolkit's own, and anybody's by dotted path.

A writer's factory is `(policy, fmt, rollout, words) -> Writer`: the recipe's sections PolicyConfig, FormatConfig and
RolloutConfig, and the words of the task's language. It runs in the process that will write. An attribute `capabilities`
on it lets a recipe be refused before any process is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from formats.base import Format
from formats.config import FormatConfig
from policy.config import PolicyConfig
from rollout.capabilities import WriterError, check_capabilities
from rollout.config import RolloutConfig
from rollout.native import as_writer
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


def check_writer_config(config: RolloutConfig, fmt: Format, constrain: str) -> None:
    """What can be known to be wrong before a process is started. Raises WriterError."""
    can = getattr(writer_factory(config.writer), "capabilities", None)
    if can is not None:
        check_capabilities(config.writer, can, fmt, constrain, config)


def make_writer(policy: PolicyConfig, fmt: FormatConfig, config: RolloutConfig, words: Sequence[str] = ()) -> Writer:
    """The writer that the recipe names.

    Raises:
        WriterError: as `writer_factory`; what the factory returns is no writer; or it cannot do what the recipe asks.
    """
    factory, where = writer_factory(config.writer), f"rollout.writer: '{config.writer}'"
    if config.writer in WRITERS:
        made = factory(policy, fmt, config, words)
    else:
        made = make(lambda: factory(policy, fmt, config, words), {}, where)
    writer = as_writer(made)
    missing = [name for name in _NEEDED if not hasattr(writer, name)]
    if missing:
        raise WriterError(
            f"{where} gave a {type(writer).__name__}, which is no Writer: it has no '{missing[0]}' (rollout/writer.py "
            "lists what it must offer)"
        )
    check_capabilities(config.writer, writer.capabilities, fmt.build(), fmt.constrain, config)
    return writer
