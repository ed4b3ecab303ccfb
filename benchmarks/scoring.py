"""Peak memory of scoring: chunked log-probs against the plain log-softmax, and the values of both.

    python -m benchmarks.scoring                        # 8 rows of 4,096 ids, 65,536 entries: the plain arm takes 17 GB
    python -m benchmarks.scoring --backward --rows 2    # gradients too: half as much again

Each arm runs in a process of its own and reports the memory it reached beyond its inputs (hidden states, head). Where
the plain arm does not fit into free memory, both arms score as many rows as it can, and the last line says so. That
line is one JSON object: ours and peer in MiB, and how many times as much the peer takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import resource
import subprocess
import time
from typing import Any

import numpy as np
import psutil
import torch

from policy.scoring.logprobs import token_logprobs
from underdrawing.options import Whole


def arm(
    name: str, rows: int, tokens: int, vocabulary: int, width: int, chunk: int, backward: bool = False
) -> dict[str, Any]:
    """Score once. Some of the numbers are returned, so that two processes can compare them."""
    generator = torch.Generator().manual_seed(0)
    count = rows * tokens
    hidden_ND = torch.randn(count, width, generator=generator).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width, generator=generator) / width**0.5).requires_grad_()
    target_N = torch.randint(vocabulary, (count,), generator=generator)
    upstream_N = torch.randn(count, generator=generator)
    before = _peak()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        if name == "ours":
            logprob_N = token_logprobs(hidden_ND, weight_VD, target_N, chunk=chunk)[0]
        else:
            logprob_N = (hidden_ND @ weight_VD.T).log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    if backward:
        logprob_N.backward(upstream_N)
    seconds = time.perf_counter() - start
    some = np.linspace(0, count - 1, min(count, 257)).astype(int)
    entries = np.linspace(0, vocabulary - 1, min(vocabulary, 257)).astype(int)
    values = {"logprob": logprob_N.detach()[some]}
    if hidden_ND.grad is not None and weight_VD.grad is not None:
        values |= {"hidden_grad": hidden_ND.grad[some].flatten(), "weight_grad": weight_VD.grad[entries].flatten()}
    return {"mib": (_peak() - before) / 1024, "seconds": seconds} | {key: x.tolist() for key, x in values.items()}


def _peak() -> int:
    """Largest resident set of this process so far, KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", name]
    for key in ("rows", "tokens", "vocabulary", "width", "chunk"):
        command += [f"--{key}", str(getattr(options, key))]
    if options.backward:
        command.append("--backward")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"the arm '{name}' ended with {done.returncode}; the plain arm needs about "
            f"{_plain_bytes(options) * options.rows / 2**30:.0f} GiB: give fewer --rows or --tokens"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _plain_bytes(options: argparse.Namespace) -> int:
    """Of one row: the logits, their log-softmax, and for the gradient a third copy."""
    return (3 if options.backward else 2) * 4 * options.tokens * options.vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Whole(1), default=8)
    parser.add_argument("--tokens", type=Whole(1), default=4096)
    parser.add_argument("--vocabulary", type=Whole(1), default=65536)
    parser.add_argument("--width", type=Whole(1), default=128)
    parser.add_argument("--chunk", type=Whole(1), default=256, help="decisions whose logits are held at a time")
    parser.add_argument("--backward", action="store_true", help="differentiate too")
    parser.add_argument("--arm", choices=("ours", "plain"), help="run one arm in this process")
    options = parser.parse_args()
    if options.arm:
        sizes = {key: value for key, value in vars(options).items() if key != "arm"}
        print(json.dumps(arm(options.arm, **sizes)))
        return
    asked, free = options.rows, psutil.virtual_memory().available - 2**30
    options.rows = min(asked, free // _plain_bytes(options))
    if options.rows < 1:
        sys.exit(
            f"not even one row of the plain arm fits into the {free / 2**30:.1f} GiB that are free: give fewer --tokens"
        )
    if options.rows < asked:
        print(f"the plain arm does not fit into {free / 2**30:.1f} GiB: {options.rows} rows instead of {asked}")
    print(f"{options.rows} rows of {options.tokens} ids, {options.vocabulary} entries, width {options.width}")
    arms = {name: _run(name, options) for name in ("ours", "plain")}
    for name, result in arms.items():
        print(f"{name:>6}: {result['mib']:8.0f} MiB beyond the inputs, {result['seconds']:6.1f} s")
    gaps = {
        key: float(np.abs(np.array(arms["ours"][key]) - np.array(arms["plain"][key])).max())
        for key in ("logprob", "hidden_grad", "weight_grad")
        if key in arms["ours"]
    }
    print("largest differences: " + ", ".join(f"{key} {gap:.1e}" for key, gap in gaps.items()))
    if gaps["logprob"] > 1e-5:
        sys.exit(f"the arms' log-probs differ by {gaps['logprob']:.1e}, more than 1e-5")
    ours, peer = arms["ours"]["mib"], arms["plain"]["mib"]
    print(
        json.dumps(
            {
                "ours": round(ours, 1),
                "peer": round(peer, 1),
                "ratio": round(peer / ours, 1),
                "unit": "MiB",
                "rows": options.rows,
                "largest_difference": gaps["logprob"],
            }
        )
    )


if __name__ == "__main__":
    main()
