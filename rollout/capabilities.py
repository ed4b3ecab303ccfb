"""What a writer can do, held against what a recipe asks for, before anything is loaded or sampled."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from formats.base import Format
from rollout.config import RolloutConfig
from runtime.errors import UserError


@dataclass(frozen=True)
class Capabilities:
    """The native writer can do all of it. An engine that serves words alone (vLLM) lacks the first four."""

    images: bool = True  # the policy draws: visual codes or latents
    guidance: bool = True  # several contexts a decision, combined
    full_constraint: bool = True  # every decision is held to the format's grammar, not only where images begin and end
    kept_sets: bool = True  # of top-p and top-k it says which ids were left, so that scoring renormalises over the same
    forks: bool = True  # it goes on from a request's prefix, with the parent's segments and their contexts
    tools: bool = True  # it calls tools where the format has the environment answer


class WriterError(UserError):
    """A writer that is not there, or one that cannot do what the recipe asks for."""


def check_capabilities(
    name: str,
    can: Capabilities,
    fmt: Format,
    constrain: str,
    config: RolloutConfig,
    draws: bool = True,
    forks: bool = False,
    tools: Collection[str] = (),
) -> None:
    """Hold a recipe to what its writer can do.

    Args:
        name: of the writer, as the recipe says it.
        constrain: the recipe's format.constrain.
        draws: whether the policy's family draws at all.
        forks: whether members are to go on from prefixes (grpo.fork).
        tools: names of the recipe's tools.

    Raises:
        WriterError: the recipe asks for something else; the sentence names the key, and what would be right.
    """
    drawn = drawing_roles(fmt) if draws else ()
    if drawn and not can.images:
        raise WriterError(
            f"rollout.writer: '{name}' writes words alone, and format '{fmt.name}' has the policy draw "
            f"({_quoted(drawn)}): set rollout.writer: native, or choose a format without images of the policy's"
        )
    if config.guidance and not can.guidance:
        raise WriterError(
            f"rollout.guidance: the writer '{name}' samples from one context and cannot guide; set it to false, or "
            "set rollout.writer: native"
        )
    if constrain == "full" and not can.full_constraint:
        raise WriterError(
            f"format.constrain: the writer '{name}' cannot hold every id to the grammar of '{fmt.name}'; set it to "
            "'images', or set rollout.writer: native"
        )
    if (config.top_p < 1 or config.top_k) and not can.kept_sets:
        key, off = ("top_p", "1") if config.top_p < 1 else ("top_k", "0")
        raise WriterError(
            f"rollout.{key}: the writer '{name}' does not say which ids were left to choose from, so that what it "
            f"samples could not be scored; set it to {off}, or set rollout.writer: native"
        )
    if forks and not can.forks:
        raise WriterError(
            f"grpo.fork: the writer '{name}' cannot go on from a trajectory's first segments; leave the section out, "
            "or set rollout.writer: native"
        )
    if tools and not can.tools:
        raise WriterError(
            f"tools: the writer '{name}' calls none, and the recipe names {_quoted(tuple(tools))}; leave the section "
            "out, or set rollout.writer: native"
        )


def drawing_roles(fmt: Format) -> tuple[str, ...]:
    """The roles in which the policy draws; where a format does not list its roles, its name for one."""
    grammar = getattr(fmt, "grammar", None)
    if grammar is None:
        return ("an image",) if fmt.max_images else ()
    return tuple(role.name for role in grammar.drawn)


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names)
