"""The policy family `chameleon` (Anole): one transformer over words and visual codes.

Everything is a token: contexts are ids, decisions are words and codes. `decode.py` serves the engine from cached
rows; `score` replays the recorded contexts in full rows through the model's own forward, with gradient.

Letters: B rows of a call, T ids, V vocabulary, N decisions of all trajectories of a call, K guidance branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policy.base import Categorical, Extent, FlowStep, Pass, Scored, TokenStep
from policy.chameleon.check import check_adapters
from policy.chameleon.codebook_loss import CodebookLoss
from policy.chameleon.config import ChameleonPolicyConfig
from policy.chameleon.learned_padding import LearnedPadding, plan_with_padding
from policy.chameleon.model import InterleavedChameleon, load_model, save_model
from policy.chameleon.replay import Replay, divide, plan
from policy.chameleon.tiny import tiny_model
from policy.chameleon.vocabulary import ChameleonVocabulary, load_tokenizer
from policy.config import LoraSection
from policy.decoding.cache import RowCache
from policy.decoding.decode import Decode
from policy.extra_losses import ExtraLoss, ExtraLosses
from policy.guidance import combine
from policy.scoring.row_attention import ROWS, packs
from policy.scoring.rows import context_ids, piece_ids
from record.trajectory import Context, Guidance, Modality, Piece, Segment, Trajectory
from runtime.errors import UserError


class ContextOverflow(UserError):
    """More ids than a row holds."""


class ReferenceLost(UserError):
    """The reference was asked for after the weights had changed."""


class ChameleonPolicy:
    """See policy/base.py for what each method promises."""

    family = "chameleon"

    def __init__(
        self,
        model: InterleavedChameleon,
        vocabulary: ChameleonVocabulary,
        score_chunk: int = 256,
        lora: LoraSection | None = None,
    ):
        self.vocabulary = vocabulary
        self.score_chunk = score_chunk
        self.max_length = int(model.config.max_position_embeddings)
        self.core = model  # the model under whatever wraps `self.model`
        self.model: nn.Module = _with_adapters(model, lora) if lora else model
        self.has_adapters = lora is not None
        self.before_forward: list[Callable[[Replay], None]] = []  # told of every forward of `score` before it runs
        self.learns_padding = False
        self._decode: Decode | None = None
        self._frozen: list[Tensor] | None = None
        self._versions = self._weights_version()

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the decoder's weights, or the adapters'. The visual tokenizer is frozen."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def packs(self) -> bool:
        """Whether scoring lays rows end to end: by the attention that the model was loaded with."""
        return packs(self.core.config._attn_implementation)

    @property
    def device(self) -> torch.device:
        return self.core.model.embed_tokens.weight.device

    # ---- what a segment takes ----

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def image_slots(self) -> int:
        return self.vocabulary.codes_per_image + 2

    def forms(self, segment: Segment) -> tuple[str, ...]:
        return ("ids",)

    def extent(self, segment: Segment, form: str, keep: tuple[int, int] | None = None) -> Extent | None:
        """Everything is ids: one slot and one position each."""
        if form != "ids":
            return None
        start, stop = keep if keep is not None else (0, len(segment.ids))
        return Extent(stop - start, stop - start)

    @torch.inference_mode()
    def perceive(self, segments: Sequence[Segment]) -> None:
        """Images become codes between their markers."""
        seen = [segment for segment in segments if segment.image is not None and not len(segment.ids)]
        for segment in segments:
            if segment.frames is not None:
                raise UserError(
                    f"segment '{segment.role}' holds {len(segment.frames.time_F)} frames; the family 'chameleon' sees "
                    "images one by one"
                )
        contents = self.encode_images([segment.image for segment in seen if segment.image is not None])
        for segment, codes in zip(seen, contents, strict=True):
            segment.ids = np.array([self.vocabulary.boi, *codes, self.vocabulary.eoi], np.int32)
            segment.modality = Modality.IMAGE_TOKENS

    # ---- sampling ----

    def allocate(self, rows: int, length: int) -> RowCache:
        config = self.core.config
        weight = self.core.model.embed_tokens.weight
        length = min(length, self.max_length)
        heads = config.num_key_value_heads or config.num_attention_heads
        return RowCache(
            rows,
            length,
            config.num_hidden_layers,
            heads,
            config.hidden_size // config.num_attention_heads,
            weight.dtype,
            weight.device,
        )

    @torch.inference_mode()
    def prefill(self, cache: RowCache, row_B: Sequence[int], contexts: Sequence[tuple[Trajectory, Context]]) -> Tensor:
        cache.reset(row_B)
        known = [context_ids(trajectory, context) for trajectory, context in contexts]
        logits_BV = self._extend(cache, row_B, known, [trajectory.key for trajectory, _ in contexts])
        cache.position_R[list(row_B)] = [context.start for _, context in contexts]
        return logits_BV

    @torch.inference_mode()
    def copy(self, cache: RowCache, source: int, row_B: Sequence[int]) -> None:
        cache.copy(source, row_B)

    @torch.inference_mode()
    def step(self, cache: RowCache, row_B: Sequence[int], inputs: TokenStep | FlowStep) -> Categorical:
        if not isinstance(inputs, TokenStep):
            raise TypeError("the family 'chameleon' has no flow: it steps by TokenStep")
        row = np.asarray(row_B, np.int64)
        self._check_room(cache, row, np.ones(len(row), np.int64), None)
        position_B = cache.position_R[row]
        hidden_BD = self._decoder()(
            cache, row, inputs.ids_B.to(cache.device)[:, None], position_B[:, None], np.ones(len(row), np.int64)
        )
        cache.position_R[row] += 1
        return Categorical(self.core.lm_head(hidden_BD).float())

    @torch.inference_mode()
    def append(self, cache: RowCache, row_B: Sequence[int], pieces: Sequence[tuple[Trajectory, Piece]]) -> Tensor:
        known = [piece_ids(trajectory, piece) for trajectory, piece in pieces]
        logits_BV = self._extend(cache, row_B, known, [trajectory.key for trajectory, _ in pieces])
        cache.position_R[list(row_B)] = [
            piece.start + len(ids) for (_, piece), (ids, _) in zip(pieces, known, strict=True)
        ]
        return logits_BV

    def _extend(
        self,
        cache: RowCache,
        row_B: Sequence[int],
        known: Sequence[tuple[np.ndarray, np.ndarray]],
        names: Sequence[str],
    ) -> Tensor:
        """Append ids at their positions; logits_BV after the last of each row (zeros where a row got none)."""
        row = np.asarray(row_B, np.int64)
        count_B = np.array([len(ids) for ids, _ in known], np.int64)
        self._check_room(cache, row, count_B, names)
        logits_BV = torch.zeros(len(row), self.core.config.vocab_size, device=cache.device)
        some = np.flatnonzero(count_B)
        if not len(some):
            return logits_BV
        steps = int(count_B.max())
        ids_BT = np.full((len(some), steps), self.vocabulary.pad, np.int64)
        position_BT = np.zeros((len(some), steps), np.int64)
        for position, index in enumerate(some.tolist()):
            ids, positions = known[index]
            ids_BT[position, : len(ids)], position_BT[position, : len(ids)] = ids, positions
        if int(position_BT.max()) >= self.max_length:
            raise ContextOverflow(f"position {int(position_BT.max())} in a context: the model has {self.max_length}")
        hidden_BD = self._decoder()(
            cache, row[some], torch.from_numpy(ids_BT).to(cache.device), position_BT, count_B[some]
        )
        logits_BV[torch.from_numpy(some).to(cache.device)] = self.core.lm_head(hidden_BD).float()
        return logits_BV

    def _check_room(self, cache: RowCache, row: np.ndarray, count_B: np.ndarray, names: Sequence[str] | None) -> None:
        needed_B = cache.used_R[row] + count_B
        if (needed_B <= cache.length).all():
            return
        worst = int(needed_B.argmax())
        what = f"trajectory {names[worst]}" if names else f"row {int(row[worst])}"
        raise ContextOverflow(
            f"{what} needs {int(needed_B[worst])} ids, but a row holds {cache.length}: shorten the "
            "prompt or raise the length that rollouts allocate (at most the model's "
            f"{self.max_length})"
        )

    def _decoder(self) -> Decode:
        if self._decode is None or self._decode.cos_Pd.device != self.device:
            self._decode = Decode(self.core.model, self.max_length)
        return self._decode

    # ---- images ----

    def encode_images(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        if not images:
            return []
        codes_BN = self.core.model.vqmodel.encode_images(images).cpu().numpy()
        return list(self.vocabulary.to_ids(codes_BN))

    def decode_images(self, contents: Sequence[np.ndarray]) -> list[np.ndarray]:
        if not contents:
            return []
        for content in contents:
            if len(content) != self.vocabulary.codes_per_image:
                raise UserError(
                    f"an image of {len(content)} codes: this model draws from exactly {self.vocabulary.codes_per_image}"
                )
        codes_BN = self.vocabulary.to_codes(np.stack(contents))
        return self.core.model.vqmodel.decode_images(torch.from_numpy(codes_BN))

    # ---- training ----

    def guide(self, branches: dict[str, Tensor], guidance: Guidance, at: FlowStep | None = None) -> Tensor:
        return combine(branches, guidance)

    def passes(self, trajectories: Sequence[Trajectory], budget: int | None = None) -> list[Pass]:
        return [p for trajectory in trajectories for p in divide(trajectory, budget, self.packs)]

    def score(
        self,
        passes: Sequence[Pass],
        old: Scored | None = None,
        reference: Scored | None = None,
        entropy: bool = False,
    ) -> Scored:
        mask_RT = None
        if self.learns_padding:
            replay, mask_RT = plan_with_padding(passes, self.vocabulary.pad, entropy, self.score_chunk, self.device)
        else:
            replay = plan(passes, self.vocabulary.pad, entropy, self.score_chunk, self.device, self.packs)
        for tell in self.before_forward:
            tell(replay)
        if replay.batch is None:
            logprob_N, entropy_N = torch.zeros(0, device=self.device), None
        else:
            # Rather than nothing: without a mask, transformers takes a jump in the position ids for the seam of packed
            # sequences. Padding is on the right, so causality hides it; rows end to end are told apart by their
            # lengths, and a mask of four axes is one that transformers does not make anew.
            rows: dict[str, Any] = {"attention_mask": torch.ones_like(replay.ids_LT) if mask_RT is None else mask_RT}
            if replay.row_lengths is not None:
                rows = {
                    "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),
                    "row_lengths": replay.row_lengths,
                }
            logprob_N, entropy_N = self.model(
                input_ids=replay.ids_LT, position_ids=replay.position_LT, decisions=replay.batch, **rows
            )
        behaviour_N = replay.behaviour_N
        _check_same(replay.target_count, old, "old")
        _check_same(replay.target_count, reference, "reference")
        base_N = old.logprob_N.detach() if old is not None else behaviour_N
        divergence_N = None
        if reference is not None:
            # k3 (Schulman, "Approximating KL Divergence", 2020): exp(r) - r - 1 with r = log ref - log new
            gap_N = reference.logprob_N.detach() - logprob_N
            divergence_N = torch.exp(gap_N) - gap_N - 1
        return Scored(
            replay.pass_N,
            replay.segment_N,
            replay.kind_N,
            logprob_N,
            behaviour_N,
            logprob_N - base_N,
            divergence_N,
            entropy_N,
        )

    def extra_losses(self, asked: ExtraLosses) -> list[ExtraLoss]:
        """See policy/extra_losses.py."""
        losses: list[ExtraLoss] = [LearnedPadding(self)] if asked.padding else []
        if asked.visual.weight:
            losses.append(CodebookLoss(self, asked.visual, asked.seed))
        return losses

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.has_adapters:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield
            return
        if self._frozen is None:
            if self._weights_version() != self._versions:
                raise ReferenceLost(
                    "the reference policy was first asked for after the weights had changed: call "
                    "policy.keep_reference() before the first update (a KL term does so by itself)"
                )
            self.keep_reference()
        assert self._frozen is not None
        trained = self.parameters()
        live = [parameter.data for parameter in trained]
        for parameter, frozen in zip(trained, self._frozen, strict=True):
            parameter.data = frozen
        try:
            yield
        finally:
            for parameter, data in zip(trained, live, strict=True):
                parameter.data = data

    def keep_reference(self) -> None:
        """Freeze a copy of the weights as they are now. With adapters nothing is copied: the base is the reference."""
        if not self.has_adapters:
            self._frozen = [parameter.detach().clone() for parameter in self.parameters()]

    def _weights_version(self) -> int:
        """Counts in-place changes, so that a reference taken too late is noticed."""
        return sum(parameter._version for parameter in self.parameters())

    # ---- files ----

    def save(self, folder: str | Path) -> None:
        """Write the released layout; adapters are merged into the weights."""
        save_model(self.core, self.vocabulary.tokenizer, folder, self.merged_state() if self.has_adapters else None)

    def merged_state(self) -> dict[str, Tensor]:
        """The weights under the model's own names, with adapters merged in."""
        merged: dict[str, Tensor] = {}
        for name, tensor in self.core.state_dict().items():
            if ".lora_" in name:
                continue
            if ".base_layer." in name:
                layer: Any = self.core.get_submodule(name.split(".base_layer.")[0])
                name = name.replace(".base_layer.", ".")
                if name.endswith(".weight"):
                    for adapter in layer.active_adapters:
                        tensor = tensor + layer.get_delta_weight(adapter).to(tensor.dtype)
            merged[name] = tensor.detach()
        return merged


def _check_same(count: int, scored: Scored | None, name: str) -> None:
    if scored is not None and len(scored.logprob_N) != count:
        raise ValueError(
            f"score: `{name}` holds {len(scored.logprob_N)} decisions, the trajectories {count}; it must "
            "come from the same call's trajectories"
        )


def _with_adapters(model: InterleavedChameleon, lora: LoraSection) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    check_adapters(model, lora)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
        ),
    )


def load(config: ChameleonPolicyConfig, words: Sequence[str] = ()) -> ChameleonPolicy:
    """The family's entry in policy/registry.py."""
    dtype: Any = getattr(torch, config.dtype)
    attention = ROWS if config.attn_implementation == "sdpa" else config.attn_implementation
    if config.path is None:
        model, tokenizer = tiny_model(config.tiny, words)
        model.to(dtype)  # type: ignore[arg-type]
        model.model.vqmodel.float()
        model.set_attn_implementation(attention)
    else:
        tokenizer = load_tokenizer(config.path)
        model = load_model(config.path, dtype, attention)
    model.to(torch.device(config.device)).eval()  # type: ignore[arg-type]
    model.model.vqmodel.requires_grad_(False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vocabulary = ChameleonVocabulary(tokenizer, model.model.vqmodel.codes_per_image, model.config.vocab_size)
    return ChameleonPolicy(model, vocabulary, config.score_chunk, config.lora)
