"""One YAML recipe a run: read, overridden by dotted keys, checked, resolved.

Every section's model lives with the package that it configures; this file only puts them side by side and turns a
failed check into a sentence that names the key and the nearest known one.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from evals.scaling_config import ScalingConfig
from formats.config import FormatConfig
from policy.chameleon.config import COMMITTED_VQ, TinySection
from policy.config import PolicyConfig
from policy.registry import DEFAULT, policy_section, section_of
from rewards.config import RewardsConfig
from rl.config import GrpoConfig
from rollout.config import FlowConfig, RolloutConfig
from rollout.tools.config import ToolsConfig
from runtime.errors import UserError, nearest
from runtime.paths import WritePath, reading
from runtime.section import LARGEST_SEED, Section
from runtime.yaml_core import dump_yaml, fault, load_yaml
from sft.config import SftConfig
from tasks.config import TaskConfig
from training.tracking import TrackConfig


class RecipeError(UserError):
    """A recipe that does not say something runnable."""


class EvaluateConfig(Section):
    """What `underdrawing evaluate` (and the quickstart's before and after) measures."""

    prompts: int = Field(300, ge=1, description="held-out prompts, spread evenly over the tags")
    by: list[str] | None = Field(
        None,
        min_length=1,
        description="what scores them: geneval (its rule on the images), reward (the recipe's own), or a name that the "
        "task offers; the first one's is the score. Default: the task's own, else geneval where the prompts have its "
        "ground truth and something detects, else reward",
    )
    samples: int = Field(
        1, ge=1, le=65536, description="answers to each prompt, whose scores are averaged; GenEval draws 4"
    )
    temperature: float = Field(1.0, ge=0, description="of every role; top_p, top_k and guidance are the rollout's")
    flow: FlowConfig | None = Field(
        None,
        description="how images are denoised, in families that denoise them: as a rule {sampler: ode, steps: 40}, more "
        "steps than training takes. Also in evaluations during training. Default: as rollout.flow; what is not named "
        "here has rollout.flow's defaults, not its values",
    )
    calibration: bool | None = Field(
        None,
        description="judge the policy's verdicts on its own images too, and how well they are calibrated; during "
        "training their rates, on the rollouts. true: refused where nothing reads or sees them. Default: where the "
        "task reads its critiques, the format has any, and something detects",
    )
    seed: int = Field(
        1234, ge=0, le=LARGEST_SEED, description="of the sampling noise; the same for every evaluated policy"
    )


def _policy(value: Any, info: ValidationInfo) -> PolicyConfig:
    return policy_section(value, info.context)


class Recipe(Section):
    """A whole run. `underdrawing sft`, `grpo`, `rollout` and `evaluate` read the sections that they need."""

    name: str = Field(description="names the run in W&B and the report")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of weights, demonstrations, prompts and sampling noise")
    run_dir: WritePath = Field(Path("runs/run"), description="everything the run writes")
    policy: Annotated[SerializeAsAny[PolicyConfig], PlainValidator(_policy)]
    task: TaskConfig
    format: FormatConfig
    sft: SftConfig = Field(default_factory=SftConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    tools: ToolsConfig = Field(
        default_factory=dict,
        description="who answers the policy's calls, in a format in which it makes any, by name; a list of names takes "
        "all their defaults",
    )
    rewards: RewardsConfig
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    scaling: ScalingConfig | None = Field(
        None,
        description="with it `underdrawing evaluate` also measures test-time scaling: the score against rounds, "
        "samples, pictures, tokens and seconds. Default: it does not; `scaling={}` takes all its defaults",
    )
    track: TrackConfig = Field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def _what_is_paid_counts(self) -> Recipe:
        self.rewards.refuse_constant_format(self.format)
        self.rewards.refuse_lost_weight(self.grpo.scale_rewards)
        if self.grpo.image_credit is not None:
            self.rewards.refuse_compared("grpo.image_credit")
        if self.grpo.restart is not None:
            self.rewards.refuse_compared("grpo.restart", self.grpo.restart.part)
        return self

    @model_validator(mode="after")
    def _a_tokenizer_that_draws_the_task(self) -> Recipe:
        """A tiny policy takes the visual tokenizer of the task's level by itself, and no committed one of another."""
        wanted, tiny = self.task.visual_tokenizer, getattr(self.policy, "tiny", None)
        if wanted is None or not isinstance(tiny, TinySection) or getattr(self.policy, "path", None) is not None:
            return self
        if "vq" not in tiny.model_fields_set:
            tiny.vq = wanted
        elif tiny.vq in COMMITTED_VQ and tiny.vq != wanted:
            raise ValueError(
                f"policy.tiny.vq: '{tiny.vq}' does not draw the objects of this level of the shapes world; leave it "
                f"out, or give '{wanted}'"
            )
        return self

    @model_validator(mode="after")
    def _parts_are_known(self) -> Recipe:
        """What names a reward part names one that there is: else it would be of no effect."""
        parts = self.rewards.parts
        for name in self.grpo.segment_reward_weights:
            if name not in parts:
                raise ValueError(f"grpo.segment_reward_weights: no reward part '{name}'; {nearest(name, parts)}")
        by = self.grpo.restart.part if self.grpo.restart is not None else None
        if by is not None and by not in parts:
            raise ValueError(f"grpo.restart.part: no reward part '{by}'; {nearest(by, parts)}")
        for metric in self.rewards.alarms.watch:
            section, _, part = metric.partition("/")
            if section == "reward" and part.split("/")[0] not in (*parts, "mean", "std", "none", "schedule"):
                raise ValueError(f"rewards.alarms.watch: '{metric}': no reward part '{part}'; {nearest(part, parts)}")
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
    return check_recipe(read_recipe(path, overrides), str(path), Path(path))


def as_now(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe that was kept by an earlier release, by today's names and with today's defaults; as it is where it is
    none any more."""
    try:
        return Recipe.model_validate(data).model_dump(mode="json")
    except (ValidationError, UserError):
        return data


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe as plain data, unchecked."""
    path = Path(path)
    try:
        data = load_yaml(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{path}: no such recipe; shipped ones are under configs/") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise RecipeError(f"{path}: a recipe is a YAML text file") from None
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror or error}); give a recipe that you may read"
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {fault(error)}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, not {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return data


def check_recipe(data: dict[str, Any], source: str, file: Path | None = None) -> Recipe:
    """Validate plain data into a Recipe.

    Args:
        source: what messages begin with.
        file: the recipe's own, beside which files are sought that it names; None: its paths stay as they are.
    """
    try:
        return Recipe.model_validate(data, context=None if file is None else reading(file.parent))
    except ValidationError as error:
        raise RecipeError("\n".join(f"{source}: {line}" for line in _sentences(error.errors(), data))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}': write it as section.key=value")
    at: Any = data
    *parents, last = key.split(".")
    for parent in parents:
        if at.get(parent) is None:  # a section that is left out, as a resolved recipe writes it
            at[parent] = {}
        at = at[parent]
        if not isinstance(at, dict):
            raise RecipeError(f"override '{override}': '{parent}' is a value, not a section")
    try:
        at[last] = load_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"override '{override}': the value is {fault(error).removeprefix('line 1: ')}") from None


def _sentences(errors: Sequence[Any], data: dict[str, Any]) -> list[str]:
    """What is wrong, a sentence for each key.

    Where a value may be of several kinds, pydantic tells what is wrong with it as each of them. What is said of a key
    inside the value, or of more than its type, is about the kind that was meant; else the kinds are put together.
    """
    faults: dict[tuple[str, ...], list[Any]] = {}
    for error in errors:
        faults.setdefault(_keys(error, data), []).append(error)
    lines = []
    for keys, told in faults.items():
        kinds = any(len(error["loc"]) > len(keys) for error in told)
        if kinds and any(len(other) > len(keys) and other[: len(keys)] == keys for other in faults):
            continue
        told = [error for error in told if not error["type"].endswith("_type")] or told
        message = " or ".join(dict.fromkeys(_message(error, keys, data) for error in told))
        given = told[0].get("input")
        shown = f" (given: {given!r})" if keys and not isinstance(given, dict | list) and _shows(told[0]) else ""
        lines.append(f"{'.'.join(keys)}: {message}{shown}" if keys else message)
    return lines


def _keys(error: Any, data: Any) -> tuple[str, ...]:
    """The place of an error as the recipe's keys, without pydantic's names of the kinds that a value may be of."""
    keys = []
    missing = error["type"] == "missing"
    for part in error["loc"][:-1] if missing else error["loc"]:
        known = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
        name = next((key for key in known if str(key) == str(part)), None)
        if name is not None:
            keys.append(str(part))
            data = known[name]
    return (*keys, str(error["loc"][-1])) if missing else tuple(keys)


def _shows(error: Any) -> bool:
    return error["type"] not in ("extra_forbidden", "missing")


def _message(error: Any, keys: Sequence[str], data: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key; {nearest(keys[-1], _known_keys(keys[:-1], data))}"
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "literal_error":
        known = [word.strip("'") for word in re.split(", | or ", error["ctx"]["expected"])]
        return f"Input should be {error['ctx']['expected']}{_closest(error['input'], known)}"
    if error["type"] in ("model_type", "dict_type"):
        return "Input should be a mapping of keys to values"
    return error["msg"].removeprefix("Value error, ")


def _closest(name: Any, known: Sequence[str]) -> str:
    hint = nearest(name, known).partition("Known: ")[0].strip() if isinstance(name, str) else ""
    return f"; {hint}" if hint else ""


def _known_keys(loc: Sequence[str], data: Any) -> list[str]:
    """Field names of the model found by walking `loc` down from Recipe."""
    models: list[type[BaseModel]] = [Recipe]
    if loc[:1] == ("policy",):  # each family has a section of its own
        family = data["policy"].get("family", DEFAULT)
        models, loc = [section_of(family if isinstance(family, str) else DEFAULT)], loc[1:]
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
