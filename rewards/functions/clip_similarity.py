"""How well an image fits its prompt, as CLIP sees it: the cosine of their embeddings.

Source: Radford et al., arXiv:2103.00020 (the cosine); Hessel et al., arXiv:2104.08718, equation 1 (CLIPScore). Any
model of open_clip or any CLIPModel of transformers serves. It counts poorly and knows no left from right: a part for
style and content, not for composition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from PIL import Image

from record.trajectory import Trajectory
from rewards.contract import policy_images
from rewards.detectors.encoders import ClipEncoder, OpenClipConfig, OpenClipEncoder
from rewards.detectors.weights import WeightsError
from runtime.errors import UserError, nearest
from runtime.section import BatchSize

Form = Literal["cosine", "clipscore"]
Library = Literal["open_clip", "transformers"]
Which = Literal["final", "first", "each"]
CLIPSCORE_SCALE = 2.5


def clip_similarity(
    trajectories: Sequence[Trajectory],
    form: Form = "cosine",
    image: Which = "final",
    library: Library = "open_clip",
    path: str | None = None,
    model: str = "ViT-L-14-quickgelu",
    pretrained: str = "openai",
    quick_gelu: bool | None = None,
    device: str = "auto",
    batch_size: BatchSize = 64,
    download: bool = False,
    **columns: Any,
) -> list[float | dict[int, float] | None]:
    """Cosine of prompt and image, in [-1, 1]; 0 for a thought without an image.

    Args:
        form: "clipscore": 2.5 times the cosine, at least 0.
        image: "each" scores every image and credits its own segment.
        library: whose layout the weights have.
        path: folder or hub id; open_clip can instead find `model` with the weights `pretrained`.
        quick_gelu: the activation the weights were trained with (open_clip; OpenClipConfig says more).
    """
    check(form, get_args(Form), "clip_similarity", "form")
    check(library, get_args(Library), "clip_similarity", "library")
    check(image, get_args(Which), "clip_similarity", "image")
    encoder: OpenClipEncoder | ClipEncoder
    if library == "open_clip":
        encoder = open_clip_encoder(
            "clip_similarity", model, pretrained, path, quick_gelu, device, batch_size, download
        )
    else:
        encoder = clip_encoder("clip_similarity", path, None, device, batch_size, download)
    scale, least = (CLIPSCORE_SCALE, 0.0) if form == "clipscore" else (1.0, -1.0)
    return scored(
        trajectories,
        image,
        lambda texts, images: [scale * max(cosine, least) for cosine in cosines(encoder, texts, images)],
    )


def cosines(encoder: OpenClipEncoder | ClipEncoder, texts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
    """Of each text with its image; a text is embedded once."""
    unique = list(dict.fromkeys(texts))
    text_UD, image_ND = encoder.texts(unique), encoder.images(images)
    text_ND = text_UD[torch.tensor([unique.index(text) for text in texts], device=text_UD.device)]
    return (text_ND * image_ND).sum(-1).tolist()


def scored(trajectories: Sequence[Trajectory], which: Which, score: Any) -> list[float | dict[int, float] | None]:
    """`score(prompts, images)` over the chosen images of all thoughts at once; 0 where a thought drew none."""
    positions = []
    for row, t in enumerate(trajectories):
        drawn = policy_images(t)
        chosen = drawn if which == "each" else drawn[:1] if which == "first" else drawn[-1:]
        positions += [(row, segment, image) for segment, image in chosen]
    values: list[float | dict[int, float] | None] = [0.0] * len(trajectories)
    if not positions:
        return values
    said = score([trajectories[row].prompt for row, _, _ in positions], [Image.fromarray(p) for _, _, p in positions])
    for (row, segment, _), value in zip(positions, said, strict=True):
        if which == "each":
            credited = values[row]
            values[row] = {**(credited if isinstance(credited, dict) else {}), segment: float(value)}
        else:
            values[row] = float(value)
    return values


# Loaded once a process, whichever part or call asks for it.


@lru_cache(maxsize=4)
def open_clip_encoder(
    where: str,
    model: str,
    pretrained: str,
    path: str | None,
    quick_gelu: bool | None,
    device: str,
    batch_size: int,
    download: bool,
) -> OpenClipEncoder:
    return OpenClipEncoder(
        OpenClipConfig(
            model=model,
            pretrained=pretrained,
            path=path,
            quick_gelu=quick_gelu,
            device=device,
            batch_size=batch_size,
            download=download,
        ),
        where,
    )


@lru_cache(maxsize=4)
def clip_encoder(
    where: str, path: str | None, processor: str | None, device: str, batch_size: int, download: bool
) -> ClipEncoder:
    if path is None:
        raise WeightsError(f"{where}: give `path`, a folder or hub id in transformers' layout")
    return ClipEncoder(path, device, batch_size, processor=processor, download=download, where=where)


def check(value: Any, known: Sequence[str], reward: str, option: str) -> None:
    """Raises UserError for an option's value that the reward does not know."""
    if value not in known:
        raise UserError(f"{reward}: no {option} '{value}'; {nearest(str(value), known)}")
