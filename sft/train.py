"""The warm start: demonstrations -> weights that write and draw in the recipe's format. It serves every policy family.

Demonstrations get the contexts and decisions of sampling (teacher_forcing.py); the loss is minus their log-probs by
`Policy.score`, and what the family learns from beside it (policy/extra_losses.py). Multi-process runs come from the
launcher (`accelerate launch`), as with any SFTTrainer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig as TrlSftConfig

from formats.base import Format
from policy.base import Policy
from policy.scoring.changed import check_codes
from record.trajectory import Trajectory
from runtime.errors import UserError
from runtime.files import write_whole
from runtime.interrupt import Interrupted, interruptible, name_of
from sft.checkpoints import chosen, finished_checkpoints, newest, prune, rewind, step_of, writing
from sft.config import SftConfig
from sft.losses import losses_of, verdict_names
from sft.teacher_forcing import Example, examples, examples_after_separator
from sft.trainer import Mirror, StopAtSignal, trainer_of
from training.precision import half_precision
from training.tracking import Tracker

logger = logging.getLogger(__name__)


def warm_start(
    policy: Policy,
    fmt: Format,
    trajectories: Sequence[Trajectory],
    config: SftConfig,
    run_dir: Path,
    *,
    seed: int = 0,
    tracker: Tracker | None = None,
    resume: bool | str = False,
    resume_command: str = "give the same command with --resume",
) -> dict[str, float]:
    """Train and save to run_dir/sft/model (as Policy.save writes it). Returns the last logged metrics.

    Args:
        fmt: says what each segment of the trajectories is conditioned on.
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
    found = _examples(policy, fmt, trajectories, config, seed)
    output_dir = Path(run_dir) / "sft"
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = chosen(output_dir, resume) if isinstance(resume, str) else newest(output_dir) if resume else None
    if not resume and finished_checkpoints(output_dir):
        raise UserError(
            f"{output_dir} already holds a warm start ({finished_checkpoints(output_dir)[-1].name}). Resume it "
            f"({resume_command}), or choose another run_dir"
        )
    device = next(policy.model.parameters()).device
    trainer = trainer_of(
        policy,
        section=config,
        examples=found,
        roles=role_names(trajectories),
        verdicts=verdict_names(trajectories),
        train_dataset=Dataset.from_dict({"index": list(range(len(found)))}),
        args=_arguments(config, output_dir, seed, device.type == "cpu"),
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


def role_names(trajectories: Sequence[Trajectory]) -> list[str]:
    """The roles of all segments, sorted: on every process the same."""
    return sorted({segment.role for trajectory in trajectories for segment in trajectory.segments})


def _examples(
    policy: Policy, fmt: Format, trajectories: Sequence[Trajectory], config: SftConfig, seed: int
) -> list[Example]:
    # Before anything is written: those that the family lacks are refused.
    latents = any(loss.name == "flow" for loss in losses_of(policy, config.extra_losses(seed)))
    max_length = min(config.max_length or policy.max_length, policy.max_length)
    if config.changed_weight != 1:
        check_codes(policy, "sft.changed_weight")
    release = config.labels == "release"
    if release:
        found, cut = examples_after_separator(trajectories, policy, max_length)
    else:
        dropout = config.conditioning_dropout_prob
        found, cut = examples(trajectories, fmt, policy, max_length, dropout, seed, latents)
    if cut.shortened:
        logger.warning(
            "%d of %d demonstrations are longer than %d ids: they lost whole segments from their end, and %d "
            "of them, with nothing left to learn, were dropped",
            cut.shortened,
            len(trajectories),
            max_length,
            cut.dropped,
        )
    elif cut.dropped and release:
        logger.warning(
            "%d of %d demonstrations are longer than %d ids and were left out whole (sft.labels=release)",
            cut.dropped,
            len(trajectories),
            max_length,
        )
    return found


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
