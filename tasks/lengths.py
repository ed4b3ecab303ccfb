"""Which prompts a policy can be asked: found before the first step, and not at the step that draws them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from formats.base import Format, Vocabulary
from runtime.errors import UserError
from tasks.base import Record
from tasks.config import TaskConfig

logger = logging.getLogger(__name__)
SHOWN = 60  # characters of a prompt in a message


class PromptError(UserError):
    """A prompt that the policy cannot be asked."""


def fitting(
    records: Sequence[Record], fmt: Format, vocabulary: Vocabulary, max_length: int, config: TaskConfig, split: str
) -> Sequence[Record]:
    """The records whose prompts fit, in their order.

    A prompt does not fit if it has more ids than task.max_prompt_length, leaves no room for an answer in a context of
    `max_length` ids, or has text that the vocabulary cannot encode (an image's marker).

    Raises:
        PromptError: one does not fit and task.overlong_prompts is "refuse", or none is left.
    """
    longest = max_length - 1 if config.max_prompt_length is None else min(config.max_prompt_length, max_length - 1)
    kept: list[Record] = []
    refused: list[tuple[str, str]] = []  # prompt, why
    mends: set[str] = set()
    for record in records:
        encoded = True
        try:
            length = len(fmt.prompt_ids(record["prompt"], vocabulary))
            reason = f"has {length} ids, and at most {longest} fit" if length > longest else ""
        except UserError as error:
            reason, encoded = f"cannot be encoded ({error})", False
        if reason:
            refused.append((record["prompt"], reason))
            mends.add("shorten" if encoded else "reword")
        else:
            kept.append(record)
    if refused:
        prompt, reason = refused[0]
        shown = prompt if len(prompt) <= SHOWN else prompt[: SHOWN - 3] + "..."
        what = f"{len(refused)} of {len(records)} prompts ({split}) cannot be asked; the first, '{shown}', {reason}"
        if config.overlong_prompts == "refuse" or not kept:
            mend = " or ".join(sorted(mends, reverse=True)) + " them"
            out = ", or leave them out with task.overlong_prompts: drop" if kept else ""
            raise PromptError(f"{what}; {mend}{out}")
        logger.warning("%s; they are left out", what)
    return kept if refused else records
