"""A stop request hears signals and calls, and leaves no trace behind."""

import os
import signal
import threading

import pytest

from phalanx.fault.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_the_flag_only(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.listening
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


def test_second_signal_changes_nothing() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"


def test_handlers_come_back_after_an_error() -> None:
    heard: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with pytest.raises(KeyError), StopRequest():
            raise KeyError
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert heard == [signal.SIGTERM]


def test_request_by_call() -> None:
    with StopRequest() as stop:
        stop.request("preempted")
        stop.request("later")
    assert stop.reason == "preempted"


def test_other_threads_do_not_listen() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    seen: list[bool] = []

    def enter() -> None:
        with StopRequest() as stop:
            stop.request("asked")
            seen.extend([stop.listening, stop.requested])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGTERM) is handler
