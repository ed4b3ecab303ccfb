"""The judge's client: questions in, verdicts out; any OpenAI-compatible endpoint, asked from any thread.

At most `concurrency` requests are in flight. What may pass (a timeout, a dropped connection, 429, 5xx, a garbled reply)
is tried again after a wait that doubles; a Retry-After is honoured, and holds all requests. Whatever ends without a
verdict is None and counted by its cause. verdicts.py has the words and reads the replies, cache.py keeps them, wire.py
sends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rewards.judge import start, verdicts
from rewards.judge.base import CAUSES, TRIED_AGAIN, AnswerCheck, Comparison, Question, Reply
from rewards.judge.cache import ReplyCache, request_key
from rewards.judge.config import JudgeConfig
from rewards.judge.wire import Failed, Wire, body_of, short
from runtime.errors import UserError, nearest

logger = logging.getLogger(__name__)
T = TypeVar("T")
Reader = Callable[[Reply], T | None]  # None: no verdict in it


class JudgeDown(UserError):
    """The endpoint cannot be reached, or refuses the key or the model, when the run starts."""


class JudgeClient:
    """A judge behind an endpoint; rewards.judge.base.JudgeLike. Opens nothing until it is first asked.

    Safe to share between threads. It pickles as its configuration: a copy in another process has its own connections,
    counts and bound on concurrency, and shares the cache's folder.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Raises UserError where the cache's folder cannot be written."""
        self.config = config
        self.cache = ReplyCache(config.cache_dir) if config.cache_dir is not None else None
        self._counts: Counter[str] = Counter()
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._wire: Wire | None = None

    def __reduce__(self) -> tuple[type[JudgeClient], tuple[JudgeConfig]]:
        return JudgeClient, (self.config,)

    # ---- what rewards ask ---------------------------------------------------------------------------------------

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One reply a question, in order. A failed one has `text` None, its `cause` and the sentence in `error`."""
        return [reply for reply, _ in self._asked(questions, [lambda reply: True] * len(questions))]

    def agrees(self, checks: Sequence[AnswerCheck]) -> list[bool | None]:
        """Whether each answer says the same as its reference. None: not judged."""
        return self._verdicts(
            [verdicts.agreement(check) for check in checks], lambda reply: verdicts.read_yes_no(reply.text or "")
        )

    def yes_probability(self, questions: Sequence[Question]) -> list[float | None]:
        """P(yes) / (P(yes) + P(no)) at the first token of the reply, from its log-probs (verdicts.share). A score of
        this kind is VQAScore's (arXiv:2404.01291, section 3). None: not judged, log-probs missing included."""
        return self._verdicts(questions, lambda reply: verdicts.share(reply.first, "yes", "no"), logprobs=True)

    def rubric(
        self, questions: Sequence[Question], criteria: Sequence[str], top: int = 2
    ) -> list[dict[str, int] | None]:
        """A whole number from 0 to `top` for each criterion, all or none. The instruction to score is added to the
        question. `wiscore` makes WISE's score of them."""
        return self._verdicts(
            [verdicts.with_rubric(q, criteria, top) for q in questions],
            lambda reply: verdicts.read_rubric(reply.text or "", criteria, top),
        )

    def checklist(
        self, questions: Sequence[Question], items: Sequence[Sequence[str]]
    ) -> list[list[bool | None] | None]:
        """For each question, each of its statements: True, False, or None where the judge cannot decide it. None in
        place of the list: not judged."""
        asked = [verdicts.with_checklist(q, statements) for q, statements in zip(questions, items, strict=True)]

        def reader(count: int) -> Reader[list[bool | None]]:
            return lambda reply: verdicts.read_checklist(reply.text or "", count)

        return [verdict for _, verdict in self._asked(asked, [reader(len(statements)) for statements in items])]

    def compare(self, comparisons: Sequence[Comparison], by_logprobs: bool = False) -> list[float | None]:
        """How far the first candidate is preferred to the second: 1, 0, or between. Each pair is shown in both orders
        and the mean taken, so a judge that always names the one in front gives 0.5 (position bias:
        arXiv:2306.05685, section 3.3). None unless both orders were judged.

        by_logprobs: each order gives P(A) / (P(A) + P(B)) in place of 1, 0, or 0.5 for a tie.
        """

        def preference(reply: Reply) -> float | None:
            if by_logprobs:
                return verdicts.share(reply.first, "a", "b")
            choice = verdicts.read_choice(reply.text or "")
            return None if choice is None else {"A": 1.0, "B": 0.0, "T": 0.5}[choice]

        asked = [verdicts.pairwise(pair, swapped) for pair in comparisons for swapped in (False, True)]
        shown = self._verdicts(asked, preference, logprobs=by_logprobs)
        return [
            None if there is None or back is None else (there + 1 - back) / 2
            for there, back in zip(shown[::2], shown[1::2], strict=True)
        ]

    # ---- start, end, counts -------------------------------------------------------------------------------------

    def check(self, needs: Collection[str] = ()) -> None:
        """Ask the endpoint for its models, then questions with the parameters of the run's.

        Args:
            needs: images, logprobs: what the run's questions ask for, beside config.check_with.

        Raises:
            JudgeDown: it cannot be reached, refuses the key, does not know the model, or does not answer a question;
                the sentence says what of it is refused, and which key changes that.
        """
        where = f"rewards.judge: the endpoint {self.config.base_url}"
        try:
            wire = self._connected()
            known = wire.run(wire.models())
            if known and self.config.model not in known:
                raise JudgeDown(f"{where} has no model '{self.config.model}'; {nearest(self.config.model, known)}")
            for body in start.bodies(self.config, {*needs, *self.config.check_with}):
                self._check_question(wire, body, where)
        except Failed as failure:
            if failure.cause in ("timeout", "connection"):
                raise JudgeDown(
                    f"{where} cannot be reached ({failure.message}). Start it, correct base_url, or set "
                    f"check_at_start: false"
                ) from None
            key = self.config.api_key_env
            hint = ""
            if failure.status in (401, 403):
                hint = (
                    f". The key is read from the environment variable {key}, which is "
                    f"{'set' if os.environ.get(key) else 'not set'}"
                )
            if failure.cause == "cut":
                hint = ". If it reasons before it answers, set rewards.judge.reasoning_tokens to what that may take"
            raise JudgeDown(f"{where} does not answer: {failure.message}{hint}") from None

    def _check_question(self, wire: Wire, body: Mapping[str, Any], where: str) -> None:
        """Raises JudgeDown where a part of it is refused, Failed where it fails as a whole."""
        try:
            wire.run(start.ask(wire.complete, body, self._wait))
        except Failed as failure:
            refused = failure.cause in ("refused", "server", "no_logprobs") and failure.status not in (401, 403)
            found = wire.run(start.refusals(wire.complete, self.config, body)) if refused else []
            if not found:
                raise
            raise JudgeDown(f"{where} refuses {'; '.join(found)}") from None

    def counts(self) -> dict[str, int]:
        """Since the client was made: questions `asked`, of which `cached` and `unjudged`; `retried` attempts; and
        `unjudged/<cause>`."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """End the connections and the thread. Idempotent; a closed client may be asked again."""
        with self._lock:
            wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- one batch ----------------------------------------------------------------------------------------------

    def _verdicts(self, questions: Sequence[Question], read: Reader[T], logprobs: bool = False) -> list[T | None]:
        return [verdict for _, verdict in self._asked(questions, [read] * len(questions), logprobs)]

    def _asked(
        self, questions: Sequence[Question], readers: Sequence[Reader[T]], logprobs: bool = False
    ) -> list[tuple[Reply, T | None]]:
        """Reply and verdict of each question. Equal requests of a batch are one, but where they are meant as samples:
        at a temperature above 0, without a cache."""
        if not questions:
            return []
        bodies = [body_of(question, self.config, logprobs) for question in questions]
        keys = [request_key(body) for body in bodies]
        names = keys
        if self.cache is None:
            names = [
                key if body.get("temperature") == 0 else f"{key} {index}"
                for index, (key, body) in enumerate(zip(keys, bodies, strict=True))
            ]
        distinct = dict(zip(names, zip(keys, bodies, readers, strict=True), strict=True))
        wire = self._connected()
        answered = dict(zip(distinct, wire.run(self._all(wire, list(distinct.values()))), strict=True))
        results = [answered[name] for name in names]
        self._count(results)
        return results

    async def _all(
        self, wire: Wire, requests: Sequence[tuple[str, dict[str, Any], Reader[T]]]
    ) -> list[tuple[Reply, T | None]]:
        return list(await asyncio.gather(*(self._one(wire, *request) for request in requests)))

    async def _one(self, wire: Wire, key: str, body: dict[str, Any], read: Reader[T]) -> tuple[Reply, T | None]:
        """From the cache, else from the endpoint in at most 1 + retries attempts."""
        kept = self.cache.get(key) if self.cache is not None else None
        if kept is not None and (verdict := read(kept)) is not None:
            return kept, verdict
        started, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                reply, cut = await wire.complete(body)
                break
            except Failed as failure:
                wait = self._wait(failure, attempt)
                if wait is None:
                    failed = Reply(
                        None, failure.cause, failure.message, attempts=attempt, seconds=time.monotonic() - started
                    )
                    return failed, None
                await asyncio.sleep(wait)
        reply = replace(reply, attempts=attempt, seconds=time.monotonic() - started)
        verdict = read(reply)
        if verdict is not None:
            if self.cache is not None:
                self.cache.put(key, reply)
            return reply, verdict
        cause = "cut" if cut else "unparsed"
        return replace(reply, text=None, cause=cause, error=f"{CAUSES[cause]}: {short(reply.text or '')}"), None

    def _wait(self, failure: Failed, attempt: int) -> float | None:
        """Seconds before the next attempt; None: there is none."""
        config = self.config
        if attempt > config.retries or failure.cause not in TRIED_AGAIN:
            return None
        if failure.wait_s is not None and failure.wait_s > config.retry_after_max_s:
            failure.message += f"; it asks to wait {failure.wait_s:g} s, more than retry_after_max_s"
            return None
        backoff = min(config.backoff_s * 2 ** (attempt - 1), config.backoff_max_s) * random.uniform(0.5, 1.5)
        return backoff if failure.wait_s is None else failure.wait_s + random.uniform(0, config.backoff_s)

    def _connected(self) -> Wire:
        with self._lock:
            if self._wire is None or self._wire.process != os.getpid():
                self._wire = Wire(self.config)
            return self._wire

    def _count(self, results: Sequence[tuple[Reply, Any]]) -> None:
        news: list[Reply] = []
        seen: set[int] = set()
        with self._lock:
            for reply, _ in results:
                self._counts["asked"] += 1
                self._counts["cached"] += reply.cached
                if reply.cause is not None:
                    self._counts["unjudged"] += 1
                    self._counts[f"unjudged/{reply.cause}"] += 1
                    if reply.cause not in self._told:
                        self._told.add(reply.cause)
                        news.append(reply)
                if id(reply) not in seen:
                    seen.add(id(reply))
                    self._counts["retried"] += max(reply.attempts - 1, 0)
        for reply in news:
            logger.warning(
                "the judge left a question unjudged after %d attempt(s): %s (further ones of this kind are "
                "only counted)",
                reply.attempts,
                reply.error,
            )


def wiscore(scores: Mapping[str, int] | None) -> float | None:
    """WISE's score of a rubric with consistency, realism and aesthetic_quality, in [0, 1] (arXiv:2503.07265)."""
    if scores is None:
        return None
    return (0.7 * scores["consistency"] + 0.2 * scores["realism"] + 0.1 * scores["aesthetic_quality"]) / 2
