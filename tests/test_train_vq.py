"""The shapes tokenizer: its recipe's images, losses and codebook, resuming; and the committed weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.train_vq import (
    Codebook,
    Training,
    TrainVQConfig,
    figures,
    main,
    patch_identity,
    patch_means,
    read_right,
    reconstruction_loss,
    round_trip,
    sample_images,
    shuffled,
    stray,
)
from experiments.vq_worlds import WORLDS
from policy.chameleon.vq import SHAPES_WEIGHTS, load_committed_vq, load_shapes_vq, load_vq
from runtime.errors import UserError
from tasks.registry import get_task
from tasks.shapes import grid
from tasks.shapes.grid import SIZES, Sized, place_of, places_of
from tasks.shapes.grid_prompts import prompts
from tasks.shapes.render import render
from tasks.shapes.world import CANVAS, COLORS, JITTERS, MAX_OBJECTS, SHAPES, Object, Scene, sample_scene


def scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, int(rng.integers(MAX_OBJECTS + 1))) for _ in range(count)]


def short(steps: int, **given) -> TrainVQConfig:
    return TrainVQConfig(**{"steps": steps, "minutes": 1e4, "batch": 2, "warmup": 0.4, "restart_every": 2} | given)


# ---- the committed weights ----


def test_scenes_are_read_right_after_the_round_trip():
    measured = figures(load_shapes_vq(), scenes(200, seed=2024))
    assert measured["read_right"] >= 0.95
    assert measured["patches"] == 193 and measured["patches_a_code"] <= 1.3


@pytest.mark.parametrize("level", ["middle", "hard"])
def test_what_prompts_of_a_level_ask_for_is_read_right_after_the_round_trip(level):
    rng = np.random.default_rng(2024)
    asked = [grid.sample_scene_for(record, rng) for record in prompts(level, "heldout")]
    measured = figures(load_committed_vq("shapes_grid"), asked, WORLDS["levels"])
    assert measured["read_right"] >= (0.995 if level == "middle" else 0.985)
    assert measured["patches_a_code"] <= 1.1 and measured["codes_a_patch"] <= 1.2


def test_thoughts_of_the_grid_are_read_right_after_the_round_trip():
    """What demonstrations show is what a policy sees and learns to draw, mistakes included."""
    vq = load_committed_vq("shapes_grid")
    for level in ("middle", "hard"):
        task = get_task("shapes", level=level)
        thoughts = task.demonstrations("strokes", 24, seed=5)
        images = [part.image for one in thoughts for part in one.parts if part.image is not None]
        made, _ = round_trip(vq, images)
        seen = [
            [sorted((d.cls, d.color, d.size, place_of(d.box, d.size)) for d in task.detect(image) if d.score > 0.9)]
            for image in (*images, *made)
        ]
        assert np.mean([a == b for a, b in zip(seen[: len(made)], seen[len(made) :], strict=True)]) >= 0.98


def test_every_object_of_the_grid_is_read_right_alone():
    singles = [
        Scene((Sized(shape, color, place, size=size),))
        for size in SIZES
        for shape in SHAPES
        for color in COLORS
        for place in places_of(size)[::4]
    ]
    made, _ = round_trip(load_committed_vq("shapes_grid"), [grid.render(scene) for scene in singles])
    wrong = [s for s, image in zip(singles, made, strict=True) if not read_right(image, s, WORLDS["grid"])]
    assert not wrong


def test_every_object_is_read_right_alone():
    singles = [
        Scene((Object(shape, color, place, jitter),))
        for shape in SHAPES
        for color in COLORS
        for place in (0, 4, 8)
        for jitter in range(len(JITTERS))
    ]
    made, _ = round_trip(load_shapes_vq(), [render(scene) for scene in singles])
    wrong = [scene for scene, image in zip(singles, made, strict=True) if not read_right(image, scene)]
    assert not wrong


def test_codes_redraw_to_themselves():
    """What was drawn can be seen again: a policy reads in its context the codes that it wrote."""
    vq = load_shapes_vq()
    made, codes = round_trip(vq, [render(scene) for scene in scenes(100, seed=7)])
    assert (vq.encode_images(made) == codes).float().mean() > 0.85


def test_committed_weights_are_small_and_half_stored():
    assert SHAPES_WEIGHTS.stat().st_size < 2 * 2**20
    vq = load_shapes_vq()
    assert (vq.codes_per_image, vq.config.num_embeddings, vq.config.resolution) == (16, 512, CANVAS)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in vq.state_dict().values())


def test_the_easy_levels_tokenizer_is_what_it_was():
    """Recipes keep their codes: what is committed for other levels is committed beside it."""
    digest = hashlib.sha256(SHAPES_WEIGHTS.read_bytes()).hexdigest()
    assert digest == "c5ddfd7c3fd27ca0ad49f433519e965437e602f19b6e1b985e4c41619fd452ae"


# ---- images ----


def test_shuffled_keeps_the_patches():
    rng = np.random.default_rng(0)
    images = sample_images(8, rng, strays=False)
    dealt = shuffled(images, rng)
    assert not np.array_equal(dealt, images)
    together = patch_identity(np.concatenate([images, dealt])).view(2, -1)
    assert torch.equal(together[0].sort().values, together[1].sort().values)


def test_patch_identity_is_in_the_order_of_the_codes():
    image = np.zeros((1, CANVAS, CANVAS, 3), np.uint8)
    image[0, 0:8, 8:16] = 9  # the second code of the first row
    image[0, 8:16, 0:8] = 9  # the first of the second
    identity = patch_identity(image)
    assert (identity != identity[0]).nonzero().flatten().tolist() == [1, 4]


def test_strays_leave_the_world():
    rng = np.random.default_rng(1)
    known = {bytes(row) for row in _patches(sample_images(200, rng, strays=False))}
    outside = [bytes(row) not in known for row in _patches(np.stack([stray(rng) for _ in range(50)]))]
    assert 0.2 < np.mean(outside) < 1


def _patches(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(-1, 192)


# ---- losses ----


def test_reconstruction_loss_weighs_the_foreground():
    pixels = torch.ones(1, 3, 1, 2)
    pixels[..., 1] = -1.0  # one pixel of ground, one of black
    made = pixels.clone()
    made[..., 0] -= 0.5
    # Weights 1 and 3; L1 0.5 + L2 0.25 on the ground pixel: 0.75 * 1 / 4. On the black one: 0.75 * 3 / 4.
    assert reconstruction_loss(made, pixels, 3.0).item() == pytest.approx(0.1875)
    made = pixels.clone()
    made[..., 1] += 0.5
    assert reconstruction_loss(made, pixels, 3.0).item() == pytest.approx(0.5625)


def test_patch_means():
    mean, size = patch_means(torch.tensor([[1.0, 0.0], [5.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1, 0]))
    assert mean.tolist() == [[2.0, 0.0], [5.0, 2.0]] and size.tolist() == [2.0, 1.0]


# ---- the codebook ----


def test_codebook_starts_on_the_most_frequent_patches():
    latent = torch.tensor([[0.0], [0.2], [4.0], [8.0], [8.0], [8.0]])
    book = Codebook.of(latent, torch.tensor([0, 0, 1, 2, 2, 2]), 2, torch.Generator().manual_seed(0))
    assert book.sum_KD.flatten().tolist() == pytest.approx([8.0, 0.1])


def test_codebook_moves_to_what_it_is_given():
    embedding = torch.nn.Embedding(2, 1)
    book = Codebook(torch.ones(2), torch.tensor([[0.0], [9.0]]), torch.zeros(2, dtype=torch.int64))
    book.update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 0.5, embedding)
    # size 0.5 * 1 + 0.5 * 2 = 1.5; sum 0.5 * 0 + 0.5 * 4 = 2; the unused code stays.
    assert embedding.weight.flatten().tolist() == pytest.approx([2 / 1.5, 9.0])
    assert book.used_K.tolist() == [2, 0]


def test_a_dead_code_moves_to_the_rarer_of_two_patches_that_share_one():
    embedding = torch.nn.Embedding(3, 1)
    embedding.weight.data = torch.tensor([[0.0], [100.0], [50.0]])
    book = Codebook(torch.ones(3), embedding.weight.data.clone(), torch.tensor([3, 0, 2]))
    latent, identity = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([0, 0, 1])
    assert book.restart(latent, identity, embedding) == 1
    assert embedding.weight.flatten().tolist() == [0.0, 1.0, 50.0]
    book.used_K[:] = 0
    assert book.restart(latent, identity, embedding) == 0  # none is shared now


# ---- training ----


@pytest.fixture
def one_thread():
    """Several threads add up in an order that depends on where in memory a tensor lies; one is exact."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_resumed_run_is_the_same_run(tmp_path, one_thread):
    whole = Training(short(8))
    for _ in range(8):
        whole.advance()
    first = Training(short(8))
    for _ in range(5):
        first.advance()
    assert first.codebook is not None
    first.save(tmp_path / "state.pt")
    second = Training(short(8, seed=99))
    second.load(tmp_path / "state.pt")
    for _ in range(3):
        second.advance()
    for name, tensor in whole.vq.state_dict().items():
        # oneDNN's convolutions sum in an order that depends on where a tensor lies in memory; without the
        # optimiser's state the difference would be 0.3.
        torch.testing.assert_close(second.vq.state_dict()[name], tensor, rtol=0, atol=5e-5)


def test_training_lowers_the_loss():
    training = Training(short(60, batch=8, warmup=0.9))
    losses = [training.advance()["loss/image"] for _ in range(50)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_command_writes_a_tokenizer_that_loads(tmp_path, capsys):
    out = tmp_path / "new" / "vq.safetensors"
    main(["--out", str(out), "--seed", "3", "--steps", "4", "--minutes", "5", "--scenes", "10"])
    assert load_vq(out).codes_per_image == 16
    assert "read_right" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == ["vq.json", "vq.safetensors"]


def test_bad_state_and_bad_arguments_are_named(tmp_path, capsys):
    broken = Path(tmp_path / "vq.state.pt")
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="vq.state.pt"):
        Training(short(4)).load(broken)
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "vq.safetensors"), "--minutes", "-1"])
    assert stopped.value.code == 2 and "minutes" in capsys.readouterr().err
