"""Speed of scoring with gradient: rows end to end against rows padded to the longest, the same weights and thoughts.

    python -m benchmarks.packing                 # 64 thoughts of each kind, a decoder of width 256
    python -m benchmarks.packing --kinds plain   # without guidance branches

Thoughts of the shapes world (one to four images) are laid into forwards of at most --budget slots as the trainer does,
each layout by its own count: a padded forward holds fewer thoughts. Tokens are the slots without padding, so both arms
do the same work. Seconds are the process's own on the CPU, so that neighbours on the machine do not count. Arms
alternate, each is judged by its fastest round, and log-probs of both are compared. The last line is one JSON object:
tokens/s of all kinds together of ours (end to end) and of the peer (padded), and their ratio.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks._thoughts import KINDS, small_policy, thoughts
from policy.base import forwarded
from policy.scoring.row_attention import ROWS
from record.trajectory import Trajectory
from rl.packing import deal
from underdrawing.options import Whole

ARMS = {"ours": ROWS, "padded": "sdpa"}


def score(policy: Any, arm: str, asked: list[Trajectory], budget: int) -> tuple[float, int, int, Tensor]:
    """Seconds of processor time, slots forwarded, forwards, and the decisions' log-probs in the order of the passes."""
    policy.core.set_attn_implementation(ARMS[arm])
    passes = policy.passes(asked, budget)
    [forwards] = deal(passes, budget, 1)
    logprobs: dict[int, Tensor] = {}
    slots, began = 0, time.process_time()
    for forward in forwards:
        chosen = [passes[number] for number in forward.passes]
        scored = policy.score(chosen)
        scored.logprob_N.sum().backward()
        slots += forwarded(chosen)
        for index, number in enumerate(forward.passes):
            logprobs[number] = scored.logprob_N.detach()[scored.pass_N == index]
    seconds = time.process_time() - began
    policy.core.zero_grad(set_to_none=False)
    return seconds, slots, len(forwards), torch.cat([logprobs[number] for number in range(len(passes))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thoughts", type=Whole(1), default=64, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--budget", type=Whole(1), default=4096, help="slots of a forward")
    parser.add_argument("--width", type=Whole(16), default=256)
    parser.add_argument("--layers", type=Whole(1), default=4)
    parser.add_argument("--threads", type=Whole(1), default=1)
    parser.add_argument("--rounds", type=Whole(1), default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = small_policy(options.width, options.layers)
    total = {arm: 0.0 for arm in ARMS}
    tokens = 0
    for kind in options.kinds:
        asked = thoughts(policy, kind, options.thoughts)
        policy.core.set_attn_implementation(ROWS)
        work = sum(one.cost for one in policy.passes(asked))
        best, logprobs = {}, {}
        for number in range(options.rounds + 1):
            for arm in ARMS:
                seconds, slots, forwards, logprobs[arm] = score(policy, arm, asked, options.budget)
                if number:  # the first round warms caches
                    best[arm] = min(best.get(arm, seconds), seconds)
                if number == options.rounds:
                    print(
                        f"{kind}: {arm}: {work} tokens as {slots} slots in {forwards} forwards, {best[arm]:.2f} s, "
                        f"{work / best[arm]:.0f} tokens/s",
                        flush=True,
                    )
        # Divided at other segments, passes may come in another order; decisions of a segment do not.
        gap = float((logprobs["ours"].sort().values - logprobs["padded"].sort().values).abs().max())
        if gap > 1e-5:
            sys.exit(f"{kind}: the arms' log-probs differ by {gap:.1e}, more than 1e-5")
        tokens += work
        for arm in ARMS:
            total[arm] += best[arm]
    ours, peer = (tokens / total[arm] for arm in ("ours", "padded"))
    print(
        json.dumps(
            {
                "ours": round(ours),
                "peer": round(peer),
                "ratio": round(ours / peer, 2),
                "unit": "tokens/s of processor time",
            }
        )
    )


if __name__ == "__main__":
    main()
