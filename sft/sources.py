"""Where demonstrations come from besides a task: files of messages with images, and stored trajectories.

A row of a file is a prompt and what should be thought about it, as TRL's conversational data sets have it:

    {"prompt": "a red circle", "messages": [{"role": "assistant", "content": [
        {"type": "text", "text": "<ins> red circle</ins><des> a red circle</des>"},
        {"type": "image", "image": "circle.png"},
        {"type": "text", "text": "<inspect> right</inspect>"}]}]}

A user's message may show images, and a message of "tool" is what the environment answers, words and images: both are
seen and not learned. The format of the recipe divides the text into segments. Stored rollouts serve too: the best of
them, as in rejection sampling.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from formats.base import Format, Part
from formats.render import render_parts
from policy.base import Policy
from record.store import load_trajectories
from record.trajectory import Author, StopReason, Trajectory
from runtime.errors import UserError
from sft.config import SftConfig
from tasks.images import image_file, read_image
from tasks.rows import DataError, Row, read_rows

logger = logging.getLogger(__name__)
KEY = "sft.data"
SHOWN = 3  # what was skipped, in a message
STORED = "trajectories.parquet"


def load_demonstrations(
    config: SftConfig, fmt: Format, policy: Policy, heldout: Sequence[Mapping[str, Any]] = ()
) -> list[Trajectory]:
    """The demonstrations at config.data.

    Args:
        heldout: the task's held-out records; stored trajectories of these are left out and counted.

    Raises:
        UserError: nothing there that can be learned from; a row that is no demonstration, by file, line and part.
    """
    assert config.data is not None
    folders = stored_folders(Path(config.data))
    if folders:
        stored = [(f, t) for f in folders for t in load_trajectories(f)]
        return _selected(stored, config, fmt, {identity(record) for record in heldout})
    _refuse_choosing(config)
    return _rendered(read_rows(config.data, KEY), fmt, policy)


def check_data(config: SftConfig, tags: Sequence[str]) -> None:
    """Read what is at config.data, without a policy to see its images. Raises as load_demonstrations."""
    assert config.data is not None
    if not stored_folders(Path(config.data)):
        _refuse_choosing(config)
    words_of(config.data, tags)


def _refuse_choosing(config: SftConfig) -> None:
    for key in ("min_reward", "best"):
        if getattr(config, key) is not None:
            raise UserError(f"sft.{key}: {config.data} holds demonstrations, which have no reward; leave it out")


def stored_folders(folder: Path) -> list[Path]:
    """The folders of stored trajectories at a path: itself, or those in it."""
    if (folder / STORED).is_file():
        return [folder]
    if not folder.is_dir():
        return []
    return sorted(path.parent for path in folder.glob(f"*/{STORED}"))


def words_of(path: str, tags: Sequence[str]) -> set[str]:
    """Every word of the demonstrations at a path, tags excluded, for tokenizers that are built offline."""
    folders = stored_folders(Path(path))
    if folders:
        texts = [segment.text for f in folders for t in load_trajectories(f) for segment in t.segments]
    else:
        texts = []
        for row in read_rows(path, KEY):
            prompt, _, parts = _row(row)
            texts += [prompt, *(part.content for part in parts if part.kind == "text")]
    for tag in tags:
        texts = [text.replace(tag, " ") for text in texts]
    return {word for text in texts for word in text.split()}


# ---- stored trajectories ----


def _selected(
    stored: Sequence[tuple[Path, Trajectory]], config: SftConfig, fmt: Format, heldout: set[str]
) -> list[Trajectory]:
    """Those that can be learned from: well-formed, not cut off, and with enough reward; the best of each prompt."""
    skipped: list[tuple[str, str]] = []  # reason, which
    kept: list[tuple[Path, Trajectory]] = []
    for folder, trajectory in stored:
        held_out = identity(trajectory.record) in heldout
        reason = "of a held-out prompt" if held_out else _unfit(trajectory, config, fmt)
        if reason:
            skipped.append((reason, f"{folder.name}/{trajectory.key} ({trajectory.prompt!r})"))
        else:
            kept.append((folder, trajectory))
    if skipped:
        counts = Counter(reason for reason, _ in skipped)
        logger.warning(
            "%d of %d stored trajectories are not learned from: %s; the first: %s",
            len(skipped),
            len(stored),
            ", ".join(f"{count} {reason}" for reason, count in counts.most_common()),
            "; ".join(f"{which}: {reason}" for reason, which in skipped[:SHOWN]),
        )
    chosen = [trajectory for _, trajectory in kept]
    if config.best is not None:
        chosen = _best(chosen, config.best)
    if not chosen:
        counts = Counter(reason for reason, _ in skipped)
        raise UserError(
            f"{KEY}: none of the {len(stored)} trajectories in {config.data} can be learned from: "
            f"{', '.join(f'{count} {reason}' for reason, count in counts.most_common())}"
        )
    return chosen


def identity(record: Mapping[str, Any]) -> str:
    """A record as JSON has it, which is how it comes back from the disk."""
    return json.dumps(record, sort_keys=True, default=str)


def _unfit(trajectory: Trajectory, config: SftConfig, fmt: Format) -> str:
    """Why it is not learned from; empty: it is."""
    written = trajectory.stop is StopReason.DEMONSTRATION
    if trajectory.format != fmt.name:
        return f"written in the format '{trajectory.format}'"
    if trajectory.stop.cut_off:
        return f"cut off ({trajectory.stop})"
    if not written and fmt.violations(trajectory):
        return "not well-formed"
    if config.min_reward is not None or config.best is not None:
        if trajectory.reward is None:
            return "without a reward"
        if config.min_reward is not None and trajectory.reward < config.min_reward:
            return f"below sft.min_reward {config.min_reward:g}"
    return ""


def _best(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """The `count` highest rewards of each prompt; of equal ones the earlier. In their order."""
    by_prompt: dict[str, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        by_prompt.setdefault(trajectory.prompt, []).append(index)
    chosen = [
        index
        for indices in by_prompt.values()
        for index in sorted(indices, key=lambda i: -(trajectories[i].reward or 0.0))[:count]
    ]
    return [trajectories[index] for index in sorted(chosen)]


# ---- rows of messages ----


class _Said(NamedTuple):
    """One part of a message."""

    kind: str  # "text" or "image"
    content: str  # the text, or the image's file
    trained: bool  # whether it is imitated
    author: Author


def _rendered(rows: Sequence[Row], fmt: Format, policy: Policy) -> list[Trajectory]:
    made = []
    for number, row in enumerate(rows):
        prompt, shown, said = _row(row)
        parts = [
            Part("", image=read_image(each.content), author=each.author)
            if each.kind == "image"
            else Part("", each.content, author=each.author)
            for each in said
        ]
        media = [read_image(image) for image in shown]
        record = {k: v for k, v in row.values.items() if k not in ("messages", "images", "prompt")}
        try:
            trajectory = render_parts(
                fmt,
                prompt,
                {"prompt": prompt, **record},
                parts,
                [each.trained for each in said],
                policy.vocabulary,
                media,
            )
        except UserError as error:
            raise DataError(f"{row.where}: {error}") from error
        trajectory.group = number
        made.append(trajectory)
    return made


def _row(row: Row) -> tuple[str, list[str], list[_Said]]:
    """The prompt's words, the files of the images that it shows, and the parts of the answer."""
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: 'messages' is a list of messages, not {messages!r}"[:300])
    prompt, shown, parts = row.values.get("prompt"), [], []
    given = iter(row.values.get("images") or ())
    for number, message in enumerate(messages, 1):
        where = f"{row.where}, message {number}"
        role = message.get("role") if isinstance(message, dict) else None
        if role == "user" and number == 1 and prompt is None:
            asked = list(_parts(message, given, row, where, Author.USER))
            prompt = "".join(part.content for part in asked if part.kind == "text")
            shown = [part.content for part in asked if part.kind == "image"]
        elif role == "assistant":
            parts += list(_parts(message, given, row, where, Author.POLICY))
        elif role == "tool" and parts:
            parts += list(_parts(message, given, row, where, Author.ENVIRONMENT))
        else:
            raise DataError(
                f"{where}: a message of '{role}'; the first may be the user's, if there is no 'prompt', and all others "
                "are the assistant's, or a tool's that answers it"
            )
    if not isinstance(prompt, str) or not (prompt.strip() or shown):
        raise DataError(f"{row.where}: there is no prompt: give 'prompt', or a first message of the user")
    if not any(part.author is Author.POLICY for part in parts):
        raise DataError(f"{row.where}: the assistant says nothing; there is nothing to learn from")
    return prompt, shown, parts


def _parts(message: dict[str, Any], given: Iterator[Any], row: Row, where: str, author: Author) -> Iterator[_Said]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise DataError(f"{where}: the content is text or a list of parts, not {type(content).__name__}")
    for number, part in enumerate(content, 1):
        at = f"{where}, part {number}"
        kind = part.get("type") if isinstance(part, dict) else None
        trained = bool(part.get("trained", True)) if isinstance(part, dict) else True
        if kind == "text" and isinstance(part.get("text"), str):
            yield _Said("text", part["text"], trained, author)
        elif kind == "image":
            image = part.get("image")
            if image is None:  # a placeholder: the image stands in the column `images`
                image = next(given, None)
                if image is None:
                    raise DataError(f"{at}: an image without content, and the column 'images' has none left")
            yield _Said("image", image_file(image, row.folder, at), trained, author)
        else:
            raise DataError(f'{at}: a part is {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}}')
