"""The warm start's trainer: a loss that `Policy.score` gives, whole checkpoints, and a log that people and files share.

TRL's SFTTrainer is the harness of a family whose model is one of transformers, with a tokenizer; transformers' own
Trainer that of any other.

Letters: N decisions of a batch, R roles.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from policy.base import Policy
from policy.extra_losses import ExtraLoss
from policy.scoring.changed import changed_weights
from runtime.errors import UserError
from runtime.interrupt import Interruption
from sft.checkpoints import WarmStartCheckpointError, prune, write_manifest, writing
from sft.config import SftConfig
from sft.losses import PADDING, learned, losses_of, weighted_cross_entropy
from sft.teacher_forcing import Example
from training.ranks import signal_anywhere
from training.tracking import Tracker

PROGRESS = "progress.pt"
KEEP_CHECKPOINTS = 2


def index_collator(rows: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
    """Which examples a batch is of, int64 [B]: they stay where they are."""
    return {"index": torch.tensor([row["index"] for row in rows])}


def trainer_of(policy: Policy, **kwargs: Any) -> WarmStart:
    """The trainer whose harness fits the policy's model; see WarmStart for the arguments."""
    model: Any = policy.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokenizer = getattr(policy.vocabulary, "tokenizer", None)
    if isinstance(base, PreTrainedModel) and tokenizer is not None:
        return InterleavedSftTrainer(policy, processing_class=tokenizer, **kwargs)
    return ModuleTrainer(policy, **kwargs)


class WarmStart(Trainer):
    """A Trainer whose loss is minus the weighted log-probs of demonstrated decisions, and the family's own losses.

    Args:
        examples: what the data set's indices are of.
        roles: the names of all roles, by which the loss is logged too; none: it is not.
        verdicts: names of `verdict_names`, by which it is logged besides.
        seed: of fresh weights in the family's losses.
    """

    def __init__(
        self,
        policy: Policy,
        section: SftConfig,
        examples: Sequence[Example],
        roles: Sequence[str] = (),
        verdicts: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.policy, self.section, self.examples = policy, section, examples
        self.roles = [*roles, PADDING] if section.labels == "release" and roles else list(roles)
        self.verdicts = list(verdicts)
        self.last: dict[str, float] = {}
        self.extra: list[ExtraLoss] = losses_of(policy, section.extra_losses(kwargs["args"].seed))
        self.means = Means(self.roles, [loss.name for loss in self.extra], self.verdicts)
        self._forward = vars(policy.model).get("forward")
        self._attached: list[ExtraLoss] = []
        for loss in self.extra:
            loss.attach()
            self._attached.append(loss)
        super().__init__(model=policy.model, data_collator=index_collator, **kwargs)
        self.remove_callback(PrinterCallback)  # the tracker and its listeners say it all
        # Our loss is a batch's own mean: batches that accumulate into a step are averaged by the Trainer.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False  # type: ignore[assignment]

    def detach(self) -> None:
        """Take the training-only parts off the model again, TRL's wrapper of its forward too."""
        model = self.accelerator.unwrap_model(self.model)
        vars(model).pop("forward", None)
        if self._forward is not None:
            model.forward = self._forward
        while self._attached:
            self._attached.pop().detach()
        self.policy.model.eval()

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = [self.examples[index] for index in inputs["index"].tolist()]
        passes = [one for example in batch for one in example.passes]
        with through(self.policy, model):
            scored = self.policy.score(passes)
            trajectories = [example.trajectory for example in batch]
            extra = [(loss, loss.loss(trajectories)) for loss in self.extra]
        logprob_N = scored.logprob_N
        by = learned(passes, scored, self.roles, self.section.role_weights, self.verdicts)
        weight_N = by.weight_N
        if self.section.changed_weight != 1:
            weight_N = weight_N * changed_weights(passes, scored, self.section.changed_weight)
        loss = weighted_cross_entropy(logprob_N, weight_N, by.code_N, self.section.image_weight)
        nll_N = -logprob_N.detach()
        self.means.add("loss_text", nll_N[~by.code_N])
        self.means.add("loss_image", nll_N[by.code_N])
        self.means.add_by_role(nll_N, by.role_N)
        self.means.add_by_verdict(nll_N, by.verdict_N)
        for own, value in extra:
            if value is not None:
                loss = loss + own.weight * value
                self.means.add(f"loss_{own.name}", value.detach()[None])
        self.means.add("loss", loss.detach()[None])
        self.means.tokens += sum(trajectory.num_tokens() for trajectory in trajectories)
        return (loss, {"logprob": logprob_N}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.means.take(self.accelerator)
            self.last = {name: float(value) for name, value in logs.items() if name != "epoch"}
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(str(self.args.output_dir))
        folder = root / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # half-written, by a run that was killed
        self.accelerator.wait_for_everyone()
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                state = self.means.state(self.accelerator)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    torch.save({"means": state, "losses": self._loss_states()}, folder / PROGRESS)
                    write_manifest(folder)
                    prune(root, KEEP_CHECKPOINTS)
        except WarmStartCheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def resume(self, checkpoint: Path) -> None:
        """Take up what transformers' own files don't hold. Call before train(resume_from_checkpoint=...)."""
        state = torch.load(checkpoint / PROGRESS, map_location="cpu", weights_only=True)
        if self.is_world_process_zero():
            self.means.load(state["means"])
        saved = state.get("losses", {})
        if state.get("projection") is not None:  # as release 0.1 wrote the only loss that it had
            saved = {"visual": {"form": "twgi, default", "state": state["projection"]}}
        self._load_losses(checkpoint, saved)

    def _loss_states(self) -> dict[str, dict[str, Any]]:
        """The family's losses by name: their form, and what they hold beside the model's weights."""
        return {loss.name: {"form": loss.form, "state": loss.state()} for loss in self.extra}

    def _load_losses(self, checkpoint: Path, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up the family's losses. Another one, or none, would be another run.

        Raises:
            UserError: the checkpoint holds another loss than the recipe asks for.
        """
        own = {loss.name: loss for loss in self.extra}
        for name in (*own, *(name for name in saved if name not in own)):
            asked = own[name].form if name in own else "none"
            held = saved[name]["form"] if name in saved else "none"
            if asked != held:
                raise UserError(
                    f"{checkpoint}: its {name} loss is {held}, that of sft.{name}_loss is {asked}; resume with the "
                    "recipe that it was written with, or start anew in another run_dir"
                )
            own[name].load(dict(saved[name]["state"]))

    def load_finished(self, checkpoint: Path) -> None:
        """The weights and the last metrics of a checkpoint that nothing is to be trained after: a run that was killed
        between its last checkpoint and its end."""
        if self.is_deepspeed_enabled:  # its weights are in its own engine, which only train() makes
            raise WarmStartCheckpointError(
                f"{checkpoint} is the last of its run, but the model was not saved from it; raise "
                "sft.max_steps to go on, or write the model with the zero_to_fp32.py in that folder"
            )
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        logged = [row for row in self.state.log_history if "loss" in row]
        self.last = (
            {name: float(logged[-1][name]) for name in logged[-1] if name not in ("epoch", "step")} if logged else {}
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints get no model card: a card is the author's to write."""


class InterleavedSftTrainer(WarmStart, SFTTrainer):
    """On TRL's SFTTrainer, for models of transformers."""


class ModuleTrainer(WarmStart):
    """On transformers' Trainer, for models that are none of transformers'."""


@contextmanager
def through(policy: Policy, model: nn.Module) -> Iterator[None]:
    """Within it the policy scores through whatever wraps its model (DDP, FSDP, DeepSpeed), whose hooks see every
    forward."""
    own = policy.model
    if own is model:
        yield
        return
    policy.model = model
    try:
        yield
    finally:
        policy.model = own


class Means:
    """Losses since the last line of metrics: over ids where they are ids', over batches where they are batches'.

    `loss/<role>` is over the role's learned ids, each counted once whatever it weighs in the total; `loss/<role>/right`
    and `loss/<role>/wrong` are over those that speak of a right or a wrong image; `loss_<name>` is the family's loss of
    that name.
    """

    def __init__(self, roles: Sequence[str] = (), extra: Sequence[str] = (), verdicts: Sequence[str] = ()) -> None:
        self.names = ("loss", "loss_text", "loss_image", *(f"loss_{name}" for name in extra))
        self.by_role = [f"loss/{role}" for role in roles]
        self.by_verdict = [f"loss/{verdict}" for verdict in verdicts]
        self.sums = self._empty()  # sum, count
        self.tokens = 0  # of this process, since it was last asked

    def _empty(self) -> dict[str, list[float]]:
        return {name: [0.0, 0.0] for name in (*self.names, *self.by_role, *self.by_verdict)}

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name][0] += float(values.double().sum())
        self.sums[name][1] += len(values)

    def add_by_role(self, values_N: Tensor, role_N: Tensor) -> None:
        self._add_by(self.by_role, values_N, role_N)

    def add_by_verdict(self, values_N: Tensor, verdict_N: Tensor) -> None:
        self._add_by(self.by_verdict, values_N, verdict_N)

    def _add_by(self, names: Sequence[str], values_N: Tensor, role_N: Tensor) -> None:
        if not names:
            return
        number_R = torch.arange(len(names), device=role_N.device)
        member_RN = (role_N == number_R[:, None]).double()
        # One product and one copy to the host, however many roles there are; the same in every run, on a GPU too.
        sums_R2 = member_RN @ torch.stack([values_N.double(), torch.ones_like(values_N, dtype=torch.float64)], 1)
        for name, (total, count) in zip(names, sums_R2.tolist(), strict=True):
            self.sums[name][0] += total
            self.sums[name][1] += count

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes of what was added; starts anew."""
        means = {name: total / count for name, (total, count) in self.state(accelerator).items() if count}
        self.sums = self._empty()
        return means

    def state(self, accelerator: Any) -> dict[str, list[float]]:
        """Sums and counts over all processes."""
        if accelerator.num_processes == 1:
            return {name: list(pair) for name, pair in self.sums.items()}
        # float32: not every backend adds doubles
        sums_K2 = torch.tensor(list(self.sums.values()), device=accelerator.device)
        return dict(zip(self.sums, accelerator.reduce(sums_K2, "sum").tolist(), strict=True))

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take up a state() again; what it does not know of, as a release without roles wrote it, begins at nothing."""
        self.sums = {name: list(state.get(name, pair)) for name, pair in self._empty().items()}


class Mirror(TrainerCallback):
    """The trainer's log as sft/* metrics; the steps between are shown, not written. First process only."""

    def __init__(self, tracker: Tracker, means: Means) -> None:
        self.tracker, self.means = tracker, means
        self._since: float | None = None
        self._tokens = 0
        self._seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = self._since or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._seconds += now - (self._since or now)
        self._since = None  # what evaluation, logging and saving take is not the step's
        self._tokens += self.means.tokens
        self.means.tokens = 0
        control.should_log |= state.global_step >= state.max_steps
        if not control.should_log:  # else on_log is next
            total, count = self.means.sums["loss"]
            self.tracker.show(state.global_step, {"sft/loss": total / count if count else math.nan, **self._rate()})

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            metrics = {f"sft/{name}": value for name, value in logs.items() if name != "epoch"}
            self.tracker.log(state.global_step, metrics | self._rate())
            self._tokens, self._seconds = 0, 0.0

    def _rate(self) -> dict[str, float]:
        """Ids a second of the first process, padding left out."""
        return {"sft/tokens_per_s": self._tokens / self._seconds} if self._seconds else {}


class StopAtSignal(TrainerCallback):
    """After a signal the step is finished and saved, on every process at the same one."""

    def __init__(self, accelerator: Any, interruption: Interruption) -> None:
        self.accelerator, self.interruption = accelerator, interruption
        self.stopped = 0  # by which signal; 0: by none

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number = signal_anywhere(self.accelerator, self.interruption.signal)
        if number and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped = number
