"""The contract between a trajectory and whatever scores it, and the rows that carry one to the other.

A reward is TRL's: ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, one value a row, over
all trajectories of a step with the members of a group next to each other. Besides TRL's keyword arguments
(`trainer_state`, `log_metric`, `log_extra`) it may take `trajectories`, and a row's value may be
``{segment index: value}`` to credit chosen segments. None: it does not apply, or could not be judged; never 0.

Here the arguments are made; loader.py finds the function, isolate.py runs it in a process of its own, compose.py
combines the parts.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
from PIL import Image

from formats.base import Format
from record.trajectory import Author, Segment, Trajectory
from rewards.detectors.base import CachedDetector, Detector
from rewards.judge.base import JudgeLike
from rewards.limits import LARGEST, too_large
from runtime.errors import UserError, nearest

Value = float | dict[int, float] | None
View = Literal["auto", "interleaved", "text", "strings"]
Reward = Callable[..., Any]  # sync or async; returns Sequence[float | Mapping[int, float] | None]

# Keys that TRL keeps for itself: a record's own `prompt` is in trajectories[i].prompt.
RESERVED = (
    "prompt",
    "prompts",
    "completion",
    "completions",
    "completion_ids",
    "trajectories",
    "trainer_state",
    "log_metric",
    "log_extra",
    "context",
)

# What a reward is called with besides columns and options (`context` and `judge` for those that stand on them).
ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trajectories",
    "trainer_state",
    "log_metric",
    "log_extra",
    "judge",
)
GIVEN = {*RESERVED, "columns"} - {"prompt", "completion"}  # and so no options

NO_JUDGE = (
    "reward '{name}' asks a judge, and the recipe names none: give rewards.judge.base_url and rewards.judge.model"
)


_BOUND = f"at most {LARGEST:g} can be trained on (in float32), so scale it down"
SHOWN = 80  # characters of a value in a message


class RewardError(UserError):
    """A reward that breaks the contract: whoever wrote it can mend it."""


class RewardFailed(UserError):
    """A part that went unjudged past the recipe's limit: the run stops here."""


@dataclass(frozen=True)
class TrainerState:
    """What TRL's rewards read of `trainer_state`."""

    global_step: int = 0
    max_steps: int = 0


@dataclass
class RewardContext:
    """What this toolkit's own rewards stand on. They name it as `context`; a user's function has no need to."""

    task: Any = None  # tasks.base.Task
    fmt: Format | None = None  # None: looked up by each trajectory's format name
    detector: CachedDetector | None = None
    judge: JudgeLike | None = None

    def detector_for(self, reward: str) -> CachedDetector:
        if self.detector is None:
            raise RewardError(f"reward '{reward}' needs a detector, and this task offers none: give rewards.detector")
        return self.detector

    def judge_for(self, reward: str) -> JudgeLike:
        if self.judge is None:
            raise RewardError(NO_JUDGE.format(name=reward))
        return self.judge

    @staticmethod
    def of(task: Any, fmt: Format | None, detector: Detector | None, judge: JudgeLike | None = None) -> RewardContext:
        return RewardContext(task, fmt, None if detector is None else CachedDetector(detector), judge)


@dataclass
class Logs:
    """What a reward says beside its values. `metrics`: scalars of this call; `columns`: one value a row; `judge`: what
    it asked of the judge, counted as JudgeClient.counts does."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    judge: dict[str, int] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: list[Any]) -> None:
        self.columns.setdefault(column, []).extend(values)


# ---- what the policy wrote -------------------------------------------------------------------------------------


def completion(trajectory: Trajectory, view: View = "interleaved") -> list[dict[str, Any]] | str:
    """The policy's own words and images as messages; what the environment or the user wrote is left out.

    interleaved: one assistant message for every stretch that no observation interrupts. Its content is a string when
    it holds no image, else a list of ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": PIL}``.
    text: one message whose content is all the words as one string, which is what text-only rewards read.
    strings: all the words as one string, without a message around it, as TRL gives for prompts that are strings.
    """
    if view == "strings":
        return policy_text(trajectory)
    if view == "text":
        return [{"role": "assistant", "content": policy_text(trajectory)}]
    turns: list[list[dict[str, Any]]] = [[]]
    for segment in trajectory.segments:
        if segment.author is not Author.POLICY:
            if turns[-1]:
                turns.append([])
            continue
        if segment.image is not None:
            turns[-1].append({"type": "image", "image": Image.fromarray(segment.image)})
        elif segment.text:
            last = turns[-1][-1] if turns[-1] else None
            if last is not None and last["type"] == "text":
                last["text"] += segment.text
            else:
                turns[-1].append({"type": "text", "text": segment.text})
    messages = [{"role": "assistant", "content": _content(turn)} for turn in turns if turn]
    return messages or [{"role": "assistant", "content": ""}]


def _content(turn: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    return turn[0]["text"] if len(turn) == 1 and turn[0]["type"] == "text" else turn


def policy_text(trajectory: Trajectory) -> str:
    """All words of the policy, in order; images leave no trace."""
    return "".join(s.text for s in trajectory.segments if s.author is Author.POLICY and s.image is None)


def policy_ids(trajectory: Trajectory) -> list[int]:
    """All ids of the policy's segments, image codes and markers included."""
    return [int(id) for s in trajectory.segments if s.author is Author.POLICY for id in s.ids]


def policy_images(trajectory: Trajectory) -> list[tuple[int, np.ndarray]]:
    """The images that the policy drew, each with the index of its segment."""
    return [
        (index, s.image)
        for index, s in enumerate(trajectory.segments)
        if s.author is Author.POLICY and s.image is not None
    ]


def groups_of(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """The rows of each group, groups in the order of their first members: for rewards that see the whole group."""
    rows: dict[int, list[int]] = {}
    for row, trajectory in enumerate(trajectories):
        rows.setdefault(trajectory.group, []).append(row)
    return list(rows.values())


def columns_of(records: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Every key of any record that a reward can ask for, in the order in which they first come."""
    return tuple(dict.fromkeys(key for record in records for key in record if key not in RESERVED))


def columns(trajectories: Sequence[Trajectory], known: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Every key of any record, and every known one, as a list: None where a record lacks it."""
    keys = dict.fromkeys([*known, *columns_of(t.record for t in trajectories)])
    return {key: [t.record.get(key) for t in trajectories] for key in keys}


def lightened(trajectory: Trajectory) -> Trajectory:
    """The trajectory as it travels to a reward's process: without the latents of denoising steps, which can weigh
    a thousand times the images and which no reward reads."""
    if all(s.flow is None and s.latent is None for s in trajectory.segments):
        return trajectory
    return replace(trajectory, segments=[_lightened(s) for s in trajectory.segments])


def _lightened(segment: Segment) -> Segment:
    decisions = None if segment.flow is not None else segment.decisions
    return replace(segment, flow=None, latent=None, decisions=decisions)


# ---- one call ---------------------------------------------------------------------------------------------------


def call(
    function: Reward,
    name: str,
    trajectories: Sequence[Trajectory],
    *,
    options: Mapping[str, Any],
    state: TrainerState,
    view: View,
    conversational: bool = True,
    context: RewardContext | None = None,
    judge: JudgeLike | None = None,
    known_columns: Sequence[str] = (),
) -> tuple[list[Value], Logs]:
    """Call a reward once. Returns one value a trajectory (NaN left as it is) and what it logged.

    Args:
        view: what `completions` holds; conversational: what the view `auto` goes by (resolved_view).
        setting: of one of the toolkit's own; None: it is somebody else's, called as TRL calls its own.
        judge: for somebody else's that has an argument of this name.
        known_columns: of the whole prompt set, so that a call whose own records all lack one still hands it over.

    Raises:
        RewardError: wrong number of values, values that are no numbers, a missing or unknown argument.
        Exception: whatever the function itself raises.
    """
    logs = Logs()
    arguments: dict[str, Any] = {
        "trajectories": list(trajectories),
        "log_metric": logs.log_metric,
        "log_extra": logs.log_extra,
    }
    if context is not None:  # one of ours: it reads the trajectories, so no image is converted for it
        arguments["context"] = context
    else:
        view = resolved_view(function, view, conversational)
        arguments |= {
            "prompts": [
                t.prompt if view == "strings" else [{"role": "user", "content": t.prompt}] for t in trajectories
            ],
            "completions": [completion(t, view) for t in trajectories],
            "completion_ids": [policy_ids(t) for t in trajectories],
            "trainer_state": state,
            **columns(trajectories, known_columns),
        }
        if asks_judge(function) and "judge" not in options:
            if judge is None:
                raise RewardError(NO_JUDGE.format(name=name))
            arguments["judge"] = judge
    result = function(**_accepted(function, name, arguments, options))
    if inspect.isawaitable(result):
        result = asyncio.run(_awaited(result))
    return _checked(result, name, trajectories), logs


async def _awaited(result: Any) -> Any:
    return await result


def resolved_view(function: Reward, view: View, conversational: bool = True) -> View:
    """What stands for `auto`, the same for a whole run.

    TRL's own functions read `completion[0]["content"]` as a string: text. One that declares `completions: list[str]`
    is given strings. All others are given what TRL gives: message lists where prompts are conversations, as they must
    be in TRL where images are about (interleaved), and strings where they are not.
    """
    if view != "auto":
        return view
    module = getattr(inspect.unwrap(function), "__module__", None) or type(function).__module__ or ""
    if module.split(".")[0] == "trl":
        return "text"
    return "interleaved" if conversational and not _declares_strings(function) else "strings"


def _declares_strings(function: Reward) -> bool:
    """Whether its argument `completions` is annotated as a list of strings."""
    try:
        hint = get_type_hints(function if inspect.isroutine(function) else type(function).__call__).get("completions")
    except (TypeError, NameError, AttributeError):  # annotated with a name that only a type checker knows
        return False
    return get_args(hint)[:1] == (str,)


def check_options(function: Reward, name: str, options: Mapping[str, Any], own: bool = False) -> None:
    """Raises RewardError for an option that the function has no argument for. One of ours takes **columns, which
    would swallow a misspelt option, so its options must be named ones; a user's **kwargs may want anything."""
    named, open_ended = _signature(function)
    for key in options:
        if key in GIVEN:
            raise RewardError(f"rewards.parts.{name}.options: '{key}' is what the toolkit calls a reward with")
        if key not in named and (own or not open_ended):
            raise RewardError(
                f"rewards.parts.{name}.options: '{key}' is no argument of the function; "
                f"{nearest(key, [p for p in named if p not in RESERVED])}"
            )


def check_columns(function: Reward, name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises RewardError where somebody's function has an argument without a default that is neither of the contract's,
    nor an option, nor a column of any record: a run would stop at its first call."""
    given = dict.fromkeys([*ARGUMENTS, *options, *known])
    missing = [
        p for p, parameter in _signature(function)[0].items() if p not in given and parameter.default is parameter.empty
    ]
    if missing:
        raise _no_column(name, missing[0], [*ARGUMENTS, *known])


def _no_column(name: str, asked: str, known: Iterable[str]) -> RewardError:
    return RewardError(
        f"reward '{name}' asks for '{asked}', which is no column of the records; {nearest(asked, known)}"
    )


def _signature(function: Reward) -> tuple[dict[str, inspect.Parameter], bool]:
    """Named parameters, and whether it takes any others by keyword."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return {}, True
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def asks_judge(function: Reward) -> bool:
    """Whether a user's function has an argument `judge` that must be given."""
    parameter = _signature(function)[0].get("judge")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _accepted(function: Reward, name: str, arguments: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the signature takes: all of them with **kwargs, else the named ones."""
    named, open_ended = _signature(function)
    given = {**arguments, **options}
    missing = [p for p in named if p not in given and named[p].default is inspect.Parameter.empty]
    if missing:
        raise _no_column(name, missing[0], arguments)
    return given if open_ended else {key: value for key, value in given.items() if key in named}


def _checked(result: Any, name: str, trajectories: Sequence[Trajectory]) -> list[Value]:
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise RewardError(
            f"reward '{name}' returned {type(result).__name__}; it must return a list with one value a completion"
        )
    values = list(result)
    if len(values) != len(trajectories):
        raise RewardError(
            f"reward '{name}' returned {len(values)} values for {len(trajectories)} completions; it must "
            f"return one a completion (None where it does not apply)"
        )
    return [_row(value, name, trajectory) for value, trajectory in zip(values, trajectories, strict=True)]


def _row(value: Any, name: str, trajectory: Trajectory) -> Value:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _number(value, name)
    credited: dict[int, float] = {}
    for segment, credit in value.items():
        if (
            isinstance(segment, bool)
            or not isinstance(segment, int | np.integer)
            or not 0 <= segment < len(trajectory.segments)
        ):
            raise RewardError(
                f"reward '{name}' credits segment {segment!r} of trajectory {trajectory.key}, which has "
                f"segments 0 to {len(trajectory.segments) - 1}"
            )
        if credit is not None:
            credited[int(segment)] = _number(credit, name)
    return credited or None


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, str | bytes | bytearray) or (isinstance(value, np.ndarray) and value.dtype.kind in "SU"):
            raise TypeError  # float() reads "0.5", and "nan", "1_0" and " 7" too
        number = float(value)
    except OverflowError:  # of a whole number beyond every float
        raise RewardError(
            f"reward '{name}' returned a number beyond every float ({type(value).__name__}) for a completion; {_BOUND}"
        ) from None
    except (TypeError, ValueError, RuntimeError):  # the last is a tensor's, of several numbers
        shown = repr(value)
        raise RewardError(
            f"reward '{name}' returned {shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + '...'} for a "
            "completion; a value is a number, None, or {segment: number}"
        ) from None
    if too_large(number):
        raise RewardError(f"reward '{name}' returned {number:.3g} for a completion; {_BOUND}")
    return number


def is_broken(value: Value) -> bool:
    """Whether a row holds NaN or infinity: a fault of the function, unlike None."""
    numbers = value.values() if isinstance(value, dict) else () if value is None else (value,)
    return any(not math.isfinite(number) for number in numbers)
