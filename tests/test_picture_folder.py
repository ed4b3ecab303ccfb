"""GenEval's folder layout: what is read, and every fault named by its file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from evals.picture_folder import PictureFolderError, read_picture, read_picture_folder

PIXELS = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)


def write(root, index, samples=("0000.png",), record=None, name=None):
    folder = root / (name or f"{index:05d}")
    (folder / "samples").mkdir(parents=True)
    (folder / "metadata.jsonl").write_text(json.dumps(record or {"prompt": f"prompt {index}", "include": []}))
    for sample in samples:
        Image.fromarray(PIXELS).save(folder / "samples" / sample)
    return folder


def test_prompts_and_samples_come_by_number(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 2, ["0010.png", "0002.png", "0001.jpg"])
    (tmp_path / "00002" / "grid.png").write_text("passed over")
    (tmp_path / "00002" / "samples" / "notes.txt").write_text("passed over")
    (tmp_path / "results.jsonl").write_text("")
    second, tenth = read_picture_folder(tmp_path)
    assert (second.index, tenth.index) == (2, 10) and second.record["prompt"] == "prompt 2"
    assert [path.name for path in second.samples] == ["0001.jpg", "0002.png", "0010.png"]
    assert np.array_equal(read_picture(tenth.samples[0]), PIXELS)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_any_mode_are_rgb(tmp_path, mode):
    Image.fromarray(PIXELS).convert(mode).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png").shape == (6, 9, 3)


def test_missing_prompts_are_named_where_all_are_wanted(tmp_path):
    for index in (0, 1, 4):
        write(tmp_path, index)
    assert len(read_picture_folder(tmp_path)) == 3
    with pytest.raises(PictureFolderError, match="2 prompt\\(s\\) are missing: 00002, 00003; draw them"):
        read_picture_folder(tmp_path, whole=True)


def faults():
    def no_record(root):
        (write(root, 0) / "metadata.jsonl").unlink()

    def no_pictures(root):
        write(root, 0, [])

    def no_samples_folder(root):
        (write(root, 0, []) / "samples").rmdir()

    def bad_json(root):
        (write(root, 0) / "metadata.jsonl").write_text("{prompt")

    def two_records(root):
        (write(root, 0) / "metadata.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')

    def no_prompt(root):
        write(root, 0, record={"include": []})

    def two_files(root):
        write(root, 0, ["0000.png", "0000.jpg"])

    def two_spellings(root):
        write(root, 0, ["0000.png", "0.png"])

    def two_folders(root):
        write(root, 0)
        write(root, 0, name="0")

    return [(no_record, "00000/metadata.jsonl: missing"), (no_pictures, "00000/samples: no pictures"),
            (no_samples_folder, "00000/samples: no pictures"), (bad_json, "00000/metadata.jsonl: not JSON"),
            (two_records, "must hold one JSON object"), (no_prompt, "with a 'prompt'"),
            (two_files, "two files for sample 0, 0000.jpg and 0000.png; keep one"),
            (two_spellings, "two files for sample 0, 0.png and 0000.png"),
            (two_folders, "two folders for prompt 0, 0 and 00000"), (lambda root: None, "no prompts here")]


@pytest.mark.parametrize("make, words", faults(), ids=lambda x: x.__name__ if callable(x) else "")
def test_what_is_wrong_with_a_folder_is_named(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(PictureFolderError, match=words):
        read_picture_folder(tmp_path)


def test_no_folder_at_all_is_named(tmp_path):
    with pytest.raises(PictureFolderError, match="nowhere: no such folder; give one in GenEval's layout"):
        read_picture_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no picture at all",
                                    lambda b: b[:60] + bytes([b[60] ^ 255]) + b[61:]])
def test_a_corrupt_png_is_named(tmp_path, damage):
    path = write(tmp_path, 0) / "samples" / "0000.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PictureFolderError, match="00000/samples/0000.png: not a whole picture"):
        read_picture(path)
    with pytest.raises(PictureFolderError, match="absent.png: no such picture"):
        read_picture(tmp_path / "absent.png")
