"""A policy small enough to check by hand: real sampling, recorded laws and contexts, real scoring with gradient.

Thoughts are plan (words until a full stop, at most 5), sketch ([BOI, 3 codes, EOI], BOI and EOI forced), inspect (one
word). The next id depends on the last one and on the mean of all before it.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from policy.base import Scored
from record.trajectory import (
    Author,
    DecisionKind,
    Decisions,
    Modality,
    SamplingParams,
    Segment,
    Trajectory,
    full_history,
    mask_of,
    ranges_of,
)
from tests.fakes import one_pass

BOS, EOS, BOI, EOI, STOP, SIZE = 0, 1, 2, 3, 11, 12
CODES, WORDS = ranges_of([4, 5, 6, 7]), ranges_of([8, 9, 10, STOP])
TEMPERATURE = {"plan": 1.0, "sketch": 0.8, "inspect": 1.0}


class BigramModel(nn.Module):
    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(SIZE, width)
        self.mix = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)  # a trainer must turn it off
        self.head = nn.Linear(width, SIZE, bias=False)

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        """logits_TV of the id after each."""
        embedded_TD = self.embedding(ids_T)
        mean_TD = embedded_TD.cumsum(0) / torch.arange(1, len(ids_T) + 1, device=ids_T.device)[:, None]
        return self.head(self.dropout(torch.tanh(self.mix(embedded_TD + mean_TD))))


class BigramPolicy:
    family = "bigram"
    max_length = 64

    def __init__(self, seed: int = 0) -> None:
        self.model = BigramModel(seed=seed).eval()
        self.frozen = None  # until the reference is first asked for
        self.forwards = 0
        self._active = self.model

    @contextmanager
    def reference(self):
        self.frozen = self.frozen or copy.deepcopy(self.model).requires_grad_(False).eval()
        self._active = self.frozen
        try:
            yield
        finally:
            self._active = self.model

    def save(self, folder) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "model.pt")

    def passes(self, trajectories, budget=None):
        return [one_pass(trajectory) for trajectory in trajectories]

    def score(self, passes, old=None, reference=None, entropy=False) -> Scored:
        self.forwards += 1
        trajectories = [one.trajectory for one in passes]
        rows: list[tuple[int, int, int]] = []
        logprobs, behaviour, entropies = [], [], []
        for index, trajectory in enumerate(trajectories):
            ids_T = torch.from_numpy(np.concatenate([s.ids for s in trajectory.segments]).astype(np.int64))
            logits_TV, start = self._active(ids_T), 0
            for number, segment in enumerate(trajectory.segments):
                if segment.trained and segment.decisions is not None:
                    sampling, position_N = segment.decisions.sampling, segment.decisions.position_N
                    for n in np.flatnonzero(~sampling.greedy_N):
                        at = start + int(position_N[n])
                        banned_V = torch.from_numpy(~mask_of(sampling.sets[sampling.allowed_N[n]], SIZE))
                        logits_V = (logits_TV[at - 1] / float(sampling.temperature_N[n])).masked_fill(
                            banned_V, -torch.inf
                        )
                        logprob_V = logits_V.log_softmax(-1)
                        rows.append((index, number, int(segment.decisions.kind_N[n])))
                        logprobs.append(logprob_V[ids_T[at]])
                        behaviour.append(float(segment.decisions.logprob_N[n]))
                        entropies.append(-(logprob_V.exp() * logprob_V.nan_to_num(neginf=0.0)).sum().detach())
                start += len(segment.ids)
        trajectory_N, segment_N, kind_N = torch.tensor(rows).T
        logprob_N, behaviour_N = torch.stack(logprobs), torch.tensor(behaviour)
        divergence_N = None
        if reference is not None:
            difference_N = reference.logprob_N - logprob_N
            divergence_N = difference_N.exp() - difference_N - 1
        return Scored(
            trajectory_N,
            segment_N,
            kind_N,
            logprob_N,
            behaviour_N,
            logprob_N - (behaviour_N if old is None else old.logprob_N),
            divergence_N,
            torch.stack(entropies) if entropy else None,
        )

    @torch.inference_mode()
    def sample(self, prompt: str, record: dict, group: int, member: int, seed: int, version: int = 0) -> Trajectory:
        """Noise is a function of (seed, group, member, decision)."""
        noise = np.random.default_rng([seed, group, member])
        word = 8 + sum(map(ord, prompt)) % 3
        prompt_ids = np.array([BOS, word], np.int32)
        trajectory = Trajectory(
            prompt,
            record,
            "bigram",
            group=group,
            member=member,
            seed=seed,
            segments=[Segment("prompt", Author.USER, Modality.TEXT, False, prompt_ids, prompt)],
        )
        for role in TEMPERATURE:
            image = role == "sketch"
            ids, logprobs = ([BOI], []) if image else ([], [])
            while len(logprobs) < (3 if image else 5 if role == "plan" else 1):
                before = np.concatenate([s.ids for s in trajectory.segments] + [np.array(ids, np.int32)])
                logits_V = self.model(torch.from_numpy(before.astype(np.int64)))[-1] / TEMPERATURE[role]
                banned_V = torch.from_numpy(~mask_of(CODES if image else WORDS, SIZE))
                logprob_V = logits_V.masked_fill(banned_V, -torch.inf).log_softmax(-1)
                chosen = int((logprob_V + torch.from_numpy(noise.gumbel(size=SIZE)).float()).argmax())
                ids.append(chosen)
                logprobs.append(float(logprob_V[chosen]))
                if role == "plan" and chosen == STOP:
                    break
            count = len(logprobs)
            sampling = SamplingParams(
                np.full(count, TEMPERATURE[role], np.float32), np.zeros(count, np.int32), (CODES if image else WORDS,)
            )
            decisions = Decisions(
                np.full(count, DecisionKind.CODE if image else DecisionKind.WORD, np.int8),
                np.arange(count, dtype=np.int32) + image,
                np.array(logprobs, np.float32),
                sampling,
            )
            trajectory.segments.append(
                Segment(
                    role,
                    Author.POLICY,
                    Modality.IMAGE_TOKENS if image else Modality.TEXT,
                    True,
                    np.array(ids + [EOI] * image, np.int32),
                    decisions=decisions,
                    version=version,
                    contexts=(full_history(trajectory, len(trajectory.segments)),),
                )
            )
        return trajectory


def reward(trajectory: Trajectory) -> float:
    """The share of code 5 in the image, and a little for a short plan."""
    codes = trajectory.segments[2].ids[1:-1]
    return float((codes == 5).mean()) + 0.1 * float(len(trajectory.segments[1].ids) <= 2)


def sampled_groups(policy, groups=4, members=4, seed=0, first=0, version=0) -> list[list[Trajectory]]:
    return [
        [policy.sample(f"prompt {group}", {}, group, member, seed, version) for member in range(members)]
        for group in range(first, first + groups)
    ]
