"""The rows of `underdrawing evaluate geneval`: what of an earlier call stays, and what is judged anew."""

from __future__ import annotations

import json

import pytest
from geneval_helpers import GOOD, ONE, refused, rows_of, run, write
from PIL import Image

from evals import geneval
from evals.geneval import EvaluationError, Results


@pytest.fixture
def looked(monkeypatch):
    """The names of the images that the detector was shown."""
    names, load = [], geneval.load_image
    monkeypatch.setattr(geneval, "load_image", lambda sample: names.append(sample.name) or load(sample))
    return names


def test_a_corrupt_image_is_named_the_others_rows_are_kept_and_the_next_call_goes_on(capsys, tmp_path, looked):
    images = write(tmp_path / "images")
    bad = images / "00001/samples/0000.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    said = refused(capsys, "--images", images, "--detector", "shapes", "--batch-size", 3)
    assert f"{bad}: no image can be read from it" in said and "the rows of the others are kept" in said
    kept = rows_of(images / "results.jsonl")
    assert [row["filename"][-22:] for row in kept] == ["00000/samples/0000.png", "00000/samples/0001.png"]
    bad.write_bytes(whole)
    looked.clear()
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    assert len(looked) == 6 and "00000/samples/0000.png" not in looked
    names = [row["filename"][-22:] for row in rows_of(images / "results.jsonl")]
    assert names == sorted(names) and len(names) == 8
    looked.clear()
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0 and not looked


def test_of_a_batch_with_a_corrupt_image_the_later_ones_are_kept_too(capsys, tmp_path):
    images = write(tmp_path / "images")
    (images / "00000/samples/0001.png").write_text("not an image")
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
    assert (
        run(capsys, "--images", images, "--detector", "shapes", "--mode", "strict", "--out", tmp_path / "strict.jsonl")[
            0
        ]
        == 0
    )


def test_rows_are_appended_whole(tmp_path):
    results = Results(tmp_path / "rows.jsonl", {})
    results.append([{"filename": "00000/samples/0000.png", "correct": True}])
    results.append([{"filename": "00000/samples/0001.png", "correct": False}])
    assert list(Results(tmp_path / "rows.jsonl", {}).rows) == ["00000/samples/0000.png", "00000/samples/0001.png"]
    for row in ({"a": 1}, {"filename": "00000/samples/0000.png", "correct": "yes"}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(EvaluationError, match="rows.jsonl, line 1: no result row"):
            Results(tmp_path / "rows.jsonl", {})


def test_a_file_that_holds_something_else_is_left_as_it_is(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("one line without an end")
    with pytest.raises(EvaluationError, match=r"notes.txt.settings.json, which is missing; if it was \{\}"):
        Results(notes, {})
    assert notes.read_text() == "one line without an end"
    with pytest.raises(EvaluationError, match="a folder, where the file for the rows belongs"):
        Results(tmp_path, {})


def test_an_image_that_was_drawn_anew_is_judged_anew(capsys, caplog, tmp_path, looked):
    images = write(tmp_path / "images", wrong=((1, 1),))
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    looked.clear()
    Image.fromarray(GOOD[1]).save(images / "00001/samples/0001.png")
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    assert looked == ["00001/samples/0001.png"] and all(row["correct"] for row in rows_of(images / "results.jsonl"))
    (said,) = [record.message for record in caplog.records if "judged anew" in record.message]
    assert "1 of its 8 rows" in said and said.endswith("00001/samples/0001.png")


def test_another_models_images_get_rows_of_their_own(capsys, tmp_path, looked):
    out = tmp_path / "rows.jsonl"
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad", wrong=[(n, s) for n in range(4) for s in range(2)])
    for images, correct in ((good, True), (bad, False)):
        assert run(capsys, "--images", images, "--detector", "shapes", "--out", out)[0] == 0
        assert {row["correct"] for row in rows_of(out)} == {correct}
        assert all(row["filename"].startswith(str(images)) for row in rows_of(out))
    looked.clear()
    bad.rename(tmp_path / "moved")
    assert run(capsys, "--images", tmp_path / "moved", "--detector", "shapes", "--out", out)[0] == 0 and not looked
    assert all(row["filename"].startswith(str(tmp_path / "moved")) for row in rows_of(out))


def test_a_record_that_changed_has_its_images_judged_anew(capsys, tmp_path, looked):
    images = write(tmp_path / "images")
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    looked.clear()
    for changed in ({**ONE, "include": [{"class": "square", "count": 1}]}, {**ONE, "tag": "colors"}):
        (images / "00000/metadata.jsonl").write_text(json.dumps(changed))
        assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
        assert looked == ["00000/samples/0000.png", "00000/samples/0001.png"]
        looked.clear()
    assert rows_of(images / "results.jsonl")[0]["tag"] == "colors"


@pytest.mark.parametrize("with_images", [True, False])
def test_detections_that_changed_are_judged_anew(capsys, caplog, tmp_path, with_images):
    images, seen, out = write(tmp_path / "images", (ONE,)), tmp_path / "seen.jsonl", tmp_path / "rows.jsonl"
    given = ("--images", images) if with_images else ()
    circle = {"circle": [{"box": [0, 0, 9, 9], "score": 1.0}]}
    for found, correct in ((({}, {}), [False, False]), (({}, circle), [False, True])):
        seen.write_text(
            "".join(
                json.dumps({"filename": f"00000/samples/{n:04}.png", "detections": one, "metadata": ONE}) + "\n"
                for n, one in enumerate(found)
            )
        )
        assert run(capsys, *given, "--detections", seen, "--out", out)[0] == 0
        assert [row["correct"] for row in rows_of(out)] == correct
    assert "1 of its 2 rows" in caplog.text  # the other's detections are the same


def test_stopped_while_it_judges_anew_it_goes_on_from_there(capsys, tmp_path, looked, monkeypatch):
    images = write(tmp_path / "images", wrong=[(n, s) for n in range(4) for s in range(2)])
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    for number in range(4):
        for sample in range(2):
            Image.fromarray(GOOD[number]).save(images / f"{number:05}/samples/{sample:04}.png")
    append = Results.append

    def stopped(self, rows):
        append(self, rows)
        if "00001/" in rows[-1]["filename"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Results, "append", stopped)
    assert run(capsys, "--images", images, "--detector", "shapes", "--batch-size", 3)[0] == 130
    monkeypatch.setattr(Results, "append", append)
    looked.clear()
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    assert len(looked) == 5 and [row["correct"] for row in rows_of(images / "results.jsonl")] == [True] * 8


def test_an_image_drawn_anew_while_it_is_looked_at_is_judged_anew(capsys, tmp_path, monkeypatch):
    images = write(tmp_path / "images", (ONE,), 1, wrong=((0, 0),))
    load = geneval.load_image

    def drawn_anew(sample):
        image = load(sample)
        Image.fromarray(GOOD[0]).save(sample.path)
        return image

    monkeypatch.setattr(geneval, "load_image", drawn_anew)
    for correct in (False, True):
        assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
        assert [row["correct"] for row in rows_of(images / "results.jsonl")] == [correct]


def test_rows_of_images_that_are_gone_are_not_thrown_away(capsys, tmp_path, looked):
    images = write(tmp_path / "images")
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    rows = (images / "results.jsonl").read_text()
    (images / "00003").rename(tmp_path / "aside")
    said = refused(capsys, "--images", images, "--detector", "shapes")
    assert "has 2 rows of images that are gone: 00003 (2)" in said and "take their lines out of it" in said
    assert (images / "results.jsonl").read_text() == rows
    looked.clear()
    (images / "results.jsonl").write_text("".join(rows.splitlines(True)[:6]))  # the documented way
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0 and not looked
    assert len(rows_of(images / "results.jsonl")) == 6


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("results.jsonl", lambda raw: b"\xff" + raw, ["results.jsonl: not UTF-8 (byte 0xff in line 1)"]),
        ("results.jsonl", lambda raw: raw.replace(b"\n", b"\n\0\n", 1), ["results.jsonl, line 2: not JSON"]),
        (
            "results.jsonl.settings.json",
            lambda raw: raw[:20],
            ["settings.json: not JSON", "write that there", '{"mode": "standard", "thresholds": [0.3, 0.9]'],
        ),
        ("results.jsonl.settings.json", lambda raw: b"\xff", ["settings.json: not UTF-8", "the rows of results.jsonl"]),
        ("results.jsonl.settings.json", lambda raw: b"[]", ["settings.json: list, where one JSON object belongs"]),
    ],
)
def test_files_of_an_earlier_call_that_are_spoilt(capsys, tmp_path, name, spoil, words):
    images = write(tmp_path / "images")
    assert run(capsys, "--images", images, "--detector", "shapes")[0] == 0
    (images / name).write_bytes(spoil((images / name).read_bytes()))
    before = (images / "results.jsonl").read_bytes()
    said = refused(capsys, "--images", images, "--detector", "shapes")
    for word in words:
        assert word in said
    assert (images / "results.jsonl").read_bytes() == before
