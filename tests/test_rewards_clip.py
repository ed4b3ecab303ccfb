"""CLIP similarity, PickScore and HPS with real tiny models from disk, against one pair at a time."""

from __future__ import annotations

import json
import shutil

import numpy as np
import open_clip
import pytest
import tiny_models
import torch
from PIL import Image
from rewards_helpers import image_segment, text, trajectory_of
from safetensors.torch import load_file, save_file

from record.trajectory import Author
from rewards.detectors.weights import WeightsError
from rewards.functions.clip_similarity import clip_similarity
from rewards.functions.preference import hps, pickscore
from runtime.errors import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": tiny_models.clip(root / "clip"),
        "open_clip": tiny_models.open_clip_model(root / "open_clip"),
        "plain": tiny_models.open_clip_model(root / "plain", quick_gelu=False, seed=1),
    }


@pytest.fixture(scope="module")
def thoughts():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((32, 32), (48, 40), (32, 32), (20, 64))]
    return [
        trajectory_of(
            {"prompt": "a red dog"},
            image_segment("sketch", images[0]),
            text("inspect", "no"),
            image_segment("sketch", images[1]),
        ),
        trajectory_of({"prompt": "two cats"}, image_segment("sketch", images[2])),
        trajectory_of({"prompt": "nothing"}),
        trajectory_of(
            {"prompt": "a red dog"},
            image_segment("sketch", images[3]),
            image_segment("observation", images[0], Author.ENVIRONMENT),
        ),
    ]


def cosine(model, preprocess, tokenizer, prompt, image):
    with torch.no_grad():
        a = model.encode_text(tokenizer([prompt]))[0].double()
        b = model.encode_image(preprocess(Image.fromarray(image))[None])[0].double()
    return float(a @ b / a.norm() / b.norm())


def final(thoughts):
    return [t.images()[-1] if t.images() else None for t in thoughts]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_clip_similarity_equals_one_pair_at_a_time(models, thoughts, batch_size):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{models['open_clip']}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{models['open_clip']}")
    expected = [
        0.0 if p is None else cosine(model.eval(), preprocess, tokenizer, t.prompt, p)
        for t, p in zip(thoughts, final(thoughts), strict=True)
    ]
    options = {"path": str(models["open_clip"]), "batch_size": batch_size}
    assert clip_similarity(thoughts, **options) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == 4
    assert clip_similarity(thoughts, form="clipscore", **options) == pytest.approx(
        [2.5 * value for value in expected], abs=1e-5
    )
    first = cosine(model, preprocess, tokenizer, thoughts[0].prompt, thoughts[0].images()[0])
    assert clip_similarity(thoughts, image="first", **options)[0] == pytest.approx(first, abs=1e-5)
    each = clip_similarity(thoughts, image="each", **options)
    assert each[0] == pytest.approx({1: first, 3: expected[0]}, abs=1e-5) and each[2] == 0.0
    assert list(each[3]) == [1]  # the environment's image is not the policy's


def test_clipscore_is_never_negative(models, thoughts, tmp_path):
    shutil.copytree(models["open_clip"], tmp_path / "turned")
    tensors = load_file(models["open_clip"] / "open_clip_model.safetensors")
    save_file({**tensors, "visual.proj": -tensors["visual.proj"]}, tmp_path / "turned/open_clip_model.safetensors")
    plain, turned = (
        clip_similarity(thoughts, path=str(folder)) for folder in (models["open_clip"], tmp_path / "turned")
    )
    assert turned == pytest.approx([-value for value in plain], abs=1e-5) and min(turned) < 0
    assert clip_similarity(thoughts, path=str(tmp_path / "turned"), form="clipscore") == [0.0] * 4


def features(models, prompt, image):
    from transformers import AutoProcessor, CLIPModel

    model = CLIPModel.from_pretrained(models["clip"]).eval()
    processor = AutoProcessor.from_pretrained(models["clip"])
    with torch.no_grad():
        output = model(
            **processor(
                text=[prompt],
                images=[Image.fromarray(image)],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=24,
            )
        )
    return float(output.logits_per_image.detach()), float(model.logit_scale.detach().exp())


def test_pickscore_is_the_models_own_logit(models, thoughts):
    expected, scales = zip(
        *[
            (0.0, 1.0) if p is None else features(models, t.prompt, p)
            for t, p in zip(thoughts, final(thoughts), strict=True)
        ],
        strict=True,
    )
    options = {"path": str(models["clip"]), "processor": None}
    assert pickscore(thoughts, **options) == pytest.approx(expected, abs=1e-4)
    assert max(abs(value) for value in expected) > 1  # the logit scale is in it
    assert pickscore(thoughts, divisor=26, **options) == pytest.approx([v / 26 for v in expected], abs=1e-5)
    plain = clip_similarity(thoughts, library="transformers", path=str(models["clip"]))
    assert plain == pytest.approx([v / s for v, s in zip(expected, scales, strict=True)], abs=1e-5)
    other = pickscore(thoughts, path=str(models["clip"]), processor=str(models["clip"]))
    assert other == pytest.approx(expected, abs=1e-4)


def test_hps_is_a_cosine_from_a_folder_or_a_file(models, thoughts, tmp_path, monkeypatch):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{models['plain']}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{models['plain']}")
    expected = [
        0.0 if p is None else cosine(model.eval(), preprocess, tokenizer, t.prompt, p)
        for t, p in zip(thoughts, final(thoughts), strict=True)
    ]
    assert hps(thoughts, path=str(models["plain"])) == pytest.approx(expected, abs=1e-5)
    # as released: a checkpoint that holds a state_dict, for an architecture that open_clip knows by name
    config = json.loads((models["plain"] / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-for-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-for-test.json")
    weights = tmp_path / "HPS_tiny.pt"
    torch.save({"epoch": 1, "state_dict": load_file(models["plain"] / "open_clip_model.safetensors")}, weights)
    assert hps(thoughts, weights=str(weights), model="tiny-for-test") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: clip_similarity([], form="cos", path=str(m["open_clip"])), "no form 'cos'; did you mean 'cosine'"),
        (lambda m: clip_similarity([], image="last", path=str(m["open_clip"])), "no image 'last'"),
        (lambda m: clip_similarity([], library="timm"), "no library 'timm'"),
        (lambda m: clip_similarity([], library="transformers"), "clip_similarity: give `path`"),
        (lambda m: clip_similarity([], path=str(m["plain"])), "computes GELU"),
        (lambda m: clip_similarity([], library="transformers", path=str(m["open_clip"])), "has no config.json"),
        (lambda m: pickscore([], path=str(m["clip"]), processor=None, divisor=0), "divisor is 0"),
        (lambda m: hps([], path=str(m["open_clip"])), "computes QuickGELU.*trained with GELU"),
        (lambda m: hps([], weights="nowhere.pt"), "no file nowhere.pt"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_scored(models, call, message):
    with pytest.raises(UserError, match=message):
        call(models)


def test_released_weights_that_the_cache_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for call, name in (
        (lambda: pickscore([]), "yuvalkirstain/PickScore_v1"),
        (lambda: hps([]), "xswu/HPSv2"),
        (lambda: clip_similarity([]), "timm/vit_large_patch14_clip_224.openai"),
    ):
        with pytest.raises(WeightsError, match=f"{name}.*download: true"):
            call()


def test_a_model_is_loaded_once(models, thoughts, monkeypatch):
    clip_similarity(thoughts, path=str(models["open_clip"]))
    monkeypatch.setattr(open_clip, "create_model_and_transforms", None)
    clip_similarity(thoughts[:1], path=str(models["open_clip"]))
