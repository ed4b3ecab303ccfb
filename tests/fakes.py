"""Small real policies and formats for tests: they keep every promise of policy/base.py and formats/base.py
with a few hundred weights, so the engine, the trainer and the workers can be proven before a family exists.

`FakePolicy` is a one-layer causal transformer with a key-value cache. With `flow=True` its images are latents,
denoised by rectified flow with Gaussian noise in the first half. `FakeFormat` comes in three views: "plain" sees all
that was written, "window" sees the prompt and the last image only, "flow" sees earlier images as latents.

Letters: R cache rows, L positions of the cache, T positions of a sequence, D width, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from formats.base import AllowedSet, Codes, ContextSpec, Latent, PieceSpec, Span, whole_history
from policy.base import Categorical, Extent, FlowStep, Pass, Scored, TokenStep, Velocity
from policy.scoring.flow_matching import FlowMatching
from policy.scoring.steps import recorded_steps, score_recorded
from record.trajectory import (
    Author,
    DecisionKind,
    Guidance,
    Modality,
    Piece,
    Segment,
    Trajectory,
    mask_of,
    ranges_of,
)
from runtime.errors import UserError

WORDS = ["a", "red", "blue", "dot", "big", "small", "left", "right", "fine", "wrong"]
LATENT_SHAPE = (2, 3)  # two tokens of three channels


class FakeVocabulary:
    """pad, bos, eos, BOI, EOI, a full stop, ten words, then the visual codes."""

    def __init__(self, codes: int = 8, codes_per_image: int = 4):
        self.pad, self.bos, self.eos, self.boi, self.eoi, self.stop = range(6)
        self.sep = None
        self.never = np.empty(0, np.int32)
        self.pieces = ["", "", "", "", "", "."] + [f" {word}" for word in WORDS]
        self.word_ids = list(range(6, len(self.pieces)))
        self.code_ids = np.arange(len(self.pieces), len(self.pieces) + codes, dtype=np.int32)
        self.size = len(self.pieces) + codes
        self.codes_per_image = codes_per_image  # 0: images are latents

    @property
    def imaging(self) -> Codes | Latent:
        if not self.codes_per_image:
            return Latent(self.boi, self.eoi)
        return Codes(self.code_ids, self.codes_per_image, self.boi, self.eoi)

    def encode(self, text: str) -> list[int]:
        unknown = [word for word in text.split() if f" {word}" not in self.pieces]
        if unknown:
            raise UserError(f"no word '{unknown[0]}'")
        return [self.pieces.index(f" {word}") for word in text.split()]

    def decode(self, ids) -> str:
        return "".join(self.piece(int(id)) for id in ids).strip()

    def piece(self, id: int) -> str:
        return self.pieces[id] if id < len(self.pieces) else ""


class FakeNet(nn.Module):
    def __init__(self, size: int, length: int, width: int = 16, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * scale / shape[-1] ** 0.5)

        self.word, self.place = weight(size, width, scale=4), weight(length, width, scale=4)
        self.query, self.key, self.value = (weight(width, width) for _ in range(3))
        self.mix, self.head = weight(width, width), weight(size, width, scale=2)
        self.see_latent, self.velocity = weight(width, LATENT_SHAPE[1], scale=2), weight(LATENT_SHAPE[1], width)
        self.clock = weight(width, 1)

    def attend(self, h: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """h [.., T, D] over keys and values [.., L, D] where seen [.., T, L]; rows that see nothing get zeros."""
        scores = (h @ self.query.T) @ keys.transpose(-1, -2) / h.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, -1e9).softmax(-1) * seen
        return torch.tanh((h + weights @ values) @ self.mix.T)


@dataclass
class FakeCache:
    keys: Tensor  # [R, L, D]
    values: Tensor
    used: list[int] = field(default_factory=list)  # entries of each row
    position: list[int] = field(default_factory=list)  # position id of each row's next token
    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # what the engine asked for, for tests

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def length(self) -> int:
        return self.keys.shape[1]


class FakePolicy:
    family = "fake"

    def __init__(
        self, vocabulary: FakeVocabulary | None = None, max_length: int = 96, flow: bool = False, seed: int = 0
    ):
        self.vocabulary = vocabulary or FakeVocabulary(codes_per_image=0 if flow else 4)
        self.max_length = max_length
        self.model = FakeNet(self.vocabulary.size, max_length, seed=seed)
        self.draws: list[int] = []  # how many images each call of `draw` got
        self.caches: list[FakeCache] = []
        self.latent_shape = LATENT_SHAPE if flow else ()

    # ---- what a segment takes ----

    @property
    def image_slots(self) -> int:
        return LATENT_SHAPE[0] if self.latent_shape else self.vocabulary.codes_per_image + 2

    def forms(self, segment: Segment) -> tuple[str, ...]:
        return ("latent",) if segment.modality is Modality.IMAGE_LATENT else ("ids",)

    def extent(self, segment: Segment, form: str, keep=None) -> Extent | None:
        if form == "latent":
            return None if segment.latent is None else Extent(*[len(segment.latent)] * 2)
        start, stop = keep or (0, len(segment.ids))
        return Extent(stop - start, stop - start) if form == "ids" else None

    def perceive(self, segments) -> None:
        for segment in segments:
            (codes,) = self.encode_images([segment.image])
            segment.ids = np.array([self.vocabulary.boi, *codes, self.vocabulary.eoi], np.int32)
            segment.modality = Modality.IMAGE_TOKENS

    # ---- sampling ----

    def allocate(self, rows: int, length: int) -> FakeCache:
        width = self.model.word.shape[1]
        cache = FakeCache(torch.zeros(rows, length, width), torch.zeros(rows, length, width), [0] * rows, [0] * rows)
        self.caches.append(cache)
        return cache

    def _embed_piece(self, trajectory: Trajectory, piece: Piece) -> Tensor:
        segment = trajectory.segments[piece.segment]
        if piece.form == "latent":
            h = torch.from_numpy(segment.latent) @ self.model.see_latent.T
        else:
            start, stop = piece.keep or (0, len(segment.ids))
            h = self.model.word[torch.from_numpy(segment.ids[start:stop].astype(np.int64))]
        return h + self.model.place[piece.start : piece.start + len(h)]

    def _write(self, cache: FakeCache, row: int, h: Tensor) -> Tensor:
        """Add entries to a row, one causal step each; logits after the last."""
        net, start = self.model, cache.used[row]
        stop = start + len(h)
        assert stop <= cache.length, "a row was given more than it can hold"
        cache.keys[row, start:stop], cache.values[row, start:stop] = h @ net.key.T, h @ net.value.T
        seen = torch.arange(stop)[None] <= torch.arange(start, stop)[:, None]
        out = net.attend(h, cache.keys[row, :stop], cache.values[row, :stop], seen)
        cache.used[row] = stop
        return out[-1] @ net.head.T

    def prefill(self, cache: FakeCache, row_B, contexts) -> Tensor:
        cache.calls.append(("prefill", tuple(row_B)))
        logits = torch.zeros(len(row_B), self.vocabulary.size)
        for b, (row, (trajectory, context)) in enumerate(zip(row_B, contexts, strict=True)):
            cache.used[row], cache.position[row] = 0, context.start
            for piece in context.pieces:
                logits[b] = self._write(cache, row, self._embed_piece(trajectory, piece))
        return logits

    def copy(self, cache: FakeCache, source: int, row_B) -> None:
        cache.calls.append(("copy", (source, *row_B)))
        for row in row_B:
            cache.keys[row], cache.values[row] = cache.keys[source], cache.values[source]
            cache.used[row], cache.position[row] = cache.used[source], cache.position[source]

    def step(self, cache: FakeCache, row_B, inputs):
        cache.calls.append((type(inputs).__name__, tuple(row_B)))
        net, rows = self.model, list(row_B)
        assert len(set(rows)) == len(rows), "a row was stepped twice"
        used = torch.tensor([cache.used[row] for row in rows])
        if isinstance(inputs, FlowStep):
            seen = (torch.arange(cache.length)[None] < used[:, None])[:, None].expand(-1, LATENT_SHAPE[0], -1)
            return self._flow(inputs.x_B, inputs.time_B, cache.keys[rows], cache.values[rows], seen)
        assert isinstance(inputs, TokenStep) and int(used.max()) < cache.length
        h = net.word[inputs.ids_B] + net.place[torch.tensor([cache.position[row] for row in rows])]
        cache.keys[rows, used], cache.values[rows, used] = h @ net.key.T, h @ net.value.T
        for row in rows:
            cache.used[row] += 1
            cache.position[row] += 1
        seen = (torch.arange(cache.length)[None] <= used[:, None])[:, None]
        out = net.attend(h[:, None], cache.keys[rows], cache.values[rows], seen)[:, 0]
        return Categorical(out @ net.head.T)

    def _flow(self, x: Tensor, time: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Velocity:
        net = self.model
        h = x @ net.see_latent.T + time[:, None, None] * net.clock[:, 0]
        return Velocity(net.attend(h, keys, values, seen) @ net.velocity.T)

    def append(self, cache: FakeCache, row_B, pieces) -> Tensor:
        cache.calls.append(("append", tuple(row_B)))
        logits = []
        for row, (trajectory, piece) in zip(row_B, pieces, strict=True):
            h = self._embed_piece(trajectory, piece)
            cache.position[row] = piece.start + len(h)
            logits.append(self._write(cache, row, h))
        return torch.stack(logits)

    # ---- images ----

    def encode_images(self, images):
        if self.latent_shape:  # what decode_images makes an image of
            return [np.arctanh(np.clip(image[0] / 127 - 1, -0.99, 0.99)).astype(np.float32) for image in images]
        codes = self.vocabulary.code_ids
        return [codes[np.clip(image[0, :, 0].astype(int) - 1, 0, len(codes) - 1)] for image in images]

    def decode_images(self, contents):
        """One pixel a code (its number + 1), or a latent's channels as colors."""
        self.draws.append(len(contents))
        images = []
        for content in contents:
            if content.dtype.kind == "f":
                images.append(((np.tanh(content)[None] + 1) * 127).astype(np.uint8))
            else:
                codes = (content - self.vocabulary.code_ids[0] + 1).astype(np.uint8)
                images.append(np.repeat(codes[None, :, None], 3, 2))
        return images

    # ---- training ----

    def guide(self, branches: dict[str, Tensor], guidance: Guidance, at=None) -> Tensor:
        assert guidance.kind == "cfg"
        return branches["uncond"] + guidance.scales["text"] * (branches["full"] - branches["uncond"])

    def passes(self, trajectories, budget=None) -> list[Pass]:
        return [part for trajectory in trajectories for part in divided(one_pass(trajectory), budget)]

    def score(
        self, passes, old: Scored | None = None, reference: Scored | None = None, entropy: bool = False
    ) -> Scored:
        columns: dict[str, list] = {name: [] for name in ("t", "s", "kind", "logprob", "behaviour", "entropy")}
        flows = []
        for t, one in enumerate(passes):
            trajectory = one.trajectory
            for s in one.segments:
                segment = trajectory.segments[s]
                chosen = np.flatnonzero(~segment.decisions.sampling.greedy_N)
                scored = [
                    self._score_one(trajectory, s, n)
                    for n in chosen
                    if segment.decisions.kind_N[n] != DecisionKind.FLOW
                ]
                if len(scored) < len(chosen):
                    at_F = torch.arange(len(scored), len(chosen)) + len(columns["t"])
                    logprob_F, entropy_F, flow = self._score_steps(trajectory, s, (t, s), at_F)
                    scored += zip(logprob_F, entropy_F.tolist(), strict=True)
                    flows.append(flow)
                for n, (logprob, uncertainty) in zip(chosen, scored, strict=True):
                    columns["t"].append(t)
                    columns["s"].append(s)
                    columns["kind"].append(int(segment.decisions.kind_N[n]))
                    columns["logprob"].append(logprob)
                    columns["behaviour"].append(float(segment.decisions.logprob_N[n]))
                    columns["entropy"].append(uncertainty)
        logprob_N = torch.stack(columns["logprob"]) if columns["logprob"] else torch.zeros(0)
        behaviour_N = torch.tensor(columns["behaviour"])
        before_N = behaviour_N if old is None else old.logprob_N.detach()
        divergence_N = None
        if reference is not None:
            ratio_N = reference.logprob_N.detach() - logprob_N
            divergence_N = ratio_N.exp() - 1 - ratio_N
        return Scored(
            torch.tensor(columns["t"]),
            torch.tensor(columns["s"]),
            torch.tensor(columns["kind"]),
            logprob_N,
            behaviour_N,
            logprob_N - before_N,
            divergence_N,
            torch.tensor(columns["entropy"]) if entropy else None,
            tuple(flows),
        )

    def _answers(self, trajectory: Trajectory, s: int, guided: bool, position: int, ask) -> Tensor:
        """What `ask` makes of each branch's context and of so many ids after it, combined; no cache and no sharing."""
        segment, answers = trajectory.segments[s], {}
        for context in segment.contexts if guided else segment.contexts[:1]:
            parts = [self._embed_piece(trajectory, piece) for piece in context.pieces]
            if position:
                parts.append(self._embed_piece(trajectory, Piece(s, "ids", context.start, (0, position))))
            answers[context.branch] = ask(torch.cat(parts) if parts else torch.zeros(0, self.model.word.shape[1]))
        return self.guide(answers, segment.decisions.sampling.guidance) if guided else answers["full"]

    def _score_one(self, trajectory: Trajectory, s: int, n: int) -> tuple[Tensor, float]:
        """One word or code, from its recorded context alone."""
        net, segment = self.model, trajectory.segments[s]
        decisions, sampling = segment.decisions, segment.decisions.sampling
        position = int(decisions.position_N[n])
        guided = sampling.guidance is not None and decisions.kind_N[n] != DecisionKind.WORD

        def ask(h: Tensor) -> Tensor:
            seen = torch.ones(1, len(h), dtype=torch.bool)
            return net.attend(h[-1:], h @ net.key.T, h @ net.value.T, seen)[0] @ net.head.T

        logits = self._answers(trajectory, s, guided, position, ask) / float(sampling.temperature_N[n])
        if sampling.allowed_N[n] >= 0:
            allowed = mask_of(sampling.sets[sampling.allowed_N[n]], self.vocabulary.size)
            logits = logits.masked_fill(~torch.from_numpy(allowed), -torch.inf)
        distribution = torch.distributions.Categorical(logits=logits)
        return distribution.log_prob(torch.tensor(int(segment.ids[position]))), float(distribution.entropy().detach())

    def _score_steps(self, trajectory: Trajectory, s: int, place, at_F: Tensor):
        """The denoising steps of one image."""
        net, segment = self.model, trajectory.segments[s]
        x_F, time_F = recorded_steps(segment, net.word.device)

        def ask(h: Tensor) -> Tensor:
            keys, values = (h @ weight.T for weight in (net.key, net.value))
            seen = torch.ones(len(x_F), LATENT_SHAPE[0], len(h), dtype=torch.bool)
            return self._flow(
                x_F, time_F, keys.expand(len(x_F), -1, -1), values.expand(len(x_F), -1, -1), seen
            ).velocity_B

        guided = segment.decisions.sampling.guidance is not None
        return score_recorded(segment, self._answers(trajectory, s, guided, 0, ask), place, at_F)

    def extra_losses(self, asked):
        learns = self.latent_shape and asked.flow.weight
        return [FlowMatching(asked.flow, self.velocities, torch.device("cpu"))] if learns else []

    def velocities(self, images, x_B: Tensor, time_B: Tensor) -> Tensor:
        """What `step` would answer to a FlowStep after each image's recorded context, with gradient."""
        answers = []
        for (trajectory, number), x, time in zip(images, x_B, time_B, strict=True):
            segment = trajectory.segments[number]
            (context,) = segment.contexts
            parts = [self._embed_piece(trajectory, piece) for piece in context.pieces]
            h = torch.cat(parts)
            keys, values = h @ self.model.key.T, h @ self.model.value.T
            seen = torch.ones(1, LATENT_SHAPE[0], len(h), dtype=torch.bool)
            answers.append(self._flow(x[None], time[None], keys[None], values[None], seen).velocity_B[0])
        return torch.stack(answers)

    def save(self, folder) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "model.pt")

    def reference(self):
        return nullcontext()


def one_pass(trajectory: Trajectory) -> Pass:
    """A whole trajectory in one forward."""
    trained = tuple(i for i, s in enumerate(trajectory.segments) if s.trained and s.decisions is not None)
    decisions = sum(int((~trajectory.segments[i].decisions.sampling.greedy_N).sum()) for i in trained)
    return Pass(trajectory, trained, trajectory.num_tokens(), frozenset({"model"}), decisions)


def divided(whole: Pass, budget: int | None) -> list[Pass]:
    """A pass for each segment where the whole costs more than the budget."""
    if budget is None or whole.cost <= budget:
        return [whole]
    segments = [whole.trajectory.segments[n] for n in whole.segments]
    decisions = [int((~segment.decisions.sampling.greedy_N).sum()) for segment in segments]
    costs = [sum(len(s.ids) for s in whole.trajectory.segments[: n + 1]) for n in whole.segments]
    return [
        Pass(whole.trajectory, (n,), cost, whole.modules, count)
        for n, cost, count in zip(whole.segments, costs, decisions, strict=True)
    ]


class FakeCursor:
    """Sentences that end with a full stop, images of exactly N codes, and the end of the turn."""

    def __init__(self, fmt: FakeFormat, vocabulary: FakeVocabulary):
        self.fmt, self.vocabulary = fmt, vocabulary
        self.sets = fmt.sets(vocabulary)
        self.spans: list[Span] = []
        self.images, self.count, self.left = 0, 0, 0
        self.in_image = self.stopped = self.awaits = False
        self.answers = 0  # of the environment
        self.lingering = False  # an image has ended, but only what follows closes it
        self.start = 0

    @property
    def role(self) -> str:
        return "image" if self.in_image else "say"

    @property
    def modality(self) -> Modality:
        if not self.in_image:
            return Modality.TEXT
        return Modality.IMAGE_LATENT if self.fmt.view == "flow" else Modality.IMAGE_TOKENS

    @property
    def open_span(self) -> Span:
        return self._span(self.count)

    def _span(self, stop: int) -> Span:
        if self.lingering:
            return Span("image", Modality.IMAGE_TOKENS, self.start, stop)
        return Span(self.role, self.modality, self.start, stop)

    def forced(self) -> int | None:
        if self.in_image:
            return self.vocabulary.eoi if self.left == 0 else None
        return self.vocabulary.boi if self.count == 0 and self.fmt.begins_with_image else None

    def allowed(self) -> AllowedSet:
        if self.in_image:
            return self.sets["codes"]
        # Where a context forgets the words, an image can only begin a segment: see FormatContractError.
        may_draw = self.images < self.fmt.max_images and (self.fmt.view != "window" or self.start == self.count)
        return self.sets["all"] if may_draw else self.sets["words"]

    def advance(self, id: int) -> None:
        assert not self.stopped
        self.count += 1
        if self.lingering:
            self._close(self.count - 1)
        if self.in_image:
            self.left -= 1
            if self.left < 0:
                assert id == self.vocabulary.eoi
                self.lingering = self.fmt.lingers
                if not self.lingering:
                    self._close(self.count)
                self.in_image = False
        elif id == self.vocabulary.boi:
            self._close(self.count - 1)
            self.in_image, self.left = True, self.vocabulary.codes_per_image
            self.images += 1
        elif id in (self.vocabulary.stop, self.vocabulary.eos):
            self._close(self.count)
            self.stopped = id == self.vocabulary.eos
            self.awaits = not self.stopped and self.answers < self.fmt.asks

    def observe(self, role: str) -> None:
        self.awaits, self.answers = False, self.answers + 1

    def cut(self) -> None:
        self._close(self.count)

    def _close(self, stop: int) -> None:
        if stop > self.start:
            self.spans.append(self._span(stop))
        self.start, self.lingering = stop, False

    def stop(self) -> None:
        self._close(self.count)
        self.stopped = True


class FakeFormat:
    """view: "plain", "window" or "flow" (the module's docstring says what each sees)."""

    def __init__(
        self,
        view: str = "plain",
        max_images: int = 3,
        guidance_scale: float | None = None,
        begins_with_image: bool = False,
        lingers: bool = False,
        asks: int = 0,
    ):
        """asks: after so many sentences the environment speaks.
        lingers: an image's segment is closed by the first id after it, as where that id tells its role."""
        self.name = f"fake_{view}"
        self.view, self.max_images, self.guidance_scale = view, max_images, guidance_scale
        self.begins_with_image, self.lingers, self.asks = begins_with_image, lingers, asks
        self._sets: dict[int, dict[str, AllowedSet]] = {}

    def sets(self, vocabulary: FakeVocabulary) -> dict[str, AllowedSet]:
        if id(vocabulary) not in self._sets:
            words = [*vocabulary.word_ids, vocabulary.stop, vocabulary.eos]
            self._sets[id(vocabulary)] = {
                "words": AllowedSet("words", ranges_of(words)),
                "all": AllowedSet("words or an image", ranges_of([*words, vocabulary.boi])),
                "codes": AllowedSet("codes", ranges_of(vocabulary.code_ids)),
            }
        return self._sets[id(vocabulary)]

    def prompt_ids(self, prompt: str, vocabulary: FakeVocabulary) -> list[int]:
        return [vocabulary.bos, *vocabulary.encode(prompt)]

    def cursor(self, vocabulary: FakeVocabulary, constrain: str = "images") -> FakeCursor:
        return FakeCursor(self, vocabulary)

    def author(self, role: str) -> Author:
        return Author.POLICY

    def trained(self, role: str) -> bool:
        return True

    def contexts(self, trajectory: Trajectory, segment: int) -> tuple[ContextSpec, ...]:
        segments = trajectory.segments
        full = whole_history(segment)
        if self.view == "window":
            images = [i for i in range(segment) if segments[i].modality is Modality.IMAGE_TOKENS]
            full = ContextSpec("full", tuple(PieceSpec(i) for i in (0, *images[-1:])))
        if self.guidance_scale is None or segments[segment].modality is Modality.TEXT:
            return (full,)
        return full, ContextSpec("uncond", ())

    def guidance(self, trajectory: Trajectory, segment: int) -> Guidance | None:
        return None if self.guidance_scale is None else Guidance("cfg", {"text": self.guidance_scale})

    def violations(self, trajectory: Trajectory) -> list:
        return []
