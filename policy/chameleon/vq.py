"""Chameleon's visual tokenizer whole: images to codes and codes to images.

transformers has the encoder's half (`ChameleonVQVAE`); the taming-style decoder of the released Anole weights is
here, under their names (`decoder.*`). `ChameleonVQ` is a `ChameleonVQVAE`, so it can stand as `model.vqmodel` within
transformers' ChameleonModel. The policy sees and draws through it; `train_vq.py` trains a small configuration of the
same class for the shapes world.

Pixels enter as x / 127.5 - 1, Meta's scale: the weights were trained with it, and it is the inverse of the way back,
so white stays white. transformers' image processor has x * 0.0078 - 1, in which 255 becomes 0.989.

Letters: B images, C channels, H height, W width, N codes an image (row by row), D codebook dimensions.
Sources: Gafni et al., arXiv:2203.13131 (the tokenizer); Esser et al., arXiv:2012.09841, 3.1 (encoder, decoder, loss).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAE,
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)

from runtime.errors import UserError, nearest

WIDEST = 2**16
SIZES = {  # of a configuration: the least and the most
    **dict.fromkeys(("embed_dim", "latent_channels", "base_channels", "in_channels", "resolution"), (1, WIDEST)),
    **{"num_embeddings": (1, 2**18), "num_res_blocks": (0, 64)},  # each code is a word of the text tokenizer too
}
CHECKPOINT_PREFIX = "model.vqmodel."  # where a released Chameleon checkpoint keeps the tokenizer
SHAPES_WEIGHTS = Path(__file__).with_name("weights") / "shapes_vq.safetensors"
DIGITS_WEIGHTS = SHAPES_WEIGHTS.with_name("digits_vq.safetensors")


class TokenizerError(UserError):
    """A visual tokenizer's file or configuration is wrong."""


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden_BCHW, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, config: ChameleonVQVAEConfig, channels: int):
        super().__init__()
        self.block_1 = ChameleonVQVAEEncoderResnetBlock(config, channels, channels)
        self.attn_1 = ChameleonVQVAEEncoderAttnBlock(channels) if config.attn_type == "vanilla" else nn.Identity()
        self.block_2 = ChameleonVQVAEEncoderResnetBlock(config, channels, channels)

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden_BCHW)))


class Level(nn.Module):
    """One resolution of the decoder: `num_res_blocks + 1` blocks, attention after each where asked, then x2."""

    def __init__(self, config: ChameleonVQVAEConfig, channels: int, width: int, attends: bool, finest: bool):
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for index in range(config.num_res_blocks + 1):
            self.block.append(ChameleonVQVAEEncoderResnetBlock(config, width if index else channels, width))
            if attends:
                self.attn.append(ChameleonVQVAEEncoderAttnBlock(width))
        if not finest:
            self.upsample = Upsample(width)
        self.finest = finest

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            hidden_BCHW = block(hidden_BCHW)
            if len(self.attn):
                hidden_BCHW = self.attn[index](hidden_BCHW)
        return hidden_BCHW if self.finest else self.upsample(hidden_BCHW)


class Decoder(nn.Module):
    """The encoder's mirror. `up[0]` is the finest level and runs last. Names are those of the released weights."""

    def __init__(self, config: ChameleonVQVAEConfig):
        super().__init__()
        multipliers = tuple(config.channel_multiplier)
        channels = config.base_channels * multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, kernel_size=3, padding=1)
        self.mid = Middle(config, channels)
        coarse_to_fine = []
        for level in reversed(range(len(multipliers))):
            attends = config.attn_type == "vanilla" and config.resolution // 2**level in (config.attn_resolutions or ())
            width = config.base_channels * multipliers[level]
            coarse_to_fine.append(Level(config, channels, width, attends, finest=level == 0))
            channels = width
        self.up = nn.ModuleList(reversed(coarse_to_fine))
        self.norm_out = nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, config.in_channels, kernel_size=3, padding=1)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(latent_BCHW))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


@dataclass(frozen=True)
class Reconstruction:
    """A round trip with gradient, for training."""

    pixels_BCHW: Tensor  # the decoder's, unclamped; its gradient passes straight through the codebook
    latent_BDHW: Tensor  # before the codebook
    quantized_BDHW: Tensor  # the nearest codebook vectors; carries the codebook's gradient
    codes_BN: Tensor  # int64


class ChameleonVQ(ChameleonVQVAE):
    """Encoder, codebook and decoder. `encode` is transformers' (ChameleonModel calls it); ours are `codes`,
    `decode`, and over uint8 images `see` and `draw`."""

    def __init__(self, config: ChameleonVQVAEConfig):
        super().__init__(config)
        self.decoder = Decoder(config)
        self.eval()
        self.post_init()

    @property
    def side(self) -> int:
        """Codes in a row of an image."""
        return self.config.resolution // 2 ** (len(self.config.channel_multiplier) - 1)

    @property
    def codes_per_image(self) -> int:
        return self.side**2

    def codes(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to the indices of the nearest codebook vectors, int64 [B, N]."""
        indices = self.quantize(self.quant_conv(self.encoder(pixels_BCHW)))[2]
        return indices.view(len(pixels_BCHW), -1)

    def decode(self, codes_BN: Tensor) -> Tensor:
        """Codes to pixels [B, C, H, W], about [-1, 1] but not clamped (`to_images` does that).

        Raises ValueError where a row is no square image or a code is outside the codebook.
        """
        count, size = codes_BN.shape[-1], self.config.num_embeddings
        side = int(count**0.5)
        if codes_BN.ndim != 2 or side * side != count or count == 0:
            raise ValueError(f"codes of shape {tuple(codes_BN.shape)}: want [images, {self.codes_per_image}]")
        if codes_BN.numel() and not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < size:
            raise ValueError(f"codes from {int(codes_BN.min())} to {int(codes_BN.max())}: the codebook has {size}")
        quantized_BNE = self.quantize.embedding(codes_BN)
        quantized_BEHW = quantized_BNE.transpose(1, 2).reshape(len(codes_BN), -1, side, side)
        return self.decoder(self.post_quant_conv(quantized_BEHW))

    def forward(self, pixels_BCHW: Tensor) -> Reconstruction:
        """The differentiable round trip of training; see `Reconstruction`."""
        latent = self.quant_conv(self.encoder(pixels_BCHW))
        with torch.no_grad():
            codes_BN = self.quantize(latent)[2].view(len(latent), -1)
        quantized = self.quantize.embedding(codes_BN).transpose(1, 2).reshape(latent.shape)
        through = latent + (quantized - latent).detach()
        return Reconstruction(self.decoder(self.post_quant_conv(through)), latent, quantized, codes_BN)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 [height, width, 3] images of any size to codes, int64 [B, N] (see `fit`)."""
        pixels = to_pixels([fit(image, self.config.resolution) for image in images])
        return self.codes(pixels.to(self.device, self.dtype))

    @torch.inference_mode()
    def decode_images(self, codes_BN: Tensor) -> list[np.ndarray]:
        """Codes to uint8 [height, width, 3] images."""
        return to_images(self.decode(codes_BN.to(self.device)))


def fit(image: np.ndarray, resolution: int) -> np.ndarray:
    """Chameleon's framing: shortest side to `resolution` (Lanczos), then the centre. No-op where it fits already.

    Raises ValueError unless the image is uint8 [height, width, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image of {image.dtype} {image.shape}: want uint8 [height, width, 3]")
    height, width = image.shape[:2]
    if (height, width) == (resolution, resolution):
        return image
    scale = resolution / min(height, width)
    wide, high = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    resized = np.asarray(Image.fromarray(image).resize((wide, high), Image.Resampling.LANCZOS))
    top, left = (high - resolution) // 2, (wide - resolution) // 2
    return resized[top : top + resolution, left : left + resolution]


def to_pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 [height, width, 3] images of one size to float32 pixels_BCHW in [-1, 1], Meta's scale."""
    stacked_BHWC = torch.from_numpy(np.stack(images))
    return stacked_BHWC.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1.0).contiguous()


def to_images(pixels_BCHW: Tensor) -> list[np.ndarray]:
    """Pixels, clamped to [-1, 1] and rounded once, to uint8 [height, width, 3] images."""
    unit = pixels_BCHW.detach().float().clamp(-1.0, 1.0).div(2.0).add(0.5)
    return list(unit.mul(255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def checkpoint_entries(vq: ChameleonVQ) -> dict[str, Tensor]:
    """The tokenizer's weights under the names of a ChameleonForConditionalGeneration checkpoint."""
    return {CHECKPOINT_PREFIX + name: tensor for name, tensor in vq.state_dict().items()}


def load_checkpoint_entries(vq: ChameleonVQ, state: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Load the tokenizer from a whole Chameleon checkpoint's entries (others are ignored) or from its own.

    Raises TokenizerError naming the missing, unknown or misshapen entries; most often a checkpoint saved by
    transformers, which leaves the decoder out.
    """
    prefixed = any(name.startswith(CHECKPOINT_PREFIX) for name in state)
    prefix = CHECKPOINT_PREFIX if prefixed else ""
    given = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    wanted = vq.state_dict()
    missing = sorted(wanted.keys() - given.keys())
    unknown = sorted(given.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape)
    if missing and all(name.startswith("decoder.") for name in missing):
        raise TokenizerError(
            f"{source}: it has no decoder weights ({prefix}{missing[0]}, ...), so nothing can be "
            "drawn with it; take a checkpoint in Anole's layout, which has them"
        )
    for names, what in ((missing, "lacks"), (unknown, "has unknown"), (misshapen, "has in another shape")):
        if names:
            raise TokenizerError(
                f"{source}: {what} {len(names)} tokenizer entries, first '{prefix}{names[0]}'; "
                "the configuration beside it must be the one it was trained with"
            )
    vq.load_state_dict({name: tensor.float() for name, tensor in given.items()})


def vq_config(values: Mapping[str, Any], source: str = "vq_config") -> ChameleonVQVAEConfig:
    """A checked configuration. Raises TokenizerError naming an unknown key, or a value that makes no tokenizer."""
    known = [name for name in ChameleonVQVAEConfig().to_dict() if not name.startswith("_")]
    for name in values:
        if name not in known:
            raise TokenizerError(f"{source}: no key '{name}'; {nearest(name, known)}")
    for name, (least, most) in SIZES.items():
        if isinstance(size := values.get(name), int) and not least <= size <= most:
            raise TokenizerError(f"{source}.{name}: {size}; give {least} to {most}")
    try:
        config = ChameleonVQVAEConfig(**{name: value for name, value in values.items() if name != "model_type"})
        factor = 2 ** (len(config.channel_multiplier) - 1)
    except Exception as error:  # transformers validates with exceptions of huggingface_hub
        raise TokenizerError(f"{source}: {' '.join(str(error).split())}") from error
    if config.resolution % factor:
        raise TokenizerError(
            f"{source}: resolution {config.resolution} is no multiple of {factor}, which the "
            f"{len(config.channel_multiplier)} levels of channel_multiplier ask for"
        )
    for multiplier in config.channel_multiplier:
        if config.base_channels * multiplier % 32:
            raise TokenizerError(
                f"{source}: base_channels {config.base_channels} x {multiplier} is no multiple of 32, "
                "the number of normalisation groups"
            )
    return config


def save_vq(vq: ChameleonVQ, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write `path` (.safetensors) and its configuration beside it (.json). `dtype` is that of storage only."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = (
        "embed_dim",
        "num_embeddings",
        "double_latent",
        "latent_channels",
        "resolution",
        "in_channels",
        "base_channels",
        "channel_multiplier",
        "num_res_blocks",
        "attn_resolutions",
        "dropout",
        "attn_type",
    )
    path.with_suffix(".json").write_text(json.dumps({key: getattr(vq.config, key) for key in keys}, indent=2) + "\n")
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().to(dtype).contiguous() for name, tensor in vq.state_dict().items()}, partial)
    os.replace(partial, path)


def load_vq(path: str | Path) -> ChameleonVQ:
    """The tokenizer that `save_vq` wrote: fp32, in evaluation mode, frozen. Raises TokenizerError naming the file."""
    path = Path(path)
    config_path = path.with_suffix(".json")
    try:
        values = json.loads(config_path.read_text())
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{config_path}: cannot be read as the tokenizer's configuration ({error})") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{config_path}: want an object of configuration keys, found {type(values).__name__}")
    vq = ChameleonVQ(vq_config(values, str(config_path)))
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TokenizerError(f"{path}: cannot be read as safetensors ({error}); fetch or train it again") from error
    load_checkpoint_entries(vq, state, str(path))
    return vq.requires_grad_(False)


def load_committed_vq(name: str) -> ChameleonVQ:
    """A tokenizer of an embedded world: 32x32 pixels, 4x4 codes (see weights/README.md).

    Args:
        name: shapes (of 512 codes, for the level easy), shapes_grid (of 256, for middle and hard) or digits (of 512).
    """
    return load_vq(SHAPES_WEIGHTS.with_name(f"{name}_vq.safetensors"))


def load_shapes_vq() -> ChameleonVQ:
    """`load_committed_vq` of the level easy."""
    return load_vq(SHAPES_WEIGHTS)


def load_digits_vq() -> ChameleonVQ:
    """The committed tokenizer of the digits world, of the same size."""
    return load_vq(DIGITS_WEIGHTS)
