"""The wire to a judge: one HTTP request to an OpenAI-compatible endpoint, and what its reply says.

Everything runs on one event loop in a thread of its own, so that any thread can ask, also one with a running loop. One
time limit covers an attempt from first to last byte, whether the endpoint stalls or drips. client.py tries again.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import ipaddress
import json
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from rewards.judge.base import ImageLike, Question, Reply
from rewards.judge.config import JudgeConfig

T = TypeVar("T")


class Failed(Exception):
    """One attempt that gave nothing."""

    def __init__(self, cause: str, message: str, status: int | None = None, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.cause, self.message, self.status = cause, message, status
        self.wait_s = wait_s  # what the endpoint asked for; None: nothing


class Wire:
    """Connections to one endpoint. Belongs to the process that made it: a fork has no thread of its parent's."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config, self.process = config, os.getpid()
        self._bound = asyncio.Semaphore(config.concurrency)
        self._not_before = 0.0  # monotonic: until then the endpoint asked to be left alone
        self._http: Any = None  # httpx2.AsyncClient
        self._loop = asyncio.new_event_loop()
        self._entry = threading.Lock()  # what is sent to the loop before it closes is cancelled, nothing is sent after
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """On the wire's loop, from any other thread. Ctrl-C cancels the requests, and so does closing.

        Raises CancelledError once it is closed.
        """
        with self._entry:
            if self._closed:
                work.close()
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        if self.process != os.getpid():
            return
        with self._entry:
            self._closed = True
            ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()

    async def complete(self, body: Mapping[str, Any]) -> tuple[Reply, bool]:
        """One request. Returns the reply, and whether it was cut at max_tokens. Raises Failed."""
        async with self._bound:
            while (hold := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(hold)
            status, headers, content = await self._send("POST", "/chat/completions", body)
            asked = _retry_after(headers) if status in (429, 503) else None
            if asked is not None:  # of everybody, not of this request alone
                until = time.monotonic() + min(asked, self.config.retry_after_max_s)
                self._not_before = max(self._not_before, until)
        if status != 200:
            cause = "busy" if status == 429 else "server" if status >= 500 or status == 408 else "refused"
            raise Failed(cause, f"status {status}: {_said(content)}", status, asked)
        return read_completion(content, bool(body.get("logprobs")))

    async def models(self) -> list[str]:
        """Names of the models; empty where the endpoint lists none. Raises Failed."""
        status, _, content = await self._send("GET", "/models")
        if status == 200:
            try:
                return [str(model["id"]) for model in json.loads(content)["data"]]
            except (ValueError, KeyError, TypeError):
                pass
        elif status in (401, 403) or status >= 500:
            raise Failed("refused", f"status {status}: {_said(content)}", status)
        return []

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        import httpx2

        limit = self.config.timeout_s
        content = None if body is None else json.dumps(body).encode()  # ASCII: a lone surrogate passes as well
        if self._http is None:
            key = os.environ.get(self.config.api_key_env)
            self._http = httpx2.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=None,  # one limit, over all of it
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self.config.concurrency),
                trust_env=not _is_loopback(self.config.base_url),
            )  # a proxy has no way to this machine's own ports
        try:
            async with asyncio.timeout(limit):
                response = await self._http.request(
                    method, self.config.base_url + path, content=content, headers={"Content-Type": "application/json"}
                )
            return response.status_code, response.headers, response.content
        except TimeoutError:
            raise Failed("timeout", f"no whole reply within {limit:g} s") from None
        except httpx2.DecodingError as error:
            raise Failed("malformed", f"{type(error).__name__}: {error}") from None
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            said = str(error) or "the connection was dropped"
            raise Failed("connection", f"{type(error).__name__}: {said}") from None


def body_of(question: Question, config: JudgeConfig, logprobs: bool = False) -> dict[str, Any]:
    """The JSON of a request, images as data URLs."""
    messages = [{**message, "content": _content(message["content"])} for message in question.messages]
    body: dict[str, Any] = {"model": config.model, "messages": _addressed(messages, config.system_role)}
    if config.token_limit is not None:
        limit = question.max_tokens or (4 if logprobs else config.max_tokens)
        body[config.token_limit] = limit + config.reasoning_tokens
    if config.temperature is not None:
        body["temperature"] = config.temperature if question.temperature is None else question.temperature
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": config.top_logprobs}
    return {**body, **config.extra_body}


def _addressed(messages: list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    """With system messages under another role; as `user` they stand before the words of the message that follows."""
    if role != "user":
        return [{**message, "role": role} if message["role"] == "system" else message for message in messages]
    others: list[dict[str, Any]] = []
    before: list[str] = []
    for message in messages:
        if message["role"] == "system":
            before.append(message["content"])
            continue
        if before:
            words, content = "\n\n".join(before), message["content"]
            joined = (
                f"{words}\n\n{content}" if isinstance(content, str) else [{"type": "text", "text": words}, *content]
            )
            message, before = {**message, "content": joined}, []
        others.append(message)
    return others


def _content(content: Any) -> Any:
    """Images as data URLs; everything else as it stands."""
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": data_url(part["image"])}} if part["type"] == "image" else part
        for part in content
    ]


def data_url(image: ImageLike) -> str:
    """PNG, so that the judge sees the very pixels."""
    pil = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    pil.convert("RGB").save(buffer, format="PNG", compress_level=3)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_completion(content: bytes, logprobs: bool) -> tuple[Reply, bool]:
    """Raises Failed for a body that is no chat completion, one without text, or without the log-probs asked for."""
    try:
        choice = json.loads(content)["choices"][0]
        text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        if not isinstance(text, str | None):
            raise TypeError
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise Failed("malformed", f"no chat completion: {short(content.decode(errors='replace'))}") from None
    first: tuple[tuple[str, float], ...] = ()
    if logprobs:
        try:
            first = _first_word(choice["logprobs"]["content"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Failed(
                "no_logprobs",
                "the reply has no log-probs; serve the judge with them, or use a reward that reads its words",
            ) from None
    if not text or not text.strip():
        if first:  # a bare special token, but with candidates
            return Reply(text or "", first=first), cut
        raise Failed("cut" if cut else "empty", "the completion has no text" + (" before max_tokens" if cut else ""))
    return Reply(text, first=first), cut


def _first_word(tokens: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, float], ...]:
    """Candidates at the first position that is not blank, the sampled one once. Candidates may share their spelling:
    different tokens do in many vocabularies, and each counts."""
    place = next((t for t in tokens if str(t["token"]).strip()), tokens[0] if tokens else None)
    if place is None:
        raise ValueError
    candidates = [(str(c["token"]), float(c["logprob"])) for c in place.get("top_logprobs") or ()]
    sampled = (str(place["token"]), float(place["logprob"]))
    if not any(token == sampled[0] for token, _ in candidates):
        candidates.append(sampled)
    return tuple(candidates)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, given as such or as a date (RFC 9110, section 10.2.3); None where it is absent or neither."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value)) if value and value.lower() not in ("nan", "inf", "infinity") else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _said(content: bytes) -> str:
    """The endpoint's own sentence, from the usual place or as it stands."""
    text = content.decode(errors="replace")
    try:
        error = json.loads(text)
        error = error.get("error", error)
        text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except (ValueError, AttributeError):
        pass
    return short(text)


def short(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return (text[:most] + " ..." if len(text) > most else text) or "(nothing)"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
