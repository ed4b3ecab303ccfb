"""GenEval's layout on disk: every prompt's record and images, or the one thing that is wrong with them.

DIR/00000/metadata.jsonl        one record: tag, prompt, include, exclude
DIR/00000/samples/0000.png      the images of that prompt; 0001.png, ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.heldout import EvaluationError

RELATIONS = ("left of", "right of", "above", "below")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Sample:
    """One image to be judged."""

    name: str  # 00000/samples/0000.png, below the folder of images
    record: dict[str, Any]
    path: Path | None = None  # None: only its detections are at hand
    detections: dict[str, Any] | None = None  # by class, made elsewhere; None: a detector is to look


def read_folder(images: Path, prompts: Path | None = None) -> list[Sample]:
    """All images of a folder in GenEval's layout, in order.

    Args:
        prompts: the benchmark's evaluation_metadata.jsonl; its line n must be folder n's record.

    Raises:
        EvaluationError: prompts or samples are missing, a prompt has two folders or a sample two files, or a record
            cannot be read.
    """
    if not images.is_dir():
        raise EvaluationError(f"{images}: no such folder of images")
    folders = _numbered("prompt", {path: path.name for path in images.iterdir() if path.is_dir()})
    if not folders:
        raise EvaluationError(
            f"{images}: no numbered folders there; GenEval's layout is 00000/metadata.jsonl and 00000/samples/0000.png"
        )
    asked = _prompt_list(prompts) if prompts is not None else None
    expected = len(asked) if asked is not None else max(folders) + 1
    missing = [number for number in range(expected) if number not in folders]
    if missing:
        raise EvaluationError(
            f"{images}: {len(missing)} of {expected} prompts have no folder: "
            f"{some([f'{number:05}' for number in missing])}"
        )
    surplus = [number for number in folders if number >= expected]
    if surplus:
        raise EvaluationError(
            f"{images}: folder {some([folders[n].name for n in surplus])} has no prompt: {prompts} has {expected}"
        )
    samples, counts = [], {}
    for number, folder in folders.items():
        record = _record(folder / "metadata.jsonl")
        if asked is not None and any(record.get(key) != asked[number].get(key) for key in ("prompt", "include")):
            raise EvaluationError(
                f"{folder / 'metadata.jsonl'}: is about '{record['prompt']}', but line {number + 1} "
                f"of {prompts} is '{asked[number].get('prompt')}'"
            )
        files = _files(folder / "samples")
        counts[folder.name] = len(files)
        samples += [Sample(f"{folder.name}/samples/{path.name}", record, path) for path in files]
    check_counts(counts, str(images))
    return samples


def check_counts(counts: Mapping[str, int], where: str) -> None:
    """Raises EvaluationError where some prompts have fewer images than others."""
    most = max(counts.values(), default=0)
    fewer = [f"{name} ({count})" for name, count in counts.items() if count < most]
    if fewer:
        raise EvaluationError(
            f"{where}: {len(fewer)} of {len(counts)} prompts have fewer than {most} images in samples/: {some(fewer)}"
        )


def _prompt_list(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file of prompts")
    return [asked for _, asked in lines_of(path)]


def _record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EvaluationError(f"{path}: missing; it holds the prompt's record")
    return checked_record(object_of(text_of(path), str(path)), str(path))


def checked_record(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Raises EvaluationError for a record without what the rules read, or with something else in its place."""
    for key, kind, what in (("tag", str, "a text"), ("prompt", str, "a text"), ("include", list, "a list of clauses")):
        if key not in record:
            raise EvaluationError(f"{where}: the record has no '{key}'")
        if not isinstance(record[key], kind):
            raise EvaluationError(f"{where}: {key} is {record[key]!r}; it is {what}")
    if not isinstance(record.get("exclude") or [], list):
        raise EvaluationError(f"{where}: exclude is {record['exclude']!r}; it is a list of clauses")
    for key in ("include", "exclude"):
        for clause in record.get(key) or ():
            if (
                not isinstance(clause, Mapping)
                or not isinstance(clause.get("class"), str)
                or not isinstance(clause.get("count"), int)
                or clause["count"] < 1
                or not isinstance(clause.get("color"), str | None)
                or not isinstance(clause.get("size"), str | None)
            ):
                raise EvaluationError(
                    f"{where}: {key} has {clause!r}; a clause is {{class, count from 1, color?, size?, position?}}"
                )
    for index, clause in enumerate(record["include"]):
        position = clause.get("position")
        if position is not None and (
            not isinstance(position, list)
            or len(position) != 2
            or position[0] not in RELATIONS
            or not isinstance(position[1], int)
            or position[1] not in range(index)
        ):
            raise EvaluationError(
                f"{where}: '{clause['class']}' has the position {position!r}; it is [relation, index "
                f"of an earlier clause], and relations are {', '.join(RELATIONS)}"
            )
    return dict(record)


def _files(folder: Path) -> list[Path]:
    """A prompt's images in the order of their numbers; other files are left alone."""
    there = folder.iterdir() if folder.is_dir() else ()
    files = _numbered("sample", {path: path.stem for path in there if path.suffix.lower() in SUFFIXES})
    missing = [f"{number:04}" for number in range(max(files, default=0)) if number not in files]
    if missing:
        raise EvaluationError(
            f"{folder}: has {files[max(files)].name}, but not {some(missing)}; a prompt's "
            f"samples are numbered from 0000 without a gap"
        )
    return list(files.values())


def _numbered(what: str, names: Mapping[Path, str]) -> dict[int, Path]:
    """Those whose name is a number, in its order. Raises EvaluationError where two have the same."""
    by_number: dict[int, Path] = {}
    for path, name in sorted(names.items()):
        if name.isdecimal():
            other = by_number.setdefault(int(name), path)
            if other != path:
                raise EvaluationError(
                    f"{path.parent}: {other.name} and {path.name} are both {what} {int(name)}; keep one"
                )
    return dict(sorted(by_number.items()))


# ---- reading ------------------------------------------------------------------------------------------------------


def text_of(path: Path) -> str:
    try:
        return decoded(path.read_bytes(), path)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from None


def decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise EvaluationError(f"{path}: not UTF-8 (byte {raw[error.start]:#x} in line {line})") from None


def lines_of(path: Path, raw: bytes | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Each line's place and JSON object. `raw`: what of the file is read; None: all of it."""
    lines = (text_of(path) if raw is None else decoded(raw, path)).split("\n")
    positions = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return [(where, object_of(line, where)) for where, line in positions]


def object_of(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not JSON ({error.msg}, line {error.lineno} column {error.colno})") from None
    if not isinstance(value, dict):
        raise EvaluationError(f"{where}: {type(value).__name__}, where one JSON object belongs")
    return value


def some(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
