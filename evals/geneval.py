"""GenEval over a folder of pictures that any model drew, in the benchmark's own layout, row format and summary.

    DIR/00000/metadata.jsonl        one record: tag, prompt, include, exclude
    DIR/00000/samples/0000.png      the pictures of that prompt; 0001.png, ...

A result row says filename, tag, prompt, correct, reason, metadata (the record as a JSON string) and details (by class
the boxes with their scores, as a JSON string), as the released script writes them. Rows are appended as they are made,
each batch in one write, so that whatever stops the command costs at most a batch: the next call goes on from there.

Source: GenEval (arXiv:2310.11513), djghosh13/geneval, evaluation/evaluate_images.py and summary_scores.py. A score is
the mean of the tags' means; a prompt counts as solved if any of its pictures is correct.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from evals.heldout import EvaluationError, mean_of_tags
from rewards.base import Setting
from rewards.detectors.base import Detections
from rewards.geneval import THRESHOLDS, check_record, classes_of, colored_of, evaluate, kept
from rollout.errors import UserError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Mode = Literal["standard", "strict"]


@dataclass(frozen=True)
class Sample:
    """One picture to be judged."""

    name: str  # 00000/samples/0000.png, below the folder of pictures
    record: dict[str, Any]
    path: Path | None = None  # None: only its detections are at hand


# ---- what is there ------------------------------------------------------------------------------------------------

def read_folder(images: Path, prompts: Path | None = None) -> list[Sample]:
    """All pictures of a folder in GenEval's layout, in order.

    Args:
        prompts: the benchmark's evaluation_metadata.jsonl; its line n must be folder n's record.

    Raises:
        EvaluationError: prompts or samples are missing, a sample has two files, or a record cannot be read.
    """
    if not images.is_dir():
        raise EvaluationError(f"{images}: no such folder of pictures")
    folders = {int(path.name): path for path in sorted(images.iterdir()) if path.is_dir() and path.name.isdigit()}
    if not folders:
        raise EvaluationError(f"{images}: no numbered folders there; GenEval's layout is 00000/metadata.jsonl and "
                              f"00000/samples/0000.png")
    asked = _prompt_list(prompts) if prompts is not None else None
    expected = len(asked) if asked is not None else max(folders) + 1
    missing = [number for number in range(expected) if number not in folders]
    if missing:
        raise EvaluationError(f"{images}: {len(missing)} of {expected} prompts have no folder: "
                              f"{_some([f'{number:05}' for number in missing])}")
    surplus = [number for number in folders if number >= expected]
    if surplus:
        raise EvaluationError(f"{images}: folder {_some([folders[n].name for n in surplus])} has no prompt: {prompts} "
                              f"has {expected}")
    samples, counts = [], {}
    for number, folder in sorted(folders.items()):
        record = _record(folder / "metadata.jsonl")
        if asked is not None and any(record.get(key) != asked[number].get(key) for key in ("prompt", "include")):
            raise EvaluationError(f"{folder / 'metadata.jsonl'}: is about '{record['prompt']}', but line {number + 1} "
                                  f"of {prompts} is '{asked[number].get('prompt')}'")
        files = _files(folder / "samples")
        counts[number] = len(files)
        samples += [Sample(f"{folder.name}/samples/{path.name}", record, path) for path in files]
    most = max(counts.values())
    fewer = [f"{folders[number].name} ({count})" for number, count in counts.items() if count < most]
    if fewer:
        raise EvaluationError(f"{images}: {len(fewer)} of {expected} prompts have fewer than {most} pictures in "
                              f"samples/: {_some(fewer)}")
    return samples


def _prompt_list(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file of prompts")
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(path.read_text().splitlines(), 1)
            if line.strip()]


def _record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EvaluationError(f"{path}: missing; it holds the prompt's record")
    return checked_record(_parsed(path.read_text(), str(path)), str(path))


def checked_record(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Raises EvaluationError for a record without what the rules read."""
    for key in ("tag", "prompt", "include"):
        if key not in record:
            raise EvaluationError(f"{where}: the record has no '{key}'")
    for key in ("include", "exclude"):
        for clause in record.get(key) or ():
            if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str) or \
                    not isinstance(clause.get("count"), int) or clause["count"] < 1:
                raise EvaluationError(f"{where}: {key} has {clause!r}; a clause is {{class, count from 1, color?, "
                                      f"position?}}")
    for place, clause in enumerate(record["include"]):
        position = clause.get("position")
        if position is not None and (not isinstance(position, Sequence) or len(position) != 2
                                     or position[0] not in RELATIONS or position[1] not in range(place)):
            raise EvaluationError(f"{where}: '{clause['class']}' has the position {position!r}; it is [relation, index "
                                  f"of an earlier clause], and relations are {', '.join(RELATIONS)}")
    return dict(record)


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not JSON ({error.msg}, line {error.lineno} column {error.colno})") from None
    if not isinstance(value, dict):
        raise EvaluationError(f"{where}: {type(value).__name__}, where one JSON object belongs")
    return value


def _files(folder: Path) -> list[Path]:
    """A prompt's pictures in the order of their numbers; other files are left alone."""
    by_number: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() not in SUFFIXES or not path.stem.isdigit():
            continue
        other = by_number.setdefault(int(path.stem), path)
        if other != path:
            raise EvaluationError(f"{folder}: {other.name} and {path.name} are both sample {int(path.stem)}; keep one")
    return [by_number[number] for number in sorted(by_number)]


def _some(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# ---- what sees the pictures --------------------------------------------------------------------------------------

Sees = Callable[[Sequence[Sample]], list[Detections]]


def by_detector(setting: Setting, samples: Sequence[Sample]) -> Sees:
    """Look at the pictures with the setting's detector.

    Raises:
        UnknownClass: a record asks for a class that the detector cannot see; nothing has run by then.
        UserError: a record asks for a colour, and nothing can name it.
    """
    detector = setting.detector_for("evaluate geneval")
    for sample in samples:
        check_record(detector, sample.record, f"{sample.name.split('/')[0]}/metadata.jsonl "
                                              f"('{sample.record['prompt']}')")

    def sees(batch: Sequence[Sample]) -> list[Detections]:
        detector.clear()
        return detector.detect([load_picture(sample) for sample in batch],
                               [classes_of(sample.record) for sample in batch],
                               [colored_of(sample.record) for sample in batch])

    return sees


def load_picture(sample: Sample) -> np.ndarray:
    """uint8 [height, width, 3], turned upright. Raises EvaluationError for a file that is no whole picture."""
    assert sample.path is not None
    try:
        with Image.open(sample.path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"{sample.path}: no picture can be read from it ({error}); the rows of the others are "
                              f"kept") from None


def by_detections(path: Path, samples: Sequence[Sample] | None) -> tuple[list[Sample], Sees]:
    """Detections that were made elsewhere: one JSON object a line,
    ``{"filename": "00000/samples/0000.png", "detections": {class: [{box, score, color?}]}}``.

    Without `samples` each line brings its record as `metadata`, and lines without a filename are named by number.

    Raises:
        EvaluationError: a line that cannot be read, two for one picture, or a picture without one.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file of detections")
    found: dict[str, Any] = {}
    records: list[Sample] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        if not isinstance(row.get("detections"), dict):
            raise EvaluationError(f"{where}: no 'detections' by class")
        if samples is not None and not isinstance(row.get("filename"), str):
            raise EvaluationError(f"{where}: no 'filename' of the picture")
        name = str(row["filename"]) if "filename" in row else f"{len(records):05}/samples/0000.png"
        name = "/".join(Path(name).parts[-3:])
        if name in found:
            raise EvaluationError(f"{where}: a second row for {name}")
        found[name] = _boxes(row["detections"], where)
        if samples is None:
            if not isinstance(row.get("metadata"), dict):
                raise EvaluationError(f"{where}: no 'metadata', the picture's record (or give --images)")
            records.append(Sample(name, checked_record({"prompt": "", **row["metadata"]}, where)))
    chosen = list(samples) if samples is not None else records
    missing = [sample.name for sample in chosen if sample.name not in found]
    if missing:
        raise EvaluationError(f"{path}: {len(missing)} of {len(chosen)} pictures have no row: {_some(missing)}")
    return chosen, lambda batch: [found[sample.name] for sample in batch]


def _boxes(detections: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name, items in detections.items():
        for item in items if isinstance(items, list) else (None,):
            if not isinstance(item, dict) or not isinstance(item.get("score"), int | float) or \
                    not isinstance(item.get("box"), list) or len(item["box"]) != 4:
                raise EvaluationError(f"{where}: detections of '{name}' are not a list of {{box [x0, y0, x1, y1], "
                                      f"score, color?}}")
    return dict(detections)


# ---- the results --------------------------------------------------------------------------------------------------

class Results:
    """The file of rows: what is finished in it, and how more is added."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open it, or go on with it: a last line that was cut off is dropped.

        Args:
            settings: what rows must have in common, kept beside the rows: rows of two detectors make no score.

        Raises:
            EvaluationError: the rows there were made with other settings, or the file holds something else.
        """
        self.path, beside = path, path.with_name(path.name + ".settings.json")
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.stat().st_size:
                self._read()
                if beside.is_file() and json.loads(beside.read_text()) != dict(settings):
                    raise EvaluationError(f"{path}: its rows were made with {beside.read_text().strip()}, and now it "
                                          f"is {json.dumps(dict(settings))}; give another --out, or remove it")
            _replace(beside, json.dumps(dict(settings)) + "\n")
        except OSError as error:
            raise EvaluationError(f"{path}: cannot write there ({error.strerror})") from None

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw[:raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode().splitlines(), 1):
            row = _parsed(line, f"{self.path}, line {number}")
            if "filename" not in row or "correct" not in row:
                raise EvaluationError(f"{self.path}, line {number}: no result row; give another --out")
            self.rows[_key(row)] = row
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add whole rows in one write."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with open(self.path, "ab", buffering=0) as file:
            file.write(text.encode())
            os.fsync(file.fileno())
        self.rows.update((_key(row), row) for row in rows)

    def finish(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """The samples' rows in their order, which the file then has too."""
        rows = [self.rows[sample.name] for sample in samples]
        _replace(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def _key(row: Mapping[str, Any]) -> str:
    return "/".join(Path(str(row["filename"])).parts[-3:])


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def judge(samples: Sequence[Sample], sees: Sees, results: Results, mode: Mode = "standard",
          thresholds: tuple[float, float] = THRESHOLDS, batch_size: int = 32, images: Path | None = None,
          progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
    """Judge what has no row yet, batch by batch, and give all rows in the samples' order.

    Args:
        progress: told how many pictures are done after each batch.

    Raises:
        EvaluationError: a picture that cannot be read. Its batch's other pictures are judged first, and all are kept.
        UserError: what the detector cannot do.
    """
    open_ones = [sample for sample in samples if sample.name not in results.rows]
    for start in range(0, len(open_ones), batch_size):
        batch = open_ones[start:start + batch_size]
        try:
            found = sees(batch)
        except EvaluationError:
            # One of them is the bad one: the others go first, one at a time, so that theirs are not lost.
            fault: EvaluationError | None = None
            for sample in batch:
                try:
                    results.append([_row(sample, sees([sample])[0], mode, thresholds, images)])
                except EvaluationError as error:
                    fault = fault or error
            if fault is not None:
                raise fault from None
        else:
            results.append([_row(sample, objects, mode, thresholds, images)
                            for sample, objects in zip(batch, found, strict=True)])
        if progress is not None:
            progress(len(samples) - len(open_ones) + start + len(batch))
    return results.finish(samples)


def _row(sample: Sample, found: Mapping[str, Any], mode: Mode, thresholds: tuple[float, float],
         images: Path | None) -> dict[str, Any]:
    record = sample.record
    correct, reason = evaluate(record, found, mode, thresholds)
    details = {name: [[*map(float, o.box), float(o.score)] for o in objects]
               for name, objects in kept(record, found, thresholds).items() if objects}
    return {"filename": str(images / sample.name) if images is not None else sample.name, "tag": record["tag"],
            "prompt": record["prompt"], "correct": bool(correct), "reason": reason, "metadata": json.dumps(record),
            "details": json.dumps(details)}


@dataclass(frozen=True)
class Summary:
    """GenEval's numbers, all in [0, 1]."""

    overall: float  # the mean of the tags
    tags: dict[str, float]  # share of correct pictures
    images: float  # share of correct pictures over all
    prompts: float  # share of prompts with a correct picture
    counts: dict[str, tuple[int, int]]  # by tag: correct, all
    num_images: int
    num_prompts: int

    def as_json(self) -> dict[str, Any]:
        return {"overall": self.overall, "tags": self.tags, "images": self.images, "prompts": self.prompts,
                "num_images": self.num_images, "num_prompts": self.num_prompts}


def summarise(rows: Sequence[Mapping[str, Any]]) -> Summary:
    """The scores of all rows. Raises EvaluationError where there are none."""
    if not rows:
        raise EvaluationError("there are no pictures to sum up")
    names = [tag for tag in TAGS if any(row["tag"] == tag for row in rows)]
    names += sorted({row["tag"] for row in rows} - set(TAGS))
    counts = {tag: (sum(bool(row["correct"]) for row in rows if row["tag"] == tag),
                    sum(row["tag"] == tag for row in rows)) for tag in names}
    solved: dict[str, bool] = {}
    for row in rows:  # a prompt is its record, as in the released summary
        solved[row["metadata"]] = solved.get(row["metadata"], False) or bool(row["correct"])
    correct = [float(bool(row["correct"])) for row in rows]
    return Summary(mean_of_tags(correct, [row["tag"] for row in rows]),
                   {tag: hits / total for tag, (hits, total) in counts.items()}, sum(correct) / len(rows),
                   sum(solved.values()) / len(solved), counts, len(rows), len(solved))


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, float]:
    if len(thresholds) != 2 or not all(0 <= score < 1 for score in thresholds):
        raise UserError(f"--thresholds: {' '.join(map(str, thresholds))}; two scores from 0 to below 1, of an object "
                        f"and of one that is counted")
    return thresholds[0], thresholds[1]
