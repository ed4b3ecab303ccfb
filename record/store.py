"""Trajectories on disk, without loss and readable without our code (docs/record.md describes every column).

    folder/
        trajectories.parquet    one row a trajectory
        segments.parquet        one row a segment: ids, decisions, laws and contexts as lists
        images/*.png          named by the column `image`
        latents.safetensors     latents, denoising steps and frames, named "<trajectory>-<segment>.<array>"

A folder is written under another name, flushed to the disk and renamed, so that one that exists is a whole one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from record.trajectory import (
    Author,
    Context,
    Decisions,
    FlowSteps,
    Frames,
    Guidance,
    Modality,
    Piece,
    RecordError,
    SamplingParams,
    Segment,
    StopReason,
    Trajectory,
)
from runtime.errors import UserError, remedy
from runtime.files import whole_folder

VERSION = "3"
# Earlier versions are read, and written no more. Version 1 (release 0.1) had other names for these columns; these of
# today's came with version 3.
_COLUMNS_1 = {"image": "picture"}
_NEW_IN_3 = ("parent", "exact", "sampler", "frames")
_VERSION_KEY = b"underdrawing.record"
_PNG_END = b"IEND\xaeB`\x82"
_FILES = ("trajectories.parquet", "segments.parquet", "latents.safetensors")
_IMAGE = re.compile(r"-?\d+--?\d+-\d+(\.\d+)?\.png")
_PAGE = "report.html"  # `underdrawing view` makes it of the trajectories, and goes with them

TRAJECTORIES = pa.schema(
    [
        ("trajectory", pa.int32()),
        ("prompt", pa.string()),
        ("record", pa.string()),
        ("format", pa.string()),
        ("group", pa.int64()),
        ("member", pa.int64()),
        ("seed", pa.int64()),
        ("parent", pa.list_(pa.int64())),
        ("exact", pa.bool_()),
        ("stop", pa.string()),
        ("segments", pa.int32()),
        ("reward", pa.float64()),
        ("rewards", pa.string()),
        ("segment_rewards", pa.string()),
        ("advantage", pa.list_(pa.float32())),
        ("info", pa.string()),
    ],
    metadata={_VERSION_KEY: VERSION},
)

SEGMENTS = pa.schema(
    [
        ("trajectory", pa.int32()),
        ("segment", pa.int32()),
        ("role", pa.string()),
        ("author", pa.string()),
        ("modality", pa.string()),
        ("trained", pa.bool_()),
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("version", pa.int64()),
        ("image", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("kind", pa.list_(pa.int8())),
        ("position", pa.list_(pa.int32())),
        ("logprob", pa.list_(pa.float32())),
        ("temperature", pa.list_(pa.float32())),
        ("allowed", pa.list_(pa.int32())),
        ("sets", pa.list_(pa.list_(pa.int32()))),
        ("guidance", pa.string()),
        ("contexts", pa.string()),
        ("latent", pa.bool_()),
        ("flow", pa.bool_()),
        ("sampler", pa.string()),
        ("frames", pa.bool_()),
    ],
    metadata={_VERSION_KEY: VERSION},
)


_FLOW_ARRAYS = tuple(part.name for part in fields(FlowSteps) if part.name != "sampler")
_FRAME_ARRAYS = tuple(part.name for part in fields(Frames))


class StoreError(UserError):
    """Trajectories that cannot be written."""


# ---- saving ----


def save_trajectories(trajectories: Sequence[Trajectory], folder: str | Path) -> None:
    """Write a folder, or replace it whole.

    Raises:
        StoreError: the disk is full or not writable, or as check_folder. Nothing half-written is left, and what was
            there stays.
        RecordError: a value that is no JSON, or not of the type that the record declares; names the trajectory.
    """
    folder = Path(folder)
    check_folder(folder)
    try:
        with whole_folder(folder) as fresh:
            (fresh / "images").mkdir()
            _write(trajectories, fresh)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StoreError(
            f"{folder}: the trajectories cannot be written ({reason}); "
            f"{remedy(error, 'choose another folder')}. Nothing was left half-written"
        ) from error


def check_folder(folder: str | Path) -> None:
    """Whether trajectories may be saved there: it is new, empty, or holds stored trajectories and nothing else.

    Raises:
        StoreError: it is a file, the current folder or one above that, or it holds what replacing it would delete.
    """
    folder = Path(folder)
    try:
        if Path.cwd().is_relative_to(folder.resolve()):
            raise StoreError(
                f"{folder}: the current folder is there, and saving trajectories replaces a folder whole; "
                "name a new one"
            )
        for parent in (folder, *folder.parents):
            if parent.exists() and not parent.is_dir():
                raise StoreError(
                    f"{folder}: the trajectories cannot be written ({parent} is a file); choose another folder"
                )
        names = sorted(os.listdir(folder)) if folder.exists() else []
        if names and not _is_stored(folder):
            raise StoreError(
                f"{folder}: holds '{names[0]}' and no stored trajectories, and saving would delete what "
                "is there; choose another folder"
            )
        foreign = _foreign(folder, names)
    except OSError as error:
        raise StoreError(
            f"{folder}: the trajectories cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    if foreign is not None:
        raise StoreError(
            f"{folder}: holds '{foreign}' beside stored trajectories, and saving would delete it; move it "
            "away, or choose another folder"
        )


def check_beside(file: str | Path) -> None:
    """Whether a file of somebody's may be written there without getting in the way of saving trajectories.

    Raises:
        StoreError: it would lie in stored trajectories, which are replaced whole and never with a foreign file in them.
            A report.html is none.
    """
    file = Path(file)
    place = file.resolve()
    for folder in place.parents:
        if _is_stored(folder) and place != folder / _PAGE:
            raise StoreError(
                f"{file}: would lie in stored trajectories ({folder}), and a run that is resumed refuses to save where "
                f"it finds it; name a file outside, such as {folder.parent / f'{folder.name}-{file.name}'}"
            )


def _is_stored(folder: Path) -> bool:
    try:
        return _VERSION_KEY in (pq.read_schema(folder / "trajectories.parquet").metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _foreign(folder: Path, names: Sequence[str]) -> str | None:
    """The first thing in a folder of stored trajectories that `save_trajectories` did not write."""
    for name in names:
        path = folder / name
        if name in ("images", "pictures") and path.is_dir():  # version 1 had pictures/
            for image in sorted(os.listdir(path)):
                if not (_IMAGE.fullmatch(image) and (path / image).is_file()):
                    return f"{name}/{image}"
        elif not (name in (*_FILES, _PAGE) and path.is_file()):
            return name
    return None


def _write(trajectories: Sequence[Trajectory], folder: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    segment_rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    for number, trajectory in enumerate(trajectories):
        where = f"trajectory {number} ({trajectory.key})"
        rows.append(_row(number, trajectory, where))
        for index, segment in enumerate(trajectory.segments):
            row = _segment_row(number, index, segment, f"{where}, segment {index} ({segment.role})", arrays)
            if segment.image is not None:
                name = f"{trajectory.key}-{index}"  # a demonstration's key may occur more than once
                name = f"{name}.{number}" if name in taken else name
                taken.add(name)
                row["image"] = f"images/{name}.png"
                with open(folder / row["image"], "wb") as file:
                    Image.fromarray(segment.image).save(file, "PNG", compress_level=3)
            segment_rows.append(row)
    for name, table, schema in (("trajectories", rows, TRAJECTORIES), ("segments", segment_rows, SEGMENTS)):
        try:
            columns = pa.Table.from_pylist(table, schema)
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise RecordError(f"{name}: a value does not have the type that the record declares ({error})") from error
        pq.write_table(columns, folder / f"{name}.parquet", write_page_checksum=True)
    if arrays:
        save_file(arrays, folder / "latents.safetensors")


def _row(number: int, trajectory: Trajectory, where: str) -> dict[str, Any]:
    return {
        "trajectory": number,
        "prompt": trajectory.prompt,
        "record": _json(trajectory.record, f"{where}: record"),
        "format": trajectory.format,
        "group": trajectory.group,
        "member": trajectory.member,
        "seed": trajectory.seed,
        "parent": None if trajectory.parent is None else list(trajectory.parent),
        "exact": trajectory.exact,
        "stop": trajectory.stop.value,
        "segments": len(trajectory.segments),
        "reward": trajectory.reward,
        "rewards": _json(trajectory.rewards, f"{where}: rewards"),
        "segment_rewards": _json(trajectory.segment_rewards, f"{where}: segment_rewards"),
        "advantage": _list(trajectory.advantage_S, np.float32, f"{where}: advantage_S"),
        "info": _json(trajectory.info, f"{where}: info"),
    }


def _segment_row(
    number: int, index: int, segment: Segment, where: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trajectory": number,
        "segment": index,
        "role": segment.role,
        "author": segment.author.value,
        "modality": segment.modality.value,
        "trained": bool(segment.trained),
        "text": segment.text,
        "ids": _list(segment.ids, np.int32, f"{where}: ids"),
        "version": segment.version,
        "contexts": _json([_context(c) for c in segment.contexts], f"{where}: contexts"),
        "latent": segment.latent is not None,
        "flow": segment.flow is not None,
        "frames": segment.frames is not None,
    }
    if segment.image is not None:
        if segment.image.shape[2] != 3 or not segment.image.size:
            raise RecordError(f"{where}: an image is uint8 [height, width, 3], not {list(segment.image.shape)}")
        row["height"], row["width"] = segment.image.shape[:2]
    if segment.decisions is not None:
        made, sampling = segment.decisions, segment.decisions.sampling
        row |= {
            "kind": _list(made.kind_N, np.int8, f"{where}: kind_N"),
            "position": _list(made.position_N, np.int32, f"{where}: position_N"),
            "logprob": _list(made.logprob_N, np.float32, f"{where}: logprob_N"),
            "temperature": _list(sampling.temperature_N, np.float32, f"{where}: temperature_N"),
            "allowed": _list(sampling.allowed_N, np.int32, f"{where}: allowed_N"),
            "sets": [_list(np.asarray(ranges).reshape(-1), np.int32, f"{where}: sets") for ranges in sampling.sets],
        }
        if sampling.guidance is not None:
            row["guidance"] = _json(
                {"kind": sampling.guidance.kind, "scales": sampling.guidance.scales}, f"{where}: guidance"
            )
    if segment.latent is not None:
        arrays[f"{number}-{index}.latent"] = np.ascontiguousarray(segment.latent)
    if segment.flow is not None:
        row["sampler"] = _json(segment.flow.sampler, f"{where}: flow.sampler")
        for part in _FLOW_ARRAYS:
            arrays[f"{number}-{index}.{part}"] = np.ascontiguousarray(getattr(segment.flow, part))
    if segment.frames is not None:
        for part in _FRAME_ARRAYS:
            arrays[f"{number}-{index}.{part}"] = np.ascontiguousarray(getattr(segment.frames, part))
    return row


def _context(context: Context) -> dict[str, Any]:
    pieces = [[p.segment, p.form, p.start, None if p.keep is None else list(p.keep)] for p in context.pieces]
    return {"branch": context.branch, "start": context.start, "pieces": pieces}


def _list(array: np.ndarray | None, dtype: type, where: str) -> np.ndarray | None:
    """The array in the record's own type; refused where that would change a value."""
    if array is None:
        return None
    array = np.asarray(array)
    cast: np.ndarray = array.astype(dtype)
    if array.ndim != 1 or (array.dtype != cast.dtype and not np.array_equal(cast, array, equal_nan=True)):
        raise RecordError(f"{where}: {array.dtype} {list(array.shape)} cannot be kept as {np.dtype(dtype)} [N]")
    return cast


def _json(value: Any, where: str) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, np.generic):
            return item.item()
        raise TypeError(f"a {type(item).__name__}")

    try:
        return json.dumps(value, default=plain, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{where}: holds what JSON cannot say ({error})") from error


# ---- loading ----


def load_trajectories(folder: str | Path) -> list[Trajectory]:
    """What `save_trajectories` wrote, in the same order.

    Raises:
        RecordError: a file is missing, truncated or altered, or the files do not belong together; names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError(f"{folder}: there are no trajectories here; expected a folder with trajectories.parquet")
    rows = _read(folder / "trajectories.parquet", TRAJECTORIES)
    segments = _read(folder / "segments.parquet", SEGMENTS)
    arrays = _arrays(folder, any(any(segments[column]) for column in ("latent", "flow", "frames")))
    of: list[list[int]] = [[] for _ in rows["trajectory"]]
    for position, (number, index) in enumerate(zip(segments["trajectory"], segments["segment"], strict=True)):
        if not 0 <= number < len(of) or index != len(of[number]):
            raise RecordError(
                f"{folder / 'segments.parquet'}: row {position} is segment {index} of trajectory "
                f"{number}, which does not follow the row before it"
            )
        of[number].append(position)
    made = []
    for number, positions in enumerate(of):
        if len(positions) != rows["segments"][number]:
            raise RecordError(
                f"{folder / 'segments.parquet'}: {len(positions)} segments of trajectory {number}; "
                f"trajectories.parquet says {rows['segments'][number]}"
            )
        row = {name: column[number] for name, column in rows.items()}
        parts = [{name: column[position] for name, column in segments.items()} for position in positions]
        try:
            made.append(_trajectory(row, [_segment(part, folder, arrays) for part in parts]))
        except (ValueError, KeyError, TypeError, IndexError) as error:  # JSON, enum names, shapes
            raise RecordError(f"{folder}: trajectory {number} cannot be read ({error})") from error
    return made


def _read(path: Path, schema: pa.Schema) -> dict[str, list[Any]]:
    """Columns by name; lists as numpy arrays of the declared type, None where there is none."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise RecordError(f"{path}: missing; the folder is not whole") from error
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path}: cannot be read, it may be truncated or altered ({error})") from error
    version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
    if version not in (VERSION, "1", "2"):
        raise RecordError(f"{path}: written as version {version} of the record; this one reads 1 to {VERSION}")
    if version == "1":
        old = {old: new for new, old in _COLUMNS_1.items()}
        table = table.rename_columns([old.get(name, name) for name in table.column_names])
    if version != VERSION:
        for field in schema:
            if field.name in _NEW_IN_3 and field.name not in table.column_names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise RecordError(f"{path}: the column '{missing[0]}' is missing")
    return {field.name: list(_column(table.column(field.name), field.type)) for field in schema}


def _column(column: pa.ChunkedArray, kind: pa.DataType) -> Iterator[Any]:
    if not pa.types.is_list(kind):
        yield from column.to_pylist()
        return
    for chunk in column.chunks:
        chunk = chunk.cast(kind)
        valid, offsets, values = chunk.is_valid().to_pylist(), chunk.offsets.to_pylist(), chunk.values
        items = (
            list(_column(pa.chunked_array([values]), kind.value_type))
            if pa.types.is_list(kind.value_type)
            else values.to_numpy(zero_copy_only=False)
        )
        for row, present in enumerate(valid):
            piece = items[offsets[row] : offsets[row + 1]]
            yield None if not present else piece if isinstance(piece, list) else piece.copy()


def _arrays(folder: Path, needed: bool) -> dict[str, np.ndarray]:
    path = folder / "latents.safetensors"
    if not needed:
        return {}
    if not path.is_file():
        raise RecordError(f"{path}: missing; the folder is not whole")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read, it may be truncated or altered ({error})") from error


def _trajectory(row: dict[str, Any], segments: list[Segment]) -> Trajectory:
    credited = {
        part: {int(index): value for index, value in by.items()}
        for part, by in json.loads(row["segment_rewards"]).items()
    }
    return Trajectory(
        prompt=row["prompt"],
        record=json.loads(row["record"]),
        format=row["format"],
        segments=segments,
        group=row["group"],
        member=row["member"],
        seed=row["seed"],
        parent=None if row["parent"] is None else (int(row["parent"][0]), int(row["parent"][1])),
        exact=row["exact"] is not False,
        stop=StopReason(row["stop"]),
        rewards=json.loads(row["rewards"]),
        segment_rewards=credited,
        reward=row["reward"],
        advantage_S=row["advantage"],
        info=json.loads(row["info"]),
    )


def _segment(row: dict[str, Any], folder: Path, arrays: dict[str, np.ndarray]) -> Segment:
    name = f"{row['trajectory']}-{row['segment']}"

    def stored(part: str) -> np.ndarray:
        if f"{name}.{part}" not in arrays:
            raise RecordError(f"{folder / 'latents.safetensors'}: '{name}.{part}' is missing")
        return arrays[f"{name}.{part}"]

    decisions = None
    if row["kind"] is not None:
        guidance = None if row["guidance"] is None else Guidance(**json.loads(row["guidance"]))
        sets = tuple(ranges.reshape(-1, 2) for ranges in row["sets"])
        decisions = Decisions(
            row["kind"],
            row["position"],
            row["logprob"],
            SamplingParams(row["temperature"], row["allowed"], sets, guidance),
        )
    flow = None
    if row["flow"]:
        flow = FlowSteps(json.loads(row["sampler"]), **{part: stored(part) for part in _FLOW_ARRAYS})
    contexts = tuple(
        Context(
            c["branch"],
            tuple(
                Piece(segment, form, start, None if keep is None else (keep[0], keep[1]))
                for segment, form, start, keep in c["pieces"]
            ),
            c["start"],
        )
        for c in json.loads(row["contexts"])
    )
    return Segment(
        role=row["role"],
        author=Author(row["author"]),
        modality=Modality(row["modality"]),
        trained=row["trained"],
        ids=row["ids"],
        text=row["text"],
        decisions=decisions,
        flow=flow,
        frames=Frames(*(stored(part) for part in _FRAME_ARRAYS)) if row["frames"] else None,
        image=None if row["image"] is None else _image(folder / row["image"], row["height"], row["width"]),
        latent=stored("latent") if row["latent"] else None,
        contexts=contexts,
        version=row["version"],
    )


def _image(path: Path, height: int, width: int) -> np.ndarray:
    try:
        data = path.read_bytes()
        if not data.endswith(_PNG_END):
            raise ValueError("its end is missing")
        Image.open(BytesIO(data)).verify()  # the checksums of its chunks, which decoding skips
        image = np.array(Image.open(BytesIO(data)))
    except FileNotFoundError as error:
        raise RecordError(f"{path}: missing; the folder is not whole") from error
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken files
        raise RecordError(f"{path}: the image cannot be read, it may be truncated ({error})") from error
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise RecordError(f"{path}: {image.dtype} {list(image.shape)}; expected uint8 [{height}, {width}, 3]")
    return image
