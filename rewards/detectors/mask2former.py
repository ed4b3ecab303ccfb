"""Mask2Former as GenEval's detector: transformers' network, read out by mmdet's rule for instances.

transformers' own instance post-processing thresholds masks at the network's resolution, resizes them by nearest
neighbour and gives no boxes; GenEval's protocol (its released scorer runs mmdet 2.x, config `lsj_8x2_50e_coco`) reads
the same two outputs otherwise. With softmax over the classes and the void, of which the void is then left out:

    pairs   the 100 best of (query x class), so that one query may emit several classes; no suppression
    mask    logits, resized bilinearly to the padded input, cut to the resized image, resized to the image, > 0
    score   class probability x mean sigmoid inside the mask (0 where the mask is empty)
    box     the mask's extent, half-open: x0, y0, x1 + 1, y1 + 1

A score is at most its class probability, so pairs whose class probability is not above `min_score` are dropped before
any mask is resized: nothing that is left changes, and most of the work is gone. Images of one size share a forward
pass; padding never depends on the neighbours.

Letters: B images, Q queries, C classes without the void, K pairs that are left, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rewards.detectors.base import Detection, Detections
from rewards.detectors.coco import geneval_names
from rewards.detectors.weights import WeightsError, device_of, folder_of

TEST_SIZE = (1333, 800)  # px: the longest side at most, the shortest side at most; whichever binds first
DIVISOR = 32  # px: the network's input is padded to a multiple of it, right and below
TOP = 100  # (query, class) pairs an image
CHUNK = 16  # masks resized at once: 16 of 1333 x 800 are 68 MB


@dataclass(frozen=True)
class Found:
    """What is left of one image. K pairs, best score first."""

    scores_K: torch.Tensor
    labels_K: torch.Tensor
    boxes_K4: torch.Tensor
    masks_KHW: torch.Tensor  # bool


def resized_size(height: int, width: int, test_size: tuple[int, int] = TEST_SIZE) -> tuple[int, int]:
    """(height, width) that keep the aspect and fit the test size, rounded half up as mmcv does."""
    scale = min(max(test_size) / max(height, width), min(test_size) / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepared(
    images: Sequence[np.ndarray],
    mean: Sequence[float],
    std: Sequence[float],
    test_size: tuple[int, int] = TEST_SIZE,
    device: str = "cpu",
) -> torch.Tensor:
    """Images of one size to the network's input [B, 3, H, W]: resized bilinearly to whole grey levels (no
    antialiasing), normalised by mean and std of the unit range, padded with zeros."""
    stacked = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float()
    height, width = resized_size(images[0].shape[0], images[0].shape[1], test_size)
    resized = F.interpolate(stacked, size=(height, width), mode="bilinear", align_corners=False)
    resized = resized.round_().clamp_(0, 255)
    shift, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (mean, std))
    return F.pad((resized - shift) / scale, (0, -width % DIVISOR, 0, -height % DIVISOR))


def instances(
    class_logits_BQC1: torch.Tensor,
    mask_logits_BQhw: torch.Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    min_score: float = 0.0,
    top: int = TOP,
) -> list[Found]:
    """The rule at the top of this file over a batch of images of one size; sizes are (height, width)."""
    probability_BQC = class_logits_BQC1.float().softmax(-1)[..., :-1]
    classes = probability_BQC.shape[-1]
    flat = probability_BQC.flatten(1)
    best_BT, pair_BT = flat.topk(min(top, flat.shape[1]), dim=1)
    left_BT = best_BT > min_score
    image_K, position_K = left_BT.nonzero(as_tuple=True)
    pair_K = pair_BT[image_K, position_K]
    query_K, label_K = pair_K // classes, pair_K % classes
    queries = mask_logits_BQhw.shape[1]
    unique_U, unique_of_K = (image_K * queries + query_K).unique(return_inverse=True)
    mask_U, sure_U, box_U = _masks(mask_logits_BQhw.flatten(0, 1), unique_U, padded, resized, original)
    score_K = best_BT[image_K, position_K] * sure_U[unique_of_K]
    found = []
    for image in range(class_logits_BQC1.shape[0]):
        mine = ((image_K == image) & (score_K > min_score)).nonzero(as_tuple=True)[0]
        mine = mine[score_K[mine].argsort(descending=True, stable=True)]
        of = unique_of_K[mine]
        found.append(Found(score_K[mine], label_K[mine], box_U[of], mask_U[of]))
    return found


def _masks(
    logits_Nhw: torch.Tensor,
    chosen_U: torch.Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks [U, H, W] of the chosen queries, the mean probability inside each [U], and their boxes [U, 4]."""
    masks, sure, boxes = [], [], []
    for chunk in chosen_U.split(CHUNK):
        logits = logits_Nhw[chunk][:, None].float()
        logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
        logits = logits[:, :, : resized[0], : resized[1]]
        logits = F.interpolate(logits, size=original, mode="bilinear", align_corners=False)[:, 0]
        mask = logits > 0
        inside = mask.float()
        sure.append((logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6))
        boxes.append(_extents(mask))
        masks.append(mask)
    if not masks:
        device = logits_Nhw.device
        return (
            torch.zeros(0, *original, dtype=torch.bool, device=device),
            torch.zeros(0, device=device),
            torch.zeros(0, 4, device=device),
        )
    return torch.cat(masks), torch.cat(sure), torch.cat(boxes)


def _extents(mask_UHW: torch.Tensor) -> torch.Tensor:
    """float32 [U, 4]: x0, y0, x1, y1, half-open; zeros for an empty mask."""
    sides = []
    for axis in (1, 2):  # columns, then rows
        hit = mask_UHW.any(axis).to(torch.uint8)
        first, last = hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    box = torch.stack([x0, y0, x1, y1], 1).float()
    return box * mask_UHW.flatten(1).any(1, keepdim=True)


class Mask2FormerDetector:
    """A Mask2Former that was trained for instances, by default with COCO's classes under GenEval's names."""

    sees_colors = False  # colors.py names them afterwards

    def __init__(
        self,
        path: str,
        device: str = "auto",
        batch_size: int = 8,
        dtype: str = "float32",
        min_score: float = 0.3,
        test_size: tuple[int, int] = TEST_SIZE,
        top: int = TOP,
        download: bool = False,
    ) -> None:
        """Load the network.

        Args:
            path: a folder in the released layout (config.json, weights, preprocessor_config.json), or a hub id.
            min_score: objects at or below it are left out; GenEval's lowest threshold is 0.3.
            top: (query, class) pairs an image.

        Raises:
            WeightsError: the folder is not there, or holds another kind of model.
        """
        from transformers import AutoConfig, AutoImageProcessor, Mask2FormerForUniversalSegmentation

        where = "rewards.detector.path"
        folder = folder_of(path, "config.json", download, where)
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "mask2former":
            raise WeightsError(f"{where}: {path} holds a model of type '{config.model_type}', not mask2former")
        processor: Any = AutoImageProcessor.from_pretrained(folder)
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)
        self.device = device_of(device, "rewards.detector.device")
        model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()
        labels = [config.id2label[index] for index in range(len(config.id2label))]
        self.classes = geneval_names(labels)
        self.batch_size, self.min_score, self.test_size, self.top = batch_size, min_score, test_size, top

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Objects by class, best first; box in px of the image, mask of the image's size."""
        found: list[Detections] = [{} for _ in images]
        for rows in same_size(images, self.batch_size):
            for row, objects in zip(rows, self._batch([images[row] for row in rows]), strict=True):
                found[row] = objects
        return found

    @torch.inference_mode()
    def _batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        height, width = images[0].shape[:2]
        pixels = prepared(images, self.mean, self.std, self.test_size, self.device)
        padded = (int(pixels.shape[2]), int(pixels.shape[3]))
        output = self.model(pixel_values=pixels.to(self.model.dtype), output_auxiliary_logits=False)
        seen = instances(
            output.class_queries_logits,
            output.masks_queries_logits,
            padded,
            resized_size(height, width, self.test_size),
            (height, width),
            self.min_score,
            self.top,
        )
        return [self._named(one) for one in seen]

    def _named(self, found: Found) -> Detections:
        objects: Detections = {}
        scores, labels, boxes, masks = (
            values.cpu().numpy() for values in (found.scores_K, found.labels_K, found.boxes_K4, found.masks_KHW)
        )
        for score, label, box, mask in zip(scores, labels, boxes, masks, strict=True):
            corners = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
            objects.setdefault(self.classes[label], []).append(Detection(corners, float(score), None, mask))
        return objects


def same_size(images: Sequence[np.ndarray], batch_size: int) -> list[list[int]]:
    """Indices in batches of at most `batch_size` images, all of one batch of one size."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    return [rows[start : start + batch_size] for rows in by_size.values() for start in range(0, len(rows), batch_size)]
