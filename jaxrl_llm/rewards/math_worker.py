"""The process in which `rewards/math.py` runs math-verify: `python math_worker.py TIME_LIMIT_IN_SECONDS`.

It reads one JSON object `{"gold": ..., "text": ...}` a line and answers, a word a line, `unparsable`, or
`gold` once the gold answer is parsed and then `right` or `wrong`. It is run as a file and imports nothing of
the package, so that neither JAX nor the user's script is loaded in it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import signal
import sys
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# Enough for any honest answer; a sampled power tower gets a MemoryError instead of the machine's memory.
MEMORY_LIMIT_BYTES = 4 * 2**30

# The box is where an answer is looked for first.
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed\b|\\fbox\b")
# A word between white space: "72 dollars" is text around a number, "xy + 1" and "x = 1 or x = 2" are not.
_PROSE = re.compile(r"(?<!\S)(?!(?:and|or)\b)[A-Za-z]{2,}[.,;:!?]?(?!\S)")


def as_latex(gold: str) -> str:
    """Returns a bare formula between dollar signs: without, math-verify reads 2^{10} as 2."""
    if _DELIMITER.search(gold) or ("\\" not in gold and _PROSE.search(gold)):
        return gold
    return f"${gold.strip()}$"


@functools.lru_cache(maxsize=1024)
def parse_gold(gold: str) -> tuple[Any, ...]:
    """Returns the parsed forms of a gold answer; empty if it has none beyond its own characters."""
    # Without math-verify's own time limits: they cannot interrupt a long operation on big integers.
    forms = parse(as_latex(gold), _TARGETS, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return tuple(forms) if any(not isinstance(form, str) for form in forms) else ()


def is_right(gold: tuple[Any, ...], text: str) -> bool:
    """Whether the final answer in `text` is equivalent to the gold one."""
    answer = parse(text, _TARGETS, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return verify(list(gold), answer, timeout_seconds=None)


def _guard(function: Any, *args: Any) -> Any:
    """Returns the function's value; None if sympy fails in whatever way on sampled text."""
    try:
        return function(*args)
    except Exception:  # of any kind: what a model writes reaches every corner of sympy
        return None


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    # macOS refuses the limit.
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main(timeout_s: float) -> None:
    """Answers requests until standard input ends."""
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(logging.CRITICAL)
    _limit_memory()

    def say(word: str) -> None:
        print(word, file=answers, flush=True)

    def set_alarm(seconds: float) -> None:
        # The trainer kills a process that is late. The alarm, which no handler catches, is for the case that
        # the trainer itself was killed meanwhile.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds)

    say("ready")
    for line in sys.stdin:
        set_alarm(timeout_s + 1.0)
        request = json.loads(line)
        gold = _guard(parse_gold, request["gold"])
        if gold:
            say("gold")
            say("right" if _guard(is_right, gold, request["text"]) else "wrong")
        else:
            say("unparsable")
        set_alarm(0.0)


if __name__ == "__main__":
    main(float(sys.argv[1]))
