"""Processes that come together before JAX starts, as threads; the tests of two processes begin so, too."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxrl_llm.training.run import gathering


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def gathered(address: str, *processes: int, count: int, within: float = 5.0) -> list[str]:
    """What each of them ends with: nothing, or an error's text."""

    def one(process: int) -> str:
        try:
            gathering.gather(address, process, count, within)
        except ConnectionError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(one, processes))


def test_all_come_in_whatever_order_and_the_port_is_free_for_jax(address: str) -> None:
    assert gathered(address, 2, 1, 0, count=3) == ["", "", ""]
    assert gathered(address, 0, 1, count=2) == ["", ""]


def test_who_is_missing_is_said_and_ends_all_that_have_come(
    address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gathering, "_WORD", 0.2)
    first, second = gathered(address, 0, 2, count=13, within=0.4)
    missing = f"for processes 1, 3, 4, 5, 6, 7, 8, 9 and 3 more to join at {address}"
    assert first == second
    assert first == f"process 0 of 13 waited in vain for 0 s {missing}; --cluster.join-within is how long it waits"
    assert f"process 0 of 13: waiting for 0 s {missing}\n" in capfd.readouterr().err


def test_process_0_is_missing(address: str) -> None:
    (told,) = gathered(address, 1, count=2, within=0.3)
    assert told.startswith(f"process 1 of 2 waited in vain for 0 s for process 0 to answer at {address}")


def test_one_that_is_lost_while_it_waits_ends_the_others(address: str) -> None:
    def come_and_go() -> None:
        while (call := gathering._answered(address, 2, 4)) is None:
            time.sleep(0.05)
        time.sleep(0.5)
        call.close()

    threading.Thread(target=come_and_go, daemon=True).start()
    assert gathered(address, 0, 1, count=4) == ["process 0 of 4 lost process 2, which waited for the others"] * 2


def test_process_0_is_lost_while_the_others_wait(address: str) -> None:
    def come_and_go() -> None:
        with socket.create_server(("localhost", int(address.rpartition(":")[2]))) as listener:
            call, _ = listener.accept()
            gathering._caller(call)
            call.close()

    threading.Thread(target=come_and_go, daemon=True).start()
    assert gathered(address, 1, count=2) == ["process 1 of 2 lost process 0, which waited for the others"]


@pytest.mark.parametrize(
    ("counts", "said"),
    [((2,), "process 0 is one of 3, and process 1 one of 2"), ((3, 3), "two processes join as process 1 of 3")],
)
def test_what_is_no_one_run_is_said_to_all(address: str, counts: tuple[int, ...], said: str) -> None:
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(gathered, address, 1, count=count) for count in counts]
        told = [*gathered(address, 0, count=3), *(other.result()[0] for other in others)]
    assert len({*told}) == 1 and said in told[0]


def test_strangers_are_let_go(address: str) -> None:
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(gathered, address, 0, count=2)
        time.sleep(0.2)
        with socket.create_connection(("localhost", int(address.rpartition(":")[2]))) as call:
            call.sendall(b"PRI * HTTP/2.0\r\n")
        assert gathered(address, 1, count=2) == first.result() == [""]
