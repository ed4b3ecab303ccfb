"""Replies of a judge on disk, one small JSON file each, named by the hash of the whole request.

Many processes may share a folder: an entry is written beside its place and moved there, so a reader sees a whole one or
none. An entry that is damaged counts as absent and is written anew. Only replies that could be used are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.judge.base import Reply
from runtime.errors import UserError

logger = logging.getLogger(__name__)


def request_key(body: Mapping[str, Any]) -> str:
    """SHA-256 of the request, model and images included; the same for any order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """Raises UserError where the folder cannot be made or written."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(f"rewards.judge.cache_dir {self.folder}: cannot write there ({error.strerror})") from None

    def get(self, key: str) -> Reply | None:
        try:
            entry = json.loads(self._path(key).read_bytes())
            text, first = entry["text"], [(str(token), float(logprob)) for token, logprob in entry["first"]]
            if entry["sum"] != _sum(key, text, first):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Reply(text, first=tuple(first), attempts=0, cached=True)

    def put(self, key: str, reply: Reply) -> None:
        assert reply.text is not None, "a failure is never kept"
        path = self._path(key)
        first = [list(candidate) for candidate in reply.first]
        entry = {"text": reply.text, "first": first, "sum": _sum(key, reply.text, reply.first)}
        try:
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(entry, file)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:  # a full disk costs the cache, not the run
            if not self._warned:
                logger.warning(
                    "rewards.judge.cache_dir %s: replies are no longer kept (%s)", self.folder, error.strerror
                )
            self._warned = True

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _sum(key: str, text: Any, first: Any) -> str:
    content = json.dumps([key, text, [list(candidate) for candidate in first]])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
