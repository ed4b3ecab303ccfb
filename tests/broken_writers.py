"""Writers with one fault each, such as runs elsewhere have had, over the fakes: what the conformance gate is for."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

from formats.segments import media_segment, text_segment
from record.trajectory import Author, Modality, Segment
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.native import NativeWriter, native
from rollout.requests import key_of
from rollout.weights.receive import WeightReceiver
from tests.fakes import FakeFormat, FakePolicy
from tests.writer_runs import ROLLOUT, TrainedFake, fake_engine


class ShownFormat(FakeFormat):
    """Prompts may show an image, before the words."""

    def prompt(self, prompt, media, vocabulary):
        shown = [media_segment("shown", image, Author.USER) for image in media]
        return [*shown, text_segment("prompt", self.prompt_ids(prompt, vocabulary), prompt)]


def fake_format(view: str = "plain") -> FakeFormat:
    """Something is written after an image in every view: a window's trajectories begin with one."""
    return FakeFormat(view, max_images=2, begins_with_image=view == "window")


def engine_over(policy: FakePolicy, view: str = "plain", fmt: FakeFormat | None = None) -> Engine:
    return Engine(policy, fmt or fake_format(view), RolloutConfig(**{**ROLLOUT, "max_tokens": 24}))


class Deaf(NativeWriter):
    """New weights go into a copy that nobody samples with: an adapter that is bound to no module."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.receiver = WeightReceiver(copy.deepcopy(engine.policy.model), self.name)


def deaf(policy, fmt, rollout, words) -> Deaf:
    """For a recipe's rollout.writer."""
    return Deaf(native(policy, fmt, rollout, words).engine)


def deaf_fake() -> Deaf:
    """For an EngineSpec."""
    return Deaf(fake_engine())


class HalfDeaf(NativeWriter):
    """Half of the tensors are bound."""

    def take(self, manifest, tensors) -> None:
        with torch.no_grad():
            for number, (name, parameter) in enumerate(self.policy.model.named_parameters()):
                if number % 2:
                    parameter.copy_(tensors[name])
        self.version = manifest.version


class Blind(TrainedFake):
    """An image that is finished is never fed again: later turns see a blank in its place."""

    def _embed_piece(self, trajectory, piece):
        h = super()._embed_piece(trajectory, piece)
        image = trajectory.segments[piece.segment].modality is not Modality.TEXT
        return torch.zeros_like(h) if image and piece.keep is None else h


class Hot(NativeWriter):
    """It samples at another temperature than it says."""

    def stream(self, requests):
        for trajectory in super().stream(requests):
            for segment in trajectory.segments:
                if segment.decisions is not None:
                    segment.decisions.sampling.temperature_N[:] = 1.0
            yield trajectory


class FromElsewhere(NativeWriter):
    """It goes on from another prompt than the one that it was given a prefix of, and hands over what it made of it."""

    def stream(self, requests):
        asked = [replace(r, prefix=(other_word(r.prefix[0]), *r.prefix[1:])) if r.prefix else r for r in requests]
        yield from super().stream(asked)


class FromElsewhereInSecret(FromElsewhere):
    """Likewise, but what it records is the prefix that it was given."""

    def stream(self, requests):
        given = {request.key: request.prefix for request in requests}
        for trajectory in super().stream(requests):
            if trajectory.parent is not None:
                trajectory.segments[0] = given[key_of(trajectory)][0]
            yield trajectory


class TrainsPrefixes(NativeWriter):
    """What it has of a parent counts in the loss once more."""

    def stream(self, requests):
        for trajectory in super().stream(requests):
            for segment in trajectory.segments:
                segment.trained = segment.decisions is not None
            yield trajectory


class Lying(NativeWriter):
    """It says that it samples with the trainer's weights, and has a copy of them."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(copy_of(engine))

    def shares(self, policy) -> bool:
        return True


def copy_of(engine: Engine) -> Engine:
    return Engine(copy.deepcopy(engine.policy), engine.fmt, engine.config)


def other_word(prompt: Segment) -> Segment:
    """A prompt whose last word is the next one in the fakes' vocabulary."""
    ids = prompt.ids.copy()
    ids[-1] = 6 + (ids[-1] - 6 + 1) % 10
    return replace(prompt, ids=ids)


class Changed(NativeWriter):
    """Something happens to every trajectory on its way out."""

    def __init__(self, engine: Engine, change) -> None:
        super().__init__(engine)
        self.change = change

    def stream(self, requests):
        for trajectory in [copy.deepcopy(t) for t in super().stream(requests)]:  # members share the prompt's segments
            self.change(trajectory)
            yield trajectory


def without_pixels(trajectory) -> None:
    """Image tensors were dropped between the processes; placeholders went on."""
    for segment in trajectory.segments:
        if segment.author is Author.USER:
            segment.image = None


def expanded_twice(trajectory) -> None:
    """The placeholders of an image were expanded by the engine once more."""
    shown = trajectory.segments[0]
    shown.ids = np.concatenate([shown.ids[:1], shown.ids[1:-1], shown.ids[1:-1], shown.ids[-1:]])


def encoded_again(trajectory) -> None:
    """The prompt was decoded to text and encoded, without the marker that began it."""
    prompt = trajectory.segments[0]
    prompt.ids = prompt.ids[1:]


def flows(trajectory):
    return [segment.flow for segment in trajectory.segments if segment.flow is not None]


def cut_trace(trajectory) -> None:
    """One latent of the sampler's trace is missing: 14 where 15 were made."""
    for flow in flows(trajectory):
        flow.x_P = flow.x_P[:-1]


def other_trace(trajectory) -> None:
    """The engine's own capture took the place of the sampler's trace, as long as it."""
    for flow in flows(trajectory):
        flow.x_P = (flow.x_P * 0.9).astype(np.float32)


def other_times(trajectory) -> None:
    for flow in flows(trajectory):
        flow.time_M = flow.time_M[:-1]
