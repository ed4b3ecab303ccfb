"""Credited groups in, an updated policy out: replay, loss, gradient, step. The loop around it is grpo.py.

It runs on every process alike, each with all groups (batches.py divides them). Gradients are averaged by whatever
accelerate wraps the model in, and losses are weighted by the counts of the whole batch, so that N processes give the
losses and weights of one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import get_scheduler

from policy.base import Pass, Policy, Scored
from policy.scoring.changed import changed_weights, check_codes
from record.trajectory import DecisionKind, Trajectory
from rl.batches import MicroBatch, plan, scored_decisions, share, trainable
from rl.config import FLOW_EPSILON, ClipConfig, GrpoConfig, Kind
from rl.flow_decisions import with_flow_terms
from rl.inexact import any_inexact, checked_gap, mean_gap_by_role, sampling_metrics
from rl.kept_forwards import KeptForward, KeptUpdate
from rl.ledger import Group
from rl.losses import SUMS, ClipRange, LossSettings, ScoredDecisions, policy_loss, summarise
from rl.packing import tell_over_budget
from rl.trainer_state import TrainingError, check_names, checked_start, restore, starting_weights, state_of
from rollout.weights.wire import fingerprint
from training.precision import half_precision
from training.random_state import set_random_state
from training.ranks import rank_local

logger = logging.getLogger(__name__)


class _Scorer(nn.Module):
    """`policy.score` as a module's forward, so that what accelerate wraps sees every pass go through it."""

    def __init__(self, policy: Policy, accelerator: Accelerator) -> None:
        super().__init__()
        self.model = policy.model
        self._score = policy.score
        self._accelerator = accelerator

    def forward(self, passes: Sequence[Pass], **kwargs: Any) -> Scored:
        with rank_local(self._accelerator):
            return self._score(passes, **kwargs)


class Trainer:
    """The optimiser of one policy.

    Args:
        policy: only parameters that require a gradient are trained, which with adapters are the adapters rank_local.
        config: see GrpoConfig.
        accelerator: with gradient_accumulation_steps 1: micro-batches are accumulated here.
        source: where the policy's weights came from, for people to read; None: not known.

    Attributes:
        version: of the weights; one more after every update that moved them.
    """

    def __init__(
        self, policy: Policy, config: GrpoConfig, accelerator: Accelerator, source: Path | str | None = None
    ) -> None:
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # accelerate's backward is then the engine's, which steps at every micro-batch.
            raise TrainingError(
                "GRPO runs with DDP or FSDP (configs/accelerate), not with DeepSpeed, which would step "
                "at every micro-batch; the DeepSpeed preset is for `underdrawing sft`"
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise TrainingError(
                "accelerate's gradient_accumulation_steps must be 1; the trainer accumulates by itself "
                "(grpo.tokens_per_micro_batch)"
            )
        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.version = 0
        # Dropout would make the log-probs of the same weights differ, and the ratio of the first update is 1.
        for module in policy.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        parameters = list(self._trained().values())
        if not parameters:
            raise TrainingError("no parameter of the policy requires a gradient: there is nothing to train")
        if (half := half_precision(policy.model)) is not None:
            raise TrainingError(half)
        if config.changed_weight != 1:
            check_codes(policy, "grpo.changed_weight")
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        self._start = starting_weights(policy, source)
        policy.model.to(accelerator.device)
        if config.beta:
            with policy.reference():  # the weights as they are now, before anything wraps, moves or overwrites them
                pass
        self.scorer, self.optimizer = accelerator.prepare(_Scorer(policy, accelerator), optimizer)
        # Not prepared: accelerate would step a prepared schedule once for every process.
        self.scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps * config.num_iterations * config.num_minibatches,
        )
        self.settings = loss_settings(config)
        self._on_policy = False  # until proven on the first rollouts
        self._told: set[tuple[str, ...]] = set()  # roles of passes over the budget, each told once
        policy.model.eval()

    @property
    def optimizer_steps(self) -> int:
        """Taken so far, in all updates."""
        return self.scheduler.last_epoch

    # ---- checks ----
    def check_on_policy(self, trajectories: Sequence[Trajectory]) -> bool:
        """Once in a process's life, on the first trajectories that there are: see on_policy_gap. Returns whether it was
        done now. Collective."""
        due = bool(trajectories) and not self._on_policy
        if due:
            exact = [t for t in trajectories if t.exact]
            if exact:
                logger.info("on-policy gap: %.2g", self.on_policy_gap(exact))
            if len(exact) < len(trajectories):
                gap = self.sampling_gap([t for t in trajectories if not t.exact])
                logger.info("the writer's log-probs are off the trainer's by %.2g on average", gap)
            self._on_policy = True
        return due

    def sampling_gap(self, trajectories: Sequence[Trajectory]) -> float:
        """The largest mean |trainer's - recorded log-prob| of a role, where the recorded ones are another engine's.
        Collective.

        Raises:
            SamplingGapError: it is past grpo.sampling_tolerance.
        """
        trajectories = [t for t in trajectories if scored_decisions(t).any()]
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        shares = share(self.policy, trajectories, self.config, processes, rank)
        scored = [([one.trajectory for one in passes], self.score(passes)) for passes in shares]
        return checked_gap(mean_gap_by_role(self.accelerator, scored), self.config.sampling_tolerance)

    def on_policy_gap(self, trajectories: Sequence[Trajectory]) -> float:
        """Largest |new - old log-prob| of trajectories that the present weights sampled: 0 but for rounding.

        Every process scores its share and returns the largest of all.

        Raises:
            TrainingError: it is past the tolerance, so sampling and scoring do not follow the same law.
        """
        trajectories = [t for t in trajectories if scored_decisions(t).any()]
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        worst, position = 0.0, ""
        for passes in share(self.policy, trajectories, self.config, processes, rank):
            scored = self.score(passes)
            gap_N = (scored.logprob_N - scored.behaviour_N).abs().nan_to_num(nan=float("inf"))
            if float(gap_N.max()) > worst:
                worst, at = float(gap_N.max()), int(gap_N.argmax())
                position = _position(passes[int(scored.pass_N[at])].trajectory, scored, at)
        worst, position = max(gather_object([(worst, position)]))
        if worst > self._tolerance():
            raise TrainingError(
                f"sampling and scoring disagree: the largest difference of log-probs under the same weights is "
                f"{worst:.3g}, over the tolerance of {self._tolerance():g} (grpo.on_policy_tolerance). Worst at "
                f"{position}. Look for sampling parameters (temperature, allowed set, guidance), a context or a "
                f"precision that differs"
            )
        return worst

    def _tolerance(self) -> float:
        if self.config.on_policy_tolerance is not None:
            return self.config.on_policy_tolerance
        full = all(p.dtype == torch.float32 for p in self.policy.model.parameters() if p.is_floating_point())
        return 1e-4 if full and self.accelerator.mixed_precision == "no" else 0.1

    # ---- learning ----
    def update(self, groups: Sequence[Group], kept: KeptUpdate | None = None) -> dict[str, float]:
        """num_iterations passes of num_minibatches optimiser steps over the credited groups.

        Args:
            kept: is filled with what a replay of this update needs; None: nothing is kept.

        Returns metrics, equal on every process: loss/*, kl, clip/*, entropy/*, ratio/max, importance/*, grad_norm,
        learning_rate, trained/*, optimizer_steps, time/update, perf/trained_tokens_per_s; on_policy_gap where the
        trajectories are the present weights' own and exact; sampling/* where some are not exact (rl/inexact.py).
        Without a group to train on, nothing moves.

        Raises:
            TrainingError: a loss or gradient is not finite, or the policy scored another number of decisions than
                the record holds.
        """
        started, config = time.perf_counter(), self.config
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        if kept is not None:
            kept.weights = self.trained_fingerprint()
        parts = [trainable(part, config) for part in split_groups(groups, config.num_minibatches)]
        minibatches = [plan(self.policy, part, config, processes, rank) for part in parts if part]
        scored = [p for batches in minibatches for batch in batches for p in batch.passes]
        tell_over_budget(scored, config.tokens_per_micro_batch, self._told)
        metrics = {"optimizer_steps": 0.0, "learning_rate": self.scheduler.get_last_lr()[0]}
        if not minibatches:
            return metrics | {"time/update": time.perf_counter() - started}

        stale = any(s.version != self.version for part in parts for t in part for s in t.segments if s.trained)
        # Ratios are to the weights at the start of this update. The recorded log-probs are theirs if they sampled
        # and one step is all there is; else they are scored here, in the very passes in which they will be compared.
        # The recorded ones of an inexact writer are not theirs either way.
        inexact = any(any_inexact(part) for part in parts)
        rescored = stale or inexact or len(minibatches) * config.num_iterations > 1
        old = [[self.score(batch.passes) if rescored else None for batch in batches] for batches in minibatches]
        reference = self._reference(minibatches)

        sums_KM, losses, norms, worst, gap = _no_sums(self.accelerator.device), [], [], 0.0, 0.0
        self.policy.model.train()
        for iteration in range(config.num_iterations):
            for number, batches in enumerate(minibatches):
                forwards: list[KeptForward] | None = None if kept is None else []
                loss_2, minibatch_sums_KM, log_ratio = self._accumulate(
                    batches, old[number], reference[number], forwards
                )
                if kept is not None:
                    kept.forwards |= {(iteration, number, rank, at): one for at, one in enumerate(forwards or ())}
                if iteration == number == 0:
                    gap = _gap(old) if rescored else log_ratio
                norms.append(self._step())
                sums_KM, worst = sums_KM + minibatch_sums_KM, max(worst, log_ratio)
                losses.append(loss_2)
        self.policy.model.eval()
        self.version += 1

        sums_KM = self.accelerator.reduce(sums_KM, "sum").cpu()
        total, policy = self.accelerator.reduce(torch.stack(losses), "sum").mean(0).tolist()
        worst, gap = self._largest(worst, gap)
        seconds, tokens = time.perf_counter() - started, sum(t.num_tokens() for part in parts for t in part)
        metrics |= summarise(sums_KM)
        metrics |= {
            "loss/total": total,
            "loss/policy": policy,
            "loss/kl": total - policy,
            "log_ratio/max": worst,
            "grad_norm": float(np.mean(norms)),
            "optimizer_steps": float(len(norms)),
            "trained/trajectories": float(sum(map(len, parts))),
            "trained/tokens": float(tokens),
            "time/update": seconds,
            "perf/trained_tokens_per_s": tokens * config.num_iterations / seconds,
        }
        if inexact:
            all_batches, all_old = [b for part in minibatches for b in part], [s for part in old for s in part]
            metrics |= sampling_metrics(self.accelerator, all_batches, all_old, self.settings, self._kind_weights())
        return metrics if stale or inexact else metrics | {"on_policy_gap": gap}

    def score(self, passes: Sequence[Pass]) -> Scored:
        """The present weights' log-probs, without gradient. All processes call it equally often."""
        with torch.no_grad(), self.accelerator.autocast():
            return self.scorer(passes)

    def _reference(self, minibatches: list[list[MicroBatch]]) -> list[list[Scored | None]]:
        if not self.config.beta:
            return [[None] * len(batches) for batches in minibatches]
        with self.policy.reference():
            return [[self.score(batch.passes) for batch in batches] for batches in minibatches]

    def _accumulate(
        self,
        batches: list[MicroBatch],
        old: list[Scored | None],
        reference: list[Scored | None],
        kept: list[KeptForward] | None = None,
    ) -> tuple[Tensor, Tensor, float]:
        """Add up gradients over micro-batches. Returns (total, policy) losses [2], sums_KM, largest |log-ratio|."""
        losses_2, sums_KM = torch.zeros(2, dtype=torch.float64), _no_sums(self.accelerator.device)
        worst = 0.0
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self.accelerator.no_sync(self.scorer) if not last else nullcontext():
                with self.accelerator.autocast():
                    scored = self.scorer(batch.passes, old=old[number], reference=reference[number], entropy=True)
                with rank_local(self.accelerator):
                    decisions = self._decisions(batch, scored, old[number], reference[number])
                if kept is not None:
                    kept.append(KeptForward.of(batch, scored, decisions))
                loss = policy_loss(decisions, self.settings)
                # Gradients are averaged over processes, and the loss is already a share of the whole batch's sum.
                self.accelerator.backward(loss.loss * self.accelerator.num_processes)
            losses_2 += torch.stack([loss.loss.detach(), loss.policy]).double().cpu()
            sums_KM = sums_KM + loss.sums_KM
            worst = max(worst, float(scored.log_ratio_N.detach().abs().max()))
        return losses_2.to(self.accelerator.device), sums_KM, worst

    def _decisions(
        self, batch: MicroBatch, scored: Scored, old: Scored | None, reference: Scored | None
    ) -> ScoredDecisions:
        if len(scored.logprob_N) != batch.decisions:
            raise TrainingError(
                f"the policy scored {len(scored.logprob_N)} decisions where the record holds "
                f"{batch.decisions} trained ones: losses would be weighted wrongly"
            )
        device = scored.logprob_N.device
        at = (scored.pass_N, scored.segment_N)
        weight_K = self._kind_weights().to(device)
        weight_N = batch.weight_PS.to(device)[at] * weight_K[scored.kind_N]
        if self.config.changed_weight != 1:
            weight_N = weight_N * changed_weights(batch.passes, scored, self.config.changed_weight)
        decisions = ScoredDecisions(
            log_ratio_N=scored.log_ratio_N,
            advantage_N=batch.advantage_PS.to(device)[at],
            kind_N=scored.kind_N,
            weight_N=weight_N,
            trajectory_N=batch.trajectory_P.to(device)[scored.pass_N],
            divergence_N=scored.divergence_N,
            entropy_N=scored.entropy_N,
            behaviour_log_ratio_N=None if old is None else old.logprob_N - old.behaviour_N,
        )
        return with_flow_terms(decisions, scored, old, reference, batch.passes, self.config.flow)

    def _kind_weights(self) -> Tensor:
        return kind_weights(self.config)

    def _step(self) -> float:
        parameters = list(self._trained().values())
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm))
        if not np.isfinite(norm):
            raise TrainingError(
                f"the gradient's norm is {norm} after version {self.version}: the weights were left as "
                f"they are. Try a lower grpo.learning_rate, or grpo.delta to bound the ratios"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return norm

    def _largest(self, *values: float) -> list[float]:
        local_1V = torch.tensor([values], dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.gather(local_1V).max(0).values.tolist()

    # ---- state ----
    @property
    def start(self) -> dict[str, str | None]:
        """Where the weights came from, and fingerprints of those that are not trained and of those that are."""
        return self._start

    def trained_fingerprint(self) -> str | None:
        """Of the trained parameters as they are now; None where each process holds a part of them alone."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return None
        return fingerprint({name: p.detach() for name, p in self._trained().items()})

    def state(self) -> dict[str, Any]:
        """Trained parameters, optimiser, schedule, version, what the run started from, and every process's random
        state. All processes call it."""
        learned = state_of(self._trained(), self.optimizer, self.scheduler)
        return learned | {"version": self.version, "start": self._start}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state() again; a process that it does not know of takes another's random state.

        Moments and the place in the schedule are the state's; rates, betas, epsilon and decay are the config's, so
        that a run resumed with others goes on with those.

        Raises:
            TrainingError: the parameters are not those of this policy; the sentence names the first one. Or the weights
                that the policy was built from are not those that the run started from.
        """
        check_names(self._trained(), state)
        if "start" in state:
            self._start = checked_start(self._start, state["start"], compared=bool(self.config.beta))
        restore(self._trained(), self.optimizer, self.scheduler, state)
        self.version = state["version"]
        set_random_state(state["random"][self.accelerator.process_index % len(state["random"])])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}


def loss_settings(config: GrpoConfig) -> LossSettings:
    """Clip ranges by kind, and the rest of what the loss must know."""
    clip = {}
    for kind in DecisionKind:
        source: GrpoConfig | ClipConfig = config
        if kind == DecisionKind.FLOW:
            source = ClipConfig(epsilon=FLOW_EPSILON[config.flow.ratio])
        source = config.clip_by_kind.get(_name(kind), source)
        high = source.epsilon if source.epsilon_high is None else source.epsilon_high
        clip[kind] = ClipRange(source.epsilon, high, source.delta)
    return LossSettings(
        clip,
        config.beta,
        config.use_bias_correction_kl,
        config.importance_sampling_level,
        config.importance_sampling_cap,
        config.importance_sampling_mode,
    )


def _name(kind: DecisionKind) -> Kind:
    return cast(Kind, kind.name.lower())


def kind_weights(config: GrpoConfig) -> Tensor:
    """weight_K, float32."""
    return torch.tensor([config.kind_weights.get(_name(kind), 1.0) for kind in DecisionKind])


def split_groups(groups: Sequence[Group], parts: int) -> list[Sequence[Group]]:
    """Consecutive parts, whole groups each, of nearly equal number."""
    edges = np.linspace(0, len(groups), parts + 1).round().astype(int)
    return [groups[start:stop] for start, stop in zip(edges[:-1], edges[1:], strict=True)]


def _gap(scored: list[list[Scored | None]]) -> float:
    return max(float((s.logprob_N - s.behaviour_N).abs().max()) for batch in scored for s in batch if s is not None)


def _position(trajectory: Trajectory, scored: Scored, at: int) -> str:
    segment, kind = int(scored.segment_N[at]), DecisionKind(int(scored.kind_N[at]))
    return (
        f"trajectory {trajectory.key}, segment {segment} ({trajectory.segments[segment].role}), a "
        f"{kind.name.lower()}: {float(scored.behaviour_N[at]):.6f} when sampled, {float(scored.logprob_N[at]):.6f} "
        f"when scored"
    )


def _no_sums(device: torch.device) -> Tensor:
    return torch.zeros(len(DecisionKind), len(SUMS), dtype=torch.float64, device=device)
