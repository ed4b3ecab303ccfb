"""Peak memory of scoring with gradient, against what grpo.tokens_per_micro_batch promises.

    python -m benchmarks.scoring_memory

A budget is a promise if memory is a linear function of it, whatever the thoughts are. The slope is taken from one
forward of plain thoughts that fills --budget; then forwards of plain thoughts at half of it, of four-condition guidance
and of forks are measured against it. The peer fills the same budget by counting the thoughts' ids, as a trainer does
that knows nothing of guidance branches.

What is measured: the resident memory that one forward and its backward reach beyond weights, gradients and the record
(Linux's VmHWM, reset before; allocations over 128 KiB are given back when freed), or allocated CUDA memory with
--device cuda; each case in a process of its own. A forward seldom fills its budget to the last slot, and what it leaves
counts against us. The last line is one JSON object: the largest deviation from the promise in percent, ours and the
peer's, and how many times as much the peer deviates.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import os
import re
import subprocess
from typing import Any

import torch

from benchmarks._thoughts import KINDS, small_policy, thoughts
from policy.base import Pass, forwarded
from rl.packing import deal
from underdrawing.options import Whole

COUNTS = ("slots", "ids")


def fill(policy: Any, kind: str, budget: int, count: str, candidates: int) -> list[Pass]:
    """The passes of one forward that fills the budget, counted in slots or in the thoughts' ids."""
    asked = thoughts(policy, kind, candidates)
    if count == "slots":
        passes = policy.passes(asked, budget)
        return [passes[number] for number in deal(passes, budget, 1)[0][0].passes]
    chosen: list[Pass] = []
    ids = 0
    for thought in asked:
        if ids + thought.num_tokens() > budget:
            break
        ids += thought.num_tokens()
        chosen += policy.passes([thought])
    return chosen


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Peak beyond what was there before, in MiB, and the slots of the forward."""
    torch.set_num_threads(1)
    policy = small_policy(options.width, options.layers)
    policy.core.to(options.device)
    policy.score(policy.passes(thoughts(policy, "plain", 1))).logprob_N.sum().backward()  # gradients are there
    chosen = fill(policy, options.case, options.budget, options.count, options.thoughts)
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = _status("VmRSS")
    policy.score(chosen).logprob_N.sum().backward()
    peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
    return {"mib": (peak - before) / 2**20, "slots": forwarded(chosen)}


def _status(name: str) -> int:
    """A line of this process's status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def run(options: argparse.Namespace, case: str, budget: int, count: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--count", count, "--budget", str(budget)]
    for key in ("thoughts", "width", "layers", "device"):
        command += [f"--{key}", str(getattr(options, key))]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"the case '{case}' ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=Whole(64), default=4096, help="slots of a forward")
    parser.add_argument("--thoughts", type=Whole(1), default=64, help="to choose from")
    parser.add_argument("--width", type=Whole(16), default=256)
    parser.add_argument("--layers", type=Whole(1), default=4)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is a GPU")
    parser.add_argument("--case", choices=KINDS, help="measure one case in this process")
    parser.add_argument("--count", choices=COUNTS, default="slots")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options)))
        return
    plain = run(options, "plain", options.budget, "slots")
    slope = plain["mib"] / plain["slots"]
    print(f"plain, {options.budget}: {plain['mib']:.0f} MiB of {plain['slots']} slots, {slope * 1024:.1f} KiB a slot")
    worst = {}
    cases = [("plain", options.budget // 2), ("guided", options.budget), ("forks", options.budget)]
    for count in COUNTS:
        deviations = []
        for case, budget in cases:
            found = run(options, case, budget, count)
            deviations.append(100 * abs(found["mib"] / (slope * budget) - 1))
            print(
                f"{case}, {budget} {count}: {found['mib']:.0f} MiB of {found['slots']} slots; "
                f"promised {slope * budget:.0f} MiB, {deviations[-1]:.1f} % off",
                flush=True,
            )
        worst[count] = max(deviations)
    ours, peer = worst["slots"], worst["ids"]
    print(
        json.dumps(
            {
                "ours": round(ours, 1),
                "peer": round(peer, 1),
                "ratio": round(peer / ours, 1),
                "unit": "% off the promised memory",
            }
        )
    )


if __name__ == "__main__":
    main()
