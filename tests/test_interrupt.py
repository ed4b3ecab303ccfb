"""Signals that ask for an end: the first waits for a boundary, the second for nothing; what is stored, for none."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager

import pytest

from runtime import interrupt
from runtime.errors import UserError
from runtime.interrupt import STOPS, Interrupted, Stop, heed_signals, interruptible, number_of, stopping, uninterrupted

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}


@pytest.fixture(autouse=True)
def handlers_as_before():
    """And not ignoring any: a test run in the background of a script ignores Ctrl-C, one under nohup SIGHUP."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        signal.signal(number, signal.default_int_handler)
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in STOPS)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int, echo: bool = False) -> None:
    if not echo:
        time.sleep(interrupt.ECHO_S + 0.05)
    signal.raise_signal(number)


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_asks_and_the_second_stops(number):
    said: list[str] = []
    with pytest.raises(Stop) as stopped, interruptible(said.append) as interruption:
        assert not interruption.pressed
        send(number)
        assert interruption.signal == number and len(said) == 1
        send(number, echo=True)  # as a launcher passes on what the terminal sent
        send(signal.SIGTERM)
    assert said[0].startswith(f"{interrupt.name_of(number)}. Stopping after this step")
    assert ("20 s" in said[0]) == (number != signal.SIGINT)
    assert number_of(stopped.value) == signal.SIGTERM and len(said) == 1


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_a_command_at_once_with_a_code_of_its_own(number):
    with pytest.raises(Interrupted) as raised, heed_signals(), stopping(lambda: "nothing was saved"):
        send(number)
    assert raised.value.exit_code == CODES[number]
    assert str(raised.value) == f"{interrupt.name_of(number)}: nothing was saved"


def test_a_keyboard_interrupt_that_a_library_makes_of_a_stop_has_its_number():
    with heed_signals():
        try:
            send(signal.SIGUSR1)
        except Stop:
            assert number_of(KeyboardInterrupt()) == signal.SIGUSR1
    with heed_signals():
        assert number_of(KeyboardInterrupt()) == signal.SIGINT


def test_nohup_stays():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with heed_signals(), interruptible(str) as interruption:
            send(signal.SIGHUP)
        assert not interruption.pressed
    finally:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def test_another_thread_gets_no_signal_and_no_handler():
    said = []

    def work():
        with heed_signals(), interruptible(said.append) as interruption, uninterrupted() as closing:
            closing.callback(said.append, interruption.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [0]


# ---- what waits ----------------------------------------------------------------------------------------------------


def test_what_is_closed_is_closed_whole_and_the_signal_comes_after():
    done = []
    with pytest.raises(Stop) as stopped, heed_signals(), uninterrupted() as closing:
        closing.callback(done.append, "last")
        closing.callback(send, signal.SIGTERM)
        closing.callback(done.append, "first")
    assert done == ["first", "last"] and stopped.value.number == signal.SIGTERM


@contextmanager
def closing_under_fire():
    with heed_signals(), uninterrupted() as closing:
        closing.callback(send, signal.SIGHUP)
        yield


def test_a_stop_that_is_on_its_way_keeps_its_words():
    with pytest.raises(Interrupted, match="saved in step 4"), closing_under_fire():
        raise Interrupted("saved in step 4", signal.SIGTERM)


def test_an_error_that_is_on_its_way_is_told_beside_the_signal():
    with (
        pytest.raises(Interrupted, match="^the disk is full. SIGHUP: nothing was saved$") as raised,
        stopping(lambda: "nothing was saved"),
        closing_under_fire(),
    ):
        raise UserError("the disk is full")
    assert raised.value.exit_code == 129


# ---- the grace time --------------------------------------------------------------------------------------------------


def test_work_that_outlasts_the_grace_time_is_broken_off(monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE_S", 0.3)

    def work():
        send(signal.SIGTERM)
        time.sleep(30)  # what it waits for need not come back

    began = time.monotonic()
    with pytest.raises(Interrupted, match="SIGTERM: broken off 0.3 s after it") as raised, interruptible(str) as asked:
        asked.breakable(work)()
    assert time.monotonic() - began < 10 and raised.value.exit_code == 143


def test_work_that_begins_after_the_grace_time_is_not_begun(monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE_S", 0.1)
    begun = []
    with pytest.raises(Interrupted), interruptible(str) as asked:
        send(signal.SIGUSR1)
        time.sleep(0.5)  # an update, which is finished
        asked.breakable(lambda: begun.append(1))()
    assert begun == []


@pytest.mark.parametrize("number", [signal.SIGINT, 0])
def test_ctrl_c_has_no_grace_time(monkeypatch, number):
    monkeypatch.setattr(interrupt, "GRACE_S", 0.1)

    def work():
        if number:
            send(number)
        time.sleep(0.5)
        return 3

    with interruptible(str) as asked:
        assert asked.breakable(work)() == 3


def test_what_is_within_the_grace_time_is_finished():
    with interruptible(str) as asked:
        assert asked.breakable(lambda: send(signal.SIGTERM) or 3)() == 3
        assert asked.signal == signal.SIGTERM


def test_a_signal_in_the_last_step_stops_what_would_follow():
    with interruptible(str):
        pass
    interrupt.raise_late()  # there was none
    with interruptible(str):
        send(signal.SIGTERM)
    with pytest.raises(Stop) as stopped:
        interrupt.raise_late()
    assert stopped.value.number == signal.SIGTERM
    interrupt.raise_late()


def test_what_fails_because_the_signal_went_to_others_too_is_blamed_on_the_signal():
    class Gone(UserError):
        pass

    with pytest.raises(Gone), interruptible(str) as asked, asked.blamed_for(Gone):
        raise Gone("Ray is gone")
    with pytest.raises(Interrupted, match="SIGTERM: Ray is gone") as raised:
        with interruptible(str) as asked, asked.blamed_for(Gone):
            send(signal.SIGTERM)
            raise Gone("Ray is gone")
    assert raised.value.exit_code == 143
