"""Encoders that embed words and images in one space: open_clip's, and CLIPModel of transformers.

What reads them: the color of an object (detectors/colors.py), CLIP similarity, and the preference models that are
CLIP with other weights. Embeddings come out as unit vectors in float32 on the encoder's device.

Letters: N rows, D features.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field

from rewards.detectors.weights import WeightsError, device_of, folder_of
from runtime.section import Section


class OpenClipConfig(Section):
    """Which open_clip model, and where its weights are."""

    model: str = Field("ViT-L-14-quickgelu", description="open_clip's name of the architecture (without `path`).")
    pretrained: str = Field("openai", description="open_clip's tag of the weights, or a file of weights for `model`.")
    path: str | None = Field(
        None,
        description="Folder or hub id in open_clip's layout (open_clip_config.json and "
        "weights), in place of model and pretrained.",
    )
    quick_gelu: bool | None = Field(
        None,
        description="The activation that the weights were trained with. None: as "
        "the tag says; a folder or a file must agree with what is written here, and "
        "without it with OpenAI's, which is true.",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1 ...; auto: a GPU where there is one.")
    batch_size: int = Field(64, ge=1)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    download: bool = Field(False, description="Fetch weights that the hub cache lacks.")


class OpenClipEncoder:
    """One open_clip model, loaded."""

    def __init__(self, config: OpenClipConfig, where: str = "open_clip") -> None:
        """Load it.

        Raises:
            WeightsError: an unknown model or tag, weights that are not there, or an activation that is not the one
                the weights were trained with.
        """
        import open_clip

        self.device = device_of(config.device, f"{where}.device")
        self.batch_size = config.batch_size
        options: dict[str, Any] = {"device": self.device, "precision": config.precision}
        if config.path is not None:
            folder = folder_of(config.path, "open_clip_config.json", config.download, f"{where}.path")
            _refuse_other_activation(folder, config, where)
            name = f"local-dir:{folder}"
        else:
            name, weights, extra = _architecture(config, where)
            options |= {"pretrained": str(weights), **extra}
        model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
        self.model: Any = model.eval()
        self.preprocess: Any = preprocess
        self.tokenizer: Any = open_clip.get_tokenizer(name)
        self.dtype = next(self.model.parameters()).dtype

    @property
    def scale(self) -> float:
        """What cosines are multiplied by to become logits."""
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """[N, D] unit vectors."""
        rows = []
        for start in range(0, len(images), self.batch_size):
            batch = torch.stack([self.preprocess(p) for p in images[start : start + self.batch_size]])
            rows.append(self.model.encode_image(batch.to(self.device, self.dtype), normalize=True).float())
        return torch.cat(rows) if rows else torch.empty(0, 0)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, D] unit vectors; words past the context length are cut, as the tokenizer does."""
        rows = [
            self.model.encode_text(
                self.tokenizer(list(texts[start : start + self.batch_size])).to(self.device), normalize=True
            ).float()
            for start in range(0, len(texts), self.batch_size)
        ]
        return torch.cat(rows) if rows else torch.empty(0, 0)


def _architecture(config: OpenClipConfig, where: str) -> tuple[str, Path, dict[str, Any]]:
    """The architecture's name, the file of its weights, and how the weights want images normalised."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    from runtime.errors import nearest

    known = open_clip.get_model_config(config.model)
    if known is None:
        raise WeightsError(
            f"{where}.model: open_clip has no '{config.model}'; {nearest(config.model, open_clip.list_models())}"
        )
    activation = bool(known.get("quick_gelu", False))
    tag = get_pretrained_cfg(config.model, config.pretrained)
    if tag:
        trained = bool(tag.get("quick_gelu", False))
        if activation != trained or config.quick_gelu not in (None, trained):
            raise WeightsError(
                _mismatch(where, config.model, f"the weights '{config.pretrained}'", activation, trained)
            )
        normalised = {"image_mean": tag.get("mean"), "image_std": tag.get("std")}
        return config.model, _cached_file(tag, config, where), {k: v for k, v in normalised.items() if v}
    file = Path(config.pretrained).expanduser()
    if not file.is_file():
        raise WeightsError(
            f"{where}.pretrained: '{config.pretrained}' is neither a file nor a tag of {config.model}; "
            f"{nearest(config.pretrained, list_pretrained_tags_by_model(config.model))}"
        )
    trained = config.quick_gelu if config.quick_gelu is not None else True
    if activation != trained:
        raise WeightsError(_mismatch(where, config.model, f"the weights {file}", activation, trained))
    return config.model, file, {}


def _cached_file(tag: dict[str, Any], config: OpenClipConfig, where: str) -> Path:
    """The tag's weights in the hub cache. open_clip itself would open the network to look for them."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, name = str(tag.get("hf_hub", "")).rpartition("/")
    names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for candidate in names:
        with contextlib.suppress(LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            return Path(hf_hub_download(repository, candidate, local_files_only=not config.download))
    hint = "the hub could not be reached" if config.download else "set `download: true` to fetch it"
    raise WeightsError(
        f"{where}: {config.model} with the weights '{config.pretrained}' ({repository}) is not in the "
        f"hub cache; {hint}, or give `path`, a folder in open_clip's layout"
    )


def _refuse_other_activation(folder: Path, config: OpenClipConfig, where: str) -> None:
    """A folder's configuration must say the activation that its weights were trained with."""
    written = json.loads((folder / "open_clip_config.json").read_text()).get("model_cfg", {})
    activation = bool(written.get("quick_gelu", False))
    trained = config.quick_gelu if config.quick_gelu is not None else True
    if activation != trained:
        raise WeightsError(_mismatch(f"{where}.path", str(folder), "its weights", activation, trained))


def _mismatch(where: str, model: str, weights: str, activation: bool, trained: bool) -> str:
    named = {True: "QuickGELU", False: "GELU"}
    right = (
        f"name {model}-quickgelu"
        if trained and not activation and "/" not in model
        else "name the architecture without -quickgelu"
        if activation and not trained and "/" not in model
        else f"if that is how they were trained, write quick_gelu: {str(activation).lower()}"
    )
    return (
        f"{where}: {model} computes {named[activation]}, but {weights} were trained with {named[trained]}; "
        f"embeddings would be off without a word of warning. Instead, {right}"
    )


class ClipEncoder:
    """A CLIPModel of transformers, loaded: CLIP itself, PickScore, and others in its layout."""

    def __init__(
        self,
        path: str,
        device: str = "auto",
        batch_size: int = 64,
        dtype: str = "float32",
        processor: str | None = None,
        download: bool = False,
        where: str = "clip",
    ) -> None:
        """Load it.

        Args:
            processor: folder or hub id of tokenizer and image processor; None: those beside the weights.

        Raises:
            WeightsError: the folder is not there, or holds another kind of model.
        """
        from transformers import AutoConfig, AutoProcessor, CLIPModel

        folder = folder_of(path, "config.json", download, f"{where}.path")
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "clip":
            raise WeightsError(f"{where}.path: {path} holds a model of type '{config.model_type}', not clip")
        beside = (
            folder
            if processor is None
            else folder_of(processor, "preprocessor_config.json", download, f"{where}.processor")
        )
        if not (beside / "preprocessor_config.json").is_file():
            raise WeightsError(
                f"{where}.path: {path} has no preprocessor_config.json; name the folder or hub id that "
                f"has one as `processor`"
            )
        self.device, self.batch_size = device_of(device, f"{where}.device"), batch_size
        model: Any = CLIPModel.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()
        self.processor: Any = AutoProcessor.from_pretrained(beside)

    @property
    def scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """[N, D] unit vectors."""
        rows = []
        for start in range(0, len(images), self.batch_size):
            inputs = self.processor(images=list(images[start : start + self.batch_size]), return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.device, self.model.dtype)
            rows.append(_unit(self.model.get_image_features(pixel_values=pixels)))
        return torch.cat(rows) if rows else torch.empty(0, 0)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, D] unit vectors; words past the model's context are cut."""
        rows = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.processor(
                text=list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            rows.append(
                _unit(
                    self.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
                )
            )
        return torch.cat(rows) if rows else torch.empty(0, 0)


def _unit(features: Any) -> torch.Tensor:
    """Unit vectors; recent transformers wraps the features in an output object."""
    tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)
