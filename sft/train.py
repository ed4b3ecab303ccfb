"""The warm start on TRL's SFTTrainer: demonstrations -> weights that write and draw in the recipe's format.

Multi-process runs come from the launcher (`accelerate launch`), as with any SFTTrainer.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from policy.chameleon.family import ChameleonPolicy
from policy.chameleon.model import DecisionBatch
from rollout.errors import UserError
from rollout.formats.base import ThoughtFormat
from rollout.formats.render import render
from rollout.trajectory import Trajectory
from sft.config import SftConfig
from sft.data import Collator, training_rows
from sft.losses import VisualReconstruction, targets, weighted_cross_entropy
from tasks.base import Demonstration, Task
from underdrawing.tracking import Tracker

log = logging.getLogger(__name__)
SEE_BATCH = 256


def demonstrate(task: Task, fmt: ThoughtFormat, policy: ChameleonPolicy, config: SftConfig,
                seed: int) -> list[Trajectory]:
    """The trajectories to learn from: the task's demonstrations rendered in the format, or the stored ones."""
    if config.data is not None:
        from rollout.store import load_trajectories

        return load_trajectories(Path(config.data))
    demonstrations = task.demonstrations(fmt.name, config.demonstrations, seed)
    return render_all(demonstrations, fmt, policy, config.learn_mistakes)


def render_all(demonstrations: Sequence[Demonstration], fmt: ThoughtFormat, policy: ChameleonPolicy,
               learn_mistakes: bool = False) -> list[Trajectory]:
    """Demonstrations with their pictures seen by the policy's visual tokenizer, in batches."""
    pictures = [part.picture for d in demonstrations for part in d.parts if part.picture is not None]
    codes = []
    with torch.inference_mode():
        for begin in range(0, len(pictures), SEE_BATCH):
            codes += policy.see(pictures[begin : begin + SEE_BATCH])
    trajectories, at = [], 0
    for group, d in enumerate(demonstrations):
        count = sum(part.picture is not None for part in d.parts)
        trajectory = render(fmt, d.prompt, d.record, d.parts, policy.vocabulary, codes[at : at + count])
        trajectory.group = group
        if not learn_mistakes:
            # A picture that is wrong on purpose is there to be inspected and repaired, not to be imitated.
            for index in d.mistakes:
                trajectory.segments[index + 1].trained = False
        trajectories.append(trajectory)
        at += count
    return trajectories


def warm_start(policy: ChameleonPolicy, trajectories: Sequence[Trajectory], config: SftConfig, run_dir: Path, *,
               seed: int = 0, tracker: Tracker | None = None, resume: bool = False) -> dict[str, float]:
    """Train and save to run_dir/sft/model (the released layout). Returns the last logged metrics.

    Args:
        tracker: metrics go here as sft/*; rank 0 only.
        resume: go on from the newest checkpoint under run_dir/sft, if there is one.

    Raises:
        UserError: nothing to learn from, or a demonstration data folder that cannot be read.
    """
    max_length = min(config.max_length or policy.max_length, policy.max_length)
    rows, cut = training_rows(trajectories, max_length)
    if cut.shortened:
        log.warning("%d of %d demonstrations are longer than %d ids: each lost whole segments from its end",
                    cut.shortened, cut.rows, max_length)
    output_dir = Path(run_dir) / "sft"
    checkpoint = get_last_checkpoint(str(output_dir)) if resume and output_dir.is_dir() else None
    collator = Collator(policy.vocabulary.pad)
    trainer = InterleavedSftTrainer(
        policy=policy, section=config, model=policy.model,
        train_dataset=Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows]),
        data_collator=collator, processing_class=policy.vocabulary.tokenizer,
        args=_arguments(config, output_dir, seed), callbacks=[_Mirror(tracker)] if tracker else [])
    trainer.remove_callback(PrinterCallback)  # the tracker and its listeners say it all
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.detach()
    if trainer.accelerator.is_main_process:
        policy.save(output_dir / "model")
        (output_dir / "done.json").write_text(json.dumps({"steps": trainer.state.global_step, **trainer.last}))
    trainer.accelerator.wait_for_everyone()
    return trainer.last


class InterleavedSftTrainer(SFTTrainer):
    """SFTTrainer whose loss sees visual codes: unmasked image logits, at learned positions only."""

    def __init__(self, policy: ChameleonPolicy, section: SftConfig, **kwargs: Any) -> None:
        is_code_V = torch.zeros(policy.vocabulary.size, dtype=torch.bool)
        code_ids_K = torch.as_tensor(policy.vocabulary.code_ids, dtype=torch.int64)
        is_code_V[code_ids_K] = True
        self.section = section
        self.is_code_V = is_code_V.to(policy.device)
        self.code_of_V = torch.full((policy.vocabulary.size,), -1, device=policy.device)
        self.code_of_V[code_ids_K] = torch.arange(len(code_ids_K), device=policy.device)
        self.last: dict[str, float] = {}
        self.core = policy.core
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._hidden: Tensor | None = None
        self._hook = None
        if section.visual_loss:
            # Part of the model while it trains, so that the optimiser, checkpoints and every wrapper see it.
            codebook_KE = self.core.model.vqmodel.quantize.embedding.weight
            self.core.visual_reconstruction = VisualReconstruction(self.core.config.hidden_size, codebook_KE)
            self.core.visual_reconstruction.to(policy.device)
            self._hook = self.core.model.register_forward_hook(self._keep_hidden)
        super().__init__(**kwargs)

    def detach(self) -> None:
        """Take the training-only parts off the model again."""
        if self._hook is not None:
            self._hook.remove()
            del self.core.visual_reconstruction

    def _keep_hidden(self, module: Any, args: Any, output: Any) -> None:
        self._hidden = output[0]

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        labels_BT = inputs["labels"]
        learned = targets(labels_BT, self.is_code_V)
        count = len(learned.id_N)
        batch = DecisionBatch(
            index_KN=learned.before_N[None], weight_KN=None, target_N=learned.id_N,
            temperature_N=torch.ones(count, device=labels_BT.device),
            allowed_N=torch.full((count,), -1, device=labels_BT.device), sets=())
        logprob_N, _ = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], decisions=batch)
        loss = weighted_cross_entropy(logprob_N, learned.image_N, self.section.image_weight)
        nll_N = -logprob_N.detach()
        self._note("loss_text", nll_N[~learned.image_N])
        self._note("loss_image", nll_N[learned.image_N])
        if self.section.visual_loss:
            assert self._hidden is not None
            hidden_ND = self._hidden.reshape(-1, self._hidden.shape[-1])[learned.before_N]
            code_M = self.code_of_V[learned.id_N[learned.image_N]]
            visual = self.core.visual_reconstruction(hidden_ND[learned.image_N], code_M)
            self._note("loss_visual", visual.detach()[None])
            loss = loss + self.section.visual_loss * visual
            self._hidden = None
        return (loss, {"logprob": logprob_N}) if return_outputs else loss

    def _note(self, name: str, values: Tensor) -> None:
        if len(values):
            self._sums[name].append(float(values.mean()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self._sums.items():
            logs[name] = sum(values) / len(values)
        self._sums.clear()
        self.last = {k: float(v) for k, v in logs.items() if isinstance(v, int | float)} or self.last
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints get no model card: a card is the author's to write."""


class _Mirror(TrainerCallback):
    """The trainer's log as sft/* metrics."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None,
               **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.tracker.log(state.global_step, {f"sft/{k}": v for k, v in logs.items() if k != "epoch"})


def _arguments(config: SftConfig, output_dir: Path, seed: int) -> TrlSftConfig:
    return TrlSftConfig(
        output_dir=str(output_dir), max_steps=config.max_steps, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps, learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type, warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay, adam_beta2=config.adam_beta2, max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps, save_total_limit=1, logging_steps=config.logging_steps, seed=seed,
        data_seed=seed, report_to=[], disable_tqdm=True, bf16=False, remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        train_sampling_strategy="group_by_length", length_column_name="length",  # rows differ threefold in length
        gradient_checkpointing=False,
        dataloader_num_workers=0, dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(), ddp_find_unused_parameters=False)


def check_demonstrations(trajectories: Sequence[Trajectory], fmt: ThoughtFormat) -> None:
    """Refuse to learn from sentences that the format itself would not accept.

    Raises:
        UserError: names the first such demonstration, its segment and what would be right.
    """
    for index, trajectory in enumerate(trajectories):
        for violation in fmt.violations(trajectory):
            where = f" segment {violation.segment}" if violation.segment is not None else ""
            raise UserError(f"demonstration {index} ({trajectory.prompt!r}){where}: {violation.message}")
