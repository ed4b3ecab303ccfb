"""The recipe's `sft` section. Names are TrainingArguments' where they mean the same."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from formats.roles import RECORDED
from policy.extra_losses import ExtraLosses, FlowLossConfig, VisualLossConfig
from runtime.paths import ReadPath
from runtime.section import Section
from training.schedules import Schedule, check_schedule

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _weight_of_twgi(value: Any) -> Any:
    """A plain number is the weight of twgi's loss."""
    if isinstance(value, VisualLossConfig | dict):
        return value
    try:
        return {"weight": float(value)}
    except (TypeError, ValueError):
        raise ValueError(
            "want a number, the weight of the loss 'twgi', or a mapping such as {kind: mvot, weight: 1.0}"
        ) from None


INSPECTION = "inspection"  # of the kinds of perception rows: the only one that is not the task's


class PerceptionConfig(Section):
    """Rows that teach seeing and nothing else: an image, and the words on it. They are as short as that."""

    share: float = Field(0.0, ge=0, lt=1, description="of all rows; 0: none")
    kinds: list[str] = Field(
        [INSPECTION],
        min_length=1,
        description="of rows, evenly. inspection: the task's own demonstrations up to the words on their first image, "
        "of which these words alone are learned. Any other is a kind of the task's questions, in the format "
        "`questions` (shapes: count, object, presence, relation)",
    )
    wrong: float = Field(0.5, ge=0, le=1, description="share of wrong images among the inspected ones")

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, kinds: list[str]) -> list[str]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("a kind is named twice; each counts as much as any other")
        return kinds


class CritiquesConfig(Section):
    """Self-sampled critiques: images that the policy drew itself, and what is true of them."""

    path: ReadPath | None = Field(
        None,
        description="folder of stored trajectories on train prompts, or of several such (underdrawing rollout --split "
        "train). The task's detector judges their images, and the task writes the true words and the repair after "
        "each; what the policy wrote is seen and not learned. None: none",
    )
    share: float = Field(0.3, gt=0, lt=1, description="of all rows; images are repeated where there are fewer")
    wrong: float = Field(0.5, ge=0, le=1, description="share of wrong images among them")
    learn: Literal["thought", "inspection"] = Field(
        "thought", description="thought: the words and all that follows them. inspection: the words on the image alone"
    )


class CorruptionConfig(Section):
    """Demonstrations whose first image is corrupted: a rectangle of it is another demonstration's (after MoTiF,
    arXiv:2606.12886). What the task's detector then sees decides whether it is to be redrawn or ignored."""

    share: float = Field(0.0, ge=0, lt=1, description="of all rows; 0: none")
    ignore: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of corruptions that do no harm: the image is called right, and the thought goes on. The "
        "others are named, and the image is drawn again",
    )
    cells: int = Field(4, ge=2, le=64, description="rows and columns of the lattice on which rectangles lie")


class SftConfig(Section):
    """The warm start."""

    demonstrations: int = Field(6000, ge=1, description="how many the task writes; ignored when `data` is given")
    data: ReadPath | None = Field(
        None,
        description="demonstrations to train on: a file or a Hugging Face data set of messages with images "
        "(docs/tasks.md has the layout), or a folder of stored trajectories or of several such; None: the task's own",
    )
    min_reward: float | None = Field(
        None, description="of stored trajectories, take those whose reward is at least this; unjudged ones never"
    )
    best: int | None = Field(
        None, ge=1, description="of stored trajectories, take so many of each prompt, those with the highest reward"
    )
    max_steps: int = Field(700, ge=1, description="optimiser steps")
    batch_size: int = Field(48, ge=1, description="rows a step on each process")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches a step")
    learning_rate: float = Field(2e-3, gt=0, description="peak")
    lr_scheduler_type: Schedule = Field("cosine", description="as in TrainingArguments")
    warmup_steps: int = Field(40, ge=0, description="linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    adam_beta2: float = Field(0.98, gt=0, lt=1, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    max_length: int | None = Field(
        None,
        ge=2,
        description="ids a row; longer ones lose whole segments from their "
        "end, never part of an image. None: the policy's own",
    )
    image_weight: float = Field(1.0, ge=0, description="of visual codes in the cross-entropy; words weigh 1")
    role_weights: Annotated[dict[str, Weight], RECORDED] = Field(
        {},
        description="of a role's ids in the cross-entropy, times image_weight "
        "on codes; a role that is left out weighs 1",
    )
    learn_mistakes: bool = Field(
        False,
        description="imitate images that are wrong on purpose too; else they are "
        "only seen, and their inspection and repair are learned",
    )
    changed_weight: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="of a redrawn image's visual codes that differ from the policy's image before it, times all other "
        "weights; 1: as the others",
    )
    conditioning_dropout_prob: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of images that are learned under one of their guidance branches' contexts in place of all "
        "that was written (classifier-free guidance, arXiv:2207.12598); without it guidance asks for contexts that "
        "were never learned. No effect where the format has no guidance",
    )
    labels: Literal["default", "release"] = Field(
        "default",
        description="which ids are learned. default: what the policy itself would decide, by segment. release: as in "
        "the code of Thinking with Generated Images, all after the prompt's separator, what the environment wrote, "
        "images that are wrong on purpose and padding too; a row longer than max_length is left out whole",
    )
    visual_loss: Annotated[VisualLossConfig, BeforeValidator(_weight_of_twgi)] = Field(
        default=0.0,  # type: ignore[assignment]
        validate_default=True,
        description="a number: the weight of the loss twgi (its paper uses 1); or a mapping of the keys below. 0: none",
    )
    flow_loss: FlowLossConfig = Field(default_factory=lambda: FlowLossConfig.model_validate({}))
    perception: PerceptionConfig = Field(default_factory=PerceptionConfig)
    critiques: CritiquesConfig = Field(default_factory=CritiquesConfig)
    corruption: CorruptionConfig = Field(default_factory=CorruptionConfig)
    save_steps: int = Field(200, ge=1, description="steps between checkpoints")
    logging_steps: int = Field(20, ge=1, description="steps between logged metrics")

    def extra_losses(self, seed: int) -> ExtraLosses:
        """What is learned beside the cross-entropy, where the policy's family has it."""
        return ExtraLosses(self.visual_loss, self.flow_loss, self.labels == "release", seed)

    def shares(self) -> dict[str, float]:
        """Shares of all rows, by section, of those that are made beside the demonstrations."""
        critiques = self.critiques.share if self.critiques.path is not None else 0.0
        shares = {"perception": self.perception.share, "critiques": critiques, "corruption": self.corruption.share}
        return {section: share for section, share in shares.items() if share}

    @model_validator(mode="after")
    def _demonstrations_are_left(self) -> SftConfig:
        shares = self.shares()
        if sum(shares.values()) > 0.95:
            told = " + ".join(f"{section}.share {share:g}" for section, share in shares.items())
            raise ValueError(f"{told} leave less than 0.05 of the rows to the demonstrations; lower one")
        if self.labels == "release" and (shares or self.changed_weight != 1):
            key = next((f"{section}.share" for section in shares), "changed_weight")
            raise ValueError(
                f"labels=release learns all that comes after the prompt's separator, each id alike; {key} is for "
                "labels=default"
            )
        return self

    @model_validator(mode="after")
    def _rate_falls(self) -> SftConfig:
        check_schedule(self.lr_scheduler_type, self.learning_rate)
        return self
