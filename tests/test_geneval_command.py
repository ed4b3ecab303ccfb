"""`underdrawing evaluate geneval`: GenEval's layout, rows and summary, through the command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image

from evals.geneval import EvaluationError, Results, read_folder, summarise
from tasks.shapes.render import render
from tasks.shapes.world import PLACES, Object, Scene
from underdrawing.cli import main

FIXTURES = Path(os.environ.get("UNDERDRAWING_FIXTURES", Path(__file__).parent.parent / "../shared/fixtures"))


def scene(*items):
    return render(Scene(tuple(Object(shape, color, PLACES.index(place)) for shape, color, place in items)))


def record(tag, prompt, *clauses, exclude=()):
    return {"tag": tag, "prompt": prompt, "include": list(clauses), **({"exclude": list(exclude)} if exclude else {})}


ONE = record("single_object", "a circle", {"class": "circle", "count": 1})
RED = record("colors", "a red circle", {"class": "circle", "count": 1, "color": "red"})
LEFT = record("position", "a circle left of a square", {"class": "square", "count": 1},
              {"class": "circle", "count": 1, "position": ["left of", 0]})
TWO = record("counting", "two squares", {"class": "square", "count": 2}, exclude=[{"class": "square", "count": 3}])

GOOD = {0: scene(("circle", "blue", "top")), 1: scene(("circle", "red", "top")),
        2: scene(("circle", "red", "left"), ("square", "red", "right")),
        3: scene(("square", "red", "left"), ("square", "red", "right"))}


def write(root, records=(ONE, RED, LEFT, TWO), samples=2, wrong=()):
    """GenEval's layout; the pictures named in `wrong` ((prompt, sample)) show nothing."""
    for number, one in enumerate(records):
        folder = root / f"{number:05}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(one) + "\n")
        for sample in range(samples):
            picture = np.full((32, 32, 3), 255, np.uint8) if (number, sample) in wrong else GOOD[number]
            Image.fromarray(picture).save(folder / "samples" / f"{sample:04}.png")
    return root


def run(capsys, *arguments):
    code = main(["evaluate", "geneval", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "Traceback" not in err
    line, = [line for line in err.splitlines() if line.startswith("underdrawing: ")]
    return line


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_and_summary(capsys, tmp_path):
    images = write(tmp_path / "images", wrong=((0, 1), (1, 0), (1, 1)))
    code, out, _ = run(capsys, "--images", images, "--detector", "shapes")
    assert code == 0
    rows = rows_of(images / "results.jsonl")
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert rows[0]["filename"] == str(images / "00000/samples/0000.png")
    assert [row["correct"] for row in rows] == [True, False, False, False, True, True, True, True]
    assert rows[1]["reason"] == "expected circle>=1, found 0"
    assert json.loads(rows[0]["metadata"]) == ONE and json.loads(rows[1]["details"]) == {}
    (x0, y0, x1, y1, score), = json.loads(rows[0]["details"])["circle"]
    assert (x1 - x0, y1 - y0) == (12, 12) and score == 1
    told = json.loads(out.splitlines()[-1])
    # tags 1/2, 0/2, 1, 1; pictures 5 of 8; prompts 3 of 4
    assert told["tags"] == {"single_object": 0.5, "counting": 1.0, "colors": 0.0, "position": 1.0}
    assert told["overall"] == pytest.approx(2.5 / 4)
    assert told["images"] == 5 / 8 and told["prompts"] == 3 / 4
    assert (told["num_images"], told["num_prompts"]) == (8, 4)
    assert json.loads((images / "results.jsonl.summary.json").read_text()) == told
    assert "overall: mean of tags" in out and "0.6250" in out


def test_every_relation_pays_and_refuses_through_the_command(capsys, tmp_path):
    pairs = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"),
             "below": ("bottom", "top")}
    for number, asked in enumerate(pairs):
        folder = tmp_path / "images" / f"{number:05}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(record(
            "position", asked, {"class": "square", "count": 1},
            {"class": "circle", "count": 1, "position": [asked, 0]})))
        for sample, (circle, square) in enumerate(pairs.values()):
            Image.fromarray(scene(("circle", "red", circle), ("square", "blue", square))).save(
                folder / "samples" / f"{sample:04}.png")
    assert run(capsys, "--images", tmp_path / "images", "--detector", "shapes")[0] == 0
    correct = [row["correct"] for row in rows_of(tmp_path / "images/results.jsonl")]
    assert np.array_equal(np.array(correct).reshape(4, 4), np.eye(4, dtype=bool))


@pytest.mark.parity
@pytest.mark.parametrize("with_images", [True, False])
def test_every_case_of_the_released_scorer_through_the_command(capsys, tmp_path, with_images):
    path = FIXTURES / "geneval_cases.jsonl"
    if not path.exists():
        pytest.skip(f"no reference cases at {path}; set UNDERDRAWING_FIXTURES")
    cases = rows_of(path)
    assert cases
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
        code, said, _ = run(capsys, "--images", tmp_path / "images", "--detections", tmp_path / "seen.jsonl",
                            "--out", out)
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
        f"colors: {{path: {tmp_path / 'clip'}}}\n")
    code, out, _ = run(capsys, "--images", images, "--detector", tmp_path / "detector.yaml",
                       "--thresholds", "0.01", "0.02")
    assert code == 0
    rows = rows_of(images / "results.jsonl")
    assert len(rows) == 4 and json.loads(out.splitlines()[-1])["detector"]["backend"] == "mask2former"
    assert any(json.loads(row["details"]) for row in rows)
    wrong = refused(capsys, "--images", write(tmp_path / "mouse", (record(
        "single_object", "a mouse", {"class": "mouse", "count": 1}),)), "--detector", f"mask2former:{tmp_path / 'm2f'}")
    assert "00000/metadata.jsonl ('a mouse') asks for 'mouse'" in wrong and "computer mouse" in wrong


# ---- going on -----------------------------------------------------------------------------------------------------

def test_a_corrupt_picture_is_named_the_others_rows_are_kept_and_the_next_call_goes_on(capsys, tmp_path, monkeypatch):
    images = write(tmp_path / "images")
    bad = images / "00001/samples/0000.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:len(whole) // 2])
    said = refused(capsys, "--images", images, "--detector", "shapes", "--batch-size", 3)
    assert f"{bad}: no picture can be read from it" in said
    kept = rows_of(images / "results.jsonl")
    assert [row["filename"][-22:] for row in kept] == ["00000/samples/0000.png", "00000/samples/0001.png"]
    bad.write_bytes(whole)
    looked = []
    import evals.geneval

    load = evals.geneval.load_picture
    monkeypatch.setattr(evals.geneval, "load_picture", lambda sample: looked.append(sample.name) or load(sample))
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    assert len(looked) == 6 and "00000/samples/0000.png" not in looked
    names = [row["filename"][-22:] for row in rows_of(images / "results.jsonl")]
    assert names == sorted(names) and len(names) == 8
    again = []
    monkeypatch.setattr(evals.geneval, "load_picture", lambda sample: again.append(sample.name) or load(sample))
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0 and not again


def test_of_a_batch_with_a_corrupt_picture_the_later_ones_are_kept_too(capsys, tmp_path):
    images = write(tmp_path / "images")
    (images / "00000/samples/0001.png").write_text("not a picture")
    refused(capsys, "--images", images, "--detector", "shapes", "--batch-size", 4)
    assert len(rows_of(images / "results.jsonl")) == 3


def test_a_line_that_was_cut_off_is_judged_again(capsys, tmp_path):
    images = write(tmp_path / "images")
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    whole = (images / "results.jsonl").read_text()
    (images / "results.jsonl").write_text(whole[:-30])
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    assert (images / "results.jsonl").read_text() == whole


def test_rows_of_other_settings_are_not_mixed(capsys, tmp_path):
    images = write(tmp_path / "images")
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    said = refused(capsys, "--images", images, "--detector", "shapes", "--mode", "strict")
    assert "its rows were made with" in said and "give another --out" in said
    assert run(capsys, "--images", images, "--detector", "shapes", "--mode", "strict", "--out",
               tmp_path / "strict.jsonl")[0] == 0


def test_rows_are_appended_whole(tmp_path):
    results = Results(tmp_path / "rows.jsonl", {})
    results.append([{"filename": "00000/samples/0000.png", "correct": True}])
    results.append([{"filename": "00000/samples/0001.png", "correct": False}])
    assert list(Results(tmp_path / "rows.jsonl", {}).rows) == ["00000/samples/0000.png", "00000/samples/0001.png"]
    (tmp_path / "notes.txt").write_text('{"a": 1}\n')
    with pytest.raises(EvaluationError, match="notes.txt, line 1: no result row"):
        Results(tmp_path / "notes.txt", {})


# ---- bad input ----------------------------------------------------------------------------------------------------

def without(images, *parts):
    path = images.joinpath(*parts)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda i: without(i, "00001"), ["1 of 4 prompts have no folder: 00001"]),
    (lambda i: without(i, "00002", "samples"), ["1 of 4 prompts have fewer than 2 pictures", "00002 (0)"]),
    (lambda i: without(i, "00003", "samples", "0001.png"), ["fewer than 2 pictures", "00003 (1)"]),
    (lambda i: shutil.copy(i / "00000/samples/0001.png", i / "00000/samples/1.png"),
     ["00000/samples: 0001.png and 1.png are both sample 1"]),
    (lambda i: shutil.copy(i / "00000/samples/0001.png", i / "00000/samples/0001.jpg"), ["both sample 1"]),
    (lambda i: without(i, "00001", "metadata.jsonl"), ["00001/metadata.jsonl: missing"]),
    (lambda i: (i / "00001/metadata.jsonl").write_text("{"), ["00001/metadata.jsonl: not JSON"]),
    (lambda i: (i / "00001/metadata.jsonl").write_text('{"tag": "colors", "prompt": "x"}'), ["has no 'include'"]),
    (lambda i: (i / "00001/metadata.jsonl").write_text(json.dumps(record("x", "y", {"class": "circle", "count": 0}))),
     ["include has", "count from 1"]),
    (lambda i: (i / "00001/metadata.jsonl").write_text(json.dumps(record(
        "x", "y", {"class": "circle", "count": 1, "position": ["left of", 1]}))), ["index of an earlier clause"]),
    (lambda i: (i / "00001/metadata.jsonl").write_text(json.dumps(record("x", "a dgo", {"class": "crcle",
                                                                                        "count": 1}))),
     ["00001/metadata.jsonl ('a dgo') asks for 'crcle'", "did you mean 'circle'"]),
])
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
    assert "1 of 5 prompts have no folder: 00004" in refused(capsys, "--images", images, "--prompts", prompts,
                                                             "--detector", "shapes")
    prompts.write_text("".join(json.dumps(r) + "\n" for r in (ONE, RED, LEFT)))
    assert "folder 00003 has no prompt" in refused(capsys, "--images", images, "--prompts", prompts)
    prompts.write_text("".join(json.dumps(r) + "\n" for r in (RED, ONE, LEFT, TWO)))
    assert "is about 'a circle', but line 1" in refused(capsys, "--images", images, "--prompts", prompts)


@pytest.mark.parametrize(("arguments", "words"), [
    ((), ["give --images DIR, or --detections FILE"]),
    (("--images", "none"), ["none: no such folder of pictures"]),
    (("--images", "empty"), ["empty: no numbered folders there"]),
    (("--images", "images", "--detector", "shape"), ["no detector 'shape'", "did you mean 'shapes'"]),
    (("--images", "images", "--detector", "mask2former:nowhere/at/all"), ["no folder nowhere/at/all"]),
    (("--images", "images", "--detections", "none.jsonl"), ["none.jsonl: no such file of detections"]),
    (("--images", "images", "--detections", "some.jsonl"), ["7 of 8 pictures have no row", "00000/samples/0001.png"]),
    (("--images", "images", "--detections", "twice.jsonl"), ["line 2: a second row for 00000/samples/0000.png"]),
    (("--images", "images", "--detections", "bad.jsonl"), ["bad.jsonl, line 1: detections of 'circle'"]),
    (("--detections", "some.jsonl", "--out", "rows.jsonl"), ["line 1: no 'metadata'"]),
    (("--detections", "some.jsonl"), ["without --images give --out"]),
    (("--images", "images", "--detector", "shapes", "--detections", "some.jsonl"), ["leave out --detector"]),
    (("--images", "images", "--detector", "shapes", "--thresholds", "0.3", "1.5"), ["--thresholds: 0.3 1.5"]),
    (("--images", "images", "--detector", "shapes", "--batch-size", "0"), ["--batch-size: 0"]),
    (("--images", "images", "--detector", "shapes", "--out", "images/00000/metadata.jsonl/x"), ["cannot write there"]),
    (("--images", "images", "grpo.steps=3"), ["takes no recipe"]),
])
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


def test_summary_by_hand():
    rows = [{"filename": f"{p:05}/samples/{i:04}.png", "tag": tag, "metadata": str(p), "correct": correct}
            for p, (tag, answers) in enumerate([("colors", (1, 0)), ("colors", (0, 0)), ("counting", (1, 1))])
            for i, correct in enumerate(answers)]
    summary = summarise(rows)
    assert summary.tags == {"counting": 1.0, "colors": 0.25}
    assert summary.overall == 0.625  # not 3 of 6: tags weigh the same
    assert summary.images == 0.5 and summary.prompts == pytest.approx(2 / 3)
    with pytest.raises(EvaluationError, match="no pictures"):
        summarise([])


def test_other_files_beside_the_samples_are_left_alone(tmp_path):
    images = write(tmp_path / "images")
    (images / "00000/samples/grid.png").write_text("x")
    (images / "00000/grid.png").write_text("x")
    (images / "notes").mkdir()
    assert len(read_folder(images)) == 8
