"""Detectors for photographs: the real classes with tiny random weights from disk, against loops written out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from rewards.config import RewardsConfig
from rewards.contract import RewardContext
from rewards.detectors.base import COLORS, CachedDetector, Detection, UnknownClass
from rewards.detectors.coco import GENEVAL_CLASSES, geneval_names
from rewards.detectors.colors import TEMPLATES, ColorNamer, crop_of
from rewards.detectors.encoders import OpenClipConfig, OpenClipEncoder
from rewards.detectors.grounding_dino import GroundingDinoDetector, caption_of, tokens_of
from rewards.detectors.mask2former import Mask2FormerDetector, instances, prepared, resized_size
from rewards.detectors.owlv2 import Owlv2Detector
from rewards.detectors.phrases import by_phrase
from rewards.detectors.registry import RELEASED, DetectorConfig, build_detector, detector_spec
from rewards.detectors.weights import WeightsError, folder_of
from rewards.functions.geneval import check_record, score_images
from rewards.manager import RewardManager
from runtime.errors import UserError

SMALL = (100, 64)  # px, a test size under which tiny images stay tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "mask2former": tiny_models.mask2former(root / "mask2former"),
        "grounding_dino": tiny_models.grounding_dino(root / "grounding_dino"),
        "owlv2": tiny_models.owlv2(root / "owlv2"),
        "clip": tiny_models.clip(root / "clip"),
        "open_clip": tiny_models.open_clip_model(root / "open_clip"),
    }


@pytest.fixture(scope="session")
def images():
    """Blocks of random colors, of three sizes; two of the same size."""
    rng = np.random.default_rng(0)
    return [
        np.kron(rng.integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        for h, w in ((64, 64), (40, 72), (64, 64), (128, 48))
    ]


def flat(found):
    """(class, score, box, mask) of one image's objects, best first."""
    return sorted(
        ((name, o.score, o.box, o.mask) for name, items in found.items() for o in items),
        key=lambda item: (-item[1], item[0]),
    )


# ---- mask2former ------------------------------------------------------------------------------------------------


def by_hand(model, mean, std, image, names, min_score, top=100, test_size=SMALL):
    """One image, one pair at a time: the rule as it stands in the protocol, in plain loops."""
    height, width = image.shape[:2]
    scale = min(test_size[0] / max(height, width), test_size[1] / min(height, width))
    new_h, new_w = int(height * scale + 0.5), int(width * scale + 0.5)
    pil = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    pil = torch.nn.functional.interpolate(pil, size=(new_h, new_w), mode="bilinear", align_corners=False)
    pil = pil.round().clamp(0, 255) / 255
    pil = (pil - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    pad_h, pad_w = (new_h + 31) // 32 * 32, (new_w + 31) // 32 * 32
    canvas = torch.zeros(1, 3, pad_h, pad_w)
    canvas[:, :, :new_h, :new_w] = pil
    with torch.no_grad():
        output = model(pixel_values=canvas)
    logits, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
    pairs = []
    for query in range(len(logits)):
        exps = np.exp(logits[query].double().numpy() - logits[query].max().item())
        probabilities = exps / exps.sum()
        pairs += [(probabilities[label], query, label) for label in range(len(names))]
    pairs.sort(key=lambda pair: -pair[0])
    found = []
    for probability, query, label in pairs[:top]:
        mask = torch.nn.functional.interpolate(
            masks[query][None, None], size=(pad_h, pad_w), mode="bilinear", align_corners=False
        )[:, :, :new_h, :new_w]
        mask = torch.nn.functional.interpolate(mask, size=(height, width), mode="bilinear", align_corners=False)[
            0, 0
        ].numpy()
        inside = [(y, x) for y in range(height) for x in range(width) if mask[y, x] > 0]
        if not inside:
            continue
        sure = float(np.mean([1 / (1 + np.exp(-mask[y, x])) for y, x in inside]))
        if probability * sure <= min_score:
            continue
        ys, xs = [y for y, _ in inside], [x for _, x in inside]
        found.append((names[label], probability * sure, (min(xs), min(ys), max(xs) + 1, max(ys) + 1), len(inside)))
    return sorted(found, key=lambda item: (-item[1], item[0]))


@pytest.mark.parametrize("min_score", [0.02, 0.3])
def test_mask2former_equals_the_rule_image_by_image(models, images, min_score):
    detector = Mask2FormerDetector(str(models["mask2former"]), min_score=min_score, test_size=SMALL, batch_size=2)
    assert detector.classes == GENEVAL_CLASSES
    total = 0
    for image, found in zip(images, detector.detect(images), strict=True):
        expected = by_hand(detector.model, detector.mean, detector.std, image, GENEVAL_CLASSES, min_score)
        got = flat(found)
        total += len(got)
        assert [item[0] for item in got] == [item[0] for item in expected]
        assert [item[1] for item in got] == pytest.approx([item[1] for item in expected], abs=1e-4)
        assert [item[2] for item in got] == [item[2] for item in expected]
        assert [item[3].sum() for item in got] == [item[3] for item in expected]
    assert total > 4 * 3


def test_one_query_may_emit_several_classes_and_nothing_is_suppressed():
    # one query, two classes of 0.5 and 0.3 and a void of 0.2; its mask is the left half
    logits = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    mask = torch.full((1, 1, 4, 4), -8.0)
    mask[..., :2] = 8.0
    (found,) = instances(logits, mask, (4, 4), (4, 4), (4, 4))
    sure = 1 / (1 + np.exp(-8))
    assert found.labels_K.tolist() == [0, 1]
    assert found.scores_K.tolist() == pytest.approx([0.5 * sure, 0.3 * sure], abs=1e-5)
    assert found.boxes_K4.tolist() == [[0, 0, 2, 4]] * 2
    (kept,) = instances(logits, mask, (4, 4), (4, 4), (4, 4), min_score=0.3)
    assert kept.labels_K.tolist() == [0]  # 0.3 is not above 0.3
    (best,) = instances(logits, mask, (4, 4), (4, 4), (4, 4), top=1)
    assert best.labels_K.tolist() == [0]


def test_the_void_takes_its_share_and_an_empty_mask_is_worth_nothing():
    logits = torch.tensor([[[0.2, 0.1, 0.7]]]).log()
    (full,) = instances(logits, torch.full((1, 1, 2, 2), 50.0), (2, 2), (2, 2), (2, 2))
    assert full.scores_K.tolist() == pytest.approx([0.2, 0.1], abs=1e-5)  # not 2/3 and 1/3
    (empty,) = instances(logits, torch.full((1, 1, 2, 2), -1.0), (2, 2), (2, 2), (2, 2))
    assert len(empty.scores_K) == 0


def test_masks_are_cut_to_the_resized_image_before_they_are_scaled_to_the_image():
    # padded 8 x 8, of which 8 x 4 is image; the mask's right half lies in the padding
    mask = torch.full((1, 1, 8, 8), 5.0)
    (found,) = instances(torch.tensor([[[9.0, 0.0]]]), mask, (8, 8), (8, 4), (16, 8))
    assert found.masks_KHW.shape == (1, 16, 8) and found.boxes_K4.tolist() == [[0, 0, 8, 16]]
    right = torch.full((1, 1, 8, 8), -5.0)
    right[..., 4:] = 5.0
    (nothing,) = instances(torch.tensor([[[9.0, 0.0]]]), right, (8, 8), (8, 4), (16, 8))
    assert len(nothing.scores_K) == 0


def test_dropping_unlikely_pairs_first_changes_nothing_that_stays():
    rng = torch.Generator().manual_seed(1)
    logits, masks = torch.randn(2, 30, 6, generator=rng) * 3, torch.randn(2, 30, 8, 8, generator=rng) * 3
    every = instances(logits, masks, (32, 32), (30, 32), (50, 60))
    some = instances(logits, masks, (32, 32), (30, 32), (50, 60), min_score=0.4)
    for all_of, left in zip(every, some, strict=True):
        above = all_of.scores_K > 0.4
        assert 0 < int(above.sum()) < len(all_of.scores_K)
        assert torch.equal(all_of.scores_K[above], left.scores_K)
        assert torch.equal(all_of.boxes_K4[above], left.boxes_K4)
        assert torch.equal(all_of.masks_KHW[above], left.masks_KHW)


def test_the_test_size():
    assert resized_size(512, 512) == (800, 800)
    assert resized_size(480, 640) == (800, 1067)  # 800 / 480 = 1.667; 1066.67 rounds up
    assert resized_size(400, 1600) == (333, 1333)  # the long side binds: 1333 / 1600; 333.25 rounds down
    pixels = prepared([np.zeros((40, 72, 3), np.uint8)], (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), SMALL)
    assert pixels.shape == (1, 3, 64, 128)  # 56 x 100, padded to 64 x 128
    assert pixels[0, 0, 0, 0] == -2 and pixels[0, 0, 60, 0] == 0 and pixels[0, 0, 0, 110] == 0


def test_labels_of_released_checkpoints_get_genevals_names():
    assert geneval_names(tiny_models.COCO_AS_RELEASED) == GENEVAL_CLASSES
    other = ["motorbike" if name == "motorcycle" else name for name in tiny_models.COCO_AS_RELEASED]
    assert geneval_names(other) == GENEVAL_CLASSES
    assert geneval_names(["cat", "dog"]) == ("cat", "dog")
    shuffled = tiny_models.COCO_AS_RELEASED[::-1]
    assert geneval_names(shuffled) == tuple(shuffled)  # no order is guessed


def test_ten_colors_and_eighty_names_are_genevals():
    assert len(set(GENEVAL_CLASSES)) == 80 and len(COLORS) == 10
    assert {"computer mouse", "tv remote", "computer keyboard"} <= set(GENEVAL_CLASSES)


# ---- open vocabulary --------------------------------------------------------------------------------------------


def test_grounding_dino_agrees_with_the_librarys_own_boxes(models, images):
    detector = GroundingDinoDetector(str(models["grounding_dino"]), min_score=0.2, batch_size=4)
    phrases = [["dog", "red cup"]] * len(images)
    found = detector.detect_phrases(images, phrases)
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(models["grounding_dino"])
    for image, objects in zip(images, found, strict=True):
        inputs = processor(images=[image], text=[["dog", "red cup"]], return_tensors="pt")
        with torch.no_grad():
            output = detector.model(**inputs)
        theirs = processor.post_process_grounded_object_detection(
            output, inputs["input_ids"], threshold=0.0, target_sizes=[image.shape[:2]]
        )[0]
        boxes = theirs["boxes"].numpy()
        for name, score, box, mask in flat(objects):
            distance = np.abs(boxes - np.asarray(box)).max(1)
            assert distance.min() < 1e-2 and mask is None  # one of the network's own boxes, in px of the image
            # the library's confidence is the largest over the whole caption
            assert score <= theirs["scores"][distance.argmin()].item() + 1e-4
            assert name in ("dog", "red cup")
    assert sum(len(flat(objects)) for objects in found)


def test_a_caption_and_its_tokens():
    caption, spans = caption_of(["Dog", "red cup."])
    assert caption == "dog. red cup." and [caption[a:b] for a, b in spans] == ["dog", "red cup"]
    # [CLS] dog . red cup . [SEP]
    offsets = torch.tensor([[0, 0], [0, 3], [3, 4], [5, 8], [9, 12], [12, 13], [0, 0]])
    assert tokens_of(offsets, spans[0]) == [1] and tokens_of(offsets, spans[1]) == [3, 4]


def test_too_many_phrases_for_the_text_encoder_are_refused(models, images):
    detector = GroundingDinoDetector(str(models["grounding_dino"]))
    with pytest.raises(UserError, match="reads 32 tokens.*fewer phrases"):
        detector.detect_phrases(images[:1], [["computer keyboard", "refrigerator", "tennis racket"]])


def test_owlv2_agrees_with_the_librarys_own_post_processing(models, images):
    detector = Owlv2Detector(str(models["owlv2"]), min_score=0.3, batch_size=4)
    phrases = [["dog", "cup"], ["cat"], ["bus"], []]
    found = detector.detect_phrases(images, phrases)
    assert found[3] == {}
    for image, some, objects in zip(images, phrases, found, strict=True):
        if not some:
            continue
        words = detector.tokenizer(
            [f"a photo of a {name}" for name in some],
            padding="max_length",
            max_length=32,
            truncation=True,
            return_tensors="pt",
        )
        seen = detector.processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            output = detector.model(**words, pixel_values=seen["pixel_values"])
        theirs = detector.processor.post_process_object_detection(output, 0.3, [image.shape[:2]])[0]
        order = theirs["scores"].argsort(descending=True)
        got = flat(objects)
        assert [item[1] for item in got] == pytest.approx(theirs["scores"][order].tolist(), abs=1e-4)
        assert [item[0] for item in got] == [some[label] for label in theirs["labels"][order].tolist()]
        height, width = image.shape[:2]
        limits = np.array([width, height, width, height])
        for (_, _, box, _), their in zip(got, theirs["boxes"][order].numpy(), strict=True):
            assert np.asarray(box) == pytest.approx(np.clip(their, 0, limits), abs=0.05)


def test_boxes_by_phrase_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.6], [0.1, 0.25]])
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.1, 0.1, 0.4, 0.2], [0.5, 0.5, 1.0, 1.0]])
    found = by_phrase(scores, boxes, ["dog", "cup"], (100.0, 200.0), (100, 200), 0.25, None)
    assert [o.score for o in found["dog"]] == pytest.approx([0.9, 0.8])
    assert found["dog"][0].box == pytest.approx((60, 30, 140, 70))
    assert [o.box for o in found["cup"]] == [pytest.approx((0, 0, 60, 20))]  # cut; 0.25 is not above 0.25
    # IoU of the two dogs: (80 - 4) / (80 + 4) = 0.905
    assert len(by_phrase(scores, boxes, ["dog", "cup"], (100.0, 200.0), (100, 200), 0.25, 0.9)["dog"]) == 1
    assert len(by_phrase(scores, boxes, ["dog", "cup"], (100.0, 200.0), (100, 200), 0.25, 0.91)["dog"]) == 2


# ---- colors ----------------------------------------------------------------------------------------------------


def test_the_crop_is_the_object_on_grey_with_corners_rounded():
    image = np.zeros((10, 10, 3), np.uint8)
    image[2:6, 3:7] = (250, 0, 0)
    mask = np.zeros((10, 10), bool)
    mask[2:6, 3:5] = True
    crop = np.asarray(crop_of(image, Detection((2.4, 1.6, 7.4, 6.4), 0.9, None, mask)))
    assert crop.shape == (4, 5, 3)  # rows 2..5 (1.6 -> 2, 6.4 -> 6), columns 2..6 (2.4 -> 2, 7.4 -> 7)
    assert (crop[:, 1:3] == (250, 0, 0)).all()
    assert (crop[:, [0, 3, 4]] == 0x99).all()  # what is red but not in the mask is grey too
    plain = np.asarray(crop_of(image, Detection((2.4, 1.6, 7.4, 6.4), 0.9)))
    assert (plain[:, 0] == 0).all() and (plain[:, 1:5] == (250, 0, 0)).all()
    for thin in ((3.1, 2.0, 3.3, 6.0), (10.0, 10.0, 10.0, 10.0)):  # narrower than a pixel, and outside of it
        assert min(crop_of(image, Detection(thin, 0.9)).size) == 1


def test_colors_equal_one_object_at_a_time(models, images):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{models['open_clip']}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{models['open_clip']}")
    model.eval()
    rng = np.random.default_rng(3)
    objects = []
    for image in images:
        height, width = image.shape[:2]
        objects.append([])
        for name in ("dog", "cup", "dog"):
            x0, y0 = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
            mask = rng.random((height, width)) < 0.7
            objects[-1].append((name, Detection((x0, y0, x0 + width / 3, y0 + height / 3), 0.9, None, mask)))
    expected = []
    for image, items in zip(images, objects, strict=True):
        expected.append([])
        for name, item in items:
            grey = np.full_like(image, 0x99)
            grey[item.mask] = image[item.mask]
            pil = Image.fromarray(grey).crop([round(corner) for corner in item.box])
            with torch.no_grad():
                seen = model.encode_image(preprocess(pil)[None])[0]
                best, name_of_best = -2.0, ""
                for color in COLORS:
                    vectors = []
                    for sentence in (
                        f"a photo of a {color} {name}",
                        f"a photo of a {color}-colored {name}",
                        f"a photo of a {color} object",
                    ):
                        vector = model.encode_text(tokenizer([sentence]))[0]
                        vectors.append(vector / vector.norm())
                    mean = sum(vectors) / 3
                    cosine = float(seen @ mean / seen.norm() / mean.norm())
                    if cosine > best:
                        best, name_of_best = cosine, color
            expected[-1].append(name_of_best)
    namer = ColorNamer(OpenClipConfig(path=str(models["open_clip"]), batch_size=5))
    assert namer.name(images, objects) == expected
    assert len({color for row in expected for color in row}) > 1


def test_the_sentences_are_genevals():
    assert [t.format(color="red", cls="bus") for t in TEMPLATES] == [
        "a photo of a red bus",
        "a photo of a red-colored bus",
        "a photo of a red object",
    ]


def test_an_activation_that_the_weights_were_not_trained_with_is_refused(models, tmp_path):
    with pytest.raises(
        WeightsError,
        match="ViT-L-14 computes GELU, but the weights 'openai' were trained with QuickGELU.*name ViT-L-14-quickgelu",
    ):
        OpenClipEncoder(OpenClipConfig(model="ViT-L-14"), "rewards.detector.colors")
    with pytest.raises(WeightsError, match="ViT-B-32-quickgelu computes QuickGELU, but .*without -quickgelu"):
        OpenClipEncoder(
            OpenClipConfig(
                model="ViT-B-32-quickgelu",
                pretrained=str(models["open_clip"] / "open_clip_model.safetensors"),
                quick_gelu=False,
            )
        )
    plain = tiny_models.open_clip_model(tmp_path / "plain", quick_gelu=False)
    with pytest.raises(WeightsError, match="plain computes GELU.*quick_gelu: false"):
        OpenClipEncoder(OpenClipConfig(path=str(plain)))
    image = [Image.fromarray(np.full((32, 32, 3), 90, np.uint8))]
    without = OpenClipEncoder(OpenClipConfig(path=str(plain), quick_gelu=False)).images(image)
    assert not torch.allclose(without, OpenClipEncoder(OpenClipConfig(path=str(models["open_clip"]))).images(image))
    assert OpenClipConfig().model == "ViT-L-14-quickgelu" and OpenClipConfig().pretrained == "openai"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OpenClipConfig(), "timm/vit_large_patch14_clip_224.openai.*not in the hub cache.*download: true"),
        (OpenClipConfig(model="ViT-L14"), "open_clip has no 'ViT-L14'; did you mean 'ViT-L-14'"),
        (OpenClipConfig(pretrained="opena1"), "neither a file nor a tag of ViT-L-14-quickgelu; did you mean 'openai'"),
        (OpenClipConfig(path="nowhere/at/all"), "no folder nowhere/at/all"),
    ],
)
def test_an_encoder_that_is_not_there(config, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=message):
        OpenClipEncoder(config)


# ---- the recipe, and what stands between -------------------------------------------------------------------------


def test_weights_that_are_not_there(tmp_path, models):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="empty has no config.json"):
        folder_of(str(tmp_path / "empty"), "config.json")
    with pytest.raises(
        WeightsError,
        match="'nobody/nothing' is neither a folder here nor a model in the hub cache; set `download: true`",
    ):
        folder_of("nobody/nothing", "config.json")
    with pytest.raises(WeightsError, match="holds a model of type 'owlv2', not mask2former"):
        Mask2FormerDetector(str(models["owlv2"]))
    with pytest.raises(WeightsError, match="of type 'mask2former', not grounding-dino"):
        GroundingDinoDetector(str(models["mask2former"]))
    with pytest.raises(WeightsError, match="of type 'clip', not owlv2"):
        Owlv2Detector(str(models["clip"]))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"backend": "mask2forme", "path": "x"}, "no 'mask2forme'; did you mean 'mask2former'"),
        ({"path": "x"}, "backend"),
        ({"backend": "shapes", "min_scroe": 0.1}, "min_scroe"),
    ],
)
def test_a_recipe_that_names_no_detector(written, message):
    with pytest.raises(ValueError, match=message):
        RewardsConfig.model_validate({"parts": {"a": {"function": "geneval"}}, "detector": written})


def test_what_the_commands_option_means(tmp_path):
    (tmp_path / "own.yaml").write_text("backend: owlv2\noverlap: 0.5\n")
    assert detector_spec("shapes") == DetectorConfig(backend="shapes")
    assert detector_spec("mask2former:/models/m2f") == DetectorConfig(backend="mask2former", path="/models/m2f")
    assert detector_spec("{backend: owlv2, min_score: 0.1}") == DetectorConfig(backend="owlv2", min_score=0.1)
    assert detector_spec(str(tmp_path / "own.yaml")) == DetectorConfig(backend="owlv2", overlap=0.5)
    assert detector_spec("mine.detectors:Mine") == "mine.detectors:Mine"
    for text, message in (
        ("mask2forme", "no detector 'mask2forme'; did you mean 'mask2former'"),
        ("{backend: shapes, scor: 1}", "scor: .*Known: backend"),
        ("{backend: [", "not YAML"),
        ("none.yaml", "none.yaml: No such file"),
        ("{path: x}", "backend: Field required"),
    ):
        with pytest.raises(UserError, match=message):
            detector_spec(text)


def test_without_a_path_the_release_is_looked_for_in_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for backend, name in RELEASED.items():
        with pytest.raises(WeightsError, match=f"'{name}' is neither a folder here nor a model in the hub cache"):
            build_detector(DetectorConfig(backend=backend))


def test_a_key_of_another_backend_is_refused(models):
    with pytest.raises(UserError, match="rewards.detector.template: mask2former has no such key; it takes path"):
        build_detector(DetectorConfig(backend="mask2former", path=str(models["mask2former"]), template="a {}"))
    with pytest.raises(UserError, match="rewards.detector.colors.modle: .*did you mean 'model'"):
        build_detector(DetectorConfig(backend="mask2former", path=str(models["mask2former"]), colors={"modle": "x"}))


class Coco:
    """A task of photographs: prompts, and nothing to detect with."""

    name, words, classes, detect = "coco", ("a",), None, None

    def __init__(self, *records):
        self.records = list(records)

    def prompts(self, split):
        return self.records if split == "train" else []


def record(name, **more):
    return {"tag": "single_object", "prompt": f"a photo of a {name}", "include": [{"class": name, "count": 1, **more}]}


def test_a_recipe_builds_its_detector_and_a_class_or_color_it_lacks_stops_it_before_anything_runs(models):
    written = {
        "backend": "mask2former",
        "path": str(models["mask2former"]),
        "test_size": [100, 64],
        "colors": {"path": str(models["open_clip"])},
    }
    recipe = {"parts": {"a": {"function": "geneval"}}, "detector": written}
    with RewardManager(RewardsConfig.model_validate(recipe), Coco(record("computer mouse", color="red"))) as manager:
        assert manager.context.detector.classes == GENEVAL_CLASSES
    with pytest.raises(
        UnknownClass,
        match="'a photo of a mouse' \\(train\\) asks for 'mouse', which the detector cannot see.*computer mouse",
    ):
        RewardManager(RewardsConfig.model_validate(recipe), Coco(record("mouse")))
    written["colors"] = None
    with RewardManager(RewardsConfig.model_validate(recipe), Coco(record("bus"))):
        pass
    with pytest.raises(UserError, match="asks for a color, and the detector names none; give rewards.detector.colors"):
        RewardManager(RewardsConfig.model_validate(recipe), Coco(record("bus", color="red")))
    written["colors"] = {"path": "nowhere/at/all"}
    with pytest.raises(WeightsError, match="rewards.detector.colors.path: no folder"):
        RewardManager(RewardsConfig.model_validate(recipe), Coco(record("bus", color="red")))


def test_the_shapes_backend_and_geneval_through_a_photographs_detector(models, images):
    assert build_detector(DetectorConfig(backend="shapes")).classes == ("circle", "square", "triangle", "cross")
    for backend in ("mask2former", "grounding_dino", "owlv2"):
        detector = build_detector(
            DetectorConfig(
                backend=backend,
                path=str(models[backend]),
                min_score=0.01,
                test_size=SMALL if backend == "mask2former" else None,
                colors={"path": str(models["open_clip"])},
            )
        )
        context = RewardContext.of(None, None, detector)
        records = [record("dog", color="red"), record("bus"), record("cup"), record("dog", color="blue")]
        graded = score_images(images, records, context, "graded")
        assert len(graded) == 4 and all(0 <= score <= 1 for score, _ in graded)
        assert graded == [
            score_images([p], [r], RewardContext.of(None, None, detector), "graded")[0]
            for p, r in zip(images, records, strict=True)
        ]


class Names:
    """Sees two dogs and a cup; names colors by the score, and says how often it was asked."""

    classes = ("dog", "cup")

    def __init__(self):
        self.asked = []

    def detect(self, images):
        return [
            {"dog": [Detection((0, 0, 1, 1), 0.4), Detection((0, 0, 1, 1), 0.8)], "cup": [Detection((0, 0, 1, 1), 0.9)]}
            for _ in images
        ]

    def name_colors(self, images, objects):
        self.asked += [(name, item.score) for items in objects for name, item in items]
        return [["red" if item.score > 0.5 else "blue" for _, item in items] for items in objects]


def test_colors_are_named_for_the_best_objects_asked_about_and_once():
    image, names = np.zeros((4, 4, 3), np.uint8), Names()
    cached = CachedDetector(names)
    (found,) = cached.detect([image], colored=[{"dog": 1}])
    assert names.asked == [("dog", 0.8)]
    assert [o.color for o in found["dog"]] == [None, "red"] and found["cup"][0].color is None
    cached.detect([image], colored=[{}])
    (again,) = cached.detect([image])  # all of them now
    assert names.asked == [("dog", 0.8), ("dog", 0.4), ("cup", 0.9)]
    assert [o.color for o in again["dog"]] == ["blue", "red"] and cached.looks == 1
    check_record(cached, record("dog", color="red"), "here")


def test_an_open_vocabulary_is_asked_for_what_each_record_names(models):
    class Asked:
        classes, open_vocabulary = (), True

        def detect_phrases(self, images, phrases):
            return [{phrase: [Detection((0, 0, 1, 1), 0.9)] for phrase in some} for some in phrases]

    cached = CachedDetector(Asked())
    image = np.zeros((4, 4, 3), np.uint8)
    cached.require(["anything"], "here")
    assert [sorted(found) for found in cached.detect([image, image], [["dog", "cup"], ["bus"]])] == [
        ["cup", "dog"],
        ["bus"],
    ]
    assert cached.looks == 2
    with pytest.raises(UserError, match="must be told which phrases"):
        cached.detect([image])


def test_configurations_on_disk_are_the_released_layout(models):
    for name, kind in (("mask2former", "mask2former"), ("grounding_dino", "grounding-dino"), ("owlv2", "owlv2")):
        names = {path.name for path in models[name].iterdir()}
        assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
        assert json.loads((models[name] / "config.json").read_text())["model_type"] == kind
