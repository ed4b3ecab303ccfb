"""A task without code: prompts from a data set whose columns the recipe maps.

    task:
      dataset:
        path: problems.jsonl
        columns: {prompt: question, ground_truth: answer}
        images: [diagram]

A record is a row under our column names: `prompt` is text, images and videos are paths, everything else is as it was;
what the prompt shows is named in `media` (media.py). Order is the data's own; rl/prompts.py draws from it, and its
position is kept in checkpoints.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError, nearest
from tasks.base import Demonstration, Record, Split
from tasks.config import DatasetConfig
from tasks.images import image_file
from tasks.media import MEDIA, items_of
from tasks.rows import DataError, Row, read_rows
from tasks.videos import video_file

logger = logging.getLogger(__name__)
KEY = "task.dataset"
SHOWN = 60  # characters of a prompt in a message


class DatasetTask:
    """Prompts of somebody's own. Built by `build`; has no detector and writes no demonstrations."""

    name = "dataset"
    classes: tuple[str, ...] = ()

    def __init__(self, train: Sequence[Record], heldout: Sequence[Record]) -> None:
        self._splits: dict[str, Sequence[Record]] = {"train": train, "heldout": heldout}
        # What a tiny tokenizer must know. A released one brings its own.
        self.words = sorted({word for record in (*train, *heldout) for word in record["prompt"].split()})

    def prompts(self, split: Split) -> Sequence[Record]:
        if split not in self._splits:
            raise UserError(f"task.dataset has no split '{split}'; {nearest(split, self._splits)}")
        return self._splits[split]

    def demonstrations(self, format: str, count: int, seed: int) -> list[Demonstration]:
        raise UserError(
            "sft.data: missing; a data set of prompts holds no demonstrations. Name a file of them (docs/tasks.md has "
            "the layout) or a folder of stored trajectories, or start GRPO from policy.path or --weights"
        )


def build(config: DatasetConfig) -> DatasetTask:
    """Read both splits.

    Raises:
        DataError: something that cannot be read, a column that is missing, a prompt that is none, a range that leaves
            nothing, or a held-out prompt that is trained on; the sentence names file, line and column.
        ImageColumnError: an image that cannot be read.
    """
    train = _records(config, config.path, config.split, f"{KEY}.path")
    if config.heldout_path is not None or config.heldout_split is not None:
        heldout = _records(
            config, config.heldout_path or config.path, config.heldout_split, f"{KEY}.heldout_path", limit=False
        )
        _refuse_overlap(train, heldout)
    else:
        train, heldout = _divided(train, config.heldout_share)
    if not train:
        raise DataError(f"{KEY}: no training prompt is left; lower heldout_share, or widen `where`")
    return DatasetTask(train, heldout)


def _records(config: DatasetConfig, path: str, split: str | None, key: str, limit: bool = True) -> list[Record]:
    rows = read_rows(path, key, config.name, split)
    _check_columns(config, rows[0])
    records: list[Record] = []
    seen: dict[str, str] = {}
    twice: list[str] = []
    left_out = 0
    for row in rows:
        if limit and config.limit is not None and len(records) == config.limit:
            break
        record = _record(config, row)
        if not _in_ranges(config, record, row.where):
            left_out += 1
            continue
        content = _fingerprint(record)
        if content in seen:
            twice.append(f"{row.where} is {seen[content]} again")
            continue
        seen[content] = row.where
        records.append(record)
    if twice:
        logger.warning("%d row(s) of %s stand there twice and were left out; the first: %s", len(twice), path, twice[0])
    if left_out:
        logger.info("%s: %d of %d rows lie outside of %s.where", path, left_out, len(rows), KEY)
    if not records:
        raise DataError(f"{KEY}.where: none of the {len(rows)} rows of {path} lies in the ranges; widen them")
    return records


# ---- one row ----


def _check_columns(config: DatasetConfig, row: Row) -> None:
    """What can be said by the first row's columns."""
    taken = {theirs: ours for ours, theirs in config.columns.items()}
    for ours, theirs in config.columns.items():
        if theirs not in row.values:
            raise DataError(
                f"{KEY}.columns.{ours}: {row.where} has no column '{theirs}'; {nearest(theirs, row.values)}"
            )
        if ours in row.values and ours not in taken and ours != theirs:
            raise DataError(
                f"{KEY}.columns.{ours}: the data has a column '{ours}' besides '{theirs}'; name it in columns too, "
                f"such as {{{ours}_2: {ours}}}"
            )
    if "prompt" not in config.columns and "prompt" not in row.values:
        raise DataError(
            f"{KEY}.columns.prompt: missing; {row.where} has no column 'prompt'. Say which one it is, such as "
            f"{{prompt: {next(iter(row.values), '...')}}}. Columns: {', '.join(row.values)}"
        )
    ours_all = {taken.get(column, column) for column in row.values}
    for kind, names in (("images", config.images), ("videos", config.videos), ("where", list(config.where))):
        for name in names:
            if name not in ours_all:
                raise DataError(f"{KEY}.{kind}: no column '{name}'; {nearest(name, ours_all)}")
    pictures = [*config.images, *config.videos]
    for name in config.show:
        if name not in pictures:
            raise DataError(
                f"{KEY}.show: '{name}' is none of the columns in {KEY}.images and {KEY}.videos"
                + (f"; {nearest(name, pictures)}" if pictures else "; name it in one of them")
            )
    both = set(config.images) & set(config.videos)
    if both:
        raise DataError(f"{KEY}.videos: '{min(both)}' is named in {KEY}.images too; a column holds one or the other")
    if config.show and MEDIA in ours_all:
        raise DataError(
            f"{KEY}.show: the data has a column '{MEDIA}', which says by itself what the prompt shows; leave out "
            f"`show`, or call the column something else in columns, such as {{its_{MEDIA}: {MEDIA}}}"
        )


def _record(config: DatasetConfig, row: Row) -> Record:
    ours = {theirs: name for name, theirs in config.columns.items()}
    record = {ours.get(column, column): value for column, value in row.values.items()}
    for column in (*config.columns, "prompt"):
        if column not in record:
            raise DataError(f"{row.where}: the column '{config.columns.get(column, column)}' is missing")
    for column in (*config.images, *config.videos):
        where = f"{row.where}, column '{config.columns.get(column, column)}'"
        take = _images if column in config.images else _video
        record[column] = take(record.get(column), row.folder, where)
    shown = [item for column in config.show for item in _items(config, column, record[column])]
    if not shown:
        shown = _given(record, row)
    if shown:
        record[MEDIA] = shown
    where = f"{row.where}, column '{config.columns.get('prompt', 'prompt')}'"
    record["prompt"] = _prompt(record["prompt"], where, wordless=bool(shown))
    return {
        column: _plain(value, f"{row.where}, column '{config.columns.get(column, column)}'")
        for column, value in record.items()
    }


def _prompt(value: Any, where: str, wordless: bool = False) -> str:
    """Text, or the text of messages as TRL's conversational data sets have them: an optional system's and a user's.

    It may be empty where pictures ask (`wordless`).
    """
    if isinstance(value, list):
        for message in value:
            if not isinstance(message, dict) or message.get("role") not in ("system", "user"):
                role = message.get("role") if isinstance(message, dict) else message
                raise DataError(
                    f"{where}: a message of '{role}'; a prompt is one turn, an optional system message and the user's"
                )
        value = "\n".join(text for message in value if (text := _text(message.get("content"), where)))
    if value is None and wordless:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: a prompt is text or a list of messages, not {type(value).__name__}")
    if not value.strip() and not wordless:
        raise DataError(f"{where}: the prompt is empty")
    return value


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
    raise DataError(f"{where}: a message's content is text or a list of parts, not {type(content).__name__}")


def _images(value: Any, folder: Path, where: str) -> str | list[str] | None:
    if value is None or value == "":
        return None
    if isinstance(value, list):
        return [image_file(item, folder, f"{where}, image {number}") for number, item in enumerate(value, 1)]
    return image_file(value, folder, where)


def _given(record: Record, row: Row) -> list[dict[str, Any]]:
    """What a record says by itself that it shows: one that `underdrawing difficulty` wrote, for one."""
    where = f"{row.where}, column '{MEDIA}'"
    try:
        items = items_of(record)
    except UserError as error:
        raise DataError(
            f"{row.where}: {error}; if the prompt is not to show it, call the column something else in {KEY}.columns"
        ) from None
    return [
        {**item, "image": image_file(item["image"], row.folder, f"{where}, item {number}")}
        if "image" in item
        else {**item, "video": video_file(item["video"], row.folder, f"{where}, item {number}")}
        for number, item in enumerate(items, 1)
    ]


def _video(value: Any, folder: Path, where: str) -> str | list[str] | None:
    return None if value is None or value == "" else video_file(value, folder, where)


def _items(config: DatasetConfig, column: str, value: str | list[str] | None) -> list[dict[str, Any]]:
    """What a column adds to `media`; nothing where its cell is empty."""
    if value is None:
        return []
    if column in config.videos:
        return [{"video": value, "frames": config.frames}]
    return [{"image": path} for path in (value if isinstance(value, list) else [value])]


def _plain(value: Any, where: str) -> Any:
    """The value as JSON has it."""
    if isinstance(value, dict):
        return {str(name): _plain(item, where) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, bytes):
        raise DataError(f"{where}: bytes; if it is an image, name the column in {KEY}.images")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DataError(f"{where}: {type(value).__name__} is nothing that a record can hold")


# ---- all rows ----


def _in_ranges(config: DatasetConfig, record: Record, where: str) -> bool:
    for column, (low, high) in config.where.items():
        value = record.get(column)
        if value is None:
            return False
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise DataError(f"{where}: {KEY}.where asks for a number in '{column}', which is {value!r}") from None
        if math.isnan(number) or (low is not None and number < low) or (high is not None and number > high):
            return False
    return True


def _fingerprint(record: Record) -> str:
    return repr(sorted(record.items()))


def _divided(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Train and held-out: the prompts with the smallest hashes are held out, with all their rows."""
    prompts = sorted({record["prompt"] for record in records}, key=_hash)
    count = min(math.ceil(share * len(prompts)), len(prompts) - 1)
    held = set(prompts[:count])
    return [r for r in records if r["prompt"] not in held], [r for r in records if r["prompt"] in held]


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _refuse_overlap(train: Iterable[Record], heldout: Sequence[Record]) -> None:
    known = {_fingerprint(record) for record in train}
    both = [record["prompt"] for record in heldout if _fingerprint(record) in known]
    if both:
        shown = both[0] if len(both[0]) <= SHOWN else both[0][: SHOWN - 3] + "..."
        raise DataError(
            f"{KEY}.heldout_path: {len(both)} held-out row(s) are trained on too, the first '{shown}'; a score on them "
            "would say nothing. Take them out of one of the two"
        )
