from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from jaxrl_llm.training.run.stop import GracefulStop


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs between bytecodes of the main thread


def test_sigterm_sets_the_flag_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulStop(notice=None) as stop:
        assert not stop.requested
        send(signal.SIGTERM)
        assert stop.requested
        assert stop.reason == "SIGTERM"
        send(signal.SIGTERM)  # schedulers may repeat it
        assert stop.requested
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_ctrl_c_raises(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), GracefulStop(notice="hold on") as stop:
        send(signal.SIGINT)
        assert stop.reason == "SIGINT"
        assert "SIGINT: hold on" in capfd.readouterr().err
        send(signal.SIGINT)
        pytest.fail("not reached")
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_after_sigterm_raises() -> None:
    with pytest.raises(KeyboardInterrupt), GracefulStop(notice=None):
        send(signal.SIGTERM)
        send(signal.SIGINT)


def test_request_keeps_the_first_reason() -> None:
    with GracefulStop() as stop:
        stop.request("another process was stopped")
        stop.request("later")
        assert stop.reason == "another process was stopped"


def test_inert_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def run() -> None:
        with GracefulStop() as stop:
            seen.extend([signal.getsignal(signal.SIGINT), stop.requested])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, False]
