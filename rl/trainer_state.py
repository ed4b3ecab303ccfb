"""What a trainer is saved as and taken up from, and whether a resumed run began with the weights that the first did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from policy.base import Policy
from rollout.weights.wire import fingerprint
from runtime.errors import UserError
from training.random_state import random_state

Start = dict[str, str | None]  # `source` of a policy's weights, for people to read; fingerprints `frozen` and `trained`


class TrainingError(UserError):
    """A run that must not go on: what it would learn from here is not what it was asked to learn."""


def state_of(trained: Mapping[str, nn.Parameter], optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Parameters, optimiser, schedule, and the random state of every process. All processes call it."""
    return {
        "parameters": {name: p.detach() for name, p in trained.items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": gather_object([random_state()]),
    }


def check_names(trained: Mapping[str, nn.Parameter], state: Mapping[str, Any]) -> None:
    """Raises TrainingError where a state holds other parameters than those that are trained here."""
    saved = state["parameters"]
    for name in sorted(trained.keys() ^ saved.keys()):
        where = "is in the checkpoint but not trained here" if name in saved else "is not in the checkpoint"
        raise TrainingError(f"parameter '{name}' {where}. Resume with the recipe of that run")


def restore(trained: Mapping[str, nn.Parameter], optimizer: Any, scheduler: Any, state: Mapping[str, Any]) -> None:
    """Copy a state's parameters, moments and place in the schedule. Rates and the optimiser's options stay as they are.

    Raises TrainingError for a parameter of another shape.
    """
    saved = state["parameters"]
    with torch.no_grad():
        for name, parameter in trained.items():
            if parameter.shape != saved[name].shape:
                raise TrainingError(
                    f"parameter '{name}' is {list(saved[name].shape)} in the checkpoint and "
                    f"{list(parameter.shape)} here. Resume with the recipe of that run"
                )
            parameter.copy_(saved[name])
    options = [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    # Both have just taken over what the checkpoint's recipe said.
    scheduler.base_lrs = [group["initial_lr"] for group in options]
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, option, rate in zip(optimizer.param_groups, options, scheduler._last_lr, strict=True):
        group.update(option, lr=rate)


def starting_weights(policy: Policy, source: Path | str | None) -> Start:
    """What the policy holds before it is trained."""
    state = policy.model.state_dict()
    trained = {name for name, p in policy.model.named_parameters(remove_duplicate=False) if p.requires_grad}
    # Fresh adapters are chance, and the reference is without them.
    adapters = getattr(policy, "has_adapters", False)
    return {
        "source": None if source is None else str(source),
        "frozen": fingerprint({name: t for name, t in state.items() if name not in trained}),
        "trained": None if adapters else fingerprint({name: t for name, t in state.items() if name in trained}),
    }


def checked_start(here: Start, saved: Start, compared: bool) -> Start:
    """What a resumed run counts as its start. A checkpoint holds what is trained; the rest, and what a KL term compares
    with, are the starting weights.

    Args:
        compared: a KL term compares with the starting weights.

    Raises TrainingError where the weights here are not those that the run started from.
    """
    start = here
    for kind in ("frozen", "trained"):
        if here[kind] == saved[kind]:
            continue
        if kind == "trained" and not compared:
            start = saved  # all of them are about to be replaced; a KL term may yet be turned on
            continue
        what = (
            "the weights that are not trained"
            if kind == "frozen"
            else "the weights that the KL term (grpo.beta) compares with"
        )
        elsewhere = saved["source"] not in (None, here["source"])
        raise TrainingError(
            f"{what} are not those of the checkpoint's run: it started from {saved['source'] or 'a policy'} "
            f"(fingerprint {str(saved[kind])[:8]}), this one from {here['source'] or 'a policy'} "
            f"({str(here[kind])[:8]}). Resume with the weights that it started from: "
            + (f"--weights {saved['source']}" if elsewhere else "--weights and a folder that holds them")
        )
    return start
