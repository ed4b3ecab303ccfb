"""The recipe's `task` section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from runtime.paths import ObjectPath, Options, ReadPath
from runtime.section import Section

Range = tuple[float | None, float | None]
TASK_BY_NAME = ("name", "level", "options")  # what a data set takes the place of


class DatasetConfig(Section):
    """Prompts from a file, a folder or the hub: a task without code."""

    path: ReadPath = Field(
        description="A .jsonl, .json, .csv, .tsv or .parquet file, a folder of them or of a saved Hugging Face data "
        "set, or a data set's name on the hub."
    )
    name: str | None = Field(None, description="Configuration of a data set on the hub.")
    split: str | None = Field(
        None, description="Split of the training prompts: of a Hugging Face data set, or how a folder's files begin."
    )
    heldout_path: ReadPath | None = Field(None, description="As `path`, for the held-out prompts. None: `path`.")
    heldout_split: str | None = Field(None, description="Split of the held-out prompts.")
    heldout_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Where neither of the two above is given: about this share of the prompts is held out, chosen by "
        "the prompts themselves, so that a prompt stays on its side when others are added.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our name of a column to its name in the data: {prompt: question, solution: answer}. Columns that "
        "are not named keep their names; rewards get all of them.",
    )
    images: list[str] = Field(
        default_factory=list,
        description="Columns (by our names) that hold an image or a list of images: paths beside the data, data URLs, "
        "or bytes. Each is checked; the record has paths.",
    )
    videos: list[str] = Field(
        default_factory=list,
        description="Columns (by our names) that hold a video: a path beside the data, bytes, or a list of its frames "
        "as images. Animated images are read by Pillow, all others by PyAV. Each is checked; the record has paths.",
    )
    show: list[str] = Field(
        default_factory=list,
        description="Which of `images` and `videos` the prompt shows to the policy, in this order, before its words. "
        "The others are for rewards.",
    )
    frames: int = Field(8, ge=1, description="Frames that a prompt shows of a video, at equal distances.")
    where: dict[str, Range] = Field(
        default_factory=dict,
        description="Keep rows whose number in a column lies in a range, both ends included, null for none: "
        "{pass_rate: [0.1, 0.9]}.",
    )
    limit: int | None = Field(None, ge=1, description="Take only so many training prompts, the first ones.")


class TaskConfig(Section):
    """Prompts, demonstrations, ground truth. Give `dataset` for prompts of your own; no code is needed."""

    name: ObjectPath = Field(
        "shapes",
        description="A task's name, or the dotted path or file of a class of your own (package.module.Class, "
        "file.py:Class) that is built with the options.",
    )
    level: str | None = Field(
        None, description="How hard it is, of a task that has levels: shapes has easy (its default), middle and hard."
    )
    options: Options = Field(default_factory=dict, description="Keyword arguments of the task.")
    dataset: DatasetConfig | None = Field(None, description="Prompts from a data set, in place of a task by name.")
    max_prompt_length: int | None = Field(
        None, ge=1, description="Longest prompt, in ids as the policy sees it. None: what the policy's context holds."
    )
    overlong_prompts: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What becomes of prompts that are longer, or that hold an image's marker. refuse: the run does not "
        "start. drop: they are left out, and counted.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if self.dataset is not None:
            for key in TASK_BY_NAME:
                if key in self.model_fields_set:
                    raise ValueError(f"{key}: `dataset` is a task by itself; leave out `{key}`, or `dataset`")
        return self

    @model_validator(mode="after")
    def _one_level(self) -> TaskConfig:
        if self.level is not None and "level" in self.options:
            raise ValueError("level: options.level is given too; leave out one of them")
        return self

    @property
    def keywords(self) -> dict[str, Any]:
        """What the task is built with."""
        return self.options if self.level is None else {**self.options, "level": self.level}

    @property
    def visual_tokenizer(self) -> str | None:
        """The visual tokenizer that draws this task's images, by the name of committed weights; None: any."""
        if self.dataset is not None or self.name != "shapes":
            return None
        return "shapes_grid" if self.keywords.get("level") in ("middle", "hard") else "shapes"

    @model_serializer(mode="wrap")
    def _readable(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A resolved recipe is a recipe: a data set has no name and options beside it there either."""
        data = serialise(self)
        left_out = TASK_BY_NAME if self.dataset is not None else ("level",) if self.level is None else ()
        return {key: value for key, value in data.items() if key not in left_out}
