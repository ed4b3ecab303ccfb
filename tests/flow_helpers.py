"""Reference records of denoising steps, windows and losses, and how they are compared; latents to step from."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from record.trajectory import DecisionKind
from rl.losses import ScoredDecisions

ROOT = Path(__file__).resolve().parents[1]


def reference(name):
    """The path of a reference file. Skips the test where the folder of reference records is absent."""
    folder = Path(os.environ.get("UNDERDRAWING_FIXTURES", "../shared/fixtures"))
    path = (folder if folder.is_absolute() else ROOT / folder) / name
    if not path.exists():
        pytest.skip(f"the reference records {path} are not here (UNDERDRAWING_FIXTURES names their folder)")
    return path


def tensors(name, kind):
    """The cases of one kind, by name."""
    cases = torch.load(reference(name), weights_only=True)[kind]
    assert cases, f"{name} holds no {kind}"
    return cases


def lines(name, function, system=None):
    """The records of one function (of one system) of a file of JSON lines."""
    records = [json.loads(line) for line in reference(name).read_text().splitlines() if line.strip()]
    found = [r for r in records if r["function"] == function and system in (None, r["system"])]
    assert found, f"{name} holds no {function} of {system}"
    return found


def differs(got, expected, relative=1e-4):
    """Where two tensors (or numbers) differ beyond rounding, in words; None: nowhere. What is not finite has to be not
    finite in the same places. An element that nearly cancels has the rounding of the largest one."""
    got, expected = (torch.as_tensor(value).detach().double().reshape(-1) for value in (got, expected))
    if got.numel() != expected.numel():
        return f"{got.numel()} numbers in place of {expected.numel()}"
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite):
        return f"not finite in other places: {got.tolist()[:4]} in place of {expected.tolist()[:4]}"
    if not finite.any():
        return None
    size = expected.abs()[finite]
    off = (got - expected).abs()[finite]
    limit = relative * size + 0.05 * relative * size.max() + 1e-9
    if (off > limit).any():
        worst = int((off - limit).argmax())
        return f"{got[finite][worst].item()} in place of {expected[finite][worst].item()}"
    return None


def every(cases, run):
    """Run every case; none may differ. `run` returns {what: difference or None}."""
    failures = []
    for name, case in cases.items() if isinstance(cases, dict) else enumerate(cases):
        wrong = {what: words for what, words in run(case).items() if words}
        if wrong:
            failures.append((name, wrong))
    assert not failures, f"{len(failures)} of {len(cases)} differ; the first: {failures[0]}"


def number(value):
    """A record's number; NaN is written as a word in JSON."""
    return math.nan if value == "nan" else value


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def random_step(seed, count=3, shape=(2, 5)):
    """x, velocity, noise of `count` rows, and times that fall from 0.98 or less to 0.02 or more."""
    generator = torch.Generator().manual_seed(seed)
    x, velocity, noise = torch.randn(3, count, *shape, generator=generator)
    low, high = torch.rand(2, count, generator=generator).mul(0.4).unbind()
    return x, velocity, noise, 0.98 - high, 0.02 + low


# Data distributed as N(1/2, 0.4^2): the velocity, its flow and the marginals are known.
MEAN, SPREAD = 0.5, 0.4


def velocity_of(x, sigma):
    alpha = 1 - sigma
    share = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    clean = MEAN + share * (x - alpha * MEAN)
    return (x - alpha * clean) / sigma - clean


def variance_at(sigma):
    return ((1 - sigma) * SPREAD) ** 2 + sigma**2


def scored(log_ratio, advantage, weight=None, divergence=None, kind=DecisionKind.FLOW):
    size = len(log_ratio)
    return ScoredDecisions(
        log_ratio_N=log_ratio,
        advantage_N=advantage,
        kind_N=torch.full((size,), int(kind)) if isinstance(kind, DecisionKind) else torch.tensor(kind),
        weight_N=torch.full((size,), 1 / size) if weight is None else weight,
        trajectory_N=torch.zeros(size, dtype=torch.int64),
        divergence_N=divergence,
    )
