"""The digits' detectors beside one another, the learned one's weights and their faults, and a part that is watched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from experiments import _digits
from experiments.train_digits_detector import alone, patched
from policy.chameleon.vq import DIGITS_WEIGHTS, load_digits_vq
from record.trajectory import Author, Modality, Segment, Trajectory
from rewards.config import RewardsConfig
from rewards.detectors.contract import check_detector
from rewards.detectors.digits import WEIGHTS, DigitsLearned, digits_exact, features
from rewards.detectors.registry import DetectorConfig, build_detector
from rewards.manager import RewardManager
from runtime.errors import UserError
from tasks.digits.scans import DIGITS
from tasks.digits.seeing import blobs
from tasks.digits.world import Digit, render, sample_scene
from tasks.registry import get_task
from tasks.shapes.world import Scene
from underdrawing.cli import main

ROOT = Path(__file__).parent.parent


def scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, int(rng.integers(1, 5)), "heldout") for _ in range(count)]


def head() -> dict[str, float]:
    with safe_open(WEIGHTS, "numpy") as file:
        return {name: float(value) for name, value in file.metadata().items()}


@pytest.mark.parametrize("backend", ["digits_exact", "digits_learned"])
def test_both_keep_the_contract(backend):
    images = [render(scene) for scene in scenes(3, seed=1)] + patched(2, np.random.default_rng(0))
    check_detector(build_detector(DetectorConfig(backend=backend)), images)


def test_the_learned_one_errs_as_its_head_says_and_the_exact_one_does_not():
    images, digits = alone("heldout", every=6)
    seen = DigitsLearned().detect(images)
    right = np.mean([str(digit) in found for digit, found in zip(digits, seen, strict=True)])
    assert 0.8 < right < 0.99 and right == pytest.approx(head()["heldout/learned_right"], abs=0.05)
    exact = digits_exact().detect(images[::10])
    assert all(str(digit) in found for digit, found in zip(digits[::10], exact, strict=True))


def test_the_learned_one_is_sure_of_more_that_is_nothing():
    images = patched(60, np.random.default_rng(5))
    learned, exact = (
        sum(any(one.score > 0.9 for items in found.values() for one in items) for found in detector.detect(images))
        for detector in (DigitsLearned(), digits_exact())
    )
    assert learned > 2 * exact and learned > 6


def test_probabilities_by_hand(tmp_path):
    """One hidden unit that counts the ink; it speaks for 1 where there is more than two pixels of it."""
    weights = {
        "w1": np.ones((64, 1), np.float32),
        "b1": np.full(1, -2, np.float32),
        "w2": np.eye(1, 10, 1, dtype=np.float32),
        "b2": np.zeros(10, np.float32),
    }
    save_file(weights, tmp_path / "w.safetensors")
    x = np.zeros((2, 64), np.float32)
    x[1, :4] = 1
    found = DigitsLearned(tmp_path / "w.safetensors").probabilities(x)
    assert found[0] == pytest.approx(np.full(10, 0.1))
    assert found[1, 1] == pytest.approx(np.e**2 / (np.e**2 + 9)) and found.sum(1) == pytest.approx([1, 1])


def test_features_are_the_ink_around_the_centre():
    (blob,) = blobs(render(Scene((Digit("1", "red", 8, scan=1),))))  # in the corner: the window ends at the canvas
    seen = features(blob)
    assert seen.shape == (64,) and seen.sum() == pytest.approx(blob.ink.sum() / 4)


def test_weights_that_are_none_are_named(tmp_path):
    path = tmp_path / "none.safetensors"
    with pytest.raises(UserError, match=r"none.safetensors: no weights; make them with `python -m experiments\.train"):
        DigitsLearned(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        DigitsLearned(path)
    weights = load_file(WEIGHTS)
    save_file({**weights, "w2": weights["w2"][:, :9].copy()}, path)
    with pytest.raises(UserError, match=r"'w2' is \[24, 9\], and the network's is finite \[24, 10\]"):
        DigitsLearned(path)


def test_a_recipe_without_weights_ends_with_what_to_run(tmp_path, capsys):
    detector = json.dumps({"backend": "digits_learned", "path": str(tmp_path / "none.safetensors")})
    record = {"tag": "single_object", "prompt": "a 7", "include": [{"class": "7", "count": 1}]}
    (tmp_path / "images/00000/samples").mkdir(parents=True)
    (tmp_path / "images/00000/metadata.jsonl").write_text(json.dumps(record))
    Image.fromarray(render(Scene(()))).save(tmp_path / "images/00000/samples/0000.png")
    recipe = str(ROOT / "configs/digits/hack.yaml")
    assert main(["rewards", "try", recipe, f"rewards.detector={detector}", "--images", str(tmp_path / "images")]) == 2
    said = capsys.readouterr().err
    assert "none.safetensors" in said and "experiments.train_digits_detector" in said


def test_weights_are_small_and_tell_their_figures():
    assert WEIGHTS.stat().st_size < 200_000 and DIGITS_WEIGHTS.stat().st_size < 2**20
    assert {"heldout/learned_right", "drawn_redrawn/exact_right", "patched/learned_sure"} <= set(head())


# ---- the visual tokenizer ----


def test_scenes_are_read_after_the_round_trip():
    found = _digits.figures(load_digits_vq(), 40, np.random.default_rng(3))
    assert found["drawn/psnr"] > 21
    assert found["drawn/exact/redrawn"] > 0.5 and found["drawn/exact/as drawn"] == 1


# ---- one detector is paid, another watched ----


def drawn(prompt: str, include: list, image: np.ndarray) -> Trajectory:
    segment = Segment("sketch", Author.POLICY, Modality.IMAGE_TOKENS, True, image=image)
    return Trajectory(prompt, {"prompt": prompt, "include": include}, "strokes", [segment])


def test_a_part_has_a_detector_of_its_own():
    """An image of which the learned detector is sure and the exact one says that it is nothing: paid, and seen."""
    learned = DigitsLearned()
    fooled = [
        (image, name)
        for image in patched(200, np.random.default_rng(2))
        for name, items in learned.detect([image])[0].items()
        if items[0].score > 0.9 and not digits_exact().detect([image])[0].get(name)
    ]
    image, name = fooled[0]
    config = RewardsConfig.model_validate(
        {
            "detector": "digits_learned",
            "parts": {
                "paid": {"function": "geneval"},
                "truth": {"function": "geneval", "options": {"detector": "digits_exact"}, "log_only": True},
            },
            "total": "paid",
        }
    )
    thought = drawn(f"a {name}", [{"class": name, "count": 1}], image)
    with RewardManager(config, get_task("digits")) as manager:
        manager.score([[thought]])
    assert thought.rewards == {"paid": 1.0, "truth": 0.0} and thought.reward == 1.0
    assert set(DIGITS) == set(learned.classes)


def test_a_parts_detector_that_is_none_is_named_before_the_run():
    part = {"function": "geneval", "options": {"detector": "digits_exakt"}}
    with pytest.raises(UserError, match="no backend 'digits_exakt'.*digits_exact"):
        RewardManager(RewardsConfig.model_validate({"parts": {"a": part}}), get_task("digits"))
