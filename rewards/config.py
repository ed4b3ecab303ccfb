"""The section `rewards` of a recipe: which parts there are and how they make the reward.

rewards:
  parts:
    result: {function: geneval, options: {mode: graded}}
    consistency: {function: critique_consistency}
    bright: {function: my_rewards.py:brightness, timeout_s: 20}
    strict: {function: geneval, log_only: true}
  schedules:
    w: {0: 1.0, 100: 0.2}
  total: result * (1 + 0.5 * coalesce(consistency, 0)) + w * (bright > group_mean(bright))
"""

from __future__ import annotations

import keyword
import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rewards.alarms import AlarmsConfig
from rewards.detectors.registry import BACKENDS, DetectorConfig
from rewards.formula.expression import ALL_FUNCTIONS, Expression
from rewards.formula.schedule import ScheduleConfig
from rewards.judge.config import JudgeConfig
from rewards.loader import check_exists, is_own
from rewards.registry import REWARDS
from runtime.errors import nearest
from runtime.paths import ObjectPath, Options
from runtime.ray_options import RayShare
from runtime.section import Retries, Seconds, Section

Scope = Literal["row", "group", "batch"]
RunsOn = Literal["driver", "process", "ray"]

RENAMED = {"watch": "log_only"}  # keys of a component
RENAMED_OPTIONS = {"picture": "image"}  # of the toolkit's own functions


class WorkersConfig(Section):
    """Who runs a part, or the detector: processes of this machine, or Ray actors."""

    kind: Literal["process", "ray"] = Field(
        "process", description="process: children of this process. ray: actors, on any machine of the cluster."
    )
    count: int = Field(1, ge=1, le=1024, description="How many, each with the function and its models loaded.")
    num_gpus: RayShare = Field(0.0, description="GPUs of each Ray actor; a fraction shares one.")
    num_cpus: RayShare = Field(1.0, description="CPUs of each Ray actor, as Ray counts them.")
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Trajectories (of the detector: images) of one call. A "
        "part that sees whole groups gets whole groups. None: a group; of the detector: "
        "all at once.",
    )

    @model_validator(mode="after")
    def _fits(self) -> WorkersConfig:
        if self.kind == "process" and self.num_gpus:
            raise ValueError("num_gpus: only Ray deals out GPUs; set kind: ray, or name a device in the part's options")
        return self


class ComponentConfig(Section):
    """One reward part."""

    function: ObjectPath = Field(
        description="A registered name, 'package.module.function', or 'path/to/file.py:function'."
    )
    options: Options = Field(default_factory=dict, description="Further keyword arguments of the function.")
    factory: bool = Field(
        False,
        description="The function makes the reward when called with the options, as TRL's "
        "get_soft_overlong_punishment does.",
    )
    weight: float | str | None = Field(
        None,
        description="Factor of the part in the sum, where `total` is not given; "
        "text: the name of a schedule; None: 1. A part of weight 0 is computed and "
        "logged, never paid.",
    )
    log_only: bool = Field(
        False,
        description="Computed, logged and shown, and part of no reward: `total` may not name it. What "
        "it says of segments is kept, and moves no advantage.",
    )
    scope: Scope | None = Field(
        None,
        description="What a row's value may depend on. row: its own trajectory. group: "
        "its group. batch: all trajectories of the step. The first two are scored while others "
        "are still being sampled. None: for the toolkit's own what is so, else batch.",
    )
    completions: Literal["auto", "interleaved", "text", "strings"] = Field(
        "auto",
        description="What `completions` holds. interleaved: message lists of words and PIL images. text: message lists "
        "with the words as one string, for rewards written for text. strings: the words, without messages; `prompts` "
        "are strings then, too. auto: text for TRL's own functions; strings where the function declares `completions: "
        "list[str]`, or where neither prompts nor thoughts hold images; else interleaved.",
    )
    isolate: bool | None = Field(
        None,
        description="Run in a process of its own, which is killed on a timeout. None: "
        "yes, except for those of this toolkit's own that are quick and call nobody.",
    )
    workers: WorkersConfig | None = Field(None, description="Who runs an isolated part. None: one process.")
    timeout_s: Seconds | None = Field(
        None,
        gt=0,
        description="Seconds one call may take (isolated parts). After three "
        "in a row the part is not called again in that step. None: 60, and where it asks "
        "the judge, twice its client's patience more.",
    )
    load_timeout_s: Seconds = Field(300.0, gt=0, description="Seconds that importing the function may take.")
    retries: Retries = Field(
        1, description="Further calls after one that raised, hung, crashed or gave NaN; then the rows are None."
    )
    retry_wait_s: Seconds = Field(0.5, ge=0, description="Seconds before the first retry; doubled at each further one.")

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, value: Any) -> Any:
        """Keys and options by the names that they had in release 0.1."""
        if not isinstance(value, dict):
            return value
        value = {RENAMED.get(key, key): content for key, content in value.items()}
        options = value.get("options")
        if isinstance(options, dict) and is_own(str(value.get("function"))):
            value["options"] = {RENAMED_OPTIONS.get(key, key): option for key, option in options.items()}
        return value

    @property
    def runs_on(self) -> RunsOn:
        """Where it runs."""
        if self.workers is not None:
            return self.workers.kind
        if self.isolate is not None:
            return "process" if self.isolate else "driver"
        return REWARDS[self.function].runs_on if is_own(self.function) else "process"

    @property
    def sees(self) -> Scope:
        """What a row's value may depend on."""
        return self.scope or (REWARDS[self.function].scope if is_own(self.function) else "batch")


class RewardsConfig(Section):
    """All parts, the formula over them, and how much failure the run bears."""

    parts: dict[str, ComponentConfig] = Field(min_length=1, description="Reward parts by the names that `total` uses.")
    total: str | None = Field(
        None,
        description="Formula over parts and schedules: + - * / % **, comparisons, and, or, "
        "not, `a if b else c`, min, max, abs, clip(x, low, high), coalesce(x, d), judged(x); "
        "group_mean(x) and batch_mean(x), likewise std, min, max, any, all, share, rank, count. "
        "None anywhere makes it None, except inside coalesce and judged. Not given: the sum of "
        "weight * part.",
    )
    schedules: dict[str, ScheduleConfig] = Field(
        default_factory=dict, description="Numbers by step that `total` and weights name: `w: {0: 1.0, 100: 0.2}`."
    )
    none_limit: int = Field(
        3,
        ge=1,
        description="The run stops when this many steps in a row had a part fail for "
        "over half of its rows, or had no trajectory with a reward.",
    )
    detector: DetectorConfig | ObjectPath | None = Field(
        None,
        description="One of the toolkit's (backend: mask2former, grounding_dino, owlv2, shapes, shapes_grid, "
        "digits_exact, digits_learned; path ...), or the dotted path or file of a function or class that makes a "
        "Detector; None: the task's own.",
    )
    detector_workers: WorkersConfig | None = Field(
        None, description="Who runs the detector for the parts that stand in the driver. None: the driver itself."
    )
    detector_timeout_s: Seconds = Field(120.0, gt=0, description="Seconds one call of detector_workers may take.")
    judge: JudgeConfig | None = Field(None, description="The endpoint of the parts that ask a judge.")
    alarms: AlarmsConfig = Field(default_factory=AlarmsConfig, description="Signs of reward hacking and collapse.")

    @field_validator("detector", mode="before")
    @classmethod
    def _backend_alone(cls, value: Any) -> Any:
        if not isinstance(value, str) or "." in value or ":" in value:
            return value
        if value not in BACKENDS:
            raise ValueError(f"no detector '{value}'; {nearest(value, BACKENDS)}, or the dotted path of your own")
        return {"backend": value}

    @model_validator(mode="after")
    def _consistent(self) -> RewardsConfig:
        for name, part in self.parts.items():
            _check_name(f"parts.{name}", name)
            check_exists(part.function)
            self._check_weighted(name, part)
            self._check_runs_on(name, part)
        for name in self.schedules:
            _check_name(f"schedules.{name}", name)
            if name in self.parts:
                raise ValueError(f"schedules.{name}: a part has this name already")
        self.expression()
        return self

    def _check_weighted(self, name: str, part: ComponentConfig) -> None:
        if part.log_only and part.weight is not None:
            raise ValueError(
                f"parts.{name}.weight: a log-only component has no weight; leave out the weight, or log_only"
            )
        if self.total is not None and part.weight is not None:
            raise ValueError(f"parts.{name}.weight has no use beside `total`; write the factor into the formula")
        if isinstance(part.weight, str) and part.weight not in self.schedules:
            raise ValueError(
                f"parts.{name}.weight: no schedule '{part.weight}'; {nearest(part.weight, self.schedules)}"
            )

    def _check_runs_on(self, name: str, part: ComponentConfig) -> None:
        if part.workers is not None and part.isolate is False:
            raise ValueError(f"parts.{name}: isolate: false keeps it in the driver, and workers do not; leave one out")
        if part.scope == "batch" and part.workers is not None and part.workers.batch_size is not None:
            raise ValueError(f"parts.{name}.workers.batch_size: a part that sees the whole batch gets it in one call")
        if not is_own(part.function):
            return
        own = REWARDS[part.function]
        if part.factory:
            raise ValueError(f"parts.{name}.factory: '{part.function}' is no factory")
        if part.scope is not None and part.scope != own.scope:
            raise ValueError(f"parts.{name}.scope: '{part.function}' sees a {own.scope}, which is no matter of choice")
        if own.needs_judge and self.judge is None:
            raise ValueError(
                f"judge: missing; parts.{name} ({part.function}) asks a judge: give judge.base_url and judge.model"
            )

    def formula(self) -> str:
        """`total`, or the weighted sum that stands for it."""
        if self.total is not None:
            return self.total
        weights = {
            name: 1.0 if part.weight is None else part.weight for name, part in self.parts.items() if not part.log_only
        }
        return (
            " + ".join(
                name if w == 1 else f"{w if isinstance(w, str) else format(w, 'g')} * {name}"
                for name, w in weights.items()
                if w != 0
            )
            or "0"
        )

    def expression(self) -> Expression:
        log_only = {
            name: "is log-only; take it out, or set log_only: false"
            for name, part in self.parts.items()
            if part.log_only
        }
        return Expression(
            self.formula(), [name for name in (*self.parts, *self.schedules) if name not in log_only], withheld=log_only
        )

    def refuse_compared(self, key: str, part: str | None = None) -> None:
        """Raises ValueError where what a thought earns, in all or in `part`, rests on others of its group or step:
        `key` compares it with what it would have earned, each by itself."""
        expression = self.expression()
        if expression.groupwise:
            raise ValueError(
                f"{key}: rewards.total ({self.formula()}) compares thoughts with one another; what is compared here "
                "must be a thought's own, so take the functions over a group or a batch out"
            )
        for name in dict.fromkeys([*expression.names, *([part] if part else [])]):
            if name in self.parts and self.parts[name].sees != "row":
                own = is_own(self.parts[name].function)
                raise ValueError(
                    f"{key}: rewards.parts.{name} sees the {self.parts[name].sees}, and what is compared here must be "
                    f"a thought's own; {'take it out of the formula' if own else 'say scope: row where that is so'}"
                )

    @property
    def ray_cpus(self) -> int | None:
        """CPUs that the Ray actors of parts and detector ask for; None: there are none."""
        everyone = [part.workers for part in self.parts.values()] + [self.detector_workers]
        asked = [workers.count * workers.num_cpus for workers in everyone if workers and workers.kind == "ray"]
        return math.ceil(sum(asked)) if asked else None

    def refuse_constant_format(self, format_config: Any) -> None:
        """Refuse a recipe that pays for `format` while decoding admits nothing but well-formed thoughts.

        Raises ValueError: under full constraint the part is 1 for everybody, which moves no advantage.
        """
        if not format_config.form_is_constant:
            return
        weighted = self.expression().names
        for name, part in self.parts.items():
            if part.function == "format" and name in weighted:
                raise ValueError(
                    f"rewards.parts.{name} pays for the format, but format.constrain is 'full', so every "
                    f"thought is well-formed and the part is a constant; set format.constrain: images, "
                    f"or take '{name}' out of rewards.total"
                )

    def refuse_lost_weight(self, scale_rewards: str) -> None:
        """Refuse a recipe that pays one factor for a whole group, where advantages are divided by the group's own
        standard deviation.

        Raises ValueError: the division takes the factor out again.
        """
        if scale_rewards != "group":
            return
        weighted = self.expression().names
        for name, part in self.parts.items():
            if part.function == "vital_weight" and name in weighted:
                raise ValueError(
                    f"rewards.parts.{name} (vital_weight) is one factor for a whole group, and "
                    f"grpo.scale_rewards: group divides it out again; set grpo.scale_rewards: none or "
                    f"batch, or take '{name}' out of rewards.total"
                )


def _check_name(where: str, name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name in ALL_FUNCTIONS:
        raise ValueError(
            f"{where}: the name stands in a formula, so it must be a plain word and none of {', '.join(ALL_FUNCTIONS)}"
        )
