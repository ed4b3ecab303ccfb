"""From `rewards.detector` of a recipe to a detector.

    detector: {backend: mask2former, path: facebook/mask2former-swin-small-coco-instance, batch_size: 8}
    detector: my_package.detectors.Mine        a function or class of one's own that makes one
    (nothing)                                  the task's own, where it has one

Loads transformers and open_clip only when a backend is built.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from runtime.errors import UserError, nearest
from runtime.loading import load_object
from runtime.paths import Options, ReadPath, expand, expand_object, reading
from runtime.section import Section
from runtime.yaml_core import fault, load_yaml

# Where each backend is; its constructor's arguments are the keys that it takes.
BACKENDS = {
    "mask2former": "rewards.detectors.mask2former:Mask2FormerDetector",
    "grounding_dino": "rewards.detectors.grounding_dino:GroundingDinoDetector",
    "owlv2": "rewards.detectors.owlv2:Owlv2Detector",
    "shapes": "rewards.detectors.shapes:shapes_detector",
    "shapes_grid": "rewards.detectors.shapes:shapes_grid_detector",
    "digits_exact": "rewards.detectors.digits:digits_exact",
    "digits_learned": "rewards.detectors.digits:DigitsLearned",
}
SEE_COLORS = (
    "shapes",
    "shapes_grid",
    "digits_exact",
    "digits_learned",
)  # the embedded worlds': nothing else is to name colors
# What is looked for in the hub cache where a recipe names no path.
RELEASED = {
    "mask2former": "facebook/mask2former-swin-small-coco-instance",
    "grounding_dino": "IDEA-Research/grounding-dino-base",
    "owlv2": "google/owlv2-base-patch16-ensemble",
}


class DetectorConfig(Section):
    """A detector of the toolkit's own. Keys that are None keep the backend's default."""

    backend: str = Field(
        description="mask2former, grounding_dino, owlv2, shapes, shapes_grid, digits_exact or digits_learned."
    )
    path: ReadPath | None = Field(
        None,
        description="Folder in the released layout, or a hub id found in the hub cache; of digits_learned a "
        ".safetensors file. None: the backend's usual release, or the committed weights.",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1 ...; auto: a GPU where there is one.")
    batch_size: int | None = Field(None, ge=1, description="Images of one forward pass.")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="Of the weights; float32 unless given."
    )
    min_score: float | None = Field(None, ge=0, lt=1, description="Objects at or below this score are left out.")
    test_size: tuple[int, int] | None = Field(
        None,
        description="mask2former: longest and shortest side in px that "
        "images are resized to; GenEval's are 1333 and 800.",
    )
    top: int | None = Field(None, ge=1, description="mask2former: (query, class) pairs looked at; GenEval's are 100.")
    overlap: float | None = Field(
        None,
        gt=0,
        le=1,
        description="grounding_dino, owlv2: of two boxes of one phrase that overlap more (IoU) the worse is dropped.",
    )
    template: str | None = Field(None, description="owlv2: the sentence that a phrase is put into, with {}.")
    download: bool = Field(False, description="Fetch weights that the hub cache lacks.")
    colors: Options | None = Field(
        default_factory=dict,
        description="The open_clip model that names colors (model, pretrained, path, device, "
        "batch_size ...); nothing: GenEval's, ViT-L-14-quickgelu of openai. null: no colors are named.",
    )

    @model_validator(mode="after")
    def _fits(self) -> DetectorConfig:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend: no '{self.backend}'; {nearest(self.backend, BACKENDS)}")
        return self


def detector_spec(text: str, where: str = "--detector") -> DetectorConfig | str:
    """What a command's option means: a backend, `backend:path`, a mapping in YAML or a file that holds one, or the
    dotted path of one's own.

    Raises:
        UserError: a mapping that describes no detector.
    """
    backend, colon, path = text.partition(":")
    if backend in BACKENDS:
        return DetectorConfig(backend=backend, path=expand(path) if colon else None)
    written = text.lstrip().startswith("{")
    file = Path(text if written else expand(text))
    if not written and file.suffix not in (".yaml", ".yml"):
        if "." not in text:
            raise UserError(f"{where}: no detector '{text}'; {nearest(text, BACKENDS)}")
        return expand_object(text)
    try:
        return DetectorConfig.model_validate(
            load_yaml(text if written else file.read_text()), context=reading(Path.cwd() if written else file.parent)
        )
    except OSError as error:
        raise UserError(f"{where}: {file}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {fault(error)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = f"; {nearest(key, DetectorConfig.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise UserError(f"{where}: {key + ': ' if key else ''}{first['msg']}{hint}") from None


def build_detector(config: DetectorConfig, where: str = "rewards.detector") -> Any:
    """The detector that a recipe describes, its weights loaded; those that name colors only when a prompt has one.

    Raises:
        UserError: a key that the backend does not take, or weights that are not there.
    """
    maker = load_object(BACKENDS[config.backend], f"{where}.backend: '{config.backend}'")
    takes = inspect.signature(maker).parameters
    given = {"path": RELEASED[config.backend]} if config.backend in RELEASED else {}
    given |= config.model_dump(exclude={"backend", "colors"}, exclude_none=True)
    for key in sorted(set(given) - set(takes)):
        if key in config.model_fields_set:
            raise UserError(f"{where}.{key}: {config.backend} has no such key; it takes {', '.join(takes) or 'none'}")
        del given[key]
    detector = maker(**given)
    if config.backend in SEE_COLORS or config.colors is None:
        return detector
    from rewards.detectors.colors import Colored, ColorNamer
    from rewards.detectors.encoders import OpenClipConfig

    try:
        colors = OpenClipConfig.model_validate({"device": config.device, "download": config.download, **config.colors})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}.colors.{key}: {first['msg']}; {nearest(key, OpenClipConfig.model_fields)}") from None
    return Colored(detector, ColorNamer(colors))
