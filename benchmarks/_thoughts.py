"""Thoughts of the shapes world as rollouts record them, for benchmarks of scoring: a demonstration's ids, every one of
them a decision of probability 1/V. Nothing is sampled, so they cost nothing to make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from formats.registry import get_format
from formats.render import render
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from policy.context import resolve
from policy.registry import load_policy
from record.trajectory import DecisionKind, Decisions, Modality, SamplingParams, Segment, Trajectory
from tasks.registry import get_task

CANDIDATES = 4  # of each fork
KINDS = ("plain", "guided", "forks")


def small_policy(width: int, layers: int) -> Any:
    """A Chameleon with the words of the shapes world and fresh weights."""
    tiny = TinySection(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=3 * width,
        max_position_embeddings=1024,
    )
    return load_policy(ChameleonPolicyConfig(family="chameleon", tiny=tiny), get_task("shapes").words)


def thoughts(policy: Any, kind: str, count: int) -> list[Trajectory]:
    """plain: each sees all before it. guided: images under the four conditions of Thinking with Generated Images.
    forks: candidates of the last image and what follows, after a prefix of their parent's that is not trained again."""
    vocabulary = policy.vocabulary
    guided = {"guidance": "full", "scales": {"negative": 0.5}, "negative_prompt": "red circle"}
    fmt: Any = get_format("strokes", max_images=4, **(guided if kind == "guided" else {}))
    blank = np.full(vocabulary.codes_per_image, vocabulary.code_ids[0])
    made: list[Trajectory] = []
    for member, demonstration in enumerate(get_task("shapes").demonstrations("strokes", count, 0)):
        images = sum(part.image is not None for part in demonstration.parts)
        thought = render(fmt, demonstration.prompt, {}, demonstration.parts, vocabulary, [blank] * images)
        if kind == "guided":
            thought.segments[1:1] = fmt.beside_prompt(vocabulary)
        thought.member = member
        thought.segments = [_sampled(policy, fmt, thought, number) for number in range(len(thought.segments))]
        made += _candidates(thought) if kind == "forks" else [thought]
    return made[:count]


def _sampled(policy: Any, fmt: Any, thought: Trajectory, number: int) -> Segment:
    segment = thought.segments[number]
    if not segment.trained:
        return segment
    image = segment.modality is Modality.IMAGE_TOKENS
    # Markers are forced.
    position_N = np.arange(1, len(segment.ids) - 1) if image else np.arange(len(segment.ids))
    count = len(position_N)
    kind = DecisionKind.CODE if image else DecisionKind.WORD
    decisions = Decisions(
        np.full(count, kind, np.int8),
        position_N.astype(np.int32),
        np.full(count, -np.log(policy.vocabulary.size), np.float32),
        SamplingParams(np.ones(count, np.float32), np.full(count, -1, np.int32), (), fmt.guidance(thought, number)),
    )
    contexts = tuple(found.context for found in resolve(policy, thought, fmt.contexts(thought, number)))
    return replace(segment, decisions=decisions, contexts=contexts)


def _candidates(thought: Trajectory) -> list[Trajectory]:
    forked = max(i for i, s in enumerate(thought.segments) if s.modality is Modality.IMAGE_TOKENS)
    prefix = [replace(segment, trained=False) for segment in thought.segments[:forked]]
    return [
        replace(thought, segments=[*prefix, *thought.segments[forked:]], parent=(thought.member, forked))
        for _ in range(CANDIDATES)
    ]
