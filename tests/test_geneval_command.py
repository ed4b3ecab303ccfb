"""`underdrawing evaluate geneval`: GenEval's layout, rows and summary, through the command."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from geneval_helpers import LEFT, ONE, RED, TWO, record, refused, rows_of, run, scene, write
from PIL import Image

from evals.geneval_folder import read_folder
from underdrawing.cli import main


def test_rows_and_summary(capsys, tmp_path):
    images = write(tmp_path / "images", wrong=((0, 1), (1, 0), (1, 1)))
    code, out, _ = run(capsys, "--images", images, "--detector", "shapes")
    assert code == 0
    rows = rows_of(images / "results.jsonl")
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details", "sha256"]
    assert rows[0]["sha256"] == hashlib.sha256((images / "00000/samples/0000.png").read_bytes()).hexdigest()
    assert rows[0]["filename"] == str(images / "00000/samples/0000.png")
    assert [row["correct"] for row in rows] == [True, False, False, False, True, True, True, True]
    assert rows[1]["reason"] == "expected circle>=1, found 0"
    assert json.loads(rows[0]["metadata"]) == ONE and json.loads(rows[1]["details"]) == {}
    ((x0, y0, x1, y1, score),) = json.loads(rows[0]["details"])["circle"]
    assert (x1 - x0, y1 - y0) == (12, 12) and score == 1
    told = json.loads(out.splitlines()[-1])
    # tags 1/2, 0/2, 1, 1; images 5 of 8; prompts 3 of 4
    assert told["tags"] == {"single_object": 0.5, "counting": 1.0, "colors": 0.0, "position": 1.0}
    assert told["overall"] == pytest.approx(2.5 / 4)
    assert told["images"] == 5 / 8 and told["prompts"] == 3 / 4
    assert (told["num_images"], told["num_prompts"]) == (8, 4)
    assert json.loads((images / "results.jsonl.summary.json").read_text()) == told
    assert told["prompts_expected"] is None  # of the shapes' prompts nobody says how many there are
    assert "overall: mean of tags" in out and "0.6250" in out and "incomplete" not in out


def test_every_relation_pays_and_refuses_through_the_command(capsys, tmp_path):
    pairs = {
        "left of": ("left", "right"),
        "right of": ("right", "left"),
        "above": ("top", "bottom"),
        "below": ("bottom", "top"),
    }
    for number, asked in enumerate(pairs):
        folder = tmp_path / "images" / f"{number:05}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(
            json.dumps(
                record(
                    "position",
                    asked,
                    {"class": "square", "count": 1},
                    {"class": "circle", "count": 1, "position": [asked, 0]},
                )
            )
        )
        for sample, (circle, square) in enumerate(pairs.values()):
            Image.fromarray(scene(("circle", "red", circle), ("square", "blue", square))).save(
                folder / "samples" / f"{sample:04}.png"
            )
    assert run(capsys, "--images", tmp_path / "images", "--detector", "shapes")[0] == 0
    correct = [row["correct"] for row in rows_of(tmp_path / "images/results.jsonl")]
    assert np.array_equal(np.array(correct).reshape(4, 4), np.eye(4, dtype=bool))


@pytest.mark.parity
@pytest.mark.parametrize("with_images", [True, False])
def test_every_case_of_the_released_scorer_through_the_command(
    capsys, tmp_path, reference_file, reference_records, with_images
):
    path, cases = reference_file("geneval_cases.jsonl"), reference_records("geneval_cases.jsonl")
    out = tmp_path / "rows.jsonl"
    if with_images:
        blank = Image.new("RGB", (8, 8))
        lines = []
        for number, case in enumerate(cases):
            folder = tmp_path / "images" / f"{number:05}"
            (folder / "samples").mkdir(parents=True)
            (folder / "metadata.jsonl").write_text(json.dumps(case["metadata"]))
            blank.save(folder / "samples/0000.png")
            lines.append(json.dumps({"filename": f"{number:05}/samples/0000.png", "detections": case["detections"]}))
        (tmp_path / "seen.jsonl").write_text("\n".join(reversed(lines)))  # their order does not matter
        code, said, _ = run(
            capsys, "--images", tmp_path / "images", "--detections", tmp_path / "seen.jsonl", "--out", out
        )
    else:
        code, said, _ = run(capsys, "--detections", path, "--out", out)
    assert code == 0
    rows = rows_of(out)
    assert [(row["correct"], row["reason"]) for row in rows] == [(c["correct"], c["reason"]) for c in cases]
    assert [json.loads(row["metadata"]) for row in rows] == [c["metadata"] for c in cases]
    assert json.loads(said.splitlines()[-1])["num_images"] == len(cases)


def test_a_real_mask2former_and_clip_through_the_command(capsys, tmp_path):
    tiny_models.mask2former(tmp_path / "m2f")
    tiny_models.open_clip_model(tmp_path / "clip")
    bus = record("single_object", "a bus", {"class": "bus", "count": 1})
    red = record("colors", "a red bus", {"class": "bus", "count": 1, "color": "red"})
    images = write(tmp_path / "images", (bus, red))
    (tmp_path / "detector.yaml").write_text(
        f"backend: mask2former\npath: {tmp_path / 'm2f'}\ntest_size: [100, 64]\nmin_score: 0.01\n"
        f"colors: {{path: {tmp_path / 'clip'}}}\n"
    )
    code, out, _ = run(
        capsys, "--images", images, "--detector", tmp_path / "detector.yaml", "--thresholds", "0.01", "0.02"
    )
    assert code == 0
    rows = rows_of(images / "results.jsonl")
    assert len(rows) == 4 and json.loads(out.splitlines()[-1])["detector"]["backend"] == "mask2former"
    assert any(json.loads(row["details"]) for row in rows)
    wrong = refused(
        capsys,
        "--images",
        write(tmp_path / "mouse", (record("single_object", "a mouse", {"class": "mouse", "count": 1}),)),
        "--detector",
        f"mask2former:{tmp_path / 'm2f'}",
    )
    assert "00000/metadata.jsonl ('a mouse') asks for 'mouse'" in wrong and "computer mouse" in wrong


# ---- a whole set --------------------------------------------------------------------------------------------------

BUS = [record("single_object", f"{n} buses", {"class": "bus", "count": n + 1}) for n in range(554)]


def seen_in(path, records):
    path.write_text("".join(json.dumps({"detections": {}, "metadata": one}) + "\n" for one in records))
    return path


@pytest.mark.parametrize(
    ("records", "expected", "incomplete"),
    [
        (BUS[:552], 553, True),
        (BUS[:552] + BUS[:1], 553, True),  # one prompt twice
        (BUS[:553], 553, False),
        (BUS, 553, False),
        ([*BUS[:3], record("mine", "a bus", {"class": "bus", "count": 1})], None, False),
        ([*BUS[:3], ONE], None, False),
    ],
)
def test_a_score_over_fewer_prompts_than_genevals_says_so(capsys, caplog, tmp_path, records, expected, incomplete):
    code, out, _ = run(capsys, "--detections", seen_in(tmp_path / "seen.jsonl", records), "--out", tmp_path / "rows")
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and told["prompts_expected"] == expected
    assert ("incomplete" in out) == incomplete == ("of GenEval's 553 prompts" in caplog.text)
    if incomplete:
        assert "552 of 553 prompts" in out and told["num_prompts"] == 552


def test_a_set_that_the_prompts_file_names_is_whole(capsys, caplog, tmp_path):
    images, prompts = (
        write(tmp_path / "images", BUS[:2], wrong=[(n, s) for n in range(2) for s in range(2)]),
        tmp_path / "prompts.jsonl",
    )
    seen = tmp_path / "seen.jsonl"
    seen.write_text(
        "".join(
            json.dumps({"filename": f"{n:05}/samples/{s:04}.png", "detections": {}}) + "\n"
            for n in range(2)
            for s in range(2)
        )
    )
    prompts.write_text("".join(json.dumps(one) + "\n" for one in BUS[:2]))
    out = run(capsys, "--images", images, "--detections", seen, "--prompts", prompts)[1]
    assert json.loads(out.splitlines()[-1])["prompts_expected"] == 2 and "incomplete" not in out
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_detections_with_fewer_images_of_one_prompt(capsys, tmp_path):
    seen = tmp_path / "seen.jsonl"
    seen.write_text(
        "".join(
            json.dumps({"filename": name, "detections": {}, "metadata": ONE}) + "\n"
            for name in ("00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png")
        )
    )
    said = refused(capsys, "--detections", seen, "--out", tmp_path / "rows.jsonl")
    assert "1 of 2 prompts have fewer than 2 images" in said and "00001 (1)" in said


# ---- bad input ----------------------------------------------------------------------------------------------------


def without(images, *parts):
    path = images.joinpath(*parts)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda i: without(i, "00001"), ["1 of 4 prompts have no folder: 00001"]),
        (lambda i: without(i, "00002", "samples"), ["1 of 4 prompts have fewer than 2 images", "00002 (0)"]),
        (lambda i: without(i, "00003", "samples", "0001.png"), ["fewer than 2 images", "00003 (1)"]),
        (
            lambda i: shutil.copy(i / "00000/samples/0001.png", i / "00000/samples/1.png"),
            ["00000/samples: 0001.png and 1.png are both sample 1"],
        ),
        (lambda i: shutil.copy(i / "00000/samples/0001.png", i / "00000/samples/0001.jpg"), ["both sample 1"]),
        (
            lambda i: [(i / f"0000{n}/samples/0001.png").rename(i / f"0000{n}/samples/0005.png") for n in range(4)],
            ["00000/samples: has 0005.png, but not 0001, 0002, 0003, 0004"],
        ),
        (lambda i: without(i, "00002", "samples", "0000.png"), ["00002/samples: has 0001.png, but not 0000"]),
        (lambda i: shutil.copytree(i / "00001", i / "1"), ["images: 00001 and 1 are both prompt 1; keep one"]),
        (lambda i: without(i, "00001", "metadata.jsonl"), ["00001/metadata.jsonl: missing"]),
        (
            lambda i: (i / "00001/metadata.jsonl").write_bytes(b'{"prompt": "caf\xe9"}'),
            ["00001/metadata.jsonl: not UTF-8 (byte 0xe9 in line 1)"],
        ),
        (
            lambda i: (i / "00001/metadata.jsonl").write_text(json.dumps({**ONE, "tag": ["a"]})),
            ["00001/metadata.jsonl: tag is ['a']; it is a text"],
        ),
        (lambda i: (i / "00001/metadata.jsonl").write_text(json.dumps({**ONE, "prompt": None})), ["prompt is None"]),
        (lambda i: (i / "00001/metadata.jsonl").write_text(json.dumps({**ONE, "include": 3})), ["include is 3"]),
        (lambda i: (i / "00001/metadata.jsonl").write_text(json.dumps({**ONE, "exclude": "x"})), ["exclude is 'x'"]),
        (
            lambda i: (i / "00001/metadata.jsonl").write_text(
                json.dumps(record("x", "y", {"class": "circle", "count": 1, "color": ["red"]}))
            ),
            ["include has", "color?"],
        ),
        (
            lambda i: (i / "00001/metadata.jsonl").write_text(
                json.dumps(
                    record(
                        "x",
                        "y",
                        {"class": "circle", "count": 1},
                        {"class": "square", "count": 1, "position": ["above", 0.0]},
                    )
                )
            ),
            ["index of an earlier clause"],
        ),
        (lambda i: (i / "00001/metadata.jsonl").write_text("{"), ["00001/metadata.jsonl: not JSON"]),
        (lambda i: (i / "00001/metadata.jsonl").write_text('{"tag": "colors", "prompt": "x"}'), ["has no 'include'"]),
        (
            lambda i: (i / "00001/metadata.jsonl").write_text(
                json.dumps(record("x", "y", {"class": "circle", "count": 0}))
            ),
            ["include has", "count from 1"],
        ),
        (
            lambda i: (i / "00001/metadata.jsonl").write_text(
                json.dumps(record("x", "y", {"class": "circle", "count": 1, "position": ["left of", 1]}))
            ),
            ["index of an earlier clause"],
        ),
        (
            lambda i: (i / "00001/metadata.jsonl").write_text(
                json.dumps(record("x", "a dgo", {"class": "crcle", "count": 1}))
            ),
            ["00001/metadata.jsonl ('a dgo') asks for 'crcle'", "did you mean 'circle'"],
        ),
    ],
)
def test_a_folder_that_is_not_whole(capsys, tmp_path, spoil, words):
    images = write(tmp_path / "images")
    spoil(images)
    said = refused(capsys, "--images", images, "--detector", "shapes")
    for word in words:
        assert word in said
    assert not (images / "results.jsonl").exists()  # nothing had run


def test_the_prompts_file_says_what_must_be_there(capsys, tmp_path):
    images, prompts = write(tmp_path / "images"), tmp_path / "metadata.jsonl"
    prompts.write_text("".join(json.dumps(r) + "\n" for r in (ONE, RED, LEFT, TWO)))
    assert run(capsys, "--images", images, "--detector", "shapes", "--prompts", prompts)[0] == 0
    prompts.write_text("".join(json.dumps(r) + "\n" for r in (ONE, RED, LEFT, TWO, ONE)))
    assert "1 of 5 prompts have no folder: 00004" in refused(
        capsys, "--images", images, "--prompts", prompts, "--detector", "shapes"
    )
    prompts.write_text("".join(json.dumps(r) + "\n" for r in (ONE, RED, LEFT)))
    assert "folder 00003 has no prompt" in refused(capsys, "--images", images, "--prompts", prompts)
    prompts.write_text("".join(json.dumps(r) + "\n" for r in (RED, ONE, LEFT, TWO)))
    assert "is about 'a circle', but line 1" in refused(capsys, "--images", images, "--prompts", prompts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["give --images DIR, or --detections FILE"]),
        (("--images", "none"), ["none: no such folder of images"]),
        (("--images", "empty"), ["empty: no numbered folders there"]),
        (("--images", "images", "--detector", "shape"), ["no detector 'shape'", "did you mean 'shapes'"]),
        (("--images", "images", "--detector", "mask2former:nowhere/at/all"), ["no folder nowhere/at/all"]),
        (("--images", "images", "--detections", "none.jsonl"), ["none.jsonl: no such file of detections"]),
        (
            ("--images", "images", "--detections", "some.jsonl"),
            ["7 of 8 images have no row", "00000/samples/0001.png"],
        ),
        (("--images", "images", "--detections", "twice.jsonl"), ["line 2: a second row for 00000/samples/0000.png"]),
        (("--images", "images", "--detections", "bad.jsonl"), ["bad.jsonl, line 1: detections of 'circle'"]),
        (("--detections", "some.jsonl", "--out", "rows.jsonl"), ["line 1: no 'metadata'"]),
        (("--detections", "some.jsonl"), ["without --images give --out"]),
        (("--images", "images", "--detector", "shapes", "--detections", "some.jsonl"), ["leave out --detector"]),
        (("--images", "images", "--detector", "shapes", "--thresholds", "0.3", "1.5"), ["--thresholds: 0.3 1.5"]),
        (("--images", "images", "--detector", "shapes", "--batch-size", "0"), ["--batch-size: 0"]),
        (
            ("--images", "images", "--detector", "shapes", "--out", "images/00000/metadata.jsonl/x"),
            ["cannot be written"],
        ),
        (("--images", "images", "grpo.steps=3"), ["takes no recipe"]),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(Path("images"))
    Path("empty").mkdir()
    row = {"filename": "00000/samples/0000.png", "detections": {}}
    Path("some.jsonl").write_text(json.dumps(row))
    Path("twice.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    Path("bad.jsonl").write_text(json.dumps({**row, "detections": {"circle": [{"box": [1, 2], "score": 1}]}}))
    said = refused(capsys, *arguments)
    for word in words:
        assert word in said


def test_genevals_options_beside_a_recipe_are_refused(capsys):
    assert main(["evaluate", "some.yaml", "--images", "x"]) == 2
    assert "--images belongs to `underdrawing evaluate geneval`" in capsys.readouterr().err


def test_other_files_beside_the_samples_are_left_alone(tmp_path):
    images = write(tmp_path / "images")
    (images / "00000/samples/grid.png").write_text("x")
    (images / "00000/grid.png").write_text("x")
    for name in ("notes", "00001.old", "²"):
        (images / name).mkdir()
    assert len(read_folder(images)) == 8
