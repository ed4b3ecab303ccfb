"""A small Chameleon and a plain sampler, so that the policy is tested without the engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from policy.base import TokenStep
from policy.chameleon.config import ChameleonPolicyConfig, TinySection
from policy.chameleon.family import ChameleonPolicy, load
from policy.config import LoraSection
from policy.guidance import branch_weights
from record.trajectory import (
    Author,
    Context,
    DecisionKind,
    Decisions,
    Guidance,
    Modality,
    Piece,
    SamplingParams,
    Segment,
    Trajectory,
    full_history,
    mask_of,
    ranges_of,
)

WORDS = ["a", "red", "blue", "circle", "square", "left", "of", "fine", "wrong", ",", "."]
VQ = {
    "embed_dim": 8,
    "num_embeddings": 32,
    "latent_channels": 8,
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_type": "none",
}  # 4 x 4 codes


def small_config(lora: LoraSection | None = None, **changes) -> ChameleonPolicyConfig:
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "vq": VQ,
    } | changes
    return ChameleonPolicyConfig(tiny=TinySection(**tiny), lora=lora)


def small_policy(lora: LoraSection | None = None, **changes) -> ChameleonPolicy:
    """Fresh weights, scaled up so that log-probs are far from uniform."""
    policy = load(small_config(lora, **changes), WORDS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "vqmodel" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    policy._versions = policy._weights_version()
    return policy


def prompt_segment(policy: ChameleonPolicy, text: str) -> Segment:
    vocabulary = policy.vocabulary
    ids = [vocabulary.bos, *vocabulary.encode(text), vocabulary.sep]
    return Segment("prompt", Author.USER, Modality.TEXT, False, np.array(ids, np.int32), text)


def windowed(trajectory: Trajectory, segment: int) -> Context:
    """The prompt and the last segment's second half, at the positions where they first stood."""
    whole = full_history(trajectory, segment)
    pieces = [whole.pieces[0]]
    if segment > 1:
        last = whole.pieces[-1]
        length = len(trajectory.segments[last.segment].ids)
        pieces.append(Piece(last.segment, "ids", last.start + length // 2, (length // 2, length)))
    return Context("full", tuple(pieces), whole.start)


def sample(
    policy: ChameleonPolicy,
    trajectory: Trajectory,
    plan: Sequence[str],
    seed: int,
    *,
    temperature: float = 0.7,
    context=full_history,
    guidance: Guidance | None = None,
    branches=None,
    words: int = 5,
) -> Trajectory:
    """Write the segments of `plan` ("text" or "image") one id at a time, as the engine would, and record them."""
    vocabulary, rng = policy.vocabulary, np.random.default_rng(seed)
    words_only = ranges_of(
        [
            id
            for id in range(vocabulary.size)
            if id not in set(vocabulary.code_ids.tolist()) | {vocabulary.eoi, vocabulary.boi}
        ]
    )
    codes, boi = ranges_of(vocabulary.code_ids), ranges_of([vocabulary.boi, vocabulary.eos, 5])
    sets = (words_only, codes, boi)
    for kind in plan:
        number = len(trajectory.segments)
        image = kind == "image"
        contexts = [context(trajectory, number)]
        if image and guidance is not None:
            contexts += branches(trajectory, number)
        weights = branch_weights(guidance) if image and guidance is not None else {"full": 1.0}
        cache = policy.allocate(len(contexts), 256)
        rows = list(range(len(contexts)))
        logits_BV = policy.prefill(cache, rows, [(trajectory, each) for each in contexts])
        ids, kinds, temperatures, allowed, logprobs, positions = [], [], [], [], [], []
        for place in range(vocabulary.codes_per_image + 2 if image else words):
            if image and place == vocabulary.codes_per_image + 1:
                ids.append(vocabulary.eoi)  # forced
                break
            is_code = image and place > 0
            logits_V = logits_BV[0]
            if is_code:
                logits_V = sum(weights.get(each.branch, 0.0) * logits_BV[row] for row, each in enumerate(contexts))
            which = 1 if is_code else 2 if image else 0
            heat = temperature if not is_code else temperature + 0.2
            banned = torch.from_numpy(~mask_of(sets[which], vocabulary.size))
            logprob_V = (logits_V / heat).masked_fill(banned, -torch.inf).log_softmax(-1)
            probability = logprob_V.exp().double().numpy()
            id = int(rng.choice(len(probability), p=probability / probability.sum()))
            if image and place == 0:
                id = vocabulary.boi
            ids.append(id)
            kinds.append(DecisionKind.CODE if is_code else DecisionKind.WORD)
            temperatures.append(heat)
            allowed.append(which)
            logprobs.append(float(logprob_V[id]))
            positions.append(place)
            logits_BV = policy.step(cache, rows, TokenStep(torch.full((len(rows),), id))).logits_BV
        decisions = Decisions(
            np.array(kinds, np.int8),
            np.array(positions, np.int32),
            np.array(logprobs, np.float32),
            SamplingParams(
                np.array(temperatures, np.float32), np.array(allowed, np.int32), sets, guidance if image else None
            ),
        )
        modality = Modality.IMAGE_TOKENS if image else Modality.TEXT
        trajectory.segments.append(
            Segment(
                "sketch" if image else "plan",
                Author.POLICY,
                modality,
                True,
                np.array(ids, np.int32),
                vocabulary.decode(ids),
                decisions,
                contexts=tuple(contexts),
            )
        )
    return trajectory


def sampled(policy: ChameleonPolicy, plans: Sequence[Sequence[str]], **options) -> list[Trajectory]:
    texts = ["a red circle left of a blue square", "a blue circle", "red , blue ."]
    with torch.inference_mode():
        return [
            sample(
                policy,
                Trajectory(text, {}, "strokes", [prompt_segment(policy, text)], group=0, member=member),
                plan,
                seed=member,
                **options,
            )
            for member, (plan, text) in enumerate(zip(plans, texts * len(plans), strict=False))
        ]
