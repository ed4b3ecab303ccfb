"""GenEval over images that any model drew, in the benchmark's own row format; geneval_folder.py reads them, and
geneval_summary.py sums the rows up.

A result row says filename, tag, prompt, correct, reason, metadata (the record as a JSON string) and details (by class
the boxes with their scores, as a JSON string), as the released script writes them, and by its sha256 what was judged.
Rows are appended as they are made, each batch in one write, so that whatever stops the command costs at most a batch:
the next call goes on from there, and judges anew what is no longer the same.

Source: GenEval (arXiv:2310.11513), djghosh13/geneval, evaluation/evaluate_images.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from evals.geneval_folder import Sample, check_counts, checked_record, lines_of, object_of, some, text_of
from evals.geneval_summary import TAGS
from evals.heldout import EvaluationError
from rewards.contract import RewardContext
from rewards.detectors.base import Detections
from rewards.detectors.coco import GENEVAL_CLASSES
from rewards.functions.geneval import THRESHOLDS, check_record, classes_of, colored_of, evaluate, kept
from runtime.errors import UserError
from runtime.files import write_whole

PROMPTS = 553
Mode = Literal["standard", "strict"]
logger = logging.getLogger(__name__)


# ---- what sees the images --------------------------------------------------------------------------------------

Sees = Callable[[Sequence[Sample]], list[Detections]]


def by_detector(context: RewardContext, samples: Sequence[Sample]) -> Sees:
    """Look at the images with the setting's detector.

    Raises:
        UnknownClass: a record asks for a class that the detector cannot see; nothing has run by then.
        UserError: a record asks for a color, and nothing can name it.
    """
    detector = context.detector_for("evaluate geneval")
    for sample in samples:
        check_record(
            detector, sample.record, f"{sample.name.split('/')[0]}/metadata.jsonl ('{sample.record['prompt']}')"
        )

    def sees(batch: Sequence[Sample]) -> list[Detections]:
        detector.clear()
        return detector.detect(
            [load_image(sample) for sample in batch],
            [classes_of(sample.record) for sample in batch],
            [colored_of(sample.record) for sample in batch],
        )

    return sees


def load_image(sample: Sample) -> np.ndarray:
    """uint8 [height, width, 3], turned upright. Raises EvaluationError for a file that is no whole image."""
    assert sample.path is not None
    try:
        with Image.open(sample.path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"{sample.path}: no image can be read from it ({error})") from None


def by_detections(path: Path, samples: Sequence[Sample] | None) -> tuple[list[Sample], Sees]:
    """Detections that were made elsewhere: one JSON object a line,
    ``{"filename": "00000/samples/0000.png", "detections": {class: [{box, score, color?}]}}``.

    Without `samples` each line brings its record as `metadata`, and lines without a filename are named by number.

    Raises:
        EvaluationError: a line that cannot be read, two for one image, or an image without one.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file of detections")
    found: dict[str, Any] = {}
    records: list[Sample] = []
    for where, row in lines_of(path):
        if not isinstance(row.get("detections"), dict):
            raise EvaluationError(f"{where}: no 'detections' by class")
        if samples is not None and not isinstance(row.get("filename"), str):
            raise EvaluationError(f"{where}: no 'filename' of the image")
        name = str(row["filename"]) if "filename" in row else f"{len(records):05}/samples/0000.png"
        name = "/".join(Path(name).parts[-3:])
        if name in found:
            raise EvaluationError(f"{where}: a second row for {name}")
        found[name] = _boxes(row["detections"], where)
        if samples is None:
            if not isinstance(row.get("metadata"), dict):
                raise EvaluationError(f"{where}: no 'metadata', the image's record (or give --images)")
            records.append(Sample(name, checked_record({"prompt": "", **row["metadata"]}, where)))
    chosen = list(samples) if samples is not None else records
    missing = [sample.name for sample in chosen if sample.name not in found]
    if missing:
        raise EvaluationError(f"{path}: {len(missing)} of {len(chosen)} images have no row: {some(missing)}")
    check_counts(Counter(sample.name.split("/")[0] for sample in chosen), str(path))
    return (
        [replace(sample, detections=found[sample.name]) for sample in chosen],
        lambda batch: [found[sample.name] for sample in batch],
    )


def _boxes(detections: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name, items in detections.items():
        for item in items if isinstance(items, list) else (None,):
            if (
                not isinstance(item, dict)
                or not isinstance(item.get("score"), int | float)
                or not isinstance(item.get("box"), list)
                or len(item["box"]) != 4
            ):
                raise EvaluationError(
                    f"{where}: detections of '{name}' are not a list of {{box [x0, y0, x1, y1], score, color?}}"
                )
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
        self.path, self._beside = path, path.with_name(path.name + ".settings.json")
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_dir():
            raise EvaluationError(f"{path}: a folder, where the file for the rows belongs")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.stat().st_size:
                self._compare(dict(settings))
                self._read()
            write_whole(self._beside, json.dumps(dict(settings)) + "\n")
        except OSError as error:
            raise EvaluationError(f"{path}: cannot write there ({error.strerror})") from None

    def _compare(self, settings: dict[str, Any]) -> None:
        now = json.dumps(settings)
        if not self._beside.is_file():
            raise EvaluationError(
                f"{self.path}: what its rows were made with stands in {self._beside.name}, which is "
                f"missing; if it was {now}, write that there, else give another --out"
            )
        try:
            made = object_of(text_of(self._beside), str(self._beside))
        except EvaluationError as error:
            raise EvaluationError(
                f"{error}; it says what the rows of {self.path.name} were made with. If that was "
                f"{now}, write that there, else give another --out"
            ) from None
        if made != settings:
            raise EvaluationError(
                f"{self.path}: its rows were made with {json.dumps(made)}, and now it is {now}; give "
                f"another --out, or remove it"
            )

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for where, row in lines_of(self.path, whole):
            if not isinstance(row.get("filename"), str) or not isinstance(row.get("correct"), bool):
                raise EvaluationError(f"{where}: no result row; give another --out")
            self.rows[_key(row)] = row
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))

    def still_open(self, samples: Sequence[Sample], images: Path | None = None) -> list[Sample]:
        """The samples that have no row, or one that was made of another image or record.

        Raises EvaluationError where rows belong to none of the samples: they are not thrown away.
        """
        gone = Counter(name.split("/")[0] for name in self.rows.keys() - {sample.name for sample in samples})
        if gone:
            raise EvaluationError(
                f"{self.path}: has {sum(gone.values())} rows of images that are gone: "
                f"{some([f'{name} ({count})' for name, count in sorted(gone.items())])}; put them "
                f"back, take their lines out of it, or give another --out"
            )
        open_ones, other = [], []
        for sample in samples:
            row = self.rows.get(sample.name)
            if row is None:
                open_ones.append(sample)
            elif any(row.get(key) != value for key, value in _identity(sample).items()):
                open_ones.append(sample)
                other.append(sample.name)
            else:  # the folder may have moved
                self.rows[sample.name] = {**row, "filename": _filename(sample, images)}
        if other:
            logger.warning(
                "%s: %d of its %d rows are of other images or records, which are judged anew: %s",
                self.path,
                len(other),
                len(self.rows),
                some(other),
            )
        return open_ones

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
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def _key(row: Mapping[str, Any]) -> str:
    return "/".join(Path(str(row["filename"])).parts[-3:])


def judge(
    samples: Sequence[Sample],
    sees: Sees,
    results: Results,
    mode: Mode = "standard",
    thresholds: tuple[float, float] = THRESHOLDS,
    batch_size: int = 32,
    images: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Judge what has no row yet, batch by batch, and give all rows in the samples' order.

    Args:
        progress: told how many images are done after each batch.

    Raises:
        EvaluationError: an image that cannot be read. Its batch's other images are judged first, and all are kept.
            Or there are rows of images that are gone.
        UserError: what the detector cannot do.
    """

    def rows_of(batch: Sequence[Sample]) -> list[dict[str, Any]]:
        # Before they are looked at: an image that is drawn anew in between is judged anew by the next call.
        identities = [_identity(sample) for sample in batch]
        return [
            _row(sample, identity, objects, mode, thresholds, images)
            for sample, identity, objects in zip(batch, identities, sees(batch), strict=True)
        ]

    open_ones = results.still_open(samples, images)
    for start in range(0, len(open_ones), batch_size):
        batch = open_ones[start : start + batch_size]
        try:
            results.append(rows_of(batch))
        except EvaluationError:
            # One of them is the bad one: the others go first, one at a time, so that theirs are not lost.
            fault: EvaluationError | None = None
            for sample in batch:
                try:
                    results.append(rows_of([sample]))
                except EvaluationError as error:
                    fault = fault or error
            if fault is not None:
                raise EvaluationError(f"{fault}; the rows of the others are kept") from None
        if progress is not None:
            progress(len(samples) - len(open_ones) + start + len(batch))
    return results.finish(samples)


def _identity(sample: Sample) -> dict[str, str]:
    """What is judged: the record, and the bytes of the image and of detections that were made elsewhere."""
    digest = hashlib.sha256()
    if sample.path is not None:
        try:
            digest.update(sample.path.read_bytes())
        except OSError as error:
            raise EvaluationError(f"{sample.path}: cannot be read ({error.strerror})") from None
    if sample.detections is not None:
        digest.update(json.dumps(sample.detections, sort_keys=True).encode())
    return {
        "tag": sample.record["tag"],
        "prompt": sample.record["prompt"],
        "metadata": json.dumps(sample.record),
        "sha256": digest.hexdigest(),
    }


def _filename(sample: Sample, images: Path | None) -> str:
    return str(images / sample.name) if images is not None else sample.name


def _row(
    sample: Sample,
    identity: Mapping[str, str],
    found: Mapping[str, Any],
    mode: Mode,
    thresholds: tuple[float, float],
    images: Path | None,
) -> dict[str, Any]:
    correct, reason = evaluate(sample.record, found, mode, thresholds)
    details = {
        name: [[*map(float, o.box), float(o.score)] for o in objects]
        for name, objects in kept(sample.record, found, thresholds).items()
        if objects
    }
    return {
        "filename": _filename(sample, images),
        "tag": identity["tag"],
        "prompt": identity["prompt"],
        "correct": bool(correct),
        "reason": reason,
        "metadata": identity["metadata"],
        "details": json.dumps(details),
        "sha256": identity["sha256"],
    }


def prompts_of_benchmark(samples: Sequence[Sample]) -> int | None:
    """How many prompts the benchmark has, where all records are of its tags and classes; None for a set of another
    kind."""
    clauses = [clause for sample in samples for clause in sample.record["include"]]
    own = all(sample.record["tag"] in TAGS for sample in samples) and all(
        clause["class"] in GENEVAL_CLASSES for clause in clauses
    )
    return PROMPTS if own else None


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, float]:
    if len(thresholds) != 2 or not all(0 <= score < 1 for score in thresholds):
        raise UserError(
            f"--thresholds: {' '.join(map(str, thresholds))}; two scores from 0 to below 1, of an object "
            f"and of one that is counted"
        )
    return thresholds[0], thresholds[1]
