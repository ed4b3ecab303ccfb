"""The benchmark of slow tools does what it says: both arms write the same, and the last line is one JSON object."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import slow_tools


@pytest.mark.slow
def test_the_last_line_is_one_json_object(monkeypatch, capsys):
    words = ["slow_tools", "--seconds", "0.02", "--prompts", "1", "--members", "2", "--rows", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--threads", "1"])
    slow_tools.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"ours", "peer", "ratio", "unit"} <= set(last) and last["unit"] == "tokens/s" and last["calls"] > 0
