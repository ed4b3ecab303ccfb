"""benchmarks/scoring_memory.py: its forwards fill their budget, and memory follows it whatever the thoughts are."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks._thoughts import KINDS, small_policy, thoughts
from benchmarks.scoring_memory import fill
from policy.base import forwarded
from tests.test_recipe import ROOT
from tests.test_scripts import run


def test_forwards_fill_the_budget_by_their_own_count():
    policy = small_policy(16, 1)
    for kind in KINDS:
        assert 900 < forwarded(fill(policy, kind, 1024, "slots", 16)) <= 1024
    passes = fill(policy, "guided", 512, "ids", 16)
    ids = sum(one.trajectory.num_tokens() for one in passes)
    assert 300 < ids <= 512 and forwarded(passes) > 2 * 512  # what a count of ids does not see
    for fork in thoughts(policy, "forks", 8):
        assert fork.parent is not None and not any(s.trained for s in fork.segments[: fork.parent[1]])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_what_the_budget_promises(tmp_path):
    done = run(tmp_path, ROOT / "benchmarks/scoring_memory.py", "--budget", 2048, "--layers", 3, "--thoughts", 32)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["ours"] < 10 < last["peer"]
