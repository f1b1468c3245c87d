from __future__ import annotations

import os
import signal
import subprocess
import sys
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


def test_terminated_hears_of_sigterm_alone() -> None:
    with GracefulStop(notice=None) as stop:
        send(signal.SIGINT)
        stop.listen(0.01)
        assert not stop.terminated and stop.requested
        send(signal.SIGTERM)
        assert stop.terminated and stop.reason == "SIGINT"


def test_ctrl_c_is_heard_once_by_whoever_is_first() -> None:
    with GracefulStop(notice=None) as stop:
        stop._hear(signal.SIGINT)  # by the other thread, before the handler
        assert stop.reason == "SIGINT"
        stop._handle(signal.SIGINT, None)
        assert not stop.aborted
        stop._hear(signal.SIGINT)
        assert stop.aborted  # until the main thread hears of it
        with pytest.raises(KeyboardInterrupt):
            stop._handle(signal.SIGINT, None)
        assert not stop.aborted


def test_of_two_ctrl_c_that_come_as_one_call_the_second_counts() -> None:
    with GracefulStop(notice=None) as stop:
        stop._hear(signal.SIGINT)
        stop._hear(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop._handle(signal.SIGINT, None)


def test_terminated_is_what_only_the_handler_heard() -> None:
    """asyncio's `add_signal_handler` takes Python's one wakeup for itself."""
    with GracefulStop(notice=None) as stop:
        taken = signal.set_wakeup_fd(-1)
        send(signal.SIGTERM)
        stop.listen(0.01)
        assert stop.terminated
        signal.set_wakeup_fd(taken)


def test_where_nobody_reads_the_notice_the_stop_is_heard() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    errors = os.dup(2)
    os.dup2(writing, 2)
    try:
        with GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.listen(5)
            assert stop.terminated and stop.requested
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        os.close(writing)


IN_A_PROCESS_OF_ITS_OWN = """
import os, signal, time
from jaxrl_llm.training.run.stop import GracefulStop

{before}
with GracefulStop(notice=None) as stop:
    {within}
print(stop.reason)
"""


@pytest.mark.parametrize(
    ("before", "within", "reason"),
    [
        # Python and many libraries can wait for descriptors of any number, select.select up to 1023.
        (
            "many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]",
            "os.kill(os.getpid(), signal.SIGTERM); stop.listen(5); assert stop.terminated",
            "SIGTERM",
        ),
        # As multiprocessing ends its workers, whose signals are not the run's.
        (
            "",
            "child = os.fork() or time.sleep(60); os.kill(child, signal.SIGTERM); "
            "assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM; stop.listen(0.1); "
            "assert not stop.terminated",
            "None",
        ),
    ],
    ids=["many_files", "forked"],
)
def test_in_a_process_of_its_own(before: str, within: str, reason: str) -> None:
    program = IN_A_PROCESS_OF_ITS_OWN.format(before=before, within=within)
    done = subprocess.run(
        [sys.executable, "-c", "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 4096))" + program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [reason], done.stderr
