"""The warm start on TRL's SFTTrainer: demonstrations -> weights that write and draw in the recipe's format.

Multi-process runs come from the launcher (`accelerate launch`), as with any SFTTrainer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig as TrlSftConfig

from formats.base import Format
from formats.render import render
from policy.chameleon.family import ChameleonPolicy
from record.trajectory import Trajectory
from runtime.errors import UserError
from runtime.files import write_whole
from runtime.interrupt import Interrupted, interruptible, name_of
from sft.checkpoints import chosen, finished_checkpoints, newest, prune, rewind, step_of, writing
from sft.config import SftConfig
from sft.data import Collator, Row, role_names, rows_after_separator, training_rows
from sft.sources import load_demonstrations
from sft.trainer import InterleavedSftTrainer, Mirror, StopAtSignal
from tasks.base import Demonstration, Task
from training.precision import half_precision
from training.tracking import Tracker

logger = logging.getLogger(__name__)
SEE_BATCH = 256


def demonstrate(task: Task, fmt: Format, policy: ChameleonPolicy, config: SftConfig, seed: int) -> list[Trajectory]:
    """The trajectories to learn from: the task's demonstrations rendered in the format, or the stored ones."""
    if config.data is not None:
        return load_demonstrations(config, fmt, policy, task.prompts("heldout"))
    demonstrations = task.demonstrations(fmt.name, config.demonstrations, seed)
    return render_all(demonstrations, fmt, policy, config.learn_mistakes)


def render_all(
    demonstrations: Sequence[Demonstration], fmt: Format, policy: ChameleonPolicy, learn_mistakes: bool = False
) -> list[Trajectory]:
    """Demonstrations with their images seen by the policy's visual tokenizer, in batches."""
    images = [part.image for d in demonstrations for part in d.parts if part.image is not None]
    codes = []
    with torch.inference_mode():
        for begin in range(0, len(images), SEE_BATCH):
            codes += policy.encode_images(images[begin : begin + SEE_BATCH])
    trajectories, at = [], 0
    for group, d in enumerate(demonstrations):
        count = sum(part.image is not None for part in d.parts)
        trajectory = render(fmt, d.prompt, d.record, d.parts, policy.vocabulary, codes[at : at + count])
        trajectory.group = group
        # An image that is wrong on purpose is there to be inspected and repaired, a needless text to be followed:
        # neither is imitated.
        for index in (*d.needless, *(() if learn_mistakes else d.mistakes)):
            trajectory.segments[index + 1].trained = False
        trajectories.append(trajectory)
        at += count
    return trajectories


def check_demonstrations(trajectories: Sequence[Trajectory], fmt: Format) -> None:
    """Refuse to learn from sentences that the format itself would not accept.

    Raises:
        UserError: names the first such demonstration, its segment and what would be right.
    """
    for index, trajectory in enumerate(trajectories):
        where = f"demonstration {index} ({trajectory.prompt!r})"
        if trajectory.format != fmt.name:
            raise UserError(
                f"{where}: written in the format '{trajectory.format}', but the recipe's is '{fmt.name}'; "
                "change format.name or give other demonstrations"
            )
        for violation in fmt.violations(trajectory):
            segment = f", segment {violation.segment}" if violation.segment is not None else ""
            raise UserError(f"{where}{segment}: {violation.message}")


def warm_start(
    policy: ChameleonPolicy,
    trajectories: Sequence[Trajectory],
    config: SftConfig,
    run_dir: Path,
    *,
    seed: int = 0,
    tracker: Tracker | None = None,
    resume: bool | str = False,
    resume_command: str = "give the same command with --resume",
) -> dict[str, float]:
    """Train and save to run_dir/sft/model (the released layout). Returns the last logged metrics.

    Args:
        tracker: metrics go here as sft/*; rank 0 only.
        resume: go on from the newest checkpoint under run_dir/sft, if there is one; text: from the one of that step or
            in that folder, and what came after it is forgotten. On a CPU a run that was stopped and resumed is the run
            that was never stopped.
        resume_command: what a person is told to do after a signal.

    Raises:
        Interrupted: after a signal, at the end of a step, once all is saved.
        UserError: 16-bit weights are to be trained; nothing to learn from; ids that the policy's vocabulary lacks; a
            checkpoint that is corrupt, or there where none is to be resumed; a disk that is full or not writable.
    """
    if (half := half_precision(policy.model)) is not None:
        raise UserError(half)
    rows = _rows(policy, trajectories, config)
    output_dir = Path(run_dir) / "sft"
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = chosen(output_dir, resume) if isinstance(resume, str) else newest(output_dir) if resume else None
    if not resume and finished_checkpoints(output_dir):
        raise UserError(
            f"{output_dir} already holds a warm start ({finished_checkpoints(output_dir)[-1].name}). Resume it "
            f"({resume_command}), or choose another run_dir"
        )
    trainer = InterleavedSftTrainer(
        policy=policy,
        section=config,
        roles=role_names(trajectories),
        model=policy.model,
        train_dataset=Dataset.from_list(list(rows)),
        data_collator=_collator(policy, config),
        processing_class=policy.vocabulary.tokenizer,
        args=_arguments(config, output_dir, seed, policy.device.type == "cpu"),
    )
    if tracker is not None:
        trainer.add_callback(Mirror(tracker, trainer.means))
    try:
        done = 0
        if checkpoint is not None:
            trainer.resume(checkpoint)
            done = step_of(checkpoint)
            logger.info("going on after step %d (%s)", done, checkpoint)
        if tracker is not None:
            tracker.rewind(done + 1)
        if trainer.accelerator.is_main_process:
            if checkpoint is not None:
                rewind(output_dir, done)
            prune(output_dir, 2)
        with interruptible(logger.warning) as interruption:
            stop = StopAtSignal(trainer.accelerator, interruption)
            trainer.add_callback(stop)
            if checkpoint is not None and done >= config.max_steps:
                trainer.load_finished(checkpoint)  # transformers would take one more step
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.detach()
    if stop.stopped:
        raise Interrupted(
            f"{name_of(stop.stopped)}: stopped after step {trainer.state.global_step} of {config.max_steps}; saved in "
            f"{finished_checkpoints(output_dir)[-1]}. To go on, {resume_command}",
            stop.stopped,
        )
    if trainer.accelerator.is_main_process:
        with writing(output_dir / "model"):
            policy.save(output_dir / "model")
            write_whole(output_dir / "done.json", json.dumps({"steps": trainer.state.global_step, **trainer.last}))
    trainer.accelerator.wait_for_everyone()
    return trainer.last


def _rows(policy: ChameleonPolicy, trajectories: Sequence[Trajectory], config: SftConfig) -> list[Row]:
    max_length = min(config.max_length or policy.max_length, policy.max_length)
    if config.labels == "release":
        if policy.vocabulary.sep is None:
            raise UserError(
                "sft.labels=release: learns what comes after the prompt's separator, and the tokenizer has none; "
                "take sft.labels=default"
            )
        rows, cut = rows_after_separator(trajectories, max_length, policy.vocabulary.sep, config.role_weights)
    else:
        rows, cut = training_rows(trajectories, max_length, config.role_weights)
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= policy.vocabulary.size:
        raise UserError(
            f"{config.data or 'demonstrations'}: holds id {largest}, but the policy's vocabulary has "
            f"{policy.vocabulary.size}; the trajectories were written by another tokenizer"
        )
    if cut.shortened:
        logger.warning(
            "%d of %d demonstrations are longer than %d ids: they lost whole segments from their end, and %d "
            "of them, with nothing left to learn, were dropped",
            cut.shortened,
            len(trajectories),
            max_length,
            cut.dropped,
        )
    elif cut.dropped and config.labels == "release":
        logger.warning(
            "%d of %d demonstrations are longer than %d ids and were left out whole (sft.labels=release)",
            cut.dropped,
            len(trajectories),
            max_length,
        )
    return rows


def _collator(policy: ChameleonPolicy, config: SftConfig) -> Collator:
    release = config.labels == "release"
    pack = policy.core.config._attn_implementation == "sdpa" and not release
    return Collator(policy.vocabulary.pad, pack, learn_padding=release)


def _arguments(config: SftConfig, output_dir: Path, seed: int, cpu: bool) -> TrlSftConfig:
    return TrlSftConfig(
        output_dir=str(output_dir),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps,
        logging_steps=config.logging_steps,
        seed=seed,
        data_seed=seed,
        report_to=[],
        disable_tqdm=True,
        bf16=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        gradient_checkpointing=False,  # the policy's own section turns it on
        dataloader_num_workers=0,
        dataloader_pin_memory=not cpu,
        use_cpu=cpu,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # no buffer changes, and a table of distances is too large to send at every step
    )
