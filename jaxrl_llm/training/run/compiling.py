"""Says what is being compiled, and how long it took the last time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax

from jaxrl_llm.training.compilation import Compilation, CompilationCounter, program_of
from jaxrl_llm.training.run.formatting import duration
from jaxrl_llm.training.run.report import Report

_LOWERED_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"
"""Told when a program begins to be compiled, with its name."""

_SHORT = 1.0
"""Seconds of compilations that are not worth a word."""

TIMES_FILE = "seconds.json"
"""Beside the compiled programs: how long each took."""
_KEPT = 512
"""Programs in that file."""

_SHAPING = ("model.", "update.", "sampling.", "algorithm.", "objective.", "data.max_")
_SHAPING_STEPS = ("prompts_per_step", "samples_per_prompt", "rows_per_step", "batch_size")


class _Begun(NamedTuple):
    program: str
    key: str
    timer: threading.Timer


class CompilationNews:
    """Says in a run's report what is compiled, while it is; a context manager.

    A program that takes more than a second is named, with the time that it took in the last run of the same settings,
    and its time is told at its end. Those that take less pass in silence.

    Args:
        report: where.
        compilations: tells of their ends; it is started and stopped elsewhere.
        settings: of the run, flat: programs of other shapes have times of their own.
        patience: seconds before a program is named.
    """

    def __init__(
        self,
        report: Report,
        compilations: CompilationCounter,
        settings: Mapping[str, Any],
        *,
        patience: float = _SHORT,
    ) -> None:
        self._report, self._compilations, self._patience = report, compilations, patience
        self._times, self._shape = LastTimes.beside_programs(), shape_of(settings)
        self._lock = threading.Lock()
        self._begun: dict[int, _Begun] = {}  # by thread
        self._named: dict[int, str] = {}  # what is said of those that are named
        self.place = ""
        """What the run is doing, which tells programs of one name apart."""

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        self._compilations.listener = self._ended
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._compilations.listener = None
        # AssertionError: someone called jax.monitoring.clear_event_listeners, which is no fault of ours.
        with contextlib.suppress(AssertionError):
            jax.monitoring.unregister_event_duration_listener(self._on_duration)
        for one in self._begun.values():
            one.timer.cancel()

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event != _LOWERED_EVENT:
            return
        thread = threading.get_ident()
        timer = threading.Timer(self._patience, self._name, (thread,))
        timer.daemon = True
        program = program_of(kwargs)
        place = self.place if threading.current_thread() is threading.main_thread() else "ahead"
        with self._lock:
            self._begun[thread] = _Begun(program, f"{place}/{program}/{self._shape}", timer)
        timer.start()

    def _name(self, thread: int) -> None:
        with self._lock:
            if (one := self._begun.get(thread)) is None:
                return
            before = self._times.seconds(one.key)
            known = "" if before is None else f" ({duration(before)} last time)"
            self._named[thread] = f"{one.program}{known}"
            self._report.compiling(list(self._named.values()), said=f"compiling {one.program} …{known}")

    def _ended(self, compilation: Compilation) -> None:
        """Called on the thread that compiled it."""
        thread = threading.get_ident()
        with self._lock:
            if (one := self._begun.pop(thread, None)) is None:
                return
            one.timer.cancel()
            if compilation.seconds >= self._patience and not compilation.from_cache:
                self._times.keep(one.key, compilation.seconds)
            if self._named.pop(thread, None) is None:
                return
            how = "read from the cache" if compilation.from_cache else "compiled"
            said = f"{how} in {duration(compilation.seconds)}: {one.program}"
            self._report.compiling(list(self._named.values()), said=said)


def shape_of(settings: Mapping[str, Any]) -> str:
    """A short name of what decides which programs a run compiles: of the settings those of shapes, and the devices."""
    chosen = {
        name: value
        for name, value in settings.items()
        if name.startswith(_SHAPING) or name.rpartition(".")[2] in _SHAPING_STEPS
    }
    where = (jax.__version__, jax.default_backend(), jax.device_count())
    return hashlib.sha256(json.dumps([chosen, where], sort_keys=True, default=str).encode()).hexdigest()[:16]


class LastTimes:
    """Seconds by program, in a file; without one, of this process alone.

    Args:
        file: where they are kept, or `None`.
    """

    def __init__(self, file: Path | None) -> None:
        self._file, self._own = file, self._read(file)

    @classmethod
    def beside_programs(cls) -> LastTimes:
        """Those of JAX's compilation cache, where it is on and a folder of this machine."""
        settings = jax.config.values
        folder = settings["jax_compilation_cache_dir"] if settings["jax_enable_compilation_cache"] else None
        return cls(Path(folder) / TIMES_FILE if folder and os.path.isdir(folder) else None)

    def seconds(self, key: str) -> float | None:
        """Of a program, if it is known."""
        return self._own.get(key)

    def keep(self, key: str, seconds: float) -> None:
        """Writes them down; where that cannot be, nothing is lost but a hint."""
        self._own = {**self._read(self._file), **self._own}
        self._own.pop(key, None)
        self._own[key] = round(seconds, 1)
        if self._file is None:
            return
        kept = dict(list(self._own.items())[-_KEPT:])
        staging = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            staging.write_text(json.dumps(kept, indent=0))
            staging.replace(self._file)

    @staticmethod
    def _read(file: Path | None) -> dict[str, float]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(file.read_text()) if file else {}
            return {str(key): float(value) for key, value in found.items()} if isinstance(found, dict) else {}
        return {}
