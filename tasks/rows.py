"""Rows of a data set, from a file, a folder or the hub, each with where it stands, so that what is wrong is named.

    prompts.jsonl, prompts.json      one object a line; a list of objects
    prompts.csv, prompts.tsv         a head line; every value is text
    prompts.parquet                  pyarrow's types as Python's
    a folder                         what datasets.Dataset.save_to_disk wrote, or files of one of the kinds above
    owner/name                       a data set of the hub, where there is a network or a cache

Knows nothing of prompts: dataset.py maps the columns.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class DataError(UserError):
    """A data set that cannot be read; the sentence names file and line."""


@dataclass(frozen=True)
class Row:
    """One row, and where it stands."""

    where: str  # "prompts.jsonl line 3"
    folder: Path  # relative files named in it are sought here
    values: dict[str, Any]


def read_rows(path: str, key: str, name: str | None = None, split: str | None = None) -> list[Row]:
    """All rows, in their order.

    Args:
        path: a file, a folder, or a name on the hub.
        key: of the recipe, for messages: "task.dataset.path".
        name, split: of a data set of the datasets library; None: its only one.

    Raises:
        DataError: nothing is there, a file that is not of its kind, a line that is not UTF-8 or no object, or no row.
    """
    place = Path(path)
    if place.is_file():
        rows = list(_file(place, key))
    elif (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
        rows = _from_disk(place, key, split)
    elif place.is_dir():
        rows = _folder(place, key, split)
    elif place.suffix in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise DataError(f"{key}: there is no {path} (seen from {Path.cwd()})")
    else:
        rows = _from_hub(path, key, name, split)
    if not rows:
        raise DataError(f"{key}: {path} holds no row")
    return rows


def _folder(folder: Path, key: str, split: str | None) -> list[Row]:
    """The data files of a folder in the order of their names; with a split, those whose name begins with it."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    chosen = [file for file in files if split is None or file.name.startswith(split)]
    if not chosen:
        what = f"no file that begins with '{split}'" if files else f"none of {', '.join(SUFFIXES)}"
        raise DataError(f"{key}: the folder {folder} holds {what}; name a file, or a folder with some")
    return [row for file in chosen for row in _file(file, key)]


def _file(file: Path, key: str) -> Iterator[Row]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = readers.get(file.suffix)
    if reader is None:
        raise DataError(f"{key}: {file} is none of {', '.join(SUFFIXES)}")
    try:
        for where, values in reader(file):
            if not isinstance(values, dict):
                raise DataError(f"{where}: a row is an object of columns, not {type(values).__name__}")
            yield Row(where, file.parent, values)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file} line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
                ) from None


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(file):
        if line.strip():
            try:
                yield f"{file} line {number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"{file} line {number}: not JSON ({error})") from None


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    text = "".join(line for _, line in _lines(file))
    try:
        items = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from None
    if not isinstance(items, list):
        raise DataError(
            f"{file}: a list of objects is expected, not {type(items).__name__}; one object a line is .jsonl"
        )
    for number, item in enumerate(items, 1):
        yield f"{file} item {number}", item


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(
        (line for _, line in _lines(file)), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True
    )
    head: list[str] | None = None
    try:
        for cells in reader:
            where = f"{file} line {reader.line_num}"
            if head is None:
                head = cells
                if len(set(head)) < len(head):
                    twice = next(name for name in head if head.count(name) > 1)
                    raise DataError(f"{where}: two columns are called '{twice}'")
            elif cells:
                if len(cells) != len(head):
                    raise DataError(f"{where}: {len(cells)} cells where the head line names {len(head)} columns")
                yield where, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num}: not CSV ({error})") from None


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except pa.ArrowException as error:
        raise DataError(f"{file}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    for number, values in enumerate(table.to_pylist(), 1):
        yield f"{file} row {number}", values


# ---- the datasets library ----


def _from_disk(folder: Path, key: str, split: str | None) -> list[Row]:
    import datasets

    try:
        return _library_rows(datasets.load_from_disk(str(folder)), str(folder), key, split, folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {folder}: cannot be read as a saved data set ({_first_line(error)})") from error


def _from_hub(path: str, key: str, name: str | None, split: str | None) -> list[Row]:
    import datasets

    try:
        found = datasets.load_dataset(path, name)
    except Exception as error:  # the library raises anything from ConnectionError to its own
        raise DataError(
            f"{key}: there is no file or folder {path} (seen from {Path.cwd()}), and the hub gives no data set of this "
            f"name ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return _library_rows(found, path, key, split, Path.cwd())


def _library_rows(found: Any, path: str, key: str, split: str | None, folder: Path) -> list[Row]:
    import datasets

    if isinstance(found, datasets.DatasetDict):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            raise DataError(f"{key}: {path} has the splits {', '.join(found)}; name one of them in `split`")
        found = found[split]
    # As bytes and paths: images and videos are decoded where they are checked, and named there if they are broken.
    for column, feature in found.features.items():
        many = isinstance(feature, datasets.List | datasets.LargeList)
        held = feature.feature if many else feature
        if isinstance(held, datasets.Image | datasets.Video):
            plain = type(held)(decode=False)
            found = found.cast_column(column, type(feature)(plain) if many else plain)
    where = f"{path} ({split})" if split else path
    return [Row(f"{where} row {number}", folder, dict(values)) for number, values in enumerate(found, 1)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
