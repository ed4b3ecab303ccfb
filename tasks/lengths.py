"""Which prompts a policy can be asked: found before the first step, and not at the step that draws them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from formats.base import Format, Vocabulary
from runtime.errors import UserError
from tasks.base import Record
from tasks.config import TaskConfig
from tasks.media import items_of

logger = logging.getLogger(__name__)
SHOWN = 60  # characters of a prompt in a message


class PromptError(UserError):
    """A prompt that the policy cannot be asked."""


def fitting(
    records: Sequence[Record],
    fmt: Format,
    vocabulary: Vocabulary,
    max_length: int,
    config: TaskConfig,
    split: str,
    shown: Callable[[Record], int] | None = None,
) -> Sequence[Record]:
    """The records whose prompts fit, in their order.

    A prompt does not fit if it has more ids than task.max_prompt_length, leaves no room for an answer in a context of
    `max_length` ids, or has text that the vocabulary cannot encode (an image's marker).

    Args:
        shown: how many slots of the context the images and frames of a prompt take (rollout/shown.py), which count as
            ids do. None: not known yet.

    Raises:
        PromptError: one does not fit and task.overlong_prompts is "refuse", or none is left; or prompts show something,
            and the format has no place for it.
    """
    longest = max_length - 1 if config.max_prompt_length is None else min(config.max_prompt_length, max_length - 1)
    kept: list[Record] = []
    refused: list[tuple[str, str]] = []  # prompt, why
    mends: set[str] = set()
    for record in records:
        encoded = True
        try:
            pictures = items_of(record)
        except UserError as error:
            raise PromptError(f"the prompt '{_short(record['prompt'])}' ({split}): {error}") from None
        if pictures and not hasattr(fmt, "prompt"):
            raise PromptError(
                f"format '{fmt.name}': its prompts are words alone, and '{_short(record['prompt'])}' ({split}) shows "
                f"{len(pictures)} image(s) or video(s)"
            )
        try:
            length = len(fmt.prompt_ids(record["prompt"], vocabulary))
            reason = f"has {length} ids, and at most {longest} fit" if length > longest else ""
        except UserError as error:
            length, reason, encoded = 0, f"cannot be encoded ({error})", False
        if pictures and shown is not None and encoded:
            try:
                length += shown(record)
                reason = f"has {length} ids and slots of what it shows, and at most {longest} fit"
                reason = reason if length > longest else ""
            except UserError as error:
                refused.append((record["prompt"], f"cannot be shown ({error})"))
                mends.add("change")
                continue
        if reason:
            refused.append((record["prompt"], reason))
            mends.add("shorten" if encoded else "reword")
        else:
            kept.append(record)
    if refused:
        prompt, reason = refused[0]
        first = _short(prompt)
        what = f"{len(refused)} of {len(records)} prompts ({split}) cannot be asked; the first, '{first}', {reason}"
        if config.overlong_prompts == "refuse" or not kept:
            mend = " or ".join(sorted(mends, reverse=True)) + " them"
            out = ", or leave them out with task.overlong_prompts: drop" if kept else ""
            raise PromptError(f"{what}; {mend}{out}")
        logger.warning("%s; they are left out", what)
    return kept if refused else records


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= SHOWN else prompt[: SHOWN - 3] + "..."
