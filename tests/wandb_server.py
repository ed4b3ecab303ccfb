"""As much of a W&B server as `wandb.init` and `wandb sync` ask for, on loopback: runs, and the lines of their history.

A history arrives as lines and the number of the first of them; what stood from there on is replaced, as W&B does. Files
and artifacts are refused, which W&B's client passes over.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class WandbServer:
    """The runs by id: each a list of the lines of its history, parsed."""

    url: str = ""
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, str | None] = field(default_factory=dict)

    def query(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        if name == "Viewer":
            who = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
            return {"data": {"viewer": who}}
        if name == "RunResumeStatus":
            run = variables["name"]
            model = {"id": "p", "name": "underdrawing", "entity": {"id": "e", "name": "me"}, "bucket": None}
            if run in self.runs:
                lines = self.runs[run]
                model["bucket"] = {
                    "name": run,
                    "historyLineCount": len(lines),
                    "eventsLineCount": 0,
                    "logLineCount": 0,
                    "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]),
                    "summaryMetrics": json.dumps(lines[-1] if lines else {}),
                    "displayName": None,
                    "id": f"id-{run}",
                    "config": "{}",
                    "eventsTail": "[]",
                    "tags": [],
                    "wandbConfig": '{"t": {}}',
                }
            return {"data": {"model": model}}
        if name == "UpsertBucket":
            run = variables["name"]
            inserted = run not in self.runs
            self.runs.setdefault(run, [])
            self.notes.setdefault(run, variables.get("notes"))
            project = {"id": "p", "name": "underdrawing", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": f"id-{run}", "name": run, "displayName": run, "description": None, "config": None}
            bucket |= {"sweepName": None, "historyLineCount": len(self.runs[run]), "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": inserted}}}
        return {"errors": [{"message": f"no {name} here"}]}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        history = files.get("wandb-history.jsonl")
        if history:
            self.runs[run][history["offset"] :] = [json.loads(line) for line in history["content"]]


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server while within."""
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def reply(self, answer: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.reply({}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                name = asked.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
                self.reply(server.query(name, asked.get("variables") or {}))
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
                self.reply({"limits": {}})
            else:
                self.reply({}, 404)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
