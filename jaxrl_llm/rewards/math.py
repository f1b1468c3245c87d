"""Mathematical equivalence with the gold answer, decided by math-verify within a hard time limit.

sympy can compute for ever on what a model writes (9^{9^{9^{9}}}). math-verify's own limit is a signal
handler: it works in the main thread only, and does not interrupt one long operation on big integers. Here the
answers are checked one by one in a process of their own, which is killed when it is late.
"""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import IO

from jaxrl_llm.rewards.per_sample import RewardFunction, make_per_sample_reward

_START_LIMIT_S = 120.0


class _Worker:
    """A running `math_worker.py`, and the words that it says."""

    def __init__(self, timeout_s: float):
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
        self._words: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A thread, as a pipe has no read with a deadline that works on every system.
        reader = threading.Thread(target=_read, args=(self._process.stdout, self._words), daemon=True)
        reader.start()
        # Runs when the object is collected, or at the interpreter's exit.
        self.stop = weakref.finalize(self, _stop, self._process, reader)
        if self.next_word(time.monotonic() + _START_LIMIT_S) != "ready":
            self.stop()
            raise RuntimeError(
                "the process that runs math-verify did not start; what it printed stands above. "
                "Is the package there? pip install math-verify"
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, gold: str, text: str) -> None:
        self._requests.write(json.dumps({"gold": gold, "text": text}) + "\n")
        self._requests.flush()

    def next_word(self, deadline: float) -> str | None:
        """Returns what the process says next; None if it says nothing until the deadline, or died."""
        try:
            return self._words.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None


def _read(stream: IO[str], words: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        words.put(line.strip())
    words.put(None)


def _stop(process: subprocess.Popen[str], reader: threading.Thread) -> None:
    process.kill()
    reader.join()
    # Waits for the process, too.
    process.communicate()


class _Verifier:
    """Asks one worker at a time; starts it at the first question and again after it had to be killed."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def score(self, text: str, gold: object) -> float | None:
        """1 where the final answer equals the gold one, else 0; None where that cannot be parsed."""
        if gold is None:
            return None
        with self._lock:
            worker = self._worker
            if worker is None or not worker.is_alive():
                worker = _Worker(self._timeout_s)
            # Kept only once it has said all: an interrupt must not leave a verdict for the next question.
            self._worker = None
            deadline = time.monotonic() + self._timeout_s
            worker.ask(str(gold), text)
            word = worker.next_word(deadline)
            verdict = worker.next_word(deadline) if word == "gold" else None
            if word == "unparsable" or verdict is not None:
                self._worker = worker
            else:
                worker.stop()  # late, or killed by what it read
            return float(verdict == "right") if word == "gold" else None


def make_math_reward(
    *, answer_column: str = "answer", timeout_s: float = 5.0, name: str = "math_reward"
) -> RewardFunction:
    r"""Returns the reward 1 for a completion whose final answer equals the gold one mathematically, else 0.

    The final answer is what stands in `\boxed{…}`, else the last formula or number of the text; several boxes
    are read as the set of their contents. 0.5 = \frac{1}{2} = 1/2. None where the gold answer cannot be
    parsed.

    The first call starts a process (about a second), which ends with the interpreter. The function may be
    called from any thread; calls take turns.

    Args:
        answer_column: The column with the gold answer: a formula or a number, bare, in `$…$` or in
            `\boxed{…}`, in which case there may be text around it.
        timeout_s: Limit for one answer, in seconds. A completion that takes longer gets 0, a gold answer
            None.
        name: The metric's name.

    Raises:
        ValueError: If the time limit is not positive.
        RuntimeError: In the call, if the process does not start.
    """
    if not 0.0 < timeout_s < math.inf:
        raise ValueError(f"{name}: timeout_s must be positive and finite, got {timeout_s}")
    return make_per_sample_reward(_Verifier(timeout_s).score, name, [answer_column])


#: `make_math_reward()`: gold answer in the column `answer`, five seconds an answer.
math_reward = make_math_reward()
