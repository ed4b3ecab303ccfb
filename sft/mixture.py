"""Which rows a warm start learns from beside its demonstrations, and how many of each."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from formats.base import Format
from policy.base import Policy
from record.trajectory import Trajectory
from sft.config import SftConfig
from sft.critiques import check_critic, corrupted_rows, self_sampled_rows, stored_folders_or_refuse
from sft.perception import check_kinds, perception_rows
from tasks.base import Task

logger = logging.getLogger(__name__)


def check_mixture(config: SftConfig, task: Task) -> None:
    """Raises UserError where the recipe asks for rows that its task cannot write, or that lie nowhere."""
    shares = config.shares()
    if "perception" in shares:
        check_kinds(config.perception, task)
    for section in ("critiques", "corruption"):
        if section in shares:
            check_critic(task, section)
    if "critiques" in shares:
        stored_folders_or_refuse(config.critiques)


def counts(demonstrations: int, shares: Mapping[str, float]) -> dict[str, int]:
    """How many rows of each kind make these shares of all, beside so many demonstrations; at least one of each.

    With shares s and D demonstrations there are D / (1 - sum s) rows in all.
    """
    total = demonstrations / (1 - sum(shares.values()))
    return {name: max(round(share * total), 1) for name, share in shares.items()}


def rows_beside(
    task: Task, fmt: Format, policy: Policy, config: SftConfig, demonstrations: int, seed: int
) -> list[Trajectory]:
    """Perception rows, self-sampled critiques and corrupted images, as many as the recipe's shares want beside
    `demonstrations`. Rows are drawn at random for a batch, so that the shares are those of a batch in the mean.

    Raises:
        UserError: the task cannot write such rows, or there is nothing to make them of.
    """
    check_mixture(config, task)
    wanted = counts(demonstrations, config.shares())
    rows: dict[str, list[Trajectory]] = {}
    if "perception" in wanted:
        rows["perception"] = perception_rows(task, fmt, policy, config.perception, wanted["perception"], seed)
    if "critiques" in wanted:
        rows["critiques"] = self_sampled_rows(
            task, fmt, policy, config.critiques, wanted["critiques"], seed, config.learn_mistakes
        )
    if "corruption" in wanted:
        rows["corruption"] = corrupted_rows(
            task, fmt, policy, config.corruption, wanted["corruption"], seed, config.learn_mistakes
        )
    if rows:
        told = ", ".join(f"{len(made)} of sft.{section}" for section, made in rows.items())
        logger.info("the warm start learns from %d demonstrations and, beside them, rows: %s", demonstrations, told)
    return [row for made in rows.values() for row in made]
