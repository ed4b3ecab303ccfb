"""What scoring images costs, and how much of it a step does not notice.

    python -m benchmarks.rewards [scoring] [shapes] [overlap]      # all three without names
    python -m benchmarks.rewards --smoke                           # minutes less, and figures worth less

scoring   GenEval with a Mask2Former (random weights, smaller than the released one, its queries, classes and mask
          resolutions the same) and an open_clip ViT: our batches against one image at a time as GenEval's script
          does it, which resizes the masks of all 100 (query, class) pairs to the image, moves them to the CPU class
          by class, and classifies colors through a DataLoader with four workers. Both sides use all of torch's
          threads, read the same images, and must give the same verdicts. An untrained network is sure of nothing, so
          the class head is scaled until an image has about as many objects above the threshold as `--objects` says.
shapes    the shapes world's detector, images a second, noisy images, one thread.
overlap   a step of rollout and judgement, its groups judged after the rollout or while it runs. In both arms the
          rollout is pinned to one core and the detector's worker to another. Hidden is the share of the judgement's
          time that the step is spared.

Rounds alternate between the arms; medians are compared. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from rewards.contract import RewardContext
from rewards.detectors.base import COLORS, Detection, Detections
from rewards.detectors.coco import GENEVAL_CLASSES
from rewards.detectors.colors import Colored, ColorNamer, crop_of
from rewards.detectors.encoders import OpenClipConfig
from rewards.detectors.mask2former import Mask2FormerDetector, prepared, resized_size
from rewards.functions.geneval import MAX_OBJECTS, colored_of, evaluate, score_images
from underdrawing.options import Number, Whole

THRESHOLD = 0.3


# ---- the models ---------------------------------------------------------------------------------------------------


def write_mask2former(folder: Path, labels: Sequence[str], width: int, seed: int = 0) -> Path:
    """A random Mask2Former in the released layout: Swin backbone, 100 queries, `width` channels in its first stage."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=224,
        patch_size=4,
        embed_dim=width,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        dim_feedforward=128,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=100,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # masks with edges, rather than everywhere about a half
        dict(model.named_parameters())["model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.weight"].mul_(
            60
        )
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333}).save_pretrained(folder)
    return folder


def make_sure(detector: Mask2FormerDetector, images: Sequence[np.ndarray], objects: float) -> float:
    """Scale the class head until the images have about `objects` above the threshold; how many they have then."""
    head, low, high = detector.model.class_predictor, 0.0, 12.0
    original, seen = head.weight.detach().clone(), 0.0
    for _ in range(8):
        middle = (low + high) / 2
        with torch.no_grad():
            head.weight.copy_(original * 2**middle)
        found = detector.detect(images)
        seen = sum(len(items) for objects_of in found for items in objects_of.values()) / len(images)
        low, high = (middle, high) if seen < objects else (low, middle)
    return seen


def write_open_clip(folder: Path, width: int, seed: int = 0) -> Path:
    """A random ViT of open_clip in its hub layout, 224 px."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    towers: dict[str, Any] = {
        "embed_dim": width,
        "vision_cfg": {"image_size": 224, "layers": 4, "width": width, "patch_size": 16, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 2, "layers": 4},
    }
    folder.mkdir(parents=True)
    save_file(open_clip.CLIP(**towers, quick_gelu=True).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**towers, "quick_gelu": True}, "preprocess_cfg": {}})
    )
    return folder


def drawn(count: int, side: int, seed: int = 0) -> list[np.ndarray]:
    """Blocks of random colors with soft edges: images on which a random network is not of one mind."""
    rng = np.random.default_rng(seed)
    return [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
        )
        for _ in range(count)
    ]


def asked(found: Sequence[Detections], seed: int = 0) -> list[dict[str, Any]]:
    """A record an image: about classes that the network sees there, every second one about a color too."""
    rng = np.random.default_rng(seed)
    records = []
    for index, objects in enumerate(found):
        names = sorted(objects) or [GENEVAL_CLASSES[0]]
        name = names[rng.integers(len(names))]
        clause: dict[str, Any] = {"class": name, "count": 1}
        if index % 2:
            clause["color"] = COLORS[rng.integers(len(COLORS))]
        records.append(
            {"tag": "colors" if index % 2 else "single_object", "prompt": f"a photo of a {name}", "include": [clause]}
        )
    return records


# ---- the peer: one image at a time ------------------------------------------------------------------------------


class OneAtATime:
    """GenEval's way, from its description: forward, all pairs' masks, per-class lists, colors by a DataLoader."""

    def __init__(self, detector: Mask2FormerDetector, namer: ColorNamer, workers: int) -> None:
        self.detector, self.namer, self.workers = detector, namer, workers

    def __call__(self, images: Sequence[np.ndarray], records: Sequence[dict[str, Any]]) -> list[Any]:
        return [self.one(image, record) for image, record in zip(images, records, strict=True)]

    @torch.inference_mode()
    def one(self, image: np.ndarray, record: dict[str, Any]) -> Any:
        height, width = image.shape[:2]
        detector = self.detector
        pixels = prepared([image], detector.mean, detector.std, detector.test_size, detector.device)
        output = detector.model(pixel_values=pixels)
        resized = resized_size(height, width, detector.test_size)
        masks = F.interpolate(
            output.masks_queries_logits, size=pixels.shape[-2:], mode="bilinear", align_corners=False
        )[0, :, : resized[0], : resized[1]]
        masks = F.interpolate(masks[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
        scores = output.class_queries_logits[0].softmax(-1)[:, :-1]
        best, pair = scores.flatten().topk(100, sorted=False)
        labels, chosen = pair % scores.shape[1], masks[pair // scores.shape[1]]
        binary = (chosen > 0).float()
        sure = (chosen.sigmoid() * binary).flatten(1).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
        total, binary = best * sure, binary.bool()
        boxes = torch.zeros(len(chosen), 4)
        for index, mask in enumerate(binary):
            x, y = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
            if len(x):
                boxes[index] = torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1], dtype=torch.float32)
        everything = binary.cpu().numpy()
        found: Detections = {}
        for label, name in enumerate(detector.classes):
            mine = (labels == label).nonzero()[:, 0]
            mine = mine[total[mine].argsort(descending=True)]
            for index in mine[total[mine] > THRESHOLD][:MAX_OBJECTS].tolist():
                x0, y0, x1, y1 = boxes[index].tolist()
                found.setdefault(name, []).append(
                    Detection((x0, y0, x1, y1), float(total[index]), None, everything[index])
                )
        for name, count in colored_of(record).items():
            objects = found.get(name, [])[:count]
            if objects:
                found[name][:count] = [
                    Detection(o.box, o.score, color, o.mask)
                    for o, color in zip(objects, self.colors(image, objects, name), strict=True)
                ]
        return evaluate(record, found)

    def colors(self, image: np.ndarray, objects: Sequence[Detection], name: str) -> list[str]:
        encoder = self.namer.load()
        classifier = self.namer.classifier(name)
        loader = DataLoader(Crops(image, objects, encoder.preprocess), batch_size=16, num_workers=self.workers)
        named = []
        for batch in loader:
            features = encoder.model.encode_image(batch, normalize=True)
            named += (100 * features @ classifier.T).argmax(1).tolist()
        return [COLORS[index] for index in named]


class Crops(Dataset[torch.Tensor]):
    def __init__(self, image: np.ndarray, objects: Sequence[Detection], transform: Any) -> None:
        self.image, self.objects, self.transform = image, objects, transform

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(crop_of(self.image, self.objects[index]))


# ---- the parts ----------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    answer = run()
    return time.perf_counter() - started, answer


def scoring(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images a second of both sides on the same images and records."""
    images = drawn(given.images, given.side)
    detector = Mask2FormerDetector(
        str(write_mask2former(folder / "mask2former", GENEVAL_CLASSES, given.width)),
        device="cpu",
        batch_size=given.batch_size,
        min_score=THRESHOLD,
        test_size=given.test_size,
    )
    objects = make_sure(detector, images[:4], given.objects)
    namer = ColorNamer(OpenClipConfig(path=str(write_open_clip(folder / "open_clip", 192)), device="cpu"))
    records = asked(detector.detect(images))
    for record in records:  # sentences are embedded once a class on either side
        for name in colored_of(record):
            namer.classifier(name)

    def ours() -> list[Any]:
        return score_images(images, records, RewardContext.of(None, None, Colored(detector, namer)), "standard")

    arms = {
        "ours": ours,
        "script": lambda: OneAtATime(detector, namer, 4)(images, records),
        "no_workers": lambda: OneAtATime(detector, namer, 0)(images, records),
    }
    taken: dict[str, list[float]] = {name: [] for name in arms}
    verdicts: dict[str, Any] = {}
    for number in range(given.rounds + 1):  # the first round warms up
        for name, arm in arms.items():
            spent, verdicts[name] = seconds(arm)
            if number or not given.rounds:
                taken[name].append(spent)
    same = verdicts["ours"] == verdicts["script"] == verdicts["no_workers"]
    if not same:
        raise SystemExit("the arms do not agree on the verdicts, so their speeds say nothing")
    speed = {name: len(images) / statistics.median(spent) for name, spent in taken.items()}
    print(
        f"scoring: {len(images)} images of {given.side} px, {objects:.1f} objects an image above {THRESHOLD}, "
        f"{torch.get_num_threads()} threads, verdicts equal"
    )
    print(f"  ours, batches of {given.batch_size:<3}           {speed['ours']:8.2f} images/s")
    print(f"  one at a time, 4 workers    {speed['script']:8.2f} images/s")
    print(f"  one at a time, no workers   {speed['no_workers']:8.2f} images/s")
    return {
        "ours": round(speed["ours"], 3),
        "peer": round(speed["script"], 3),
        "ratio": round(speed["ours"] / speed["script"], 2),
        "unit": "images/s",
        "peer_without_workers": round(speed["no_workers"], 3),
        "ratio_without_workers": round(speed["ours"] / speed["no_workers"], 2),
        "objects": round(objects, 1),
    }


def shapes(given: argparse.Namespace) -> dict[str, Any]:
    """The shapes detector on noisy scenes."""
    from rewards.detectors.shapes import shapes_detector
    from tasks.shapes.render import render
    from tasks.shapes.world import sample_scene

    rng = np.random.default_rng(0)
    images = [
        np.clip(render(sample_scene(rng, 1 + index % 4)) + rng.normal(0, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
        for index in range(given.scenes)
    ]
    detector = shapes_detector()
    detector.detect(images[:1])
    speed = len(images) / statistics.median(
        seconds(lambda: detector.detect(images))[0] for _ in range(given.rounds or 1)
    )
    print(f"shapes: {speed:.0f} images/s over {len(images)} noisy scenes")
    return {"shapes_images_per_s": round(speed, 1)}


def overlap(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a step with the judgement after the rollout, and beside it."""
    from formats.registry import get_format
    from policy.chameleon.config import ChameleonPolicyConfig
    from policy.registry import load_policy
    from rewards.config import RewardsConfig
    from rewards.manager import RewardManager
    from rollout.config import RolloutConfig
    from rollout.engine.engine import Engine
    from rollout.pool.local import LocalRollouts
    from rollout.requests import RolloutRequest
    from tasks.registry import get_task

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("overlap: left out, it takes two cores")
        return {}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = get_task("shapes")
    policy = load_policy(
        ChameleonPolicyConfig.model_validate(
            {
                "family": "chameleon",
                "tiny": {
                    "hidden_size": given.policy_width,
                    "num_hidden_layers": given.policy_layers,
                    "num_attention_heads": 4,
                    "intermediate_size": 3 * given.policy_width,
                },
            }
        ),
        task.words,
    )
    rollouts = LocalRollouts(
        Engine(policy, get_format("strokes", max_images=4), RolloutConfig(rows=given.rows, max_tokens=240), "full")
    )
    records = task.prompts("train")
    folder_of_detector = write_mask2former(folder / "shapes_mask2former", task.classes, 24)
    config = RewardsConfig.model_validate(
        {
            "parts": {"graded": {"function": "geneval", "options": {"mode": "graded", "image": "each"}}},
            "detector": {
                "backend": "mask2former",
                "path": str(folder_of_detector),
                "device": "cpu",
                "batch_size": 8,
                "test_size": [given.overlap_side, given.overlap_side],
                "colors": {"path": str(write_open_clip(folder / "shapes_open_clip", 128))},
            },
            "detector_workers": {"kind": "process", "count": 1, "batch_size": 16},
        }
    )
    requests = [
        RolloutRequest(number, records[number]["prompt"], records[number], tuple(range(given.members)), 0)
        for number in range(given.prompts)
    ]
    sizes = [given.members] * given.prompts
    before = children()
    with RewardManager(config, task, get_format("strokes", max_images=4)) as manager:
        for child in children() - before:
            os.sched_setaffinity(child, {cores[1]})
            for thread in Path(f"/proc/{child}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {cores[1]})
        os.sched_setaffinity(0, {cores[0]})

        def after() -> tuple[float, float]:
            rolled, result = seconds(lambda: rollouts.generate(requests))
            judged, _ = seconds(lambda: manager.score(result.groups))
            return rolled, judged

        def beside() -> float:
            pending = manager.begin(0, sizes)
            result = rollouts.generate(requests, each=pending.add)
            return seconds(lambda: pending.finish(result.groups))[0]

        after()  # warms up
        apart, together = [], []
        for _ in range(max(given.rounds, 1)):
            apart.append(after())
            together.append(seconds(beside))
    os.sched_setaffinity(0, set(cores))
    rolled, judged = (statistics.median(column) for column in zip(*apart, strict=True))
    step, waited = (statistics.median(column) for column in zip(*together, strict=True))
    hidden = (rolled + judged - step) / judged
    print(
        f"overlap: rollout {rolled:.2f} s, judgement {judged:.2f} s ({judged / (rolled + judged):.0%} of the step); "
        f"beside it the step takes {step:.2f} s, of which rewards take {max(step - rolled, 0) / step:.0%} (the "
        f"last of them {waited:.2f} s after the rollout); "
        f"{hidden:.0%} hidden"
    )
    return {
        "rollout_s": round(rolled, 2),
        "judgement_s": round(judged, 2),
        "step_overlapped_s": round(step, 2),
        "waited_s": round(waited, 2),
        "reward_share_apart": round(judged / (rolled + judged), 3),
        "reward_share_overlapped": round(max(step - rolled, 0) / step, 3),
        "hidden": round(hidden, 3),
    }


def children() -> set[int]:
    """Processes that this one has started."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="scoring, shapes, overlap (default: all)")
    parser.add_argument("--smoke", action="store_true", help="small images and few of them: does it run?")
    parser.add_argument("--images", type=Whole(1), default=16)
    parser.add_argument("--side", type=Whole(1), default=512, help="px of the scored images")
    parser.add_argument("--width", type=Whole(1), default=24, help="channels of the backbone's first stage")
    parser.add_argument("--objects", type=Number(), default=8.0, help="an image, above the threshold")
    parser.add_argument("--batch-size", type=Whole(1), default=4)
    parser.add_argument("--scenes", type=Whole(1), default=2000)
    parser.add_argument("--prompts", type=Whole(1), default=12, help="overlap: groups of the step")
    parser.add_argument("--members", type=Whole(1), default=2)
    parser.add_argument("--rows", type=Whole(1), default=2)
    parser.add_argument("--overlap-side", type=Whole(1), default=96, help="overlap: px that the detector resizes to")
    parser.add_argument(
        "--policy-width",
        type=Whole(1),
        default=512,
        help="overlap: of the policy; a rollout that is shorter than its judgement cannot hide it",
    )
    parser.add_argument("--policy-layers", type=Whole(1), default=9)
    parser.add_argument("--rounds", type=Whole(1), default=3)
    parser.add_argument("--threads", type=Whole(1), default=None, help="of torch (default: all cores)")
    given = parser.parse_args()
    known = {"scoring": scoring, "shapes": shapes, "overlap": overlap}
    for part in given.parts:
        if part not in known:
            parser.error(f"no part '{part}'; there are {', '.join(known)}")
    given.test_size = (1333, 800)
    if given.smoke:
        given.images, given.side, given.test_size, given.rounds, given.scenes = 4, 96, (160, 128), 0, 50
        given.prompts, given.members, given.rows = 2, 2, 2
    torch.set_num_threads(given.threads or len(os.sched_getaffinity(0)))
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts or known:
            told |= shapes(given) if part == "shapes" else known[part](given, Path(folder))  # type: ignore[operator]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
