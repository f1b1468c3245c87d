from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Callable

import pytest

from jaxrl_llm.training.run.notices import Notices
from jaxrl_llm.training.run.rescue import Rescue
from jaxrl_llm.training.run.stop import GracefulStop


class Service:
    """What JAX's coordination service does for the processes, here threads."""

    def __init__(self, count: int) -> None:
        self.values: dict[str, str] = {}
        self.barrier = threading.Barrier(count)

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        self.values[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]

    def wait_at_barrier(self, name: str, timeout: int) -> None:
        self.barrier.wait(10)


class Process:
    """One of them, whose main thread does what it is told."""

    def __init__(self, service: Service, number: int, count: int, *, ready: bool = True, grace: float = 0.6) -> None:
        self.told = GracefulStop(notice=None)
        self.saved, self.ended, self.status = threading.Event(), threading.Event(), -1
        others = Notices(service, number, count) if count > 1 else Notices()
        others._run = "run"  # they are of one run, though made in one process
        self.rescue = Rescue(self.told, grace, self.saved.set, others, end=self._end)
        self.rescue.ready = ready

    def _end(self, status: int) -> None:
        self.status = status
        self.ended.set()

    def begin(self, main: Callable[[Rescue], None]) -> threading.Thread:
        def run() -> None:
            with self.rescue:
                main(self.rescue)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def terminated(monkeypatch: pytest.MonkeyPatch) -> set[GracefulStop]:
    """Those that get SIGTERM: signals reach a process's main thread alone."""
    given: set[GracefulStop] = set()
    listen = GracefulStop.listen

    def hear(stop: GracefulStop, seconds: float) -> None:
        listen(stop, 0.01)
        stop.terminated |= stop in given

    monkeypatch.setattr(GracefulStop, "listen", hear)
    monkeypatch.setattr("jaxrl_llm.training.run.notices._LAST", 0.0)
    return given


def test_one_process_is_cut_in_a_phase_and_not_between(terminated: set[GracefulStop]) -> None:
    process, between, phase = Process(Service(1), 0, 1), threading.Event(), threading.Event()

    def main(rescue: Rescue) -> None:
        between.wait(10)
        with rescue.phase():
            phase.wait(10)
        raise AssertionError("not reached")

    process.begin(main)
    terminated.add(process.told)
    assert not process.saved.wait(0.5)
    between.set()
    assert process.ended.wait(5) and process.saved.is_set() and process.status == 0
    phase.set()  # and the main thread stays where it is


def test_a_phase_that_ends_soon_is_not_cut(terminated: set[GracefulStop]) -> None:
    process = Process(Service(1), 0, 1, grace=30.0)

    def main(rescue: Rescue) -> None:
        with rescue.phase():
            terminated.add(process.told)

    process.begin(main).join(5)
    assert not process.ended.is_set()


def test_where_nothing_is_ready_a_phase_is_waited_for(terminated: set[GracefulStop]) -> None:
    process, phase = Process(Service(1), 0, 1, ready=False, grace=0.06), threading.Event()

    def main(rescue: Rescue) -> None:
        with rescue.phase():
            phase.wait(10)

    thread = process.begin(main)
    terminated.add(process.told)
    assert not process.ended.wait(0.3)
    phase.set()
    thread.join(5)
    assert not thread.is_alive() and not process.ended.is_set()


@pytest.mark.parametrize(("term", "times"), [(True, 1), (False, 2)], ids=["after SIGTERM", "twice"])
@pytest.mark.parametrize("interactive", [False, True])
def test_ctrl_c_ends_a_process_that_waits_but_no_notebook(
    terminated: set[GracefulStop],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    term: bool,
    times: int,
    interactive: bool,
) -> None:
    monkeypatch.setattr("jaxrl_llm.training.run.rescue._HEARS", 0.01)
    if interactive:
        monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    process, phase = Process(Service(1), 0, 1, ready=False, grace=0.06), threading.Event()

    def main(rescue: Rescue) -> None:
        with rescue.phase():
            phase.wait(10)

    process.begin(main)
    if term:
        terminated.add(process.told)
        while process.told.reason is None:
            time.sleep(0.01)
    for _ in range(times):
        process.told._hear(signal.SIGINT)
    assert process.ended.wait(0.5 if interactive else 5) is not interactive
    assert process.status == (-1 if interactive else 130) and not process.saved.is_set()
    assert ("only a new kernel" in capfd.readouterr().err) is interactive
    phase.set()


def test_one_that_fails_to_save_says_so(terminated: set[GracefulStop], capfd: pytest.CaptureFixture[str]) -> None:
    process = Process(Service(1), 0, 1)

    def fails() -> None:
        raise OSError("disk full")

    process.rescue._save = fails

    def main(rescue: Rescue) -> None:
        with rescue.phase():
            process.ended.wait(10)

    process.begin(main)
    terminated.add(process.told)
    assert process.ended.wait(5) and process.status == 1
    assert "could not save: OSError: disk full" in capfd.readouterr().err


@pytest.mark.parametrize("output", [None, io.StringIO()], ids=["none", "closed"])
def test_where_there_is_no_output_it_ends_all_the_same(
    terminated: set[GracefulStop], monkeypatch: pytest.MonkeyPatch, output: io.StringIO | None
) -> None:
    if output is not None:
        output.close()
    monkeypatch.setattr("jaxrl_llm.training.run.rescue.sys.stdout", output)
    process = Process(Service(1), 0, 1)

    def main(rescue: Rescue) -> None:
        with rescue.phase():
            process.ended.wait(10)

    process.begin(main)
    terminated.add(process.told)
    assert process.ended.wait(5) and process.status == 0


@pytest.mark.parametrize("signalled", [0, 1, 2])
def test_all_processes_are_cut_together_wherever_they_are(terminated: set[GracefulStop], signalled: int) -> None:
    """One waits for the others after the phase, one is in it for long, and one is late, between phases."""
    service, late, agreed = Service(3), threading.Event(), threading.Event()
    processes = [Process(service, number, 3) for number in range(3)]

    def waits(rescue: Rescue) -> None:
        with rescue.phase():
            pass
        with rescue.agreement():
            agreed.wait(10)

    def stuck(rescue: Rescue) -> None:
        with rescue.phase():
            agreed.wait(10)

    def comes_late(rescue: Rescue) -> None:
        late.wait(10)
        stuck(rescue)

    for process, main in zip(processes, (waits, stuck, comes_late), strict=True):
        process.begin(main)
    terminated.add(processes[signalled].told)
    assert not any(process.saved.wait(0.3) for process in processes)
    late.set()
    assert all(process.ended.wait(5) and process.status == 0 and process.saved.is_set() for process in processes)
    assert {process.told.reason for process in processes} == {"another process was stopped"}
    agreed.set()


def test_processes_that_agree_first_are_not_cut(terminated: set[GracefulStop]) -> None:
    """All wait for each other, and none is known to stay away."""
    service, agreement = Service(2), threading.Barrier(3)
    processes = [Process(service, number, 2, grace=0.06) for number in range(2)]

    def main(rescue: Rescue) -> None:
        with rescue.phase():
            pass
        with rescue.agreement():
            agreement.wait(10)

    threads = [process.begin(main) for process in processes]
    terminated.add(processes[0].told)
    assert not any(process.saved.wait(0.3) for process in processes)
    agreement.wait(10)
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
