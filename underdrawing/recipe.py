"""One YAML recipe a run: read, overridden by dotted keys, checked, resolved.

Every section's model lives with the package that it configures; this file only puts them side by side and turns a
failed check into a sentence that names the key and the nearest known one.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from formats.config import FormatConfig
from policy.config import PolicyConfig
from rewards.config import RewardsConfig
from rl.config import GrpoConfig
from rollout.config import RolloutConfig
from runtime.errors import UserError, nearest
from sft.config import SftConfig
from tasks.config import TaskConfig
from training.tracking import TrackConfig


class RecipeError(UserError):
    """A recipe that does not say something runnable."""


class EvaluateConfig(BaseModel):
    """What `underdrawing evaluate` (and the quickstart's before and after) measures."""

    model_config = ConfigDict(extra="forbid")

    prompts: int = Field(300, ge=1, description="held-out prompts, spread evenly over the tags")
    samples: int = Field(1, ge=1, description="answers to each prompt, whose scores are averaged; GenEval draws 4")
    temperature: float = Field(1.0, ge=0, description="of every role; top_p, top_k and guidance are the rollout's")
    seed: int = Field(1234, description="of the sampling noise; the same for every evaluated policy")


class Recipe(BaseModel):
    """A whole run. `underdrawing sft`, `grpo`, `rollout` and `evaluate` read the sections that they need."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="names the run in W&B and the report")
    seed: int = Field(0, ge=0, description="of weights, demonstrations, prompts and sampling noise")
    run_dir: Path = Field(Path("runs/run"), description="everything the run writes")
    policy: PolicyConfig
    task: TaskConfig
    format: FormatConfig
    sft: SftConfig = Field(default_factory=SftConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    rewards: RewardsConfig
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def _what_is_paid_counts(self) -> Recipe:
        self.rewards.refuse_constant_format(self.format)
        self.rewards.refuse_lost_weight(self.grpo.scale_rewards)
        return self

    @model_validator(mode="after")
    def _one_law_for_heldout_scores(self) -> Recipe:
        """Scores during training come from the workers of the training, at their temperature."""
        other = {role: value for role, value in self.rollout.temperature.items() if value != self.evaluate.temperature}
        if self.grpo.evaluate_every is not None and other:
            role, value = next(iter(other.items()))
            raise ValueError(
                f"grpo.evaluate_every: rollout.temperature is {value:g} ({role}) and evaluate.temperature "
                f"{self.evaluate.temperature:g}, so scores during training and after it would not "
                f"compare; make them equal, or leave evaluate_every out and evaluate checkpoints"
            )
        return self

    @model_validator(mode="after")
    def _workers_have_what_they_run_on(self) -> Recipe:
        if self.policy.device.startswith("cuda") and self.rollout.workers and not self.rollout.gpus:
            raise ValueError(
                f"rollout.gpus is 0, so Ray shows its {self.rollout.workers} workers no GPU, and "
                f"policy.device is {self.policy.device}; give each worker a GPU or a fraction of one"
            )
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides of the form `section.key=value` (the value is YAML).

    Raises:
        RecipeError: no such file, not YAML, an unknown or missing key, or a value of the wrong type; the message
            names file, key and what would be right.
    """
    return check_recipe(read_recipe(path, overrides), str(path))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe as plain data, unchecked."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{path}: no such recipe; shipped ones are under configs/") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise RecipeError(f"{path}: a recipe is a YAML text file") from None
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror or error}); give a recipe that you may read"
        ) from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}:" if where else ""
        raise RecipeError(f"{path}:{line} not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, not {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return data


def check_recipe(data: dict[str, Any], source: str) -> Recipe:
    """Validate plain data into a Recipe."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{source}: {_sentence(e)}" for e in error.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}': write it as section.key=value")
    at: Any = data
    *parents, last = key.split(".")
    for parent in parents:
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            raise RecipeError(f"override '{override}': '{parent}' is a value, not a section")
    try:
        at[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"override '{override}': the value is not YAML") from None


def _sentence(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; {nearest(loc[-1], _known_keys(loc[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (given: {given!r})" if key and not isinstance(given, dict | list) else ""
    return f"{key}: {message}{shown}" if key else message


def _known_keys(loc: Sequence[str]) -> list[str]:
    """Field names of the model found by walking `loc` down from Recipe."""
    models: list[type[BaseModel]] = [Recipe]
    for part in loc:
        following: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                following += _models_in(model.model_fields[part].annotation)
        # A mapping's own key, or a union's tag, is no field: stay with the models already found.
        models = following or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is not None or isinstance(annotation, types.UnionType):
        return [model for arg in typing.get_args(annotation) for model in _models_in(arg)]
    return []
