import numpy as np
import pytest

from tasks.shapes.detector import ImageError, detect
from tasks.shapes.render import MASKS, render
from tasks.shapes.world import COLORS, JITTERS, SHAPES, Object, Scene, place_of, sample_scene


def seen(image, threshold=0.3):
    return sorted((d.cls, d.color, d.box) for d in detect(image) if d.score > threshold)


def truth(scene):
    return sorted((item.shape, item.color, tuple(map(float, item.box))) for item in scene.objects)


def test_every_object_alone_is_read_exactly():
    for shape in SHAPES:
        for color in COLORS:
            for place in range(9):
                for jitter in range(len(JITTERS)):
                    item = Object(shape, color, place, jitter)
                    (found,) = detect(render(Scene((item,))))
                    assert (found.cls, found.color, found.box) == (shape, color, item.box)
                    assert found.score == 1.0 and found.mask.sum() == MASKS[shape].sum()
                    assert place_of(found.box) == place


def test_rendered_scenes_are_read_exactly():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = sample_scene(rng, int(rng.integers(0, 5)))
        assert seen(render(scene), 0.9) == truth(scene)


def test_neighbours_of_one_color_stay_apart():
    scene = Scene(
        tuple(Object("square", "blue", place, jitter) for place, jitter in zip((0, 2, 6, 8), (1, 0, 0, 0), strict=True))
    )  # top-left leans on both its neighbours
    assert seen(render(scene)) == truth(scene)


@pytest.mark.parametrize("noise", [0, 12])
def test_blurred_images_are_read(noise):
    rng = np.random.default_rng(3)
    right = 0
    for _ in range(200):
        scene = sample_scene(rng, int(rng.integers(1, 5)))
        image = render(scene).astype(float)
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        blurred = sum(padded[y : y + 32, x : x + 32] for y in range(3) for x in range(3)) / 9
        blurred = np.clip(blurred + rng.normal(0, noise, blurred.shape), 0, 255).astype(np.uint8)
        found = sorted((d.cls, d.color, place_of(d.box)) for d in detect(blurred) if d.score > 0.3)
        right += found == sorted((item.shape, item.color, item.place) for item in scene.objects)
    assert right >= 196


def test_half_an_object_is_none():
    image = render(Scene((Object("circle", "red", 4),)))
    image[:, 15:] = 255
    assert all(d.score < 0.3 for d in detect(image))


def test_dirt_is_ignored_and_an_empty_image_is_empty():
    image = render(Scene(()))
    assert detect(image) == []
    image[3:6, 3:6] = COLORS["green"]  # 9 px
    assert detect(image) == []


def test_two_halves_of_different_colors_are_no_object():
    image = render(Scene((Object("square", "red", 0),)))
    other = render(Scene((Object("square", "blue", 0),)))
    image[:, 7:] = other[:, 7:]
    assert seen(image) == []


def test_other_images_are_refused():
    with pytest.raises(ImageError, match=r"uint8 images of \[32, 32, 3\], not float64 \[32, 32, 3\]"):
        detect(np.zeros((32, 32, 3)))
    with pytest.raises(ImageError, match=r"not uint8 \[16, 16, 3\]"):
        detect(np.zeros((16, 16, 3), np.uint8))
