"""Models of what people prefer among images: PickScore and HPS, both CLIP with other weights.

    pickscore  exp(logit scale) * cosine / divisor; Kirstain et al., arXiv:2305.01569, equation 1. flow_grpo divides
               by 26 to bring it near [0, 1]
    hps        cosine; Wu et al., arXiv:2306.09341 (version 2 and 2.1), as T2I-R1 uses it

Both are easily gamed towards a house style: watch another part beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, get_args

from record.trajectory import Trajectory
from rewards.detectors.encoders import OpenClipEncoder
from rewards.detectors.weights import file_of
from rewards.functions.clip_similarity import Which, check, clip_encoder, cosines, open_clip_encoder, scored
from runtime.errors import UserError
from runtime.section import BatchSize

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore's repository has weights alone
HPS = "xswu/HPSv2/HPS_v2.1_compressed.pt"


def pickscore(
    trajectories: Sequence[Trajectory],
    image: Which = "final",
    path: str = PICKSCORE,
    processor: str | None = PICKSCORE_PROCESSOR,
    divisor: float = 1.0,
    device: str = "auto",
    batch_size: BatchSize = 32,
    download: bool = False,
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """PickScore of the prompt and the image (about 18 to 23 undivided); 0 for a thought without an image.

    Args:
        image: "each" scores every image and credits its own segment.
        path, processor: folders or hub ids of the weights, and of tokenizer and image processor (None: beside them).
        divisor: what the score is divided by; flow_grpo's is 26.
    """
    check(image, get_args(Which), "pickscore", "image")
    if divisor <= 0:
        raise UserError(f"pickscore: divisor is {divisor}; it must be positive")
    encoder = clip_encoder("pickscore", path, processor, device, batch_size, download)
    scale = encoder.scale / divisor
    return scored(
        trajectories, image, lambda texts, images: [scale * cosine for cosine in cosines(encoder, texts, images)]
    )


def hps(
    trajectories: Sequence[Trajectory],
    image: Which = "final",
    weights: str = HPS,
    model: str = "ViT-H-14",
    path: str | None = None,
    quick_gelu: bool = False,
    device: str = "auto",
    batch_size: BatchSize = 32,
    download: bool = False,
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """HPS v2 of the prompt and the image (about 0.2 to 0.35); 0 for a thought without an image.

    Args:
        image: "each" scores every image and credits its own segment.
        weights: file, or organisation/repository/file in the hub cache, of weights for `model`.
        path: folder or hub id in open_clip's layout, in place of `weights` and `model`.
    """
    check(image, get_args(Which), "hps", "image")
    encoder = _hps(weights, model, path, quick_gelu, device, batch_size, download)
    return scored(trajectories, image, lambda texts, images: cosines(encoder, texts, images))


@lru_cache(maxsize=2)
def _hps(
    weights: str, model: str, path: str | None, quick_gelu: bool, device: str, batch_size: int, download: bool
) -> OpenClipEncoder:
    file = "" if path is not None else str(file_of(weights, download, "hps.weights"))
    return open_clip_encoder("hps", model, file, path, quick_gelu, device, batch_size, download)
