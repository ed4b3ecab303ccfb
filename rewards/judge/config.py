"""The section `rewards.judge` of a recipe: the endpoint that some rewards ask, and how patiently.

rewards:
  judge: {base_url: "http://localhost:8000/v1", model: Qwen/Qwen2.5-VL-72B-Instruct, cache_dir: runs/judge_cache}
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from runtime.paths import WritePath
from runtime.section import Retries, Seconds, Section


class JudgeConfig(Section):
    """An OpenAI-compatible endpoint that judges."""

    model_config = ConfigDict(protected_namespaces=())

    base_url: str = Field(description="Where the API is, with its version: http://localhost:8000/v1.")
    model: str = Field(description="The model's name, as the endpoint knows it.")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key; where it is not set, no key is sent."
    )
    timeout_s: Seconds = Field(60.0, gt=0, description="Seconds one attempt may take from first to last byte.")
    retries: Retries = Field(
        3,
        description="Further attempts after a timeout, a dropped connection, 429, 5xx or a "
        "reply that is no completion; then the question goes unjudged.",
    )
    backoff_s: Seconds = Field(
        0.5,
        ge=0,
        description="Seconds before the first retry, doubled at each further one, "
        "with jitter of half to one and a half; Retry-After is honoured.",
    )
    backoff_max_s: Seconds = Field(
        30.0, ge=0, description="The longest wait before a retry that the endpoint did not ask for."
    )
    retry_after_max_s: Seconds = Field(
        120.0,
        ge=0,
        description="The longest Retry-After that is waited for; after a longer one the question goes unjudged.",
    )
    concurrency: int = Field(16, ge=1, description="Requests in flight at once.")
    cache_dir: WritePath | None = Field(
        None, description="Folder that keeps replies, by the whole request; None: none are kept. Failures never are."
    )
    max_tokens: int = Field(512, ge=1, description="Tokens of a reply.")
    token_limit: Literal["max_tokens", "max_completion_tokens"] | None = Field(
        "max_tokens",
        description="The name under which a reply's limit is sent: max_completion_tokens for OpenAI's reasoning "
        "models. None: no limit is sent.",
    )
    reasoning_tokens: int = Field(
        0, ge=0, description="Tokens added to every limit, for a model that reasons before it answers."
    )
    temperature: float | None = Field(
        0.0,
        ge=0,
        description="The judge's sampling temperature. None: none is sent, also where a reward names one, for "
        "endpoints that refuse it.",
    )
    system_role: Literal["system", "developer", "user"] = Field(
        "system",
        description="The role of instructions, such as `agrees` gives. user: they stand before the question, for "
        "endpoints that refuse the others.",
    )
    top_logprobs: int = Field(
        20, ge=1, le=20, description="Candidates asked for where a probability is read from log-probs."
    )
    check_at_start: bool = Field(
        True,
        description="Ask the endpoint for its models before the run, and questions as the run will, so that one that "
        "is down, lacks the model or refuses the questions stops it at once.",
    )
    check_with: list[Literal["images", "logprobs"]] = Field(
        default_factory=list,
        description="What the questions at the start hold beside words, for rewards of your own. Of the toolkit's own "
        "parts it is known.",
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="Further keys of every request, as chat_template_kwargs: {enable_thinking: false} for vLLM.",
    )

    @property
    def patience_s(self) -> float:
        """The longest that one question may take: every attempt runs out of time, every wait is at its longest."""
        waits = [1.5 * min(self.backoff_s * 2**attempt, self.backoff_max_s) for attempt in range(self.retries)]
        return self.timeout_s * (self.retries + 1) + sum(waits)

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            whole = parts.scheme in ("http", "https") and parts.hostname and value.isascii() and value.isprintable()
            whole = whole and (parts.port is None or parts.port > 0) and " " not in value
        except ValueError:  # brackets without an address in them, a port that is no number
            whole = False
        if not whole:
            raise ValueError(f"'{value}' is no address; write it as http://host:port/v1")
        return value.rstrip("/")
