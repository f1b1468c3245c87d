"""Processes that run math-verify, several at once, within a limit an answer and a limit a call.

sympy can compute for ever on what a model writes (9^{9^{9^{9}}}). math-verify's own limit is a signal
handler: it works in the main thread only, and does not interrupt one long operation on big integers. Here the
questions are put to processes of their own, which are killed when they are late.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

_START_LIMIT_S = 120.0
_MOST_WORKERS = 4

#: `unread`: the gold answer cannot be parsed, or not computed with in time; `late`: the answer cannot.
Verdict = Literal["right", "wrong", "unread", "late"]


@dataclass(frozen=True)
class Question:
    """Whether two formulas are equal; without an answer, whether the gold one can be computed with."""

    gold: str
    answer: str | None

    @property
    def danger(self) -> tuple[int, int]:
        """Larger for what is likelier to take long: towers of powers, factorials."""
        text = f"{self.gold}{self.answer or ''}"
        return text.count("^") + text.count("!"), len(text)


_Words = queue.SimpleQueue[tuple[int, str | None]]


class _Worker:
    """A running `math_worker.py`; what it says goes into a queue, as `(number of the worker, word)`."""

    def __init__(self, number: int, timeout_s: float, words: _Words):
        worker = Path(__file__).with_name("math_worker.py")
        # Not `multiprocessing`: fork is unsafe beside JAX's threads, spawn would import the user's script
        # again. -P: the folder of this file, which has a math.py, must not be on the path. A session of its
        # own: Ctrl-C in the terminal is for the trainer, which may still want an answer while it stops.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(worker), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests: IO[str] = self._process.stdin
        # Until when it must have said all that is expected of it.
        self.deadline = time.monotonic() + _START_LIMIT_S
        self.ready = False
        self.question: Question | None = None
        self.gold_is_read = False
        # A thread, as a pipe has no read with a deadline that works on every system.
        reader = threading.Thread(target=_read, args=(number, self._process.stdout, words), daemon=True)
        reader.start()
        # Runs when the object is collected, or at the interpreter's exit.
        self.stop = weakref.finalize(self, _stop, self._process, reader)

    @property
    def idle(self) -> bool:
        return self.ready and self.question is None

    def ask(self, question: Question, timeout_s: float) -> None:
        self.question, self.gold_is_read = question, False
        self.deadline = time.monotonic() + timeout_s
        # If it has died, its reader says so.
        with contextlib.suppress(OSError):
            self._requests.write(json.dumps({"gold": question.gold, "text": question.answer}) + "\n")
            self._requests.flush()


def _read(number: int, stream: IO[str], words: _Words) -> None:
    for line in stream:
        words.put((number, line.strip()))
    words.put((number, None))


def _stop(process: subprocess.Popen[str], reader: threading.Thread) -> None:
    process.kill()
    reader.join()
    # Waits for the process, too.
    process.communicate()


class MathPool:
    """Answers questions of equality in processes, which it starts when they are needed, and again when killed.

    Args:
        timeout_s: Limit for one question, in seconds.
        batch_timeout_s: Limit for one call of `ask`, in seconds, without the start of the processes.
    """

    def __init__(self, timeout_s: float, batch_timeout_s: float):
        self._timeout_s = timeout_s
        self._batch_timeout_s = batch_timeout_s
        self._workers: dict[int, _Worker] = {}
        self._started = 0
        self._words: _Words = queue.SimpleQueue()
        self._lock = threading.Lock()

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """Returns a verdict a question. Calls from several threads take turns.

        What looks dangerous comes last, so that it costs nobody else an answer; what is not reached within the
        call's limit is late.

        Raises:
            RuntimeError: If a process does not start.
        """
        with self._lock:
            try:
                verdicts = self._run(set(questions))
            finally:
                # Late, or interrupted: its verdict must not be taken for the next question's.
                for number in [number for number, worker in self._workers.items() if worker.question is not None]:
                    self._workers.pop(number).stop()
        return [verdicts.get(question, "late") for question in questions]

    def _run(self, questions: set[Question]) -> dict[Question, Verdict]:
        waiting = sorted(questions, key=lambda question: question.danger, reverse=True)
        verdicts: dict[Question, Verdict] = {}
        end = math.inf
        while len(verdicts) < len(questions) and time.monotonic() < end:
            self._hand_out(waiting)
            if end == math.inf and any(worker.ready for worker in self._workers.values()):
                end = time.monotonic() + self._batch_timeout_s
            at_work = {number: worker for number, worker in self._workers.items() if not worker.idle}
            now = time.monotonic()
            try:
                number, word = self._words.get(
                    timeout=max(0.0, min(end, *(worker.deadline for worker in at_work.values())) - now)
                )
            except queue.Empty:
                for number, worker in at_work.items():
                    if worker.deadline <= time.monotonic():
                        self._heard(number, None, verdicts)
            else:
                # A stopped worker's last words are nobody's.
                if number in self._workers:
                    self._heard(number, word, verdicts)
        return verdicts

    def _hand_out(self, waiting: list[Question]) -> None:
        """Gives the idle processes questions; starts one where they are few for what waits."""
        for worker in self._workers.values():
            if waiting and worker.idle:
                worker.ask(waiting.pop(), self._timeout_s)
        most = min(_MOST_WORKERS, os.cpu_count() or 1)
        # Each costs a second to start, in which another answers many honest questions.
        if len(self._workers) < min(most, -(-len(waiting) // 4)) or not self._workers:
            self._started += 1
            self._workers[self._started] = _Worker(self._started, self._timeout_s, self._words)

    def _heard(self, number: int, word: str | None, verdicts: dict[Question, Verdict]) -> None:
        """Acts on what a process says; None: it is late, or dead."""
        worker = self._workers[number]
        if not worker.ready:
            if word != "ready":
                self._workers.pop(number).stop()
                raise RuntimeError(
                    "the process that runs math-verify did not start; what it printed stands above. "
                    "Is the package there? pip install 'jaxrl-llm[rewards]'"
                )
            worker.ready = True
            return
        question = worker.question
        if word is None:
            self._workers.pop(number).stop()
            if question is not None:
                verdicts[question] = "late" if worker.gold_is_read else "unread"
        elif question is not None:
            worker.gold_is_read = True
            if word == "unread":
                verdicts[question] = "unread"
            elif word == "right" or (word == "gold" and question.answer is None):
                verdicts[question] = "right"
            elif word == "wrong":
                verdicts[question] = "wrong"
            else:
                return
            worker.question = None
