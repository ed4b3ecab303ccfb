"""What is asked of a judge before a run starts: the run's own kinds of question, and, where one is refused, which part
of it the endpoint does not take and which key of rewards.judge changes that.

An endpoint that is up and lists its model may still refuse every question: reasoning models take max_completion_tokens
in place of max_tokens and no temperature but 1; others know no system role, see no images, or give no log-probs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from rewards.judge.base import AnswerCheck, Question
from rewards.judge.config import JudgeConfig
from rewards.judge.verdicts import agreement
from rewards.judge.wire import Failed, body_of

Need = Literal["images", "logprobs"]
Wait = Callable[[Failed, int], float | None]  # a failure and its attempt -> seconds before the next; None: give up
Complete = Callable[[Mapping[str, Any]], Awaitable[Any]]  # Wire.complete

_SHOWN = np.full((64, 64, 3), 255, np.uint8)  # an image of this many px is large enough for every vision model
_OTHER = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_SAY = "Say yes."


def bodies(config: JudgeConfig, needs: Collection[str]) -> Iterator[dict[str, Any]]:
    """The requests of the start: a comparison of answers, a question of the full length, and one for log-probs where
    they are needed; with an image where images are."""
    images = (_SHOWN,) if "images" in needs else ()
    yield body_of(agreement(AnswerCheck("Is snow white?", "yes", "yes", images)), config)
    yield body_of(Question.of(_SAY, images), config)
    if "logprobs" in needs:
        yield body_of(Question.of(_SAY, images), config, logprobs=True)


async def ask(complete: Complete, body: Mapping[str, Any], wait: Wait) -> None:
    """One request, tried again as in the run. Raises Failed."""
    attempt = 0
    while True:
        attempt += 1
        try:
            await complete(body)
            return
        except Failed as failure:
            seconds = wait(failure, attempt)
            if seconds is None:
                raise
        await asyncio.sleep(seconds)


async def refusals(complete: Complete, config: JudgeConfig, body: Mapping[str, Any]) -> list[str]:
    """What of a refused request the endpoint does not take, each with what it says and what to change.

    Every part is tried alone on a bare question. Empty where the bare question fails as well, or nothing is refused
    alone: then the request's own failure says more.
    """
    bare = {"model": config.model, "messages": [{"role": "user", "content": _SAY}]}
    if await _refusal(complete, bare) is not None:
        return []
    found = []
    for part, what, mend in _parts(config, body):
        said = await _refusal(complete, {**bare, **part})
        if said is not None:
            if "logprobs" in part and await _refusal(complete, {**bare, **part, "top_logprobs": 1}) is None:
                what, mend = f"top_logprobs {config.top_logprobs}", "lower rewards.judge.top_logprobs"
            found.append(f"{what} ({said}): {mend}")
    return found


async def _refusal(complete: Complete, body: Mapping[str, Any]) -> str | None:
    """What the endpoint says against it; None where it takes it, whatever it then answers."""
    try:
        await complete(body)
    except Failed as failure:
        return failure.message if failure.cause in ("refused", "server", "no_logprobs") else None
    return None


def _parts(config: JudgeConfig, body: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each part of a request as keys of a body, its name, and the key that changes it."""
    for key in ("max_tokens", "max_completion_tokens"):
        if key in body and key not in config.extra_body:
            yield (
                {key: body[key]},
                f"{key} {body[key]}",
                f"set rewards.judge.token_limit: {_OTHER[key]} (null sends no limit), or lower "
                "rewards.judge.max_tokens",
            )
    if "temperature" in body and "temperature" not in config.extra_body:
        yield (
            {"temperature": body["temperature"]},
            f"temperature {body['temperature']:g}",
            "set rewards.judge.temperature: null, which sends none",
        )
    if body.get("logprobs"):
        yield (
            {key: body[key] for key in ("logprobs", "top_logprobs")},
            "log-probs",
            "name an endpoint that gives them in rewards.judge.base_url and model, or leave out the parts that read "
            "probabilities",
        )
    first, last = body["messages"][0], body["messages"][-1]
    if first is not last:
        yield (
            {"messages": [first, {"role": "user", "content": _SAY}]},
            f"the role {first['role']}",
            "set rewards.judge.system_role: user, which puts its words before the question (or developer)",
        )
    images = [part for part in last["content"] if part["type"] == "image_url"] if _is_list(last["content"]) else []
    if images:
        yield (
            {"messages": [{"role": "user", "content": [*images, {"type": "text", "text": _SAY}]}]},
            "images",
            "name a model that sees them in rewards.judge.model, or leave out the parts that show it some",
        )
    for key, value in config.extra_body.items():
        yield {key: value}, f"{key} {value!r}", f"take {key} out of rewards.judge.extra_body, or change it there"


def _is_list(content: Any) -> bool:
    return isinstance(content, list)
