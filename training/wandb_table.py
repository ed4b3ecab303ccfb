"""One table of an evaluation to W&B, as a W&B run of its own: what trains in the same folder has another one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError, writing
from training.tracking import TrackConfig
from training.wandb_mirror import wandb_login

logger = logging.getLogger(__name__)


def send_table(
    run_dir: Path,
    config: TrackConfig,
    key: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    name: str,
    recipe: Mapping[str, Any],
    plot: str = "",
) -> bool:
    """Log a table under `key`, and beside it a plot as HTML. Returns whether it was logged.

    What it is of lies in run_dir already, so W&B's own trouble is told and ends nothing.

    Args:
        name: of the W&B run, whose files go to run_dir/wandb.
        plot: an SVG; empty: none.
    """
    if config.wandb == "disabled":
        return False
    mode: Any = config.wandb if config.wandb != "auto" else "online" if wandb_login() else "offline"
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or W&B reports its own use over the network
    import wandb

    try:
        with writing(run_dir / "wandb"):
            run = wandb.init(
                project=config.wandb_project,
                entity=config.wandb_entity,
                config=dict(recipe),
                name=name,
                job_type="evaluation",
                dir=str(run_dir),
                mode=mode,
                settings=wandb.Settings(console="off", silent=True),
            )
            shown = {f"{key}_plot": wandb.Html(plot, inject=False)} if plot else {}
            run.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows]), **shown})
            run.finish()
    except (wandb.errors.Error, UserError) as error:
        logger.warning("W&B does without the table '%s': %s", key, str(error).strip())
        return False
    return True
