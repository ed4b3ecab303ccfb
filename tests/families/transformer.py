"""A small two-layer transformer that keeps every promise of policy/base.py, on which the fake families stand.

A family says what a piece looks like (`look`: vectors), where its slots stand (`offsets`: by position axis, from the
piece's start) and what it takes (`extent`). Slots of an image see one another; those of words see what came before.
The second layer makes what a slot holds depend on its context, so that a stale cache is noticed.

Letters: R cache rows, L slots of a row, S slots of a piece, A position axes, D width, V vocabulary, N decisions.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from formats.base import Imaging, SeenOnly
from policy.base import Categorical, Extent, FlowStep, Pass, Scored, TokenStep, Velocity
from policy.scoring.flow import replay, sampler_of
from record.trajectory import Context, DecisionKind, Modality, Piece, Segment, Trajectory, mask_of

LAYERS, WIDTH = 2, 12
WORDS = ["red", "blue", "dot", "left", "right", "big"]


class Vocabulary:
    """pad, eos, the family's own special ids, tags and words, then visual codes."""

    sep = None

    def __init__(self, special=(), tags=(), words=WORDS, codes: int = 0, eos: bool = True, never=()):
        self.pieces = ["", "", *("" for _ in special), *tags, *(f" {word}" for word in words)]
        self.pad, self.bos = 0, None
        self.eos = 1 if eos else None
        self.special = {name: 2 + n for n, name in enumerate(special)}
        self.code_ids = np.arange(len(self.pieces), len(self.pieces) + codes, dtype=np.int32)
        self.size = len(self.pieces) + codes
        self.never = np.array([self.pad, *(self.special[name] for name in never)], np.int32)
        self.imaging: Imaging = SeenOnly()

    def encode(self, text: str) -> list[int]:
        parts = re.findall(r"</?\w+>|\w+", text)
        return [self.pieces.index(part if part in self.pieces else f" {part}") for part in parts]

    def decode(self, ids) -> str:
        return "".join(self.piece(int(id)) for id in ids).strip()

    def piece(self, id: int) -> str:
        return self.pieces[id] if id < len(self.pieces) else ""


class Net(nn.Module):
    """`inputs`: by the name of a way of looking, how many channels it takes; each gets a linear map to the width."""

    def __init__(self, size: int, axes: int, positions: int, inputs: dict[str, int], flow: int = 0, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * scale / shape[-1] ** 0.5)

        self.word, self.place = weight(size, WIDTH, scale=3), weight(axes, positions, WIDTH, scale=2)
        self.look = nn.ParameterDict({name: weight(WIDTH, channels, scale=2) for name, channels in inputs.items()})
        self.query, self.key, self.value, self.mix = (weight(LAYERS, WIDTH, WIDTH) for _ in range(4))
        self.head = weight(size, WIDTH, scale=2)
        if flow:
            self.velocity, self.clock = weight(flow, WIDTH), weight(WIDTH)

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, S, D] after cached keys and values [B, layers, L, D], where seen [B, S, L + S].

        Returns the last layer's outputs [B, S, D], and the keys and values [B, layers, S, D] of the new slots.
        """
        new_keys, new_values = [], []
        for layer in range(LAYERS):
            key, value = h @ self.key[layer].T, h @ self.value[layer].T
            new_keys.append(key)
            new_values.append(value)
            scores = (h @ self.query[layer].T) @ torch.cat([keys[:, layer], key], 1).transpose(-1, -2) / WIDTH**0.5
            weights = scores.masked_fill(~seen, -1e9).softmax(-1)
            h = h + torch.tanh((h + weights @ torch.cat([values[:, layer], value], 1)) @ self.mix[layer].T)
        return h, torch.stack(new_keys, 1), torch.stack(new_values, 1)


@dataclass
class Cache:
    keys: Tensor  # [R, layers, L, D]
    values: Tensor
    used: list[int]
    position: list[int]  # of each row's next id, on every axis

    @property
    def rows(self) -> int:
        return len(self.used)

    @property
    def length(self) -> int:
        return self.keys.shape[2]


def mask(past: int, slots: int, whole: bool) -> Tensor:
    """[S, past + S]: which slots each new one sees."""
    if whole:
        return torch.ones(slots, past + slots, dtype=torch.bool)
    return torch.arange(past + slots)[None] <= torch.arange(past, past + slots)[:, None]


class FamilyPolicy:
    """What the fake families share: cache, sampling and scoring."""

    family = "fake"
    axes = 1
    latent_shape: tuple[int, ...] = ()
    image_slots = 0
    inputs: dict[str, int] = {}

    def __init__(self, vocabulary: Vocabulary, max_length: int = 160, seed: int = 0):
        self.vocabulary, self.max_length = vocabulary, max_length
        flow = self.latent_shape[-1] if self.latent_shape else 0
        self.model = Net(vocabulary.size, self.axes, max_length, self.inputs, flow, seed)
        self._frozen: dict[str, Tensor] | None = None

    # ---- a family's own ----

    def forms(self, segment: Segment) -> tuple[str, ...]:
        return ("ids",)

    def extent(self, segment: Segment, form: str, keep=None) -> Extent | None:
        """Ids take a slot and a position each."""
        start, stop = keep or (0, len(segment.ids))
        return Extent(stop - start, stop - start) if form == "ids" else None

    def look(self, segment: Segment, form: str, keep) -> Tensor:
        """[S, D], before its positions are added."""
        start, stop = keep or (0, len(segment.ids))
        return self.model.word[torch.from_numpy(segment.ids[start:stop].astype(np.int64))]

    def offsets(self, segment: Segment, form: str, keep) -> np.ndarray:
        """int [S, A], from the piece's start."""
        start, stop = keep or (0, len(segment.ids))
        return np.repeat(np.arange(stop - start)[:, None], self.axes, 1)

    def advance(self, segment: Segment, form: str, keep) -> int:
        """By how much a piece moves the next one's start: what the network does, whatever `extent` says."""
        offsets = self.offsets(segment, form, keep)
        return int(offsets.max()) + 1 if len(offsets) else 0

    def perceive(self, segments) -> None:
        """Nothing: pixels are seen as they are."""

    # ---- sampling ----

    def allocate(self, rows: int, length: int) -> Cache:
        shape = (rows, LAYERS, length, WIDTH)
        return Cache(torch.zeros(shape), torch.zeros(shape), [0] * rows, [0] * rows)

    def _at(self, h: Tensor, position: np.ndarray | Tensor) -> Tensor:
        """Vectors [S, D] at positions [S, A]."""
        at = torch.as_tensor(position, dtype=torch.int64)
        return h + sum(self.model.place[axis][at[:, axis]] for axis in range(self.axes))

    def _embed(self, trajectory: Trajectory, piece: Piece) -> tuple[Tensor, bool]:
        segment = trajectory.segments[piece.segment]
        h = self.look(segment, piece.form, piece.keep)
        return self._at(h, piece.start + self.offsets(segment, piece.form, piece.keep)), piece.form != "ids"

    def _write(self, cache: Cache, row: int, trajectory: Trajectory, piece: Piece) -> Tensor:
        h, whole = self._embed(trajectory, piece)
        used, stop = cache.used[row], cache.used[row] + len(h)
        if stop > cache.length:
            raise RuntimeError(f"row {row} holds {cache.length} slots and was given {stop}")
        segment = trajectory.segments[piece.segment]
        cache.position[row] = piece.start + self.advance(segment, piece.form, piece.keep)
        if not len(h):
            return torch.zeros(self.vocabulary.size)
        past = cache.keys[row : row + 1, :, :used], cache.values[row : row + 1, :, :used]
        out, keys, values = self.model(h[None], *past, mask(used, len(h), whole)[None])
        cache.keys[row, :, used:stop], cache.values[row, :, used:stop] = keys[0], values[0]
        cache.used[row] = stop
        return out[0, -1] @ self.model.head.T

    def prefill(self, cache: Cache, row_B, contexts) -> Tensor:
        logits = torch.zeros(len(row_B), self.vocabulary.size)
        for b, (row, (trajectory, context)) in enumerate(zip(row_B, contexts, strict=True)):
            cache.used[row] = 0
            for piece in context.pieces:
                logits[b] = self._write(cache, row, trajectory, piece)
            cache.position[row] = context.start
        return logits

    def append(self, cache: Cache, row_B, pieces) -> Tensor:
        return torch.stack([self._write(cache, row, *piece) for row, piece in zip(row_B, pieces, strict=True)])

    def copy(self, cache: Cache, source: int, row_B) -> None:
        for row in row_B:
            cache.keys[row], cache.values[row] = cache.keys[source], cache.values[source]
            cache.used[row], cache.position[row] = cache.used[source], cache.position[source]

    def step(self, cache: Cache, row_B, inputs):
        rows = list(row_B)
        used = torch.tensor([cache.used[row] for row in rows])
        position = torch.tensor([cache.position[row] for row in rows])
        past = torch.arange(cache.length)[None] < used[:, None]
        if isinstance(inputs, FlowStep):
            velocity = self._flow(inputs.x_B, inputs.time_B, cache.keys[rows], cache.values[rows], past, position)
            return Velocity(velocity)
        assert isinstance(inputs, TokenStep)
        if int(used.max()) >= cache.length:
            raise RuntimeError(f"a row holds {cache.length} slots and was given one more")
        h = self._at(self.model.word[inputs.ids_B], position[:, None].expand(-1, self.axes))[:, None]
        seen = torch.cat([past, torch.ones(len(rows), 1, dtype=torch.bool)], 1)[:, None]
        out, keys, values = self.model(h, cache.keys[rows], cache.values[rows], seen)
        cache.keys[rows, :, used], cache.values[rows, :, used] = keys[:, :, 0], values[:, :, 0]
        for row in rows:
            cache.used[row] += 1
            cache.position[row] += 1
        return Categorical(out[:, 0] @ self.model.head.T)

    def _flow(self, x: Tensor, time: Tensor, keys: Tensor, values: Tensor, past: Tensor, position: Tensor) -> Tensor:
        """Velocities of latents [B, S, C]: their slots see one another and what the row holds, and share a position."""
        net, slots = self.model, x.shape[1]
        at = torch.stack([net.place[axis][position] for axis in range(self.axes)]).sum(0)
        h = x @ net.look["latent"].T + (time[:, None] * net.clock + at)[:, None]
        seen = torch.cat([past, torch.ones(len(x), slots, dtype=torch.bool)], 1)[:, None].expand(-1, slots, -1)
        return net(h, keys, values, seen)[0] @ net.velocity.T

    # ---- images ----

    def encode_images(self, images):
        raise NotImplementedError(f"{self.family} draws no images")

    decode_images = encode_images

    # ---- training ----

    def guide(self, branches, guidance, at=None) -> Tensor:
        raise NotImplementedError(f"{self.family} has no guidance")

    def passes(self, trajectories, budget=None) -> list[Pass]:
        """Divided at segments, each of which forwards its own contexts."""
        out = []
        for trajectory in trajectories:
            scored = [n for n in range(len(trajectory.segments)) if len(decided(trajectory.segments[n]))]
            together: list[int] = []
            for n in [*scored, None]:
                cost = sum(self._cost(trajectory, m) for m in (*together, n) if m is not None)
                if together and (n is None or (budget is not None and cost > budget)):
                    out.append(self._pass(trajectory, together))
                    together = []
                together.append(n)
        return out

    def _cost(self, trajectory: Trajectory, n: int) -> int:
        segment = trajectory.segments[n]
        latent = self.latent_shape[0] * len(segment.flow.point_N) if segment.flow is not None else 0
        return sum(
            len(segment.ids) + latent + sum(len(self._embed(trajectory, piece)[0]) for piece in context.pieces)
            for context in segment.contexts
        )

    def _pass(self, trajectory: Trajectory, segments: list[int]) -> Pass:
        kinds = {int(k) for n in segments for k in trajectory.segments[n].decisions.kind_N}
        modules = {"flow" if kind == DecisionKind.FLOW else "head" for kind in kinds}
        decisions = sum(len(decided(trajectory.segments[n])) for n in segments)
        cost = sum(self._cost(trajectory, n) for n in segments)
        return Pass(trajectory, tuple(segments), cost, frozenset(modules), decisions)

    def score(self, passes, old: Scored | None = None, reference: Scored | None = None, entropy: bool = False):
        place, logprobs, behaviour, entropies = [], [], [], []
        for number, one in enumerate(passes):
            for s in one.segments:
                decisions = one.trajectory.segments[s].decisions
                found = self._score_segment(one.trajectory, s)
                for n, (logprob, uncertainty) in zip(decided(one.trajectory.segments[s]), found, strict=True):
                    place.append((number, s, int(decisions.kind_N[n])))
                    logprobs.append(logprob)
                    behaviour.append(float(decisions.logprob_N[n]))
                    entropies.append(float(uncertainty))
        pass_N, segment_N, kind_N = torch.tensor(place, dtype=torch.int64).reshape(-1, 3).T
        logprob_N = torch.stack(logprobs) if logprobs else torch.zeros(0)
        behaviour_N = torch.tensor(behaviour)
        log_ratio_N = logprob_N - (behaviour_N if old is None else old.logprob_N.detach())
        divergence_N = None
        if reference is not None:  # k3
            off_N = reference.logprob_N.detach() - logprob_N
            divergence_N = off_N.exp() - 1 - off_N
        entropy_N = torch.tensor(entropies) if entropy else None
        return Scored(pass_N, segment_N, kind_N, logprob_N, behaviour_N, log_ratio_N, divergence_N, entropy_N)

    def _score_segment(self, trajectory: Trajectory, s: int) -> list[tuple[Tensor, Tensor]]:
        """Log-prob and entropy of each scored decision, from the recorded contexts alone: no cache."""
        segment = trajectory.segments[s]
        decisions, sampling = segment.decisions, segment.decisions.sampling
        rows = [self._row(trajectory, s, context) for context in segment.contexts]
        flow_before = int((decisions.kind_N != DecisionKind.FLOW).sum())
        found = []
        for n in decided(segment):
            position, kind = int(decisions.position_N[n]), int(decisions.kind_N[n])
            guided = sampling.guidance is not None and kind != DecisionKind.WORD
            used = rows if guided else rows[:1]
            if kind == DecisionKind.FLOW:
                found.append(self._score_flow(segment, position, n - flow_before, used, guided))
                continue
            answers = {row.branch: row.outputs[row.before + position - 1] @ self.model.head.T for row in used}
            logits = self.guide(answers, sampling.guidance) if guided else answers["full"]
            logits = logits / float(sampling.temperature_N[n])
            if sampling.allowed_N[n] >= 0:
                allowed = mask_of(sampling.sets[sampling.allowed_N[n]], self.vocabulary.size)
                logits = logits.masked_fill(~torch.from_numpy(allowed), -torch.inf)
            law = torch.distributions.Categorical(logits=logits)
            found.append((law.log_prob(torch.tensor(int(segment.ids[position]))), law.entropy().detach()))
        return found

    def _row(self, trajectory: Trajectory, s: int, context: Context) -> Row:
        """A context and the segment's own ids after it, in one forward."""
        parts = [self._embed(trajectory, piece) for piece in context.pieces]
        before = sum(len(h) for h, _ in parts)
        segment = trajectory.segments[s]
        latent = segment.modality is Modality.IMAGE_LATENT  # its markers are no input of its own decisions
        if not latent:
            parts.append(self._embed(trajectory, Piece(s, "ids", context.start)))
        total = sum(len(h) for h, _ in parts)
        seen, at = mask(0, total, False), 0
        for h, whole in parts:
            if whole:
                seen[at : at + len(h), at : at + len(h)] = True
            at += len(h)
        empty = torch.zeros(1, LAYERS, 0, WIDTH)
        out, keys, values = self.model(
            torch.cat([torch.zeros(0, WIDTH), *(h for h, _ in parts)])[None], empty, empty, seen[None]
        )
        return Row(context.branch, before, context.start, out[0], keys, values)

    def _score_flow(self, segment: Segment, step: int, n: int, rows, guided: bool) -> tuple[Tensor, Tensor]:
        flow = segment.flow
        times = torch.from_numpy(flow.time_M[step : step + 2])
        x = torch.from_numpy(flow.x_N[n])[None]
        answers = {}
        for row in rows:
            past = torch.ones(1, row.before, dtype=torch.bool)
            answers[row.branch] = self._flow(x, times[:1], row.keys, row.values, past, torch.tensor([row.start]))
        velocity = answers["full"]
        if guided:
            velocity = self.guide(answers, segment.decisions.sampling.guidance, FlowStep(x, times[:1]))
        x_next = torch.from_numpy(flow.x_next_N[n])[None]
        taken = replay(sampler_of(flow.sampler), x, velocity, times[:1], times[1:], x_next)
        return taken.log_prob_B[0], (0.5 + 0.5 * np.log(2 * np.pi) + taken.noise_std_B.log()).detach()

    @contextmanager
    def reference(self):
        """The weights as they were when it was first asked for."""
        live = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._frozen = self._frozen or live
        self.model.load_state_dict(self._frozen)
        try:
            yield
        finally:
            self.model.load_state_dict(live)

    def save(self, folder) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "model.pt")

    @classmethod
    def load(cls, folder):
        policy = cls(seed=99)
        policy.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        return policy


@dataclass
class Row:
    branch: str
    before: int  # slots of the context
    start: int  # position of the segment's first id
    outputs: Tensor  # [S, D]
    keys: Tensor  # [1, layers, S, D]
    values: Tensor


def decided(segment: Segment) -> list[int]:
    """The numbers of the decisions that are scored."""
    if segment.decisions is None or not segment.trained:
        return []
    return np.flatnonzero(~segment.decisions.sampling.greedy_N).tolist()
