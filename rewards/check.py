"""`check_reward`: what a recipe will ask of somebody's reward, tried on a handful of thoughts, and said in plain words.

The function is called on batches of several lengths and in several orders, on thoughts with and without words, images
and observations, on records that lack a column, twice over, and in a process of its own as in a run. Nothing has to be
registered or configured:

    from rewards.check import check_reward
    print(check_reward("brightness.py:brightness"))
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from record.trajectory import Author, Segment, Trajectory
from rewards.contract import (
    RESERVED,
    Logs,
    RewardError,
    TrainerState,
    Value,
    View,
    asks_judge,
    call,
    check_options,
    is_broken,
    policy_images,
    resolved_view,
)
from rewards.judge.base import JudgeLike, StandIn
from rewards.judge.client import JudgeClient
from rewards.judge.config import JudgeConfig
from rewards.loader import is_own, load_reward
from rewards.runtime.isolate import ProcessWorker
from rewards.runtime.serving import RAISED, CallFailed, ComponentSpec, describe
from rewards.samples import sample_thoughts
from runtime.errors import UserError

Scope = Literal["row", "group", "batch"]

STEP_ROWS = 128  # thoughts of a step, for saying how long one will take
SLOW_S = 30.0  # seconds a step's thoughts may take before it is worth a remark


@dataclass(frozen=True)
class RewardCheck:
    """What was found. `problems` would break a run or falsify its rewards; `notes` are for the author to weigh."""

    name: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    scope: Scope | None  # the narrowest that its values allow; None: it could not be called
    values: tuple[Value, ...] = ()  # over `thoughts`, as one batch
    trajectories: tuple[str, ...] = ()  # what each one is
    seconds: float = 0.0  # of a thought

    @property
    def ok(self) -> bool:
        return not self.problems

    def sentences(self) -> list[str]:
        """Problems, then notes."""
        return [*self.problems, *self.notes]

    def __str__(self) -> str:
        head = f"{self.name}: " + ("keeps the contract" if self.ok else f"{len(self.problems)} problem(s)")
        return "\n".join([head, *(f"  problem: {p}" for p in self.problems), *(f"  note: {n}" for n in self.notes)])


def check_reward(
    function: str | Callable[..., Any],
    *,
    options: Mapping[str, Any] | None = None,
    factory: bool = False,
    completions: View = "auto",
    columns: Mapping[str, Any] | None = None,
    trajectories: Sequence[Trajectory] | None = None,
    scope: Scope | None = None,
    judge: JudgeConfig | None = None,
    timeout_s: float = 20.0,
) -> RewardCheck:
    """Hold a reward to the contract (rewards/contract.py).

    Args:
        function: as a recipe names it ("file.py:function", "package.module.function"), or the function itself.
        options, factory, completions: as in a recipe's part; auto is strings where no thought holds an image.
        columns: further columns of every record, for a reward that asks for them.
        trajectories: in place of the built-in `sample_thoughts`; at least two groups of two.
        scope: what the recipe will say of it; None: it is only found out.
        judge: the endpoint, for a reward with an argument `judge`; None: a stand-in with made-up verdicts answers it.
        timeout_s: seconds that one call may take.

    Raises:
        UserError: the file does not exist or does not import, there is no such function, or an option it does not take.
    """
    name, spec = _named(function)
    own = load_reward(function, options, factory) if isinstance(function, str) else function
    check_options(own, name, {} if factory else options or {})
    trajectories = list(trajectories) if trajectories is not None else sample_thoughts(columns)
    kinds = [str(t.info.get("kind", f"trajectory {t.key}")) for t in trajectories]
    client: JudgeLike | None = None
    if asks_judge(own):
        client = JudgeClient(judge) if judge is not None else StandIn()
    checker = _Checker(
        name, own, {} if factory else dict(options or {}), completions, trajectories, kinds, scope, client
    )
    if isinstance(client, StandIn):
        checker.notes.append(
            "its judge is a stand-in here, with made-up verdicts, so it was not tried in a process of "
            "its own; give the check an endpoint"
        )
    elif spec is None:
        checker.notes.append(
            "it is defined where no recipe can name it (in a function, a notebook, or a lambda), so "
            "it was not tried in a process of its own; put it into a file"
        )
    else:
        worker = ProcessWorker(
            ComponentSpec(
                name, spec, dict(options or {}), factory, completions, None, judge, None, checker.conversational
            ),
            timeout_s,
        )
        try:
            checker.isolated(worker)
        finally:
            worker.close()
    try:
        checker.run()
    finally:
        if isinstance(client, JudgeClient):
            client.close()
    return checker.report()


# ---- the checks -------------------------------------------------------------------------------------------------


class _Checker:
    """One run through the checks: each adds its sentences, and those that need the last one's success ask for it."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        options: dict[str, Any],
        view: View,
        trajectories: list[Trajectory],
        kinds: list[str],
        wanted: Scope | None,
        judge: JudgeLike | None = None,
    ) -> None:
        self.name, self.function, self.options, self.view = name, function, options, view
        self.trajectories, self.kinds, self.wanted, self.judge = trajectories, kinds, wanted, judge
        self.conversational = any(policy_images(trajectory) for trajectory in trajectories)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.scope: Scope | None = None
        self.values: list[Value] | None = None
        self.apart: list[Value] | None = None  # from the process of its own
        self.apart_raised = ""
        self.seconds = 0.0
        self.stop = False  # calling it here as well would only hang or crash this process

    def report(self) -> RewardCheck:
        return RewardCheck(
            self.name,
            tuple(dict.fromkeys(self.problems)),
            tuple(dict.fromkeys(self.notes)),
            self.scope,
            tuple(self.values or ()),
            tuple(self.kinds),
            self.seconds,
        )

    def isolated(self, worker: ProcessWorker) -> None:
        """One call in a process of its own, as a run has it."""
        try:
            self.apart, _ = worker(self.trajectories, TrainerState())
        except CallFailed as failure:
            if failure.kind == "timeout":
                self.problems.append(
                    f"a call with {len(self.trajectories)} thoughts took longer than {worker.timeout_s:g} "
                    f"s{_stood(failure.stack)}; give what it waits for a time limit of its own"
                )
            elif failure.kind == "crash":
                self.problems.append(f"it ended its process ({failure.message}); raise an error, or return None")
            self.stop, self.apart_raised = failure.kind != "raised", failure.message
        except UserError as error:
            self.apart_raised = str(error)

    def run(self) -> None:
        if self.stop or not self._whole_batch():
            return
        assert self.values is not None
        for look in (
            self._values,
            self._blindness,
            self._lengths,
            self._determinism,
            self._scope,
            self._missing_columns,
            self._observations,
            self._input_untouched,
        ):
            try:
                look()
            except RAISED as error:
                self.problems.append(f"called again with the same thoughts, it raises: {describe(error)[0]}")
                return
        if self.apart is not None and not _equal(self.values, self.apart) and not self._random:
            self.problems.append(
                "in a process of its own it gives other values than here: it depends on something "
                "that is set up outside of it (a global, the working folder, an environment variable)"
            )
        if self.apart_raised:
            self.problems.append(f"in a process of its own, where a run calls it, it raises: {self.apart_raised}")

    def _call(self, trajectories: Sequence[Trajectory]) -> tuple[list[Value], Logs]:
        """On a copy: what one call does to its thoughts is no concern of the next."""
        return self._call_with(self.function, copy.deepcopy(list(trajectories)))

    def _call_with(self, function: Callable[..., Any], trajectories: Sequence[Trajectory]) -> tuple[list[Value], Logs]:
        return call(
            function,
            self.name,
            trajectories,
            options=self.options,
            state=TrainerState(),
            view=self.view,
            conversational=self.conversational,
            judge=self.judge,
        )

    def _whole_batch(self) -> bool:
        started = time.perf_counter()
        try:
            self.values, logs = self._call(self.trajectories)
        except RewardError as error:
            self.problems.append(self._contract(str(error)))
            return False
        except RAISED:
            self._who_raises()
            return False
        self.seconds = (time.perf_counter() - started) / len(self.trajectories)
        if self.seconds * STEP_ROWS > SLOW_S:
            self.notes.append(
                f"it takes {self.seconds:.2g} s a thought, so {self.seconds * STEP_ROWS:.0f} s for a "
                f"step of {STEP_ROWS}; score the batch at once, or raise the part's timeout_s"
            )
        for column, rows in logs.columns.items():
            if len(rows) != len(self.trajectories):
                self.problems.append(f"it logs {len(rows)} values under '{column}' with log_extra; give one a thought")
        return True

    def _contract(self, sentence: str) -> str:
        if "which is no column of the records" in sentence:
            column = sentence.split("'")[3]
            return (
                f"it asks for '{column}', which is no column of the thoughts it is tried on; if your records have "
                f"it, give the check an example: columns={{'{column}': ...}}"
            )
        return sentence.replace(f"reward '{self.name}'", "it")

    def _who_raises(self) -> None:
        """Each thought by itself: the kinds that it cannot bear."""
        alone: dict[str, list[str]] = {}
        for trajectory, kind in zip(self.trajectories, self.kinds, strict=True):
            try:
                self._call([trajectory])
            except RAISED as error:
                alone.setdefault(describe(error)[0], []).append(kind)
        if not alone:
            try:
                self._call(self.trajectories)
            except RAISED as error:
                self.problems.append(
                    f"it raises for several thoughts at once, and for none of them alone: {describe(error)[0]}"
                )
        for error_line, kinds in alone.items():
            who = "every thought" if len(kinds) == len(self.kinds) else " and for ".join(kinds)
            hint = "" if len(kinds) == len(self.kinds) else "; return None for what it does not apply to"
            self.problems.append(f"it raises for {who}: {error_line}{hint}")

    def _values(self) -> None:
        assert self.values is not None
        for value, kind in zip(self.values, self.kinds, strict=True):
            if is_broken(value):
                self.problems.append(f"it gives {value} for {kind}; where there is nothing to judge, return None")
        judged = [value for value in self.values if value is not None]
        if not judged:
            self.notes.append(
                "it gives None for every thought that it was tried on, so most of the checks say "
                "nothing; give the check trajectories that it judges"
            )
        elif len(judged) > 1 and all(value == judged[0] for value in judged):
            self.notes.append(
                f"it gives {_shown(judged[0])} for every thought that it judges; a group like that trains nothing"
                f"{self._of_messages()}"
            )

    def _of_messages(self) -> str:
        """What to set where it may have been written for completions that are strings."""
        try:
            reads = "completions" in inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            return ""
        view = resolved_view(self.function, self.view, self.conversational)
        if not reads or view == "strings":
            return ""
        return (
            ". `completions` are message lists here, one a thought; a function that was written for strings, as TRL "
            "gives them for prompts that are strings, wants completions: strings"
        )

    def _blindness(self) -> None:
        """Values must move when all that the policy wrote is other words and other pixels."""
        assert self.values is not None
        if isinstance(self.judge, StandIn):  # which sees no more of an image than its size
            return
        judged = [value for value in self.values if value is not None]
        if len(judged) < 2 or all(value == judged[0] for value in judged):  # told by _values
            return
        for longer in (False, True):
            try:
                values, _ = self._call([_rewritten(trajectory, longer) for trajectory in self.trajectories])
            except RAISED:
                return
            if not _equal(values, self.values):
                return
        self.notes.append(
            "its values stay the same when every word and every image that the policy wrote is another: it pays for "
            f"the record, or for how many segments there are{self._of_messages()}"
        )

    def _lengths(self) -> None:
        for count in (1, 3, len(self.trajectories) - 1):
            try:
                self._call(self.trajectories[:count])
            except RewardError as error:
                self.problems.append(f"with {count} thought(s) in a call: {self._contract(str(error))}")
            except RAISED as error:
                self.problems.append(
                    f"with {count} thought(s) in a call it raises, with {len(self.trajectories)} it does "
                    f"not: {describe(error)[0]}"
                )

    def _determinism(self) -> None:
        again, _ = self._call(self.trajectories)
        self._random = not _equal(self.values, again)
        if self._random:
            assert self.values is not None
            first = next(i for i, (a, b) in enumerate(zip(self.values, again, strict=True)) if not _equal([a], [b]))
            self.problems.append(
                f"called twice with the same thoughts it gives different values ({self.kinds[first]}: "
                f"{_shown(self.values[first])}, then {_shown(again[first])}): members of a group are "
                f"compared by it, so luck would be trained. Draw from a generator that the thought "
                f"seeds"
            )

    def _scope(self) -> None:
        """Calls with each thought alone, each group alone, and in another order."""
        if self._random:
            return
        assert self.values is not None
        groups: dict[int, list[int]] = {}
        for index, trajectory in enumerate(self.trajectories):
            groups.setdefault(trajectory.group, []).append(index)
        rows = self._in_calls([[index] for index in range(len(self.trajectories))])
        by_group = self._in_calls(list(groups.values()))
        turned = self._in_calls([[i for members in reversed(list(groups.values())) for i in members]])
        self.scope = "row" if _equal(rows, self.values) else "group" if _equal(by_group, self.values) else "batch"
        if turned is not None and not _equal(turned, self.values):
            self.problems.append(
                "its values depend on the order of the groups in a call; values belong to thoughts, wherever they stand"
            )
            return
        order: list[Scope] = ["row", "group", "batch"]
        if self.wanted is not None and order.index(self.scope) > order.index(self.wanted):
            self.problems.append(
                f"with scope: {self.wanted} each value may depend on {_SCOPES[self.wanted]} alone, "
                f"but it gives other values when it is called with less; say scope: {self.scope}, or "
                f"write it so that it does not look further"
            )
        elif self.wanted is None and self.scope != "batch":
            self.notes.append(
                f"its values depend on {_SCOPES[self.scope]} alone; say scope: {self.scope} in the "
                f"recipe, and it scores thoughts while others are still being sampled"
            )

    def _in_calls(self, calls: list[list[int]]) -> list[Value] | None:
        values: list[Value] = [None] * len(self.trajectories)
        try:
            for indices in calls:
                got, _ = self._call([self.trajectories[index] for index in indices])
                for index, value in zip(indices, got, strict=True):
                    values[index] = value
        except RAISED:  # told by _lengths
            return None
        return values

    def _missing_columns(self) -> None:
        """A record that lacks a column has None there, as the rows of a mixed data set do."""
        try:
            asked = set(inspect.signature(self.function).parameters) - {*RESERVED, "judge", *self.options}
        except (TypeError, ValueError):
            return
        assert self.values is not None
        for column in sorted(asked & {key for trajectory in self.trajectories for key in trajectory.record}):
            lacking = [replace(t, record={**t.record, column: None}) for t in self.trajectories]
            try:
                values, _ = self._call(lacking)
            except RAISED as error:
                self.problems.append(
                    f"it raises where a record lacks '{column}': {describe(error)[0]}. The column is "
                    f"None there; return None for such a thought"
                )
                continue
            if any(is_broken(value) for value in values):
                self.problems.append(f"it gives NaN or infinity where a record lacks '{column}'; return None there")
            paid = [v for v in values if v is not None]
            if paid and any(v is not None for v in self.values) and all(v == 0 for v in paid):
                self.notes.append(
                    f"it pays 0 where a record lacks '{column}'; None would leave such a thought out of "
                    f"the baseline, 0 counts it as bad"
                )

    def _observations(self) -> None:
        """Values must not move when only what the environment said does."""
        if self._random:
            return
        assert self.values is not None
        changed = [
            replace(
                t,
                segments=[
                    replace(s, text="something else 17", image=None) if s.author is Author.ENVIRONMENT else s
                    for s in t.segments
                ],
            )
            for t in self.trajectories
        ]
        if all(
            a is b
            for t, u in zip(self.trajectories, changed, strict=True)
            for a, b in zip(t.segments, u.segments, strict=True)
        ):
            return
        try:
            values, _ = self._call(changed)
        except RAISED as error:
            self.notes.append(f"it reads observations, and raises when they change: {describe(error)[0]}")
            return
        if not _equal(values, self.values):
            self.notes.append(
                "its value changes with what the environment said. If that is not meant (whether a call "
                "worked is), read rewards.base.policy_text and policy_images, which leave observations "
                "out: else the policy is paid for words that a tool wrote"
            )

    def _input_untouched(self) -> None:
        given = copy.deepcopy(self.trajectories)
        self._call_with(self.function, given)
        for trajectory, original, kind in zip(given, self.trajectories, self.kinds, strict=True):
            same = (
                trajectory.record == original.record
                and len(trajectory.segments) == len(original.segments)
                and all(
                    a.text == b.text and np.array_equal(a.ids, b.ids) and _same_image(a.image, b.image)
                    for a, b in zip(trajectory.segments, original.segments, strict=True)
                )
            )
            if not same:
                self.problems.append(
                    f"it changes the thoughts that it is given ({kind}); other rewards read the same "
                    f"ones, so work on a copy"
                )
                return


_STDLIB = str(Path(inspect.__file__).parent)
_SCOPES: dict[Scope, str] = {"row": "its own trajectory", "group": "its group", "batch": "the whole call"}


def _named(function: str | Callable[..., Any]) -> tuple[str, str | None]:
    """A name for the sentences, and the spec under which a recipe could have it; None where it could not."""
    if isinstance(function, str):
        if is_own(function):
            raise UserError(
                f"'{function}' is one of the toolkit's own, which its tests check; name a function of "
                f"yours as 'file.py:function'"
            )
        return function, function
    name = getattr(function, "__qualname__", type(function).__name__)
    module = getattr(function, "__module__", None)
    file = inspect.getsourcefile(function) if inspect.isfunction(function) else None
    if not inspect.isfunction(function) or "<" in name or "." in name or module is None:
        return name, None
    if module == "__main__":
        return name, f"{file}:{name}" if file and file.endswith(".py") and Path(file).is_file() else None
    return name, f"{module}:{name}"


def _rewritten(trajectory: Trajectory, longer: bool) -> Trajectory:
    """With a letter in place of the policy's words, or with them twice and backwards; ids likewise; images inverted."""

    def other(segment: Segment) -> Segment:
        if segment.author is not Author.POLICY:
            return segment
        if segment.image is not None:
            return replace(segment, image=255 - segment.image)
        text = 2 * segment.text[::-1] if longer else "x" * bool(segment.text)
        ids = np.tile(segment.ids, 2) if longer else segment.ids[:1]
        return replace(segment, text=text, ids=ids, decisions=None, flow=None, latent=None)

    return replace(trajectory, segments=[other(segment) for segment in trajectory.segments])


def _equal(one: Sequence[Value] | None, other: Sequence[Value] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    return all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float | int) and isinstance(b, float | int):  # batched arithmetic may round another way
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(a) and math.isnan(b)) or a == b
    return a is None and b is None


def _same_image(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _shown(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _stood(stack: str) -> str:
    """Where a hung call stood, from faulthandler's dump: the innermost line outside of the libraries, in the thread
    that called the function."""
    for thread in stack.split("\n\n"):
        lines = [line.strip() for line in thread.splitlines()]
        frames = [line.removeprefix("File ") for line in lines if line.startswith("File ")]
        calls = [
            n
            for n, frame in enumerate(frames)
            if frame.endswith("in call") and Path(call.__code__.co_filename).name in frame
        ]
        if calls:
            below = frames[: calls[0]]
            own = [frame for frame in below if not any(f"{place}/" in frame for place in ("site-packages", _STDLIB))]
            return f" (it stood at {(own or below or frames)[0]})"
    return ""
