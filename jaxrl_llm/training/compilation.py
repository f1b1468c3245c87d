"""Counting XLA compilations by program, and JAX's persistent compilation cache."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import platform
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"

_MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster are not cached: reading them would cost as much."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One program that XLA compiled, or that was loaded from the persistent cache in its stead."""

    program: str
    """Name of the jitted function."""
    seconds: float
    """Time to compile or to load; tracing and lowering are not included."""
    from_cache: bool
    """Loaded from the persistent cache. The function was traced anew all the same."""


class CompilationCounter:
    """Records every compilation in this process, on any thread, between `start` and `stop`.

    It listens to `jax.monitoring`, which reports compilations only: executing a compiled program costs
    nothing more. A load from the persistent cache is recorded as well, marked `from_cache`: with a warm cache
    a function that is traced again at every step is still a defect.

    Example:
        >>> with CompilationCounter() as counter:
        ...     train_one_iteration()
        ...     mark = counter.mark()
        ...     train_one_iteration()
        ...     assert counter.since(mark) == {}
    """

    def __init__(self) -> None:
        self._records: list[Compilation] = []
        self._hit = threading.local()
        self._listening = False
        self.listener: Callable[[Compilation], None] | None = None
        """Told of each, on the thread that compiled it."""

    def start(self) -> None:
        """Starts to record; what was recorded before is kept."""
        if not self._listening:
            jax.monitoring.register_event_listener(self._on_event)
            jax.monitoring.register_event_duration_secs_listener(self._on_duration)
            self._listening = True

    def stop(self) -> None:
        """Stops recording; the records stay readable."""
        if self._listening:
            # AssertionError: someone called jax.monitoring.clear_event_listeners, which is no fault of ours.
            with contextlib.suppress(AssertionError):
                jax.monitoring.unregister_event_listener(self._on_event)
                jax.monitoring.unregister_event_duration_listener(self._on_duration)
            self._listening = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def records(self) -> tuple[Compilation, ...]:
        """All compilations, in the order in which they ended."""
        return tuple(self._records)

    @property
    def counts(self) -> dict[str, int]:
        """Compilations and cache loads by program name."""
        return self.since(0)

    @property
    def seconds(self) -> float:
        """Time spent compiling and loading, summed over threads."""
        return sum(record.seconds for record in self._records)

    def mark(self) -> int:
        """A place in the records, for `since`."""
        return len(self._records)

    def since(self, mark: int) -> dict[str, int]:
        """Compilations and cache loads by program name since `mark`; empty if there were none."""
        return dict(collections.Counter(record.program for record in self._records[mark:]))

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        if event == _CACHE_HIT_EVENT:
            # JAX names no program here; the compile event that follows on this thread does.
            self._hit.pending = True

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            from_cache = getattr(self._hit, "pending", False)
            self._hit.pending = False
            self._records.append(Compilation(program_of(kwargs), duration_secs, from_cache))
            if self.listener is not None:
                self.listener(self._records[-1])


def program_of(event: Mapping[str, str | int]) -> str:
    """The function of which one of JAX's events tells."""
    name = str(event.get("fun_name", "unknown"))
    wrapped = re.fullmatch(r"\w+\((.*)\)", name)  # "jit(update_step)"
    return wrapped[1] if wrapped else name


def enable_persistent_cache(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Keeps compiled programs on disk, so that the next run of the same program starts without compiling.

    A cache that the user has configured (`JAX_COMPILATION_CACHE_DIR` or `jax_compilation_cache_dir`) is left
    as it is, and `JAX_ENABLE_COMPILATION_CACHE=false` turns any cache off. The cache is trusted: whoever can
    write the folder can run code in this process. It is never emptied; deleting it costs only time.

    Args:
        folder: Where to keep the programs. By default `$JAXRL_LLM_CACHE/xla/…` or `~/.cache/jaxrl_llm/xla/…`,
            with a folder below it for each kind of CPU: machine code for one may not run on another, and the
            machines of a cluster share homes.

    Returns:
        The cache's folder, or None if caching is off or the default folder under the home cannot be written
        (the run goes on without a cache).

    Raises:
        ValueError: If a folder that was asked for cannot be written.
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        return None
    if settings["jax_compilation_cache_dir"]:
        return settings["jax_compilation_cache_dir"]
    asked = folder or os.environ.get("JAXRL_LLM_CACHE")
    path = Path(folder) if folder else Path(asked or "~/.cache/jaxrl_llm").expanduser() / "xla" / _cpu_kind()
    try:
        # Private, because what is read from here is executed.
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        if asked:
            raise ValueError(f"the compilation cache {path} cannot be created: {error}") from error
        return None
    if not writable:
        if asked:
            raise ValueError(f"the compilation cache {path} cannot be written: choose another folder")
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    return str(path)


def _cpu_kind() -> str:
    """A short name of this CPU's instruction set."""
    features = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):  # x86, Arm
                features = line
                break
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
