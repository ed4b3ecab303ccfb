"""TRL's SFTTrainer with a loss that sees visual codes, whole checkpoints, and a log that people and files share.

Letters: L lines of a batch, T ids, N learned ids, M visual codes of the visual loss, R roles, D width of the model,
V vocabulary.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from policy.chameleon.family import ChameleonPolicy
from policy.chameleon.model import DecisionBatch
from policy.scoring.visual_losses import CodeTargets
from runtime.errors import UserError
from runtime.interrupt import Interruption
from sft.checkpoints import WarmStartCheckpointError, prune, write_manifest, writing
from sft.config import SftConfig
from sft.losses import targets, visual_loss, visual_targets, weighted_cross_entropy
from training.ranks import signal_anywhere
from training.tracking import Tracker

PROGRESS = "progress.pt"
KEEP_CHECKPOINTS = 2


class InterleavedSftTrainer(SFTTrainer):
    """SFTTrainer whose loss sees visual codes: unmasked image logits, at learned positions only.

    `roles`: names of the rows' role numbers, by which the loss is logged too.
    """

    def __init__(self, policy: ChameleonPolicy, section: SftConfig, roles: Sequence[str] = (), **kwargs: Any) -> None:
        vocabulary = policy.vocabulary
        self.section = section
        self.score_chunk = policy.score_chunk
        self.pad = vocabulary.pad
        self.vocabulary = vocabulary
        self.code_of_V = torch.full((vocabulary.size,), -1, dtype=torch.int64)  # -1: no visual code
        self.code_of_V[torch.as_tensor(vocabulary.code_ids, dtype=torch.int64)] = torch.arange(len(vocabulary.code_ids))
        self.last: dict[str, float] = {}
        self.means = Means(roles)
        self.core: Any = policy.core
        self._codes: CodeTargets | None = None
        self._visual: Tensor | None = None
        self._hook: Any = None
        if section.visual_loss.weight:
            # Part of the model while it trains, so that the optimiser, checkpoints and every wrapper see it.
            # The seed makes it the same on every process.
            self.core.visual_loss = visual_loss(section.visual_loss, policy, kwargs["args"].seed)
            self._hook = self.core.model.register_forward_hook(self._take_visual_loss)
        self._forward = vars(policy.model).get("forward")
        super().__init__(**kwargs)
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
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del self.core.visual_loss
        self.core.eval()

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels_LT = inputs["labels"]
        self.code_of_V = self.code_of_V.to(labels_LT.device)
        learned = targets(labels_LT, inputs["weights"], self.code_of_V >= 0)
        if self._hook is not None:
            self._codes = visual_targets(
                self.section.visual_loss, self.vocabulary, self.code_of_V, inputs["input_ids"], labels_LT
            )
        count = len(learned.id_N)
        batch = DecisionBatch(
            index_KN=learned.before_N[None],
            weight_KN=None,
            target_N=learned.id_N,
            temperature_N=torch.ones(count, device=labels_LT.device),
            allowed_N=torch.full((count,), -1, device=labels_LT.device),
            sets=(),
            chunk=self.score_chunk,
        )
        logprob_N, _ = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            decisions=batch,
        )
        loss = weighted_cross_entropy(logprob_N, learned.weight_N, learned.image_N, self.section.image_weight)
        nll_N = -logprob_N.detach()
        self.means.add("loss_text", nll_N[~learned.image_N])
        self.means.add("loss_image", nll_N[learned.image_N])
        self.means.add_by_role(nll_N, inputs["roles"].flatten()[learned.before_N + 1])
        if self._visual is not None:
            loss = loss + self.section.visual_loss.weight * self._visual
            self.means.add("loss_visual", self._visual.detach()[None])
            self._visual = None
        self.means.add("loss", loss.detach()[None])
        self.means.tokens += int((inputs["input_ids"] != self.pad).sum())
        return (loss, {"logprob": logprob_N}) if return_outputs else loss

    def _take_visual_loss(self, module: Any, args: Any, output: Any) -> None:
        # Inside the model's forward, where wrappers such as FSDP have the weights of projection and head at hand.
        codes = self._codes
        assert codes is not None
        hidden_MD = output[0].reshape(-1, output[0].shape[-1])[codes.at_M]
        self._visual = self.core.visual_loss(hidden_MD, codes.code_M, self.core.lm_head.weight)

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
                    torch.save({"means": state, "visual_loss": self._visual_state()}, folder / PROGRESS)
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
        saved = state.get("visual_loss")
        if saved is None and state.get("projection") is not None:  # as release 0.1 wrote the only one it had
            saved = {"kind": "twgi", "variant": "default", "state": state["projection"]}
        self._load_visual_state(checkpoint, saved)

    def _visual_state(self) -> dict[str, Any] | None:
        """The visual loss's name, variant, and projection or table; None: the run has none."""
        if self._hook is None:
            return None
        config = self.section.visual_loss
        return {"kind": config.kind, "variant": config.variant, "state": self.core.visual_loss.state_dict()}

    def _load_visual_state(self, checkpoint: Path, saved: Mapping[str, Any] | None) -> None:
        """Take up the visual loss. Another one, or none, would be another run.

        Raises:
            UserError: the checkpoint holds another visual loss than the recipe names.
        """
        config = self.section.visual_loss
        asked = f"{config.kind}, {config.variant}" if config.weight else "none"
        held = f"{saved['kind']}, {saved['variant']}" if saved else "none"
        if asked != held:
            raise UserError(
                f"{checkpoint}: its visual loss is {held}, that of sft.visual_loss is {asked}; resume with the recipe "
                "that it was written with, or start anew in another run_dir"
            )
        if saved:
            self.core.visual_loss.load_state_dict(saved["state"])

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


class Means:
    """Losses since the last line of metrics: over ids where they are ids', over batches where they are batches'.

    `loss/<role>` is over the role's learned ids, each counted once whatever it weighs in the total.
    """

    NAMES = ("loss", "loss_text", "loss_image", "loss_visual")

    def __init__(self, roles: Sequence[str] = ()) -> None:
        self.by_role = [f"loss/{role}" for role in roles]
        self.sums = self._empty()  # sum, count
        self.tokens = 0  # of this process, since it was last asked

    def _empty(self) -> dict[str, list[float]]:
        return {name: [0.0, 0.0] for name in (*self.NAMES, *self.by_role)}

    def add(self, name: str, values: Tensor) -> None:
        self.sums[name][0] += float(values.double().sum())
        self.sums[name][1] += len(values)

    def add_by_role(self, values_N: Tensor, role_N: Tensor) -> None:
        if not self.by_role:
            return
        number_R = torch.arange(len(self.by_role), device=role_N.device)
        member_RN = (role_N == number_R[:, None]).double()
        # One product and one copy to the host, however many roles there are; the same in every run, on a GPU too.
        sums_R2 = member_RN @ torch.stack([values_N.double(), torch.ones_like(values_N, dtype=torch.float64)], 1)
        for name, (total, count) in zip(self.by_role, sums_R2.tolist(), strict=True):
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
