"""The process in which `rewards/math_pool.py` runs math-verify: `python math_worker.py TIME_LIMIT_IN_SECONDS`.

It reads one JSON object `{"gold": ..., "text": ...}` a line, each a formula in LaTeX, and answers, a word a
line, `unread`, or `gold` once the gold answer is parsed and computed with, and then, unless the text is null,
`right` or `wrong`. It is run as a file and imports nothing of the package, so that neither JAX nor the user's
script is loaded in it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import sys
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Integer

# Enough for any honest answer; a sampled power tower gets a MemoryError instead of the machine's memory.
MEMORY_LIMIT_BYTES = 2 * 2**30

# Units are left out before; math-verify would take "5ab" for 5 of them.
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_TARGETS = (LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_NORMALIZATION),)


def parse_formula(formula: str) -> tuple[Any, ...]:
    """Returns the parsed forms of a formula; empty if it is none."""
    # As a whole or not at all: no fallback to a number within it. And without math-verify's own time limits:
    # they cannot interrupt a long operation on big integers.
    return tuple(
        parse(f"${formula}$", _TARGETS, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    )


@functools.lru_cache(maxsize=1024)
def parse_gold(gold: str) -> tuple[Any, ...]:
    """Returns the parsed forms of a gold answer that can be computed with; empty if it has none."""
    forms = parse_formula(gold)
    if forms:
        # A power tower parses at once, and takes for ever as soon as it meets a number.
        verify(list(forms), [Integer(4)], timeout_seconds=None)
    return forms


def is_right(gold: tuple[Any, ...], formula: str) -> bool:
    """Whether the formula is equivalent to the gold answer."""
    return verify(list(gold), list(parse_formula(formula)), timeout_seconds=None)


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
            if request["text"] is not None:
                say("right" if _guard(is_right, gold, request["text"]) else "wrong")
        else:
            say("unread")
        set_alarm(0.0)


if __name__ == "__main__":
    main(float(sys.argv[1]))
