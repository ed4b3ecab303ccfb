"""A judge's endpoint on loopback: real sockets, and every way in which an endpoint fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server does with one request."""

    text: str | None = "yes"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of a completion
    logprobs: Any = None
    finish: str = "stop"
    stall_s: float = 0.0  # before the first byte
    drip_s: float = 0.0  # between bytes
    drop: bool = False  # close the connection without a word


def candidates(**logprobs: float) -> dict[str, Any]:
    """The log-probs of one position; keywords are tokens."""
    return spelled(list(logprobs.items()))


def spelled(pairs: list[tuple[str, float]], sampled: tuple[str, float] | None = None) -> dict[str, Any]:
    token, logprob = sampled or max(pairs, key=lambda pair: pair[1])
    return {
        "content": [
            {"token": token, "logprob": logprob, "top_logprobs": [{"token": t, "logprob": p} for t, p in pairs]}
        ]
    }


class JudgeServer:
    """Use as a context manager. `answer(body, number)` says what to do with the request of that number, from 0."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer | str], models: Any = ("judge",)) -> None:
        self.answer, self.models = answer, models
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = self._at_once = 0
        self._lock, self.released = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                listed = outer.models() if callable(outer.models) else outer.models
                if isinstance(listed, Answer):
                    return outer._send(self, listed)
                outer._send(self, Answer(body=json.dumps({"data": [{"id": name} for name in listed]}).encode()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                try:
                    said = outer.answer(body, number)
                    outer._send(self, said if isinstance(said, Answer) else Answer(said))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer._lock:
                        outer._at_once -= 1

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_: Any) -> None:
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        if answer.stall_s:
            self.released.wait(answer.stall_s)
        if answer.drop:
            handler.close_connection = True
            handler.connection.close()
            return
        body = answer.body
        if body is None:
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish,
                "logprobs": answer.logprobs,
            }
            body = json.dumps(
                {"choices": [choice]} if answer.status == 200 else {"error": {"message": "no room here"}}
            ).encode()
        handler.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if not answer.drip_s:
            handler.wfile.write(body)
            return
        for byte in body:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            if self.released.wait(answer.drip_s):
                return
