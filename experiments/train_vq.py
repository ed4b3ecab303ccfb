"""Trains a visual tokenizer of an embedded world: `python -m experiments.train_vq --out vq.safetensors`.

The class is Chameleon's (vq.py), only smaller. Everything that the tiny policy sees and draws passes through these
codes, so the recipe aims at two things: every patch of the world survives the round trip, and a patch has the same
code wherever it stands, so that the policy has one spelling to learn.

1. Warm-up: an autoencoder without codebook, with noise on the latent, which pushes patches apart.
2. The codebook starts on the mean latents of the most frequent patches (from random vectors, most codes would die).
3. Straight-through training with commitment (van den Oord et al., arXiv:1711.00937, eq. 3; the codebook is their
   moving average, appendix A.1). Here a latent is assigned the code nearest to the mean latent of all patches in
   the batch that equal its own, and cross-entropy over the distances to all codes makes contexts agree on it. The
   world of shapes has fewer patches than there are codes: where two of its patches share one, a dead code moves to
   the rarer. The world of digits has more, so similar ones share a code (experiments/_digits.py).

Letters: B images, M latents of a batch (B x N), G distinct patches, K codes, D codebook dimensions.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from experiments import _digits
from experiments.vq_worlds import WORLDS, World
from policy.chameleon.vq import ChameleonVQ, load_vq, save_vq, to_pixels, vq_config
from runtime.errors import UserError
from tasks.shapes.world import CANVAS, COLORS, GROUND, MAX_OBJECTS, OBJECT, PATCH, Scene
from underdrawing.options import LARGEST_SEED, Number, Parser, Whole, expanded_path

SHAPES_VQ = {
    "embed_dim": 16,
    "num_embeddings": 512,
    "latent_channels": 16,
    "resolution": CANVAS,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1],  # three halvings: 8 px a code
    "num_res_blocks": 0,
    "attn_type": "none",  # little context: a patch's code should not depend on its neighbours
}


WorldName = Literal["shapes", "digits"]
FAINT, SURE = 0.3, 0.9  # the scores from which GenEval sees an object, and counts one


class TrainVQConfig(BaseModel):
    """The recipe's numbers; the command line sets the first six and three of the weights."""

    model_config = ConfigDict(extra="forbid")

    world: Literal["easy", "grid", "levels", "digits"] = Field(
        default="easy", description="Whose images: vq_worlds.py has them."
    )
    start: str | None = Field(default=None, description="Weights to begin with, the codebook apart; none: fresh ones.")
    seed: int = Field(default=0, description="Seed of weights, images and restarts.")
    minutes: float = Field(default=60.0, gt=0, description="Time budget; the run ends with the budget first spent.")
    steps: int = Field(default=4000, gt=0, description="Step budget, warm-up included.")
    batch: int = Field(default=16, gt=0, description="Images a step.")
    warmup: float = Field(default=0.1, gt=0, lt=1, description="Share of the training that runs without the codebook.")
    learning_rate: float = Field(default=4e-3, gt=0, description="AdamW's peak; linear rise, cosine fall to 1%.")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW's weight decay.")
    foreground: float = Field(default=3.0, ge=1, description="Weight of a pixel that is not ground; ground has 1.")
    noise: float = Field(default=0.1, ge=0, description="Standard deviation of the warm-up's latent noise.")
    commitment: float = Field(default=0.25, ge=0, description="Weight of |latent - code|^2.")
    consistency: float = Field(default=0.2, ge=0, description="Weight of a patch's spread of latents over contexts.")
    decay: float = Field(default=0.98, gt=0, lt=1, description="The codebook's moving average.")
    restart_every: int = Field(default=50, gt=0, description="Steps between looks for dead codes.")
    agreement: float = Field(default=0.05, ge=0, description="Weight of the cross-entropy of a latent's code.")
    temperature: float = Field(default=0.1, gt=0, description="Squared distance that divides its logits.")


@dataclass
class Codebook:
    """The moving average behind `quantize.embedding`, and how often each code was used since the last look."""

    size_K: Tensor
    sum_KD: Tensor
    used_K: Tensor  # int64

    @staticmethod
    def of(latent_MD: Tensor, identity_M: Tensor, count: int, generator: torch.Generator) -> Codebook:
        """Start on the mean latents of the `count` most frequent patches; if there are fewer, drawn latents follow."""
        mean_GD, size_G = patch_means(latent_MD, identity_M)
        centre_KD = mean_GD[size_G.argsort(descending=True, stable=True)[:count]]
        surplus = torch.randint(len(latent_MD), (count - len(centre_KD),), generator=generator)
        centre_KD = torch.cat([centre_KD, latent_MD[surplus]])
        return Codebook(torch.ones(count), centre_KD, torch.zeros(count, dtype=torch.int64))

    def update(self, latent_MD: Tensor, codes_M: Tensor, decay: float, embedding: nn.Embedding) -> None:
        count = len(self.size_K)
        hits_K = torch.bincount(codes_M, minlength=count)
        sums_KD = torch.zeros_like(self.sum_KD).index_add_(0, codes_M, latent_MD)
        # Only codes that were hit move: a rare one keeps its place instead of fading.
        hit = hits_K > 0
        self.size_K[hit] = decay * self.size_K[hit] + (1 - decay) * hits_K[hit]
        self.sum_KD[hit] = decay * self.sum_KD[hit] + (1 - decay) * sums_KD[hit]
        embedding.weight.data.copy_(self.sum_KD / self.size_K[:, None])
        self.used_K += hits_K

    def restart(self, latent_MD: Tensor, identity_M: Tensor, embedding: nn.Embedding) -> int:
        """Where distinct patches share a code, move codes unused since the last look to all but the most frequent.
        Returns how many were moved."""
        mean_GD, size_G = patch_means(latent_MD, identity_M)
        codes_G = torch.cdist(mean_GD, embedding.weight.data).argmin(1)
        self.used_K[codes_G] += 1
        dead = (self.used_K == 0).nonzero().flatten().tolist()
        self.used_K.zero_()
        moved, taken = 0, set()
        for patch in size_G.argsort(descending=True, stable=True).tolist():
            if int(codes_G[patch]) in taken and moved < len(dead):
                code = dead[moved]
                self.size_K[code], self.sum_KD[code] = 1.0, mean_GD[patch]
                embedding.weight.data[code] = mean_GD[patch]
                moved += 1
            taken.add(int(codes_G[patch]))
        return moved


# ---- images ----


def stray(rng: np.random.Generator, world: World = WORLDS["easy"]) -> np.ndarray:
    """An image outside the world's rules: objects at any pixel, overlapping, cut by the edge, shaded off color."""
    padded = np.full((CANVAS + 2 * OBJECT, CANVAS + 2 * OBJECT, 3), GROUND, np.uint8)
    masks, colors = [mask for sized in world.masks for mask in sized.values()], list(COLORS.values())
    for _ in range(rng.integers(1, MAX_OBJECTS + 2)):
        x, y = rng.integers(0, CANVAS + OBJECT, 2)
        shade = np.clip(np.add(colors[rng.integers(len(colors))], rng.integers(-25, 26, 3)), 0, 255)
        mask = masks[rng.integers(len(masks))]
        padded[y : y + len(mask), x : x + len(mask)][mask] = shade
    return padded[OBJECT:-OBJECT, OBJECT:-OBJECT]


def shuffled(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The patches of uint8 [B, height, width, 3] dealt anew: what an untrained policy draws, and context that tells
    nothing about a patch."""
    count, height, width = images.shape[:3]
    grid = images.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, 3).swapaxes(2, 3)
    patches = grid.reshape(-1, PATCH, PATCH, 3)
    dealt = patches[rng.permutation(len(patches))].reshape(grid.shape)
    return dealt.swapaxes(2, 3).reshape(images.shape)


def sample_images(
    count: int, rng: np.random.Generator, strays: bool = True, world: World = WORLDS["easy"]
) -> np.ndarray:
    """uint8 [count, CANVAS, CANVAS, 3]: of 16, 11 are scenes, 4 the patches of scenes shuffled, and 1 a stray."""
    scenes = np.stack([world.render(world.sample(rng)) for _ in range(count)])
    mixed = count // 4
    scenes[:mixed] = shuffled(scenes[:mixed], rng)
    for index in range(mixed, mixed + (count // 16 if strays else 0)):
        scenes[index] = stray(rng, world) if world.stray is None else world.stray(rng)
    return scenes


def patch_identity(images: np.ndarray) -> Tensor:
    """Equal numbers for equal patches, int64 [M] in the order of the codes."""
    count, height, width = images.shape[:3]
    grid = images.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, 3).swapaxes(2, 3)
    flat = np.ascontiguousarray(grid.reshape(count * (height // PATCH) * (width // PATCH), -1))
    return torch.from_numpy(np.unique(flat, axis=0, return_inverse=True)[1].reshape(-1))


# ---- losses ----


def reconstruction_loss(made_BCHW: Tensor, pixels_BCHW: Tensor, foreground: float) -> Tensor:
    """L1 plus L2, weighted up where the image is not ground."""
    ground = to_pixels([np.full((1, 1, 3), GROUND, np.uint8)])
    weight_B1HW = 1 + (foreground - 1) * (pixels_BCHW - ground).abs().amax(1, keepdim=True).gt(1e-3).float()
    error = made_BCHW - pixels_BCHW
    return (weight_B1HW * (error.abs() + error.square())).sum() / weight_B1HW.sum() / error.shape[1]


def patch_means(latent_MD: Tensor, identity_M: Tensor) -> tuple[Tensor, Tensor]:
    """The mean latent of each distinct patch over its contexts, mean_GD, and their number, size_G."""
    size_G = torch.bincount(identity_M).float()
    sum_GD = torch.zeros(len(size_G), latent_MD.shape[1]).index_add(0, identity_M, latent_MD)
    return sum_GD / size_G[:, None], size_G


# ---- figures ----


def read_right(image: np.ndarray, scene: Scene, world: World = WORLDS["easy"]) -> bool:
    """Whether the detector finds the scene's objects, surely enough to be counted and within 1 px, and no other."""
    seen = [found for found in world.detect(image) if found.score > FAINT]
    left = list(seen)
    for item in scene.objects:
        near = [
            found
            for found in left
            if (found.cls, found.color) == (item.shape, item.color)
            and found.score > SURE
            and np.abs(np.subtract(found.box, item.box)).max() <= 1
        ]
        if not near:
            return False
        left.remove(near[0])
    return not left


@torch.inference_mode()
def round_trip(vq: ChameleonVQ, images: Sequence[np.ndarray], chunk: int = 64) -> tuple[list[np.ndarray], Tensor]:
    """Images drawn again from their codes, and the codes, int64 [B, N]."""
    codes_BN = torch.cat([vq.encode_images(images[start : start + chunk]) for start in range(0, len(images), chunk)])
    made = [
        image for start in range(0, len(codes_BN), chunk) for image in vq.decode_images(codes_BN[start : start + chunk])
    ]
    return made, codes_BN


def figures(vq: ChameleonVQ, scenes: Sequence[Scene], world: World = WORLDS["easy"]) -> dict[str, float]:
    """How well scenes survive the round trip: `read_right` by the detector, `pixels_right` by the nearest color of
    the world, `codes_a_patch` (1: one spelling), `patches_a_code` (1: none confused), codes used, their perplexity."""
    images = [world.render(scene) for scene in scenes]
    made, codes_BN = round_trip(vq, images)
    palette = np.array([GROUND, *COLORS.values()], np.int64)

    def named(image: np.ndarray) -> np.ndarray:
        return np.square(image[:, :, None].astype(np.int64) - palette).sum(-1).argmin(-1)

    pixels = [np.mean(named(one) == named(other)) for one, other in zip(made, images, strict=True)]
    identity_M, codes_M = patch_identity(np.stack(images)), codes_BN.flatten()
    pairs = torch.stack([identity_M, codes_M]).unique(dim=1).shape[1]
    used_K = torch.bincount(codes_M, minlength=vq.config.num_embeddings).double()
    share_K = used_K[used_K > 0] / used_K.sum()
    right = [read_right(image, scene, world) for image, scene in zip(made, scenes, strict=True)]
    return {
        "read_right": float(np.mean(right)),
        "pixels_right": float(np.mean(pixels)),
        "largest_error": max(float(np.abs(a.astype(int) - b).max()) for a, b in zip(made, images, strict=True)),
        "patches": float(identity_M.max() + 1),
        "codes_a_patch": pairs / float(identity_M.max() + 1),
        "patches_a_code": pairs / float((used_K > 0).sum()),
        "codes_used": float((used_K > 0).sum()),
        "perplexity": float(torch.exp(-(share_K * share_K.log()).sum())),
    }


# ---- training ----


class Training:
    """Weights, optimiser, codebook, random states and clocks: all that a resumed run needs."""

    def __init__(self, config: TrainVQConfig, model: dict[str, Any] | None = None):
        torch.manual_seed(config.seed)
        self.config, self.world = config, WORLDS[config.world]
        self.vq = ChameleonVQ(vq_config(model or {**SHAPES_VQ, "num_embeddings": self.world.codes})).train()
        for module in self.vq.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()  # transformers' normal(0.02) is a slow start for so few channels
        if config.start is not None:
            begun = load_vq(config.start).state_dict()
            del begun["quantize.embedding.weight"]
            self.vq.load_state_dict(begun, strict=False)
        trained = [tensor for name, tensor in self.vq.named_parameters() if name != "quantize.embedding.weight"]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        self.codebook: Codebook | None = None  # None: still in the warm-up
        self.step = 0
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """0 to 1, by whichever budget is further spent."""
        return max(self.step / self.config.steps, self.seconds / 60 / self.config.minutes)

    @torch.no_grad()
    def _latents(self, count: int, strays: bool) -> tuple[Tensor, Tensor]:
        """Latents and identities of the patches of `count` new images."""
        images = sample_images(count, self.rng, strays, self.world)
        latents = [self.vq.quant_conv(self.vq.encoder(chunk)) for chunk in to_pixels(list(images)).split(64)]
        return _rows(torch.cat(latents)), patch_identity(images)

    def advance(self) -> dict[str, float]:
        """One step. Returns the losses."""
        began, config, vq, progress = time.monotonic(), self.config, self.vq, self.progress
        embedding = vq.quantize.embedding
        if self.codebook is None and progress >= config.warmup:
            self.codebook = Codebook.of(*self._latents(1024, strays=True), vq.config.num_embeddings, self.generator)
            embedding.weight.data.copy_(self.codebook.sum_KD)
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (self.step + 1) / 100) * cosine

        images = sample_images(config.batch, self.rng, world=self.world)
        pixels, identity_M = to_pixels(list(images)), patch_identity(images)
        latent = vq.quant_conv(vq.encoder(pixels))
        latent_MD = _rows(latent)
        mean_GD, _ = patch_means(latent_MD, identity_M)
        if self.codebook is None:
            # Noise of a fixed size pushes the latents apart, the bound keeps that from being met by scale alone.
            passed = latent + config.noise * torch.randn(latent.shape, generator=self.generator)
            commitment = F.relu(latent_MD.square().mean(1) - 1).mean()
            agreement = torch.zeros(())
        else:
            codes_M = torch.cdist(mean_GD.detach(), embedding.weight).argmin(1)[identity_M]
            distance_MK = torch.cdist(latent_MD, embedding.weight).square()
            agreement = F.cross_entropy(-distance_MK / config.temperature, codes_M)
            quantized_MD = embedding(codes_M).detach()
            commitment = (latent_MD - quantized_MD).square().sum(1).mean()
            quantized = quantized_MD.view(len(pixels), vq.side, vq.side, -1).permute(0, 3, 1, 2)
            passed = latent + (quantized - latent).detach()  # straight through
            self.codebook.update(latent_MD.detach(), codes_M, config.decay, embedding)
        image_loss = reconstruction_loss(vq.decoder(vq.post_quant_conv(passed)), pixels, config.foreground)
        spread = (latent_MD - mean_GD[identity_M]).square().sum(1).mean()
        loss = image_loss + config.commitment * commitment + config.consistency * spread + config.agreement * agreement
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        self.optimizer.step()

        self.step += 1
        if self.codebook is not None and self.step % config.restart_every == 0 and progress < 0.8:
            self.codebook.restart(*self._latents(256, strays=False), embedding)
        self.seconds += time.monotonic() - began
        return {
            "loss/image": image_loss.item(),
            "loss/commitment": commitment.item(),
            "loss/spread": spread.item(),
            "loss/agreement": agreement.item(),
            "latent_variance": latent_MD.detach().var(0).sum().item(),
        }

    def save(self, path: Path) -> None:
        state = {
            "vq": self.vq.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "generator": self.generator.get_state(),
            "rng": json.dumps(self.rng.bit_generator.state),
            "config": self.config.model_dump(),
            "codebook": vars(self.codebook) if self.codebook else None,
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Raises UserError naming the file if it is no state of this recipe."""
        try:
            state = torch.load(path, weights_only=True)
            self.vq.load_state_dict(state["vq"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.generator.set_state(state["generator"])
            self.rng.bit_generator.state = json.loads(state["rng"])
            self.codebook = Codebook(**state["codebook"]) if state["codebook"] else None
        except Exception as error:  # torch.load raises nearly anything on a broken file
            raise UserError(f"{path}: cannot be resumed ({error}); remove it to start anew") from error


def _rows(latent_BDHW: Tensor) -> Tensor:
    return latent_BDHW.flatten(2).transpose(1, 2).reshape(-1, latent_BDHW.shape[1])


def train(config: TrainVQConfig, out: Path, resume: bool = False, every: int = 100) -> ChameleonVQ:
    """Run the recipe and write `out` and its configuration. The state for --resume lies beside until it is done."""
    training, state_path = Training(config), out.with_suffix(".state.pt")
    if resume and state_path.exists():
        training.load(state_path)
        print(f"resumed at step {training.step}, {training.seconds / 60:.1f} minutes", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    while training.progress < 1:
        losses = training.advance()
        if training.step % every == 0:
            shown = " ".join(f"{name} {value:.5f}" for name, value in losses.items())
            print(f"step {training.step} {training.seconds:.0f}s {shown}", flush=True)
            training.save(state_path)
    save_vq(training.vq.eval(), out)
    state_path.unlink(missing_ok=True)
    return training.vq


def main(arguments: Sequence[str] | None = None) -> None:
    defaults = TrainVQConfig()
    parser = Parser(description="Train a world's visual tokenizer.")
    parser.add_argument("--out", type=expanded_path, required=True, help="weights file to write (.safetensors)")
    parser.add_argument("--world", choices=list(WORLDS), default=defaults.world)
    parser.add_argument("--start", type=expanded_path, help="weights to begin with (.safetensors)")
    parser.add_argument("--seed", type=Whole(0, LARGEST_SEED), default=defaults.seed)
    parser.add_argument("--minutes", type=Number(), default=defaults.minutes)
    parser.add_argument("--steps", type=Whole(1), default=defaults.steps)
    parser.add_argument("--batch", type=Whole(1), default=defaults.batch, help="images a step")
    parser.add_argument("--learning-rate", type=Number(), default=defaults.learning_rate)
    parser.add_argument("--consistency", type=Number(), default=defaults.consistency, help="weight of a patch's spread")
    parser.add_argument("--agreement", type=Number(), default=defaults.agreement, help="weight of a patch's one code")
    parser.add_argument("--resume", action="store_true", help="go on from the state beside --out, if there is one")
    parser.add_argument("--scenes", type=Whole(1), default=1000, help="scenes of the closing measurement")
    try:
        given = parser.parse_args(arguments)
        config = TrainVQConfig(
            world=given.world,
            start=None if given.start is None else str(given.start),
            seed=given.seed,
            minutes=given.minutes,
            steps=given.steps,
            batch=given.batch,
            learning_rate=given.learning_rate,
            consistency=given.consistency,
            agreement=given.agreement,
        )
        train(config, given.out, given.resume)
    except (UserError, ValidationError) as error:
        parser.error(str(error))
    rng = np.random.default_rng(config.seed + 1)
    world = WORLDS[config.world]
    if config.world == "digits":  # read as whole scenes, by both of its detectors
        found = _digits.figures(load_vq(given.out), given.scenes, rng)
    else:
        found = figures(load_vq(given.out), [world.sample(rng) for _ in range(given.scenes)], world)
    for name, value in found.items():
        print(f"{name} {value:.4f}")


if __name__ == "__main__":
    main()
