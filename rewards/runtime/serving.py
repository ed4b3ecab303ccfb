"""What scores, wherever it runs: a part's function with everything that it stands on, or a detector.

A spec is plain data. `load` makes the callable of it, in the driver or in a worker (isolate.py, ray_worker.py), which
answers messages by `Server`.
"""

from __future__ import annotations

import pickle
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from formats.base import Format
from record.trajectory import Trajectory
from rewards.contract import (
    Logs,
    RewardContext,
    RewardError,
    TrainerState,
    Value,
    View,
    asks_judge,
    call,
    check_columns,
    check_options,
)
from rewards.detectors.base import CachedDetector, Detector
from rewards.detectors.registry import DetectorConfig, build_detector
from rewards.detectors.shapes import TaskDetector
from rewards.functions.geneval import check_record, classes_of
from rewards.judge.base import JudgeLike
from rewards.judge.config import JudgeConfig
from rewards.loader import load_object, load_reward, make
from rewards.registry import REWARDS
from runtime.errors import UserError
from runtime.options import checked

PATIENCE_S = 60.0  # for one call, where nothing else is said
RAISED = (Exception, SystemExit)  # what a reward may raise and its run goes on: sys.exit in it ends nobody else


class CallFailed(UserError):
    """One call that gave no values: the function raised, hung, or took its process with it. A part is called again;
    where nobody does that, its sentence is the user's."""

    def __init__(self, kind: str, message: str, stack: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.stack = kind, message, stack

    def __reduce__(self) -> tuple[Any, ...]:
        return CallFailed, (self.kind, self.message, self.stack)


class Spec(Protocol):
    """Something that can be sent to a worker and loaded there."""

    @property
    def name(self) -> str: ...

    def load(self) -> Callable[..., Any]: ...


# ---- the specs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardContextSpec:
    """What a RewardContext is made of. This travels; a context with loaded weights and open connections does not."""

    task: Any = None
    fmt: Format | None = None
    detector: DetectorConfig | str | Detector | None = None  # None: the task's own
    judge: JudgeConfig | None = None

    def build(self, detector: bool = True) -> RewardContext:
        """`detector`: whether to load it.

        Raises UserError where something cannot be had.
        """
        client = None
        if self.judge is not None:
            from rewards.judge.client import JudgeClient

            client = JudgeClient(self.judge)
        return RewardContext.of(self.task, self.fmt, self.detector_or_none() if detector else None, client)

    def detector_or_none(self) -> Detector | None:
        """Raises UserError for one that cannot be made, or is none."""
        if self.detector is None:
            return TaskDetector.of(self.task) if hasattr(self.task, "detect") else None
        if isinstance(self.detector, DetectorConfig):
            return build_detector(self.detector)
        if not isinstance(self.detector, str):
            return self.detector
        made = make(load_object(self.detector), self.detector)
        if not hasattr(made, "detect") or not hasattr(made, "classes"):
            raise UserError(
                f"rewards.detector: {self.detector} made {type(made).__name__}, which has no `detect` and `classes`"
            )
        return OwnDetector(made, self.detector)


class OwnDetector:
    """A detector of somebody's own: whatever its members raise, or give that is no detection, names it."""

    def __init__(self, detector: Any, spec: str) -> None:
        self._detector, self._spec = detector, spec

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_detector":  # while it is copied there is none yet
            raise AttributeError(name)
        member = getattr(self._detector, name)
        return partial(self._call, name, member) if name in _CALLED else member

    def _call(self, name: str, member: Callable[..., Any], *arguments: Any) -> Any:
        try:
            found = member(*arguments)
            if name.startswith("detect") and hasattr(found, "__iter__") and not isinstance(found, Mapping):
                found = list(found)
        except UserError:
            raise
        except RAISED as error:
            raise CallFailed(
                "raised", f"rewards.detector: {name} of {self._spec} raises {describe(error)[0]}", describe(error)[1]
            ) from error
        if name.startswith("detect") and (
            not isinstance(found, list)
            or len(found) != len(arguments[0])
            or not all(isinstance(objects, Mapping) for objects in found)
        ):
            raise CallFailed(
                "raised",
                f"rewards.detector: {name} of {self._spec} gives {str(found)[:80]}; it must "
                f"give a list with one {{class: [Detection, ...]}} for each image",
            )
        return found


_CALLED = ("detect", "detect_phrases", "name_colors", "require_colors")


def check_prompts(
    detector: CachedDetector, task: Any, by_geneval: bool = True, splits: Sequence[str] = ("train", "heldout")
) -> None:
    """Raises UserError for a prompt of the task's that asks for what the detector cannot see; `by_geneval`: or that
    GenEval's rule cannot judge."""
    for split in splits if task is not None else ():
        for record in task.prompts(split):
            where = f"prompt '{record.get('prompt', '')}' ({split})"
            if by_geneval:
                check_record(detector, record, where)
            else:
                detector.require(classes_of(record), where)


@dataclass(frozen=True)
class ComponentSpec:
    """A part's function as the recipe names it."""

    name: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    factory: bool = False
    view: View = "auto"
    context: RewardContextSpec | None = None  # of one of the toolkit's own; None: it is somebody else's
    judge: JudgeConfig | None = None  # for somebody else's that asks for it
    columns: tuple[str, ...] | None = None  # of the whole prompt set; None: not known
    conversational: bool = True  # what the view `auto` goes by

    @property
    def own(self) -> bool:
        """Whether it is one of the toolkit's."""
        return self.function in REWARDS

    @property
    def needs_detector(self) -> bool:
        return self.own and REWARDS[self.function].needs_detector

    def load(self, context: RewardContext | None = None) -> LoadedComponent:
        """Load the function, and check its options as far as that can be done without trajectories.

        Args:
            setting: of a part that shares it with others; None: one of its own is made.

        Raises RewardError for a function that cannot be loaded, and UserError for options that make no sense.
        """
        function = load_reward(self.function, self.options, self.factory)
        options = {} if self.factory else dict(self.options)
        check_options(function, self.name, options, own=self.context is not None)
        if self.own:
            options = checked(function, options, f"rewards.parts.{self.name}.options")
        if self.columns is not None:
            if self.own:
                REWARDS[self.function].check_columns(function, self.name, options, self.columns)
            else:
                check_columns(function, self.name, options, self.columns)
        if self.context is None:
            client = None
            if asks_judge(function) and "judge" not in options:
                client = RewardContextSpec(judge=self.judge).build(detector=False).judge_for(self.name)
            return LoadedComponent(self, function, options, None, False, client)
        shared = context is not None
        context = context or self.context.build(self.needs_detector)
        if self.needs_detector and not shared:
            check_prompts(context.detector_for(self.function), self.context.task, REWARDS[self.function].by_geneval)
        loaded = LoadedComponent(self, function, options, context, shared)
        loaded([], TrainerState())
        return loaded


@dataclass(frozen=True)
class LoadedComponent:
    """The callable of a part."""

    spec: ComponentSpec
    function: Callable[..., Any]
    options: Mapping[str, Any]
    context: RewardContext | None
    shared: bool
    judge: JudgeLike | None = None  # of somebody else's

    @property
    def patience_s(self) -> float:
        """Seconds that a call may take where the recipe says nothing: with a judge, twice its client's patience more,
        for the client knows itself what to do with an endpoint that hangs."""
        asks = self.judge is not None or (self.spec.own and REWARDS[self.spec.function].needs_judge)
        config = getattr(self.judge if self.context is None else self.context.judge, "config", None)
        return PATIENCE_S + (2 * config.patience_s if asks and isinstance(config, JudgeConfig) else 0.0)

    def __call__(self, trajectories: Sequence[Trajectory], state: TrainerState) -> tuple[list[Value], Logs]:
        """As rewards.base.call; the logs say what a call asked of the judge."""
        context = self.context
        if context is not None and context.detector is not None and not self.shared:
            context.detector.clear()
        client: Any = self.judge if context is None else context.judge
        before = client.counts() if hasattr(client, "counts") else {}
        values, logs = call(
            self.function,
            self.spec.name,
            trajectories,
            options=self.options,
            state=state,
            view=self.spec.view,
            conversational=self.spec.conversational,
            context=context,
            judge=self.judge,
            known_columns=self.spec.columns or (),
        )
        if hasattr(client, "counts"):
            logs.judge = {name: count - before.get(name, 0) for name, count in client.counts().items()}
        return values, logs


@dataclass(frozen=True)
class DetectorSpec:
    """A detector with workers of its own; detectors/served.py is the driver's side."""

    context: RewardContextSpec
    name: str = "detector"

    def load(self) -> LoadedDetector:
        detector = self.context.detector_or_none()
        if detector is None:
            raise RewardError("rewards.detector_workers: there is no detector to run; give rewards.detector")
        return LoadedDetector(detector)


@dataclass(frozen=True)
class LoadedDetector:
    """Calls a member of the detector by its name."""

    detector: Any

    def __call__(self, member: str, *arguments: Any) -> Any:
        if member == "about":
            return {
                "classes": tuple(self.detector.classes),
                "open_vocabulary": bool(getattr(self.detector, "open_vocabulary", False)),
                "sees_colors": getattr(self.detector, "sees_colors", True),
                "colors": tuple(getattr(self.detector, "colors", ())),
                "sizes": tuple(getattr(self.detector, "sizes", ())),
                "has": [
                    name for name in ("name_colors", "detect_phrases", "require_colors") if hasattr(self.detector, name)
                ],
            }
        return getattr(self.detector, member)(*arguments)


# ---- in a worker -------------------------------------------------------------------------------------------------


class Server:
    """Answers the messages ("load", search path, spec) and ("call", *arguments), whatever happens, with (kind, answer):
    "ready" (seconds that a call may take), "values", "refused" (the user can mend it: a sentence) or "raised" (one
    line, and the traceback)."""

    def __init__(self) -> None:
        self._loaded: Callable[..., Any] | None = None

    def answer(self, message: tuple[Any, ...]) -> tuple[str, Any]:
        verb, *content = message
        try:
            if verb == "load":
                path, spec = content
                sys.path += [position for position in path if position not in sys.path]
                self._loaded = pickle.loads(spec).load()
                return "ready", getattr(self._loaded, "patience_s", PATIENCE_S)
            assert self._loaded is not None, "called before it was loaded"
            return "values", self._loaded(*content)
        except CallFailed as failure:
            return "raised", (failure.message, failure.stack)
        except UserError as error:
            return "refused", str(error)
        except RAISED as error:
            return "raised", describe(error)


def loading(spec: Spec) -> tuple[Any, ...]:
    """The message that loads a spec. Raises RewardError where something in it cannot travel."""
    try:
        return "load", list(sys.path), pickle.dumps(spec)
    except Exception as error:
        raise RewardError(
            f"'{spec.name}' runs in a process of its own, and what it stands on cannot be sent there "
            f"({type(error).__name__}: {error}); the task, its format and its detector must pickle"
        ) from None


def read(answer: tuple[str, Any]) -> Any:
    """What a Server answered. Raises RewardError or CallFailed."""
    kind, content = answer
    if kind == "refused":
        raise RewardError(content)
    if kind == "raised":
        raise CallFailed("raised", *content)
    return content


def describe(error: BaseException) -> tuple[str, str]:
    """(one line with the place it was raised at, the whole traceback)."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    hint = ""
    if isinstance(error, TypeError) and "got 'list'" in str(error):
        hint = ". If it reads text alone, set completions: text for this part"
    elif isinstance(error, TypeError) and str(error).startswith("string indices must be integers"):
        hint = (
            ". Completions are strings here; if it reads messages, set completions: text or interleaved for this part"
        )
    return f"{type(error).__name__}: {error}{where}{hint}", "".join(traceback.format_exception(error))


# ---- the driver's side -------------------------------------------------------------------------------------------


@dataclass
class Worker(ABC):
    """A spec loaded somewhere else. Not started until `start` or the first call; usable again after any failure. One
    call at a time."""

    spec: Spec
    timeout_s: float | None = None  # of a call; None: what the loaded spec thinks right
    load_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # held while the worker is in use
        self._closed = False
        self._patience_s = 0.0  # until it is loaded

    def start(self) -> None:
        """Start the worker and load the spec in it.

        Raises:
            RewardError: it cannot be loaded, or there is too little for it.
            CallFailed: loading hung or crashed, or nothing was free for so long.
        """
        with self._lock:
            self._ensure()

    def __call__(self, *arguments: Any) -> Any:
        """Call what was loaded. Raises CallFailed, or RewardError where the user can mend it."""
        with self._lock:
            self._ensure()
            limit = self._patience_s if self.timeout_s is None else self.timeout_s
            return self._exchange(("call", *arguments), limit, "a call")

    def close(self) -> None:
        """End it for good. A call in another thread fails at once. Idempotent."""
        self._closed = True
        self._interrupt()
        with self._lock:
            self._drop()

    def _ensure(self) -> None:
        """A worker with the spec loaded."""
        if self._running():
            return
        self._drop()
        if self._closed:
            raise CallFailed("crash", "the judge was closed")
        message = loading(self.spec)
        try:
            self._launch()
            if self._closed:  # meanwhile
                raise CallFailed("crash", "the judge was closed")
            self._patience_s = self._exchange(message, self.load_timeout_s, "loading it")
        except (CallFailed, RewardError):
            self._drop()  # or the next call would find a worker that has nothing loaded
            raise

    def _interrupt(self) -> None:  # noqa: B027 - a Ray worker's call looks at `_closed` itself
        """End a call that another thread is in."""

    @abstractmethod
    def _running(self) -> bool: ...

    @abstractmethod
    def _launch(self) -> None:
        """Start a fresh worker with nothing loaded."""

    @abstractmethod
    def _drop(self) -> None:
        """End the worker, if there is one, and let go of all that belongs to it."""

    @abstractmethod
    def _exchange(self, message: tuple[Any, ...], timeout_s: float, what: str) -> Any:
        """Send a message; what the Server answered. Raises CallFailed once the time is up, or RewardError."""
