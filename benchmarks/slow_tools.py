"""What slow tools cost: tokens/s of the engine with tools that take a while, against the same run without waiting.

    python -m benchmarks.slow_tools                  # 200 ms a call, 128 rows, 256 trajectories
    python -m benchmarks.slow_tools --seconds 1

The tiny Chameleon with fresh weights thinks in the format `look` under full constraint, so that it draws and calls;
nearly all of its boxes are errors, which makes no difference here. Both arms write the same trajectories, which is
checked by their ids: the noise is by decision, so the order of answers changes nothing. A row whose tool is at work is
parked while the others decode; what is lost is what no row could do meanwhile, and smaller batches.

`serial` is what the run would take if each call stopped all rows, as where a tool is asked within the tick: it is
computed, not run. Arms alternate; each is judged by its fastest round. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, in a folder whose files bear our packages' names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import asyncio
import gc
import json
import time
from collections.abc import Sequence

import numpy as np
import torch

from formats.registry import get_format
from policy.chameleon.config import ChameleonPolicyConfig
from policy.registry import load_policy
from record.trajectory import Trajectory
from rollout.config import RolloutConfig
from rollout.engine.engine import Engine
from rollout.requests import RolloutRequest
from rollout.tools.base import Reply, ToolCall
from rollout.tools.config import ToolConfig
from rollout.tools.look import Look, LookOptions
from rollout.tools.registry import Tools, words_of
from underdrawing.options import Number, Whole

TAGS = ["<ins>", "</ins>", "<look>", "</look>", "<inspect>", "</inspect>"]


class SlowLook(Look):
    """`look` behind a wait, as of a server elsewhere."""

    def __init__(self, seconds: float):
        super().__init__(LookOptions())
        self.seconds = seconds

    async def call(self, call: ToolCall, trajectory: Trajectory) -> Sequence[Reply]:  # type: ignore[override]
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return super().call(call, trajectory)


class Work:
    """The same rollouts with a tool of either speed."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        words = ["a", "red", "circle", *words_of(Tools([SlowLook(0)]))]
        config = ChameleonPolicyConfig.model_validate({"tiny": {"tags": TAGS}})
        self.policy = load_policy(config, words)
        self.format = get_format("look", max_tokens={"plan": 8, "look": 4, "inspect": 8}, max_images=3)
        self.requests = [
            RolloutRequest(group, "a red circle", {}, tuple(range(options.members))) for group in range(options.prompts)
        ]

    def run(self, seconds: float) -> tuple[Engine, float, list[bytes]]:
        """The engine with its counts, seconds, and the ids of each trajectory."""
        tools = Tools([SlowLook(seconds)], {"look": ToolConfig(concurrency=4096)})
        config = RolloutConfig(rows=self.options.rows, max_tokens=240, reproducible=self.options.reproducible)
        engine = Engine(self.policy, self.format, config, "full", tools)
        began = time.perf_counter()
        written = engine.run(self.requests)
        spent = time.perf_counter() - began
        engine.close()
        return engine, spent, [np.concatenate([s.ids for s in t.segments]).tobytes() for t in written]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=Number(), default=0.2, help="that each call of a tool takes")
    parser.add_argument("--reproducible", action="store_true", help="answers are read a fixed number of ticks later")
    parser.add_argument("--prompts", type=Whole(1), default=32)
    parser.add_argument("--members", type=Whole(1), default=8)
    parser.add_argument("--rows", type=Whole(1), default=128)
    parser.add_argument("--threads", type=Whole(1), default=2)
    parser.add_argument("--rounds", type=Whole(1), default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Work(options)
    best: dict[str, float] = {}
    same, calls = 1.0, 0
    for number in range(options.rounds + 1):
        ids: dict[str, list[bytes]] = {}
        for name, seconds in (("ours", options.seconds), ("peer", 0.0)):
            gc.collect()
            busy = time.process_time()
            engine, spent, ids[name] = work.run(seconds)
            busy = time.process_time() - busy
            if number == 0:  # warms caches
                continue
            stats = engine.stats
            calls = sum(stats.tool_calls.values())
            best[name] = max(best.get(name, 0.0), stats.tokens / spent)
            print(
                f"round {number}: {name}: {stats.tokens} tokens in {spent:.2f} s, {stats.tokens / spent:.0f} tokens/s; "
                f"{calls} calls, rows parked {stats.tools_parked_seconds:.1f} s, all of them "
                f"{stats.tools_waited_seconds:.2f} s; {stats.mean_rows:.0f} rows a tick; {busy:.2f} s of CPU time",
                flush=True,
            )
        same = min(same, float(np.mean([a == b for a, b in zip(ids["ours"], ids["peer"], strict=True)])))
        # Products of other batches differ in the last bit, which may move a draw that lay on a border.
        assert same > 0.95, f"only {same:.0%} of the trajectories are those of the run without waiting"
    tokens = engine.stats.tokens
    serial = tokens / (tokens / best["peer"] + calls * options.seconds)
    print(f"{same:.1%} of the trajectories are equal; one call after another would give {serial:.0f} tokens/s")
    print(
        json.dumps(
            {
                "ours": round(best["ours"]),
                "peer": round(best["peer"]),
                "ratio": round(best["ours"] / best["peer"], 2),
                "unit": "tokens/s",
                "serial": round(serial),
                "calls": calls,
                "seconds_a_call": options.seconds,
                "reproducible": options.reproducible,
                "threads": options.threads,
            }
        )
    )


if __name__ == "__main__":
    main()
