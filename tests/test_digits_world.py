"""The digits world: whose scans are whose, what prompts ask for, and what the exact detector reads."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.registry import get_format
from rewards.functions.geneval import evaluate
from runtime.errors import UserError
from tasks.contract import check_task
from tasks.digits.demonstrations import FORMATS, slip
from tasks.digits.detector import FAR, NEAR, detect, distances
from tasks.digits.prompts import HELDOUT, pool, prompts, sample_scene_for
from tasks.digits.scans import DIGITS, DRAWN, LEARNED, enlarged, scans, used_for
from tasks.digits.seeing import ImageError, blobs
from tasks.digits.world import COLORS, Digit, digit, paint, render, sample_scene
from tasks.registry import get_task
from tasks.shapes.prompts import TAGS, compositions, satisfies
from tasks.shapes.world import CANVAS, Object, Scene


def as_detections(scene: Scene) -> dict:
    """A scene as the judge would see it if it saw perfectly."""
    seen: dict = {}
    for item in scene.objects:
        seen.setdefault(item.shape, []).append({"box": item.box, "score": 1.0, "color": item.color})
    return seen


# ---- scans ----


def test_the_three_uses_share_no_scan_and_leave_none_out():
    ink, digits = scans()
    assert ink.shape == (1797, 8, 8) and (ink.min(), ink.max()) == (0, 1)
    sets = {use: {scan for name in DIGITS for scan in used_for(use, name)} for use in ("drawn", "learned", "heldout")}
    assert [len(found) for found in sets.values()] == [10 * DRAWN, 10 * LEARNED, 1797 - 10 * (DRAWN + LEARNED)]
    assert len(set().union(*sets.values())) == 1797
    assert all(digits[scan] == 7 for use in ("drawn", "learned", "heldout") for scan in used_for(use, "7"))


def test_demonstrations_draw_their_own_scans_alone():
    rng = np.random.default_rng(0)
    for tag in TAGS:
        for record in pool("train", tag)[:5]:
            scene = sample_scene_for(record, rng)
            for item in (*scene.objects, *slip(record, scene, rng).scene.objects):
                assert item.scan in used_for("drawn", item.shape)


# ---- images ----


def test_a_pixel_is_a_mix_of_ground_and_color_by_its_ink():
    window = np.full((1, 3, 3), 255, np.float32)
    paint(window, np.array([[0, 0.5, 1]], np.float32), "red")  # red is (220, 20, 40)
    assert window.tolist() == [[[255, 255, 255], [237.5, 137.5, 147.5], [220, 20, 40]]]


def test_an_object_without_a_scan_is_not_drawn():
    with pytest.raises(TypeError, match="no Digit"):
        render(Scene((Object("7", "red", 4),)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_scenes_are_read_exactly(seed, count):
    """Any scans, two pixels apart at the nearest: what is seen is what was drawn, boxes and all."""
    scene = sample_scene(np.random.default_rng(seed), count, "heldout")
    found = sorted((one.box, one.cls, one.color) for one in detect(render(scene)) if one.score == 1)
    assert found == sorted((tuple(map(float, item.box)), item.shape, item.color) for item in scene.objects)


# ---- what is no digit ----


def test_distance_and_score_by_hand():
    """A scan paled to half its ink: |a - b|^2 / (|a|^2 + |b|^2) = 0.25 / 1.25 = 0.2, but for the edges."""
    item = digit(np.random.default_rng(0), "0", "blue", 4)
    (blob,) = blobs(render(Scene((item,))))
    assert distances(blob)[item.scan] < 1e-4
    image = np.full((CANVAS, CANVAS, 3), 255, np.float32)
    paint(image[9:23, 9:23], (enlarged()[item.scan] > 0.6) * np.float32(0.5), "blue")
    (pale,) = blobs(image.round().astype(np.uint8))
    full = enlarged()[item.scan] * (enlarged()[item.scan] > 0.3)
    flat = (enlarged()[item.scan] > 0.6) * 0.5
    wanted = ((full - flat) ** 2).sum() / ((full**2).sum() + (flat**2).sum())
    assert distances(pale)[item.scan] == pytest.approx(wanted, abs=0.01)
    nearest = distances(pale).min()
    seen = detect(image.round().astype(np.uint8))
    score = (FAR - nearest) / (FAR - NEAR)
    assert [one.score for one in seen] == ([pytest.approx(score)] if score > 0 else [])


def test_a_bar_a_disk_and_two_colors_are_nothing():
    item = digit(np.random.default_rng(1), "8", "red", 4)
    y, x = np.mgrid[:CANVAS, :CANVAS]
    for mask in ((abs(x - 15) < 7) & (abs(y - 15) < 2), (x - 15) ** 2 + (y - 15) ** 2 < 49):
        image = np.full((CANVAS, CANVAS, 3), 255, np.uint8)
        image[mask] = COLORS["green"]
        assert detect(image) == []
    image = render(Scene((item,)))
    image[16:] = render(Scene((Digit("8", "blue", 4, scan=item.scan),)))[16:]
    assert detect(image) == []


def test_dirt_is_ignored_and_other_images_are_refused():
    image = render(Scene(()))
    image[3:6, 3:8] = COLORS["green"]  # 15 px
    assert detect(image) == []
    with pytest.raises(ImageError, match=r"uint8 images of \[32, 32, 3\], not uint8 \[16, 16, 3\]"):
        detect(np.zeros((16, 16, 3), np.uint8))


# ---- prompts ----


def test_prompts_have_genevals_schema_and_wording():
    by_prompt = {record["prompt"]: record for tag in TAGS for s in ("train", "heldout") for record in pool(s, tag)}
    assert by_prompt["a photo of a 3 left of a 5"] == {
        "tag": "position",
        "prompt": "a photo of a 3 left of a 5",
        "include": [{"class": "5", "count": 1}, {"class": "3", "count": 1, "position": ["left of", 0]}],
    }
    assert by_prompt["a photo of three 7s"] == {
        "tag": "counting",
        "prompt": "a photo of three 7s",
        "include": [{"class": "7", "count": 3}],
        "exclude": [{"class": "7", "count": 4}],
    }
    assert "a photo of an 8" in by_prompt and "a photo of a red 8 and a blue 1" in by_prompt


def test_the_split_is_by_composition():
    train, heldout = prompts("train"), prompts("heldout")
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in heldout}
    for record in (r for tag in TAGS for r in pool("train", tag)):
        assert not compositions(record) & HELDOUT
    for record in heldout:
        assert record["tag"] == "single_object" or compositions(record) & HELDOUT
    assert set(Counter(r["tag"] for r in heldout).values()) == {52}
    words = {word for record in train for word in record["prompt"].split()}
    assert {word for record in heldout for word in record["prompt"].split()} <= words


@pytest.mark.parametrize("tag", TAGS)
def test_scenes_are_what_was_asked_for_and_slips_are_not(tag):
    rng = np.random.default_rng(0)
    for split in ("train", "heldout"):
        records = pool(split, tag)
        for _ in range(15):
            record = records[rng.integers(len(records))]
            scene = sample_scene_for(record, rng)
            assert satisfies(record, scene) and evaluate(record, as_detections(scene))[0], record["prompt"]
            made = slip(record, scene, rng)
            assert not evaluate(record, as_detections(made.scene))[0], record["prompt"]


# ---- the task ----


def test_the_digits_keep_the_contract():
    task = get_task("digits")
    check_task(task, [get_format(name) for name in FORMATS], demonstrations=6)
    with pytest.raises(UserError, match="task 'digits' has no demonstrations in the format 'look'"):
        task.demonstrations("look", 1, 0)
    with pytest.raises(UserError, match="task.options.mistake_rat: .*mistake_rate"):
        get_task("digits", mistake_rat=0.5)


def test_inspections_are_read_back():
    """The language of the shapes, said of digits: what a demonstration claims is so, by the exact detector."""
    task = get_task("digits")
    told = {"fine": 0, "wrong": 0}
    for one in task.demonstrations("strokes", 30, seed=3):
        shown, owed = None, one.record
        for part in one.parts:
            if part.role == "plan":
                owed = task.requirement(one.record, part.text)
            if part.image is not None:
                shown = task.detect(part.image)
            elif part.role == "inspect":
                claim = task.claims(part.text)
                assert claim.verdict is not None and claim.seen is not None
                assert all(any(c.matches(seen) for seen in task.seen_in(shown)) for c in claim.seen)
                assert all(task.holds(mistake, owed, shown) for mistake in claim.mistakes)
                told[claim.verdict] += 1
    assert min(told.values()) > 5
