"""Trajectories come back as they went, are readable without our code, and broken folders are named."""

from __future__ import annotations

import json
import os
import resource
import shutil
from dataclasses import fields, is_dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from properties import examples

from record.store import StoreError, load_trajectories, save_trajectories
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


def assert_same(this, that, where=""):
    """Equal in every field, array type and shape; NaN equals NaN."""
    assert type(this) is type(that), where
    if is_dataclass(this):
        for field in fields(this):
            assert_same(getattr(this, field.name), getattr(that, field.name), f"{where}.{field.name}")
    elif isinstance(this, np.ndarray):
        assert (this.dtype, this.shape) == (that.dtype, that.shape), where
        np.testing.assert_array_equal(this, that, where)
    elif isinstance(this, (list, tuple)):
        assert len(this) == len(that), where
        for number, (a, b) in enumerate(zip(this, that, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    elif isinstance(this, dict):
        assert list(this) == list(that), where
        for key in this:
            assert_same(this[key], that[key], f"{where}[{key!r}]")
    else:
        assert this == that or (this != this and that != that), where


# ---- the round trip ----

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.sampled_from(["plan", "sketch", "other"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | texts | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
maybe_scores = st.none() | st.floats(allow_nan=False)
int32s = st.integers(-(2**31), 2**31 - 1)


def arrays(dtype, shape, **options):
    return hnp.arrays(dtype, shape, **options)


@st.composite
def segments(draw):
    modality = draw(st.sampled_from(Modality))
    ids = draw(arrays(np.int32, st.integers(0, 8)))
    decisions = flow = None
    if draw(st.booleans()):
        n = draw(st.integers(0, len(ids)))
        sets = tuple(draw(arrays(np.int32, (draw(st.integers(0, 3)), 2))) for _ in range(draw(st.integers(0, 2))))
        guidance = draw(
            st.none() | st.builds(Guidance, names, st.dictionaries(names, st.floats(allow_nan=False), max_size=2))
        )
        sampling = SamplingParams(draw(arrays(np.float32, n)), draw(arrays(np.int32, n)), sets, guidance)
        decisions = Decisions(
            draw(arrays(np.int8, n)), np.arange(n, dtype=np.int32), draw(arrays(np.float32, n)), sampling
        )
    if draw(st.booleans()):
        n = draw(st.integers(0, 2))
        flow = FlowSteps(
            draw(st.dictionaries(texts, json_values, max_size=2)),
            draw(arrays(np.float32, n + 1)),
            draw(arrays(np.int32, n)),
            draw(arrays(np.float32, (n + 1, 2, 3))),
        )
    frames = None
    if draw(st.booleans()):
        n = draw(st.integers(0, 2))
        frames = Frames(draw(arrays(np.uint8, (n, 2, 3, 3))), draw(arrays(np.float32, n)))
    pieces = st.builds(
        Piece,
        st.integers(0, 9),
        st.sampled_from(["ids", "latent"]),
        st.integers(0, 99),
        st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    )
    contexts = st.builds(Context, names, st.lists(pieces, max_size=3).map(tuple), st.integers(0, 99))
    size = st.tuples(st.integers(1, 4), st.integers(1, 4), st.just(3))
    return Segment(
        draw(names),
        draw(st.sampled_from(Author)),
        modality,
        draw(st.booleans()),
        ids,
        draw(texts),
        decisions,
        flow,
        draw(st.none() | arrays(np.uint8, size)),
        draw(st.none() | arrays(np.float32, (2, 1))),
        tuple(draw(st.lists(contexts, max_size=3))),
        draw(st.integers(0, 2**40)),
        frames,
    )


trajectories = st.builds(
    Trajectory,
    texts,
    st.dictionaries(texts, json_values, max_size=3),
    names,
    st.lists(segments(), max_size=4),
    st.integers(-(2**40), 2**40),
    st.integers(0, 3),
    st.integers(0, 2**62),
    st.sampled_from(StopReason),
    st.dictionaries(texts, maybe_scores, max_size=2),
    st.dictionaries(texts, st.dictionaries(st.integers(0, 9), maybe_scores, max_size=2), max_size=2),
    maybe_scores,
    st.none() | arrays(np.float32, st.integers(0, 4)),
    st.dictionaries(texts, json_values, max_size=2),
    st.none() | st.tuples(st.integers(0, 3), st.integers(0, 4)),
)


@examples(0.25)
@given(st.lists(trajectories, max_size=4))
def test_what_is_saved_comes_back_without_loss(tmp_path_factory, saved):
    folder = tmp_path_factory.mktemp("store") / "step"
    save_trajectories(saved, folder)
    loaded = load_trajectories(folder)
    assert_same(loaded, saved)
    shutil.rmtree(folder)


def example():
    """A sketch of two codes under guidance, and a denoised one. The law's temperature 0 has no density: NaN."""
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    sampling = SamplingParams(
        np.array([1, 0.5, 0], np.float32),
        np.array([-1, 0, 0], np.int32),
        (np.array([[6, 12]], np.int32),),
        Guidance("normal", {"full": 2.0}),
    )
    made = Decisions(
        np.array([0, 1, 1], np.int8),
        np.array([0, 1, 2], np.int32),
        np.array([-0.25, -1.5, np.nan], np.float32),
        sampling,
    )
    contexts = (Context("full", (Piece(0, "ids", 0),), 2), Context("unconditional", (), 0))
    flow = FlowSteps(
        {"sampler": "cps", "noise_level": 0.5},
        np.array([1, 0.75, 0.5, 0], np.float32),
        np.array([0, 1], np.int32),
        np.stack([np.full((2, 3), value, np.float32) for value in (0, 1, 2)]),
    )
    segments = [
        Segment("prompt", Author.USER, Modality.TEXT, False, np.array([1, 7], np.int32), "red circle"),
        Segment(
            "sketch",
            Author.POLICY,
            Modality.IMAGE_TOKENS,
            True,
            np.array([3, 8, 9, 4], np.int32),
            decisions=made,
            image=image,
            contexts=contexts,
            version=7,
        ),
        Segment(
            "sketch",
            Author.POLICY,
            Modality.IMAGE_LATENT,
            True,
            flow=flow,
            image=image[::-1].copy(),
            latent=np.full((2, 3), 0.5, np.float32),
        ),
    ]
    return Trajectory(
        "red circle",
        {"tag": "colors"},
        "strokes",
        segments,
        group=3,
        member=1,
        seed=11,
        rewards={"result": 1.0, "consistency": None},
        segment_rewards={"inspect": {2: 0.5}},
        reward=None,
        advantage_S=np.array([0, 1, -1], np.float32),
    )


def test_it_is_readable_without_our_code(tmp_path):
    save_trajectories([example(), example()], tmp_path / "step")
    rows = pd.read_parquet(tmp_path / "step" / "trajectories.parquet")
    assert rows.prompt.tolist() == ["red circle"] * 2 and rows.stop.tolist() == ["end"] * 2
    assert json.loads(rows.rewards[0]) == {"result": 1.0, "consistency": None} and rows.reward.isna().all()
    assert rows.advantage[0].tolist() == [0, 1, -1]
    segments = pd.read_parquet(tmp_path / "step" / "segments.parquet")
    sketch = segments[(segments.trajectory == 1) & (segments.segment == 1)].iloc[0]
    assert sketch.role == "sketch" and sketch.ids.tolist() == [3, 8, 9, 4] and sketch.kind.tolist() == [0, 1, 1]
    assert sketch.logprob.tolist()[:2] == [-0.25, -1.5] and np.isnan(sketch.logprob[2])
    assert sketch.sets[sketch.allowed[1]].tolist() == [6, 12]
    assert json.loads(sketch.guidance) == {"kind": "normal", "scales": {"full": 2.0}}
    assert json.loads(sketch.contexts)[0] == {"branch": "full", "start": 2, "pieces": [[0, "ids", 0, None]]}
    image = np.asarray(Image.open(tmp_path / "step" / sketch.image))
    np.testing.assert_array_equal(image, example().segments[1].image)
    # Two trajectories of one key do not share their images.
    assert segments.image.dropna().nunique() == 4


def test_the_documented_columns_are_those_that_are_written():
    from pathlib import Path

    from record.store import SEGMENTS, TRAJECTORIES

    page = (Path(__file__).parent.parent / "docs" / "record.md").read_text()
    for schema in (TRAJECTORIES, SEGMENTS):
        for name in schema.names:
            assert f"| `{name}` |" in page, name


def test_saving_again_replaces_the_folder_whole(tmp_path):
    save_trajectories([example()], tmp_path / "step")
    save_trajectories([], tmp_path / "step")
    assert load_trajectories(tmp_path / "step") == []
    assert os.listdir(tmp_path) == ["step"] and os.listdir(tmp_path / "step" / "images") == []
    (tmp_path / "step" / "report.html").write_text("what `underdrawing view` made of them")
    save_trajectories([example()], tmp_path / "step")
    assert_same(load_trajectories(tmp_path / "step"), [example()])
    (tmp_path / "empty").mkdir()
    save_trajectories([], tmp_path / "empty")


@pytest.mark.parametrize(
    "stored, name, words",
    [
        (False, "thesis.tex", "holds 'thesis.tex' and no stored trajectories"),
        (False, "trajectories.parquet", "holds 'trajectories.parquet' and no stored trajectories"),
        (False, "images/0-0-1.png", "holds 'images' and no stored trajectories"),
        (True, "thesis.tex", "holds 'thesis.tex' beside stored trajectories"),
        (True, ".git/HEAD", "holds '.git' beside stored trajectories"),
        (True, "rewards.jsonl", "holds 'rewards.jsonl' beside stored trajectories"),
        (True, "images/holiday.png", "holds 'images/holiday.png' beside stored trajectories"),
    ],
)
def test_nothing_but_stored_trajectories_is_replaced(tmp_path, stored, name, words):
    if stored:
        saved(tmp_path)
    path = tmp_path / "step" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(StoreError, match=words):
        save_trajectories([example(), example()], tmp_path / "step")
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["step"]
    if stored:
        assert_same(load_trajectories(tmp_path / "step"), [example()])


@pytest.mark.parametrize("place", [".", "..", "../step", "images/.."])
def test_the_folder_that_one_stands_in_is_not_replaced(tmp_path, monkeypatch, place):
    monkeypatch.chdir(saved(tmp_path))
    with pytest.raises(StoreError, match="the current folder is there"):
        save_trajectories([], place)
    assert_same(load_trajectories(tmp_path / "step"), [example()])


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="thesis.tex is a file"):
        save_trajectories([example()], tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_broken_off_between_two_renames_what_was_there_stays(tmp_path, monkeypatch):
    folder, rename = saved(tmp_path), os.rename

    def pressed(source, target):
        if str(source).endswith(".part"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", pressed)
    with pytest.raises(KeyboardInterrupt):
        save_trajectories([], folder)
    assert os.listdir(tmp_path) == ["step"]
    assert_same(load_trajectories(folder), [example()])


# ---- what breaks ----


def saved(tmp_path):
    save_trajectories([example()], tmp_path / "step")
    return tmp_path / "step"


FILES = ["trajectories.parquet", "segments.parquet", "latents.safetensors", "images/3-1-1.png"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_truncated_file_is_named(tmp_path, name, keep):
    path = saved(tmp_path) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(RecordError, match=name):
        load_trajectories(tmp_path / "step")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    (saved(tmp_path) / name).unlink()
    with pytest.raises(RecordError, match=f"{name}: missing"):
        load_trajectories(tmp_path / "step")


def test_a_missing_folder_and_a_file_of_another_program_are_named(tmp_path):
    with pytest.raises(RecordError, match="there are no trajectories here"):
        load_trajectories(tmp_path / "nowhere")
    folder = saved(tmp_path)
    pd.DataFrame({"trajectory": [0]}).to_parquet(folder / "trajectories.parquet")
    with pytest.raises(RecordError, match=r"trajectories.parquet: written as version none"):
        load_trajectories(folder)


@pytest.mark.parametrize("name", ["segments.parquet", "images/3-1-1.png"])
def test_no_altered_byte_goes_unnoticed(tmp_path, name):
    """Flip each byte in turn: the folder is refused, or read exactly as it was."""
    path = saved(tmp_path) / name
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            loaded = load_trajectories(tmp_path / "step")
        except RecordError:
            continue
        assert_same(loaded[0].segments, example().segments)


def test_files_of_two_folders_do_not_mix(tmp_path):
    folder = saved(tmp_path)
    save_trajectories([example(), example()], tmp_path / "other")
    shutil.copy(tmp_path / "other" / "trajectories.parquet", folder)
    with pytest.raises(RecordError, match="0 segments of trajectory 1; trajectories.parquet says 3"):
        load_trajectories(folder)


def test_what_the_record_does_not_allow_is_refused_and_named(tmp_path):
    wide = example()
    wide.segments[0].ids = np.array([2**40])
    with pytest.raises(RecordError, match=r"trajectory 0 \(3-1\), segment 0 \(prompt\): ids: int64"):
        save_trajectories([wide], tmp_path / "step")
    odd = example()
    odd.record["when"] = object()
    with pytest.raises(RecordError, match=r"record: holds what JSON cannot say \(a object\)"):
        save_trajectories([odd], tmp_path / "step")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 100, 1000, 4000])
def test_a_full_disk_leaves_nothing_half_written_and_what_was_there(tmp_path, limit):
    """The system refuses to let any file grow past `limit` bytes, as a full disk would."""
    before = saved(tmp_path)
    many = example()
    many.segments[2].latent = np.zeros((2000,), np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            StoreError, match=f"{before}: the trajectories cannot be written .*; free some space, or choose"
        ):
            save_trajectories([many], before)
        with pytest.raises(StoreError):
            save_trajectories([many], tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["step"]
    assert_same(load_trajectories(before), [example()])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        StoreError, match=r"file/step: the trajectories cannot be written \(.*\); choose another folder"
    ):
        save_trajectories([example()], tmp_path / "file" / "step")
