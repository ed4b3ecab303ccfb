"""One writer a folder: the second is refused by name while the first lives, and never after."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime import locks
from runtime.errors import UserError
from runtime.locks import Busy, only_writer
from tests.test_cli import QUICKSTART, ROOT, SMALL
from underdrawing.cli import main

BEGIN = """
import errno, fcntl, sys, time
from pathlib import Path
from runtime import locks

def flock(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")

if sys.argv[2] == "without locks":
    fcntl.flock = flock
"""
HOLDER = f"""{BEGIN}
with locks.only_writer(Path(sys.argv[1]), Path(sys.argv[1]).parent):
    print("held", flush=True)
    time.sleep(600)
"""
TAKER = f"""{BEGIN}
done = 0
while done < 15:
    try:
        with locks.only_writer(Path(sys.argv[1]), Path(sys.argv[1])):
            inside = Path(sys.argv[1] + ".inside")
            inside.touch(exist_ok=False)
            time.sleep(0.002)
            inside.unlink()
            done += 1
    except locks.Busy:
        time.sleep(0.001)
"""


class Holder:
    """Another process that holds a lock."""

    def __init__(self, file: Path, kind: str = "locks") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(file), kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Holder:
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def no_flock(number: int):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture(params=["locks", "without locks"])
def kind(request, monkeypatch) -> str:
    if request.param == "without locks":
        monkeypatch.setattr(fcntl, "flock", no_flock(errno.ENOLCK))
    return request.param


def test_the_second_is_refused_by_name_while_the_first_lives(tmp_path, kind):
    file = tmp_path / ".lock"
    with Holder(file, kind) as holder:
        with pytest.raises(Busy) as refused, only_writer(file, tmp_path, "choose another run_dir"):
            pass
        named = f"{tmp_path}: process {holder.process.pid} on {socket.gethostname()} is at work there"
        assert str(refused.value).startswith(named) and "or choose another run_dir" in str(refused.value)
        holder.kill()
        with only_writer(file, tmp_path):  # what it left behind is nobody's
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_may_ask_again_for_its_own(tmp_path, kind):
    file = tmp_path / ".lock"
    with only_writer(file, tmp_path):
        with only_writer(file, tmp_path), only_writer(tmp_path / "other.lock", tmp_path):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".lock" if kind == "locks" else ".lock.owner"]
    assert list(tmp_path.iterdir()) == []


def test_an_error_gives_it_back_and_folders_made_for_it_go(tmp_path, kind):
    with pytest.raises(UserError, match="mine"), only_writer(tmp_path / "a/b/.lock", tmp_path / "a/b"):
        raise UserError("mine")
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "a/b/.lock", tmp_path / "a/b"):
        (tmp_path / "a/b/result").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["result"]


def test_of_many_that_ask_one_has_it_at_a_time(tmp_path, kind):
    """The file is removed at each end, so some lock one that is gone from its folder."""
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, str(tmp_path / ".lock"), kind], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in asking:
        assert "Error" not in process.communicate(timeout=120)[1] and process.returncode == 0
    assert list(tmp_path.iterdir()) == []


# ---- file systems without locks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_gone_on_with(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr(fcntl, "flock", no_flock(number))
    with caplog.at_level(logging.WARNING), only_writer(tmp_path / ".lock", tmp_path):
        owner = json.loads((tmp_path / ".lock.owner").read_text())
    assert f"{tmp_path}: this file system has no locks ({os.strerror(number)})" in caplog.text
    assert owner["pid"] == os.getpid() and owner["host"] == socket.gethostname()


def test_another_error_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock(errno.EIO))
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be written .Input/output error.; choose another folder"):
        with only_writer(tmp_path / ".lock", tmp_path):
            pass


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock(errno.ENOLCK))
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": 12.0}  # this process began later
    (tmp_path / ".lock.owner").write_text(json.dumps(mine))
    with only_writer(tmp_path / ".lock", tmp_path):
        assert json.loads((tmp_path / ".lock.owner").read_text())["started"] > 12.0


def test_an_owner_on_another_machine_lives_while_it_touches_its_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", no_flock(errno.ENOLCK))
    file = tmp_path / ".lock.owner"
    file.write_text(json.dumps({"pid": 4, "host": "elsewhere", "started": 1.0}))
    with pytest.raises(Busy, match="process 4 on elsewhere is at work there.*or delete .*owner if that process"):
        with only_writer(tmp_path / ".lock", tmp_path):
            pass
    quiet = time.time() - locks.DEAD_AFTER_S - 5
    os.utime(file, (quiet, quiet))
    with only_writer(tmp_path / ".lock", tmp_path):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert "process 4 on elsewhere, which held it, has ended without giving it back" in caplog.text


def test_the_owner_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock(errno.ENOLCK))
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    threads = threading.active_count()
    with only_writer(tmp_path / ".lock", tmp_path):
        file = tmp_path / ".lock.owner"
        os.utime(file, (1.0, 1.0))
        until = time.monotonic() + 10
        while file.stat().st_mtime < 2 and time.monotonic() < until:
            time.sleep(0.02)
        assert file.stat().st_mtime > 2
    assert threading.active_count() == threads


# ---- commands ------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments: object, run=main) -> str:
    assert run([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("underdrawing: ") and "Traceback" not in said
    return said


@pytest.mark.parametrize("command", ["sft", "grpo", "quickstart"])
def test_nobody_trains_where_another_does(capsys, tmp_path, command):
    from underdrawing import quickstart

    with Holder(tmp_path / ".lock") as holder:
        if command == "quickstart":
            said = refused(capsys, "--run-dir", tmp_path, run=quickstart.main)
        else:
            given = ["policy.path=nowhere"] if command == "sft" else []  # refused before weights are looked for
            said = refused(capsys, command, QUICKSTART, *SMALL, f"run_dir={tmp_path}", *given)
        assert f"{tmp_path}: process {holder.process.pid} on {socket.gethostname()} is at work there" in said
        assert "choose another run_dir" in said
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]  # a killed holder's


def test_one_may_evaluate_and_roll_out_beside_a_run_but_not_twice_into_one_folder(capsys, tmp_path):
    assert main(["sft", QUICKSTART, *SMALL, f"run_dir={tmp_path}"]) == 0
    more = [QUICKSTART, *SMALL, f"run_dir={tmp_path}", "rollout.max_tokens=60", "evaluate.samples=1"]
    with Holder(tmp_path / ".lock"):
        assert main(["evaluate", *more]) == 0
        assert main(["rollout", *more, "--prompts", "1"]) == 0
    with Holder(tmp_path / "evaluations" / ".a.lock"), Holder(tmp_path / ".rollout.lock"):
        capsys.readouterr()
        assert f"{tmp_path / 'evaluations/a'}: process" in refused(capsys, "evaluate", *more, "--label", "a")
        assert main(["evaluate", *more, "--label", "b"]) == 0
        assert f"{tmp_path / 'rollout'}: process" in refused(capsys, "rollout", *more, "--prompts", "1")
        assert main(["rollout", *more, "--prompts", "1", "--out", str(tmp_path / "other")]) == 0
