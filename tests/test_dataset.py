"""Tasks without code: rows from files of every kind, columns mapped, images checked, splits that do not leak."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from runtime.errors import UserError
from tasks import dataset
from tasks.config import DatasetConfig, TaskConfig
from tasks.images import image_file, read_image

ROWS = [{"question": f"how many is {n} and {n}", "answer": str(2 * n), "level": n} for n in range(20)]
COLUMNS = {"prompt": "question", "ground_truth": "answer"}


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def png(color=(255, 0, 0), mode="RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, (3, 2), color).save(content, "PNG")
    return content.getvalue()


def build(path, **config):
    return dataset.build(DatasetConfig(path=str(path), **{"columns": COLUMNS, **config}))


def written(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "saved":
        from datasets import Dataset

        Dataset.from_list(ROWS).save_to_disk(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "saved"])
def test_every_kind_of_file_gives_the_same_records_in_their_order(tmp_path, kind):
    task = build(written(tmp_path, kind), heldout_share=0)
    records = task.prompts("train")
    assert [r["prompt"] for r in records] == [row["question"] for row in ROWS]
    assert [r["ground_truth"] for r in records] == [row["answer"] for row in ROWS]
    assert [float(r["level"]) for r in records] == [row["level"] for row in ROWS]
    assert task.prompts("heldout") == []
    assert {"how", "many", "7"} <= set(task.words)


def test_a_folder_is_its_files_and_a_split_is_how_their_names_begin(tmp_path):
    jsonl(tmp_path / "train-1.jsonl", ROWS[:8])
    jsonl(tmp_path / "train-2.jsonl", ROWS[8:15])
    jsonl(tmp_path / "test.jsonl", ROWS[15:])
    task = build(tmp_path, split="train", heldout_split="test")
    assert [r["level"] for r in task.prompts("train")] == list(range(15))
    assert [r["level"] for r in task.prompts("heldout")] == list(range(15, 20))
    with pytest.raises(UserError, match=r"task.dataset.path: the folder .* holds no file that begins with 'dev'"):
        build(tmp_path, split="dev")


def test_splits_of_a_saved_hugging_face_data_set(tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list(ROWS[:15]), "validation": Dataset.from_list(ROWS[15:])}
    DatasetDict(splits).save_to_disk(tmp_path / "d")
    task = build(tmp_path / "d", split="train", heldout_split="validation")
    assert (len(task.prompts("train")), len(task.prompts("heldout"))) == (15, 5)
    with pytest.raises(UserError, match="has the splits train, validation; name one of them in `split`"):
        build(tmp_path / "d")


@given(share=st.floats(0, 0.9), extra=st.integers(1, 30))
def test_a_share_is_held_out_by_prompt_and_a_prompt_stays_on_its_side(share, extra):
    records = [{"prompt": f"p{n // 2}", "n": n} for n in range(40)]  # every prompt twice, with other columns
    train, heldout = dataset._divided(records, share)
    assert sorted(r["n"] for r in [*train, *heldout]) == list(range(40))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in heldout}
    assert len({r["prompt"] for r in heldout}) == min(int(np.ceil(share * 20)), 19)
    more = [*records, *({"prompt": f"q{n}", "n": 100 + n} for n in range(extra))]
    still, _ = dataset._divided(more, share * 20 / (20 + extra))
    assert {r["prompt"] for r in train} <= {r["prompt"] for r in still}  # none is held out that was trained on


def test_rows_that_stand_there_twice_are_left_out_and_counted(tmp_path, caplog):
    path = jsonl(tmp_path / "rows.jsonl", [*ROWS[:3], ROWS[1], ROWS[2]])
    task = build(path, heldout_share=0)
    assert [r["level"] for r in task.prompts("train")] == [0, 1, 2]
    assert f"2 row(s) of {path} stand there twice" in caplog.text and "line 4 is " in caplog.text


def test_a_held_out_row_that_is_trained_on_is_refused(tmp_path):
    train, heldout = jsonl(tmp_path / "a.jsonl", ROWS[:5]), jsonl(tmp_path / "b.jsonl", ROWS[4:])
    with pytest.raises(
        UserError, match=r"heldout_path: 1 held-out row\(s\) are trained on too, the first 'how many is 4"
    ):
        build(train, heldout_path=heldout)


def test_ranges_keep_both_ends_and_rows_without_a_number_go(tmp_path):
    rows = [*ROWS[:5], {"question": "unmeasured", "answer": "", "level": None}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    kept = build(path, heldout_share=0, where={"level": (1, 3)}).prompts("train")
    assert [r["level"] for r in kept] == [1, 2, 3]
    assert len(build(path, heldout_share=0, where={"level": (None, 1)}).prompts("train")) == 2
    with pytest.raises(UserError, match="none of the 6 rows .* lies in the ranges"):
        build(path, where={"level": (10, 20)})
    with pytest.raises(
        UserError, match=r"line 1: task.dataset.where asks for a number in 'prompt', which is 'how many"
    ):
        build(path, where={"prompt": (0, 1)})
    assert [r["level"] for r in build(path, heldout_share=0, limit=2).prompts("train")] == [0, 1]


def test_conversational_prompts_are_their_text(tmp_path):
    messages = [
        {"role": "system", "content": "Answer in words."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": messages}, {"prompt": "plain"}])
    records = dataset.build(DatasetConfig(path=path, heldout_share=0)).prompts("train")
    assert [r["prompt"] for r in records] == ["Answer in words.\nWhat is it?", "plain"]
    messages.append({"role": "assistant", "content": "a cat"})
    path = jsonl(tmp_path / "more.jsonl", [{"prompt": messages}])
    with pytest.raises(UserError, match=r"line 1, column 'prompt': a message of 'assistant'; a prompt is one turn"):
        dataset.build(DatasetConfig(path=path))


# ---- images ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/underdrawing/images"


def test_images_are_paths_whatever_they_were(tmp_path, cache):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/a.png").write_bytes(png())
    url = "data:image/png;base64," + base64.b64encode(png((0, 255, 0))).decode()
    rows = [
        {"prompt": "a", "pic": "pics/a.png"},
        {"prompt": "b", "pic": url},
        {"prompt": "c", "pic": ["pics/a.png", url]},
        {"prompt": "d", "pic": None},
    ]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    config = DatasetConfig(path=path, columns={"image": "pic"}, images=["image"], heldout_share=0)
    a, b, c, d = (r["image"] for r in dataset.build(config).prompts("train"))
    assert a == str(tmp_path / "pics/a.png") and c == [a, b] and d is None
    assert Path(b).parent == cache and read_image(b).tolist() == [[[0, 255, 0]] * 3] * 2
    json.dumps(dataset.build(config).prompts("train"))  # a record holds JSON


def test_images_of_parquet_and_of_the_datasets_library_are_written_once(tmp_path, cache):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    content = {"bytes": png(), "path": None}
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "image": content}]), tmp_path / "rows.parquet")
    features = Features({"prompt": Value("string"), "image": ImageFeature()})
    Dataset.from_dict({"prompt": ["a"], "image": [content]}, features).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        config = DatasetConfig(path=str(path), images=["image"], heldout_share=0)
        (record,) = dataset.build(config).prompts("train")
        assert read_image(record["image"]).tolist() == [[[255, 0, 0]] * 3] * 2
    assert len(list(cache.iterdir())) == 1


def test_transparent_ground_is_white(tmp_path):
    (tmp_path / "a.png").write_bytes(png((255, 0, 0, 0), "RGBA"))
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 255, 255]] * 3] * 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere.png", "the image .*nowhere.png cannot be read"),
        ("broken.png", r"broken.png: not an image that can be read \(40 bytes, cut"),
        ("half.png", r"half.png: not an image that can be read \([^<>]+\); it may be cut or altered$"),
        ("data:image/png;base64,@@", "a data URL that is not base64"),
        (
            b"GIF",
            r"not an image that can be read \(3 bytes, cut, .*kind\); PNG, .*that Pillow opens are$",
        ),
        (b"", r"not an image that can be read \(empty\); PNG, JPEG"),
        (7, "int is no image; give a path, a data URL or bytes"),
    ],
)
def test_a_broken_image_is_named(tmp_path, cache, value, words):
    (tmp_path / "broken.png").write_bytes(png()[:40])
    (tmp_path / "half.png").write_bytes(png()[:50])
    with pytest.raises(UserError, match=f"^x.jsonl line 3, column 'pic': {words}|^x.jsonl.*{words}"):
        image_file(value, tmp_path, "x.jsonl line 3, column 'pic'")
    assert not cache.exists()


# ---- what is wrong is named ----


@pytest.mark.parametrize(
    ("name", "content", "config", "words"),
    [
        ("a.jsonl", b'{"question": 1}\n', {}, "columns.ground_truth: .*a.jsonl line 1 has no column 'answer'; Known"),
        ("a.jsonl", b'{"question": "x", "anwser": "y"}', {}, "has no column 'answer'; did you mean 'anwser'"),
        ("a.jsonl", b'{"q": "x"}\n', {"columns": {}}, "columns.prompt: missing; .*has no column 'prompt'. Say which"),
        (
            "a.jsonl",
            b'{"prompt": "x"}\n{"p": "y"}\n',
            {"columns": {}},
            "a.jsonl line 2: the column 'prompt' is missing",
        ),
        (
            "a.jsonl",
            b'{"prompt": "x"}\n\n{"prompt": " "}\n',
            {"columns": {}},
            "line 3, column 'prompt': the prompt is emp",
        ),
        ("a.jsonl", b'{"prompt": 3}\n', {"columns": {}}, "a prompt is text or a list of messages, not int"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n', {"columns": {}}, "a.jsonl line 2: byte 13 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', {"columns": {}}, "a.jsonl line 2: not JSON"),
        ("a.jsonl", b"[1]\n", {"columns": {}}, "line 1: a row is an object of columns, not list"),
        ("a.jsonl", b"\n\n", {}, "a.jsonl holds no row"),
        ("a.json", b'{"prompt": "x"}', {"columns": {}}, "a.json: a list of objects is expected, not dict"),
        ("a.csv", b"prompt,x\na,1\nb\n", {"columns": {}}, "a.csv line 3: 1 cells where the head line names 2 columns"),
        ("a.csv", b"prompt,prompt\na,1\n", {"columns": {}}, "a.csv line 1: two columns are called 'prompt'"),
        ("a.csv", b'prompt\n"a" b\n', {"columns": {}}, "a.csv line 2: not CSV"),
        ("a.parquet", b"PAR1", {}, "a.parquet: cannot be read as parquet"),
        ("a.txt", b"x", {}, "a.txt is none of .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.jsonl", b'{"prompt": "x"}', {"columns": {}, "images": ["pic"]}, "images: no column 'pic'; Known: prompt"),
        ("a.jsonl", b'{"prompt": "x"}', {"columns": {}, "where": {"rate": (0, 1)}}, "where: no column 'rate'"),
        ("a.jsonl", b'{"question": "x", "prompt": "y", "answer": ""}', {}, "has a column 'prompt' besides 'question'"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, content, config, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        build(tmp_path / name, **config)


def test_a_path_that_leads_nowhere_says_so_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args: pytest.fail("the hub was asked"))
    for path in ("data/missing.jsonl", str(tmp_path / "missing"), "./folder"):
        with pytest.raises(UserError, match="there is no "):
            build(path)


def test_a_name_on_the_hub_without_a_network_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no file or folder nobody/nothing .*and the hub gives no data set.*Offline"):
        build("nobody/nothing")


def test_a_task_is_a_data_set_or_a_name_and_not_both():
    with pytest.raises(ValidationError, match="`dataset` is a task by itself; leave out `name`"):
        TaskConfig(name="shapes", dataset={"path": "x.jsonl"})


def test_a_data_set_writes_no_demonstrations(tmp_path):
    task = build(jsonl(tmp_path / "rows.jsonl", ROWS))
    with pytest.raises(UserError, match="sft.data: missing; a data set of prompts holds no demonstrations"):
        task.demonstrations("strokes", 3, 0)
    assert not hasattr(task, "detect")
