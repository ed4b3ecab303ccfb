import numpy as np
import pytest

from tasks.shapes.render import MASKS, render
from tasks.shapes.world import (
    CANVAS,
    COLORS,
    JITTERS,
    OBJECT,
    PATCH,
    PLACES,
    SHAPES,
    Object,
    Scene,
    disjoint,
    layouts,
    sample_scene,
)


def every_object():
    return [
        Object(shape, color, place, jitter)
        for shape in SHAPES
        for color in COLORS
        for place in range(len(PLACES))
        for jitter in range(len(JITTERS))
    ]


def test_images_are_made_of_193_patches():
    patches = set()
    for item in every_object():
        image = render(Scene((item,)))
        for y in range(0, CANVAS, PATCH):
            for x in range(0, CANVAS, PATCH):
                patches.add(image[y : y + PATCH, x : x + PATCH].tobytes())
    assert len(patches) <= 193


def test_objects_stay_in_the_canvas_and_cover_their_box():
    for item in every_object():
        image = render(Scene((item,)))
        ys, xs = np.nonzero((image != 255).any(-1))
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == item.box
        assert (image[ys, xs] == COLORS[item.color]).all()


def test_shapes_differ_from_one_another():
    for i, a in enumerate(SHAPES):
        for b in SHAPES[i + 1 :]:
            overlap = (MASKS[a] & MASKS[b]).sum() / (MASKS[a] | MASKS[b]).sum()
            assert overlap < 0.8, (a, b, overlap)


def test_places_are_rows_of_blocks():
    # top-left starts at (0, 0), center at (8, 8), bottom-right at (16, 16); the first jitter adds (1, 1)
    boxes = {PLACES[p]: Object("square", "red", p).box for p in range(9)}
    assert boxes["top-left"] == (1, 1, 13, 13)
    assert boxes["center"] == (9, 9, 21, 21)
    assert boxes["bottom-left"] == (1, 17, 13, 29)
    assert not disjoint(PLACES.index("top"), PLACES.index("center"))
    assert disjoint(PLACES.index("top"), PLACES.index("bottom-left"))


def test_four_objects_fill_the_corners_only():
    assert {frozenset(places) for places in layouts(4)} == {frozenset({0, 2, 6, 8})}
    assert layouts(5) == ()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sampled_objects_keep_a_gap(count):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng, count)
        assert len(scene.objects) == count
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                gap = max(
                    max(a.box[0], b.box[0]) - min(a.box[2], b.box[2]), max(a.box[1], b.box[1]) - min(a.box[3], b.box[3])
                )
                assert gap >= 2, (a, b)


def test_sampling_repeats_by_seed():
    a, b = (sample_scene(np.random.default_rng(7), 3) for _ in range(2))
    assert a == b and (render(a) == render(b)).all()
    with pytest.raises(ValueError, match="at most 4"):
        sample_scene(np.random.default_rng(0), 5)


def test_a_changed_scene_keeps_the_rest():
    scene = sample_scene(np.random.default_rng(1), 3)
    changed = scene.with_object(1, color="red" if scene.objects[1].color != "red" else "blue")
    assert changed.objects[0] == scene.objects[0] and changed.objects[1] != scene.objects[1]
    assert scene.without(1).objects == (scene.objects[0], scene.objects[2])
    assert OBJECT == 12
