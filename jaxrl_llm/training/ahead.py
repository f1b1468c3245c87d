"""Programs that are compiled before they are called, beside each other."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from typing import Any

import jax

Lowering = Callable[[], jax.stages.Lowered]
"""Makes what is compiled, with the very arguments of the call: the call then finds it."""


class Ahead:
    """Compiles programs on threads of their own. Much of a compilation occupies one core, and the others are free.

    Args:
        mesh: that is set while they are traced.
        programs: by name.
    """

    def __init__(self, mesh: jax.sharding.Mesh, programs: Mapping[str, Lowering]) -> None:
        def compiled(lower: Lowering) -> Any:
            with jax.set_mesh(mesh):
                return lower().compile()

        self._pending: dict[str, concurrent.futures.Future[Any]] = {}
        if programs:
            pool = concurrent.futures.ThreadPoolExecutor(len(programs), thread_name_prefix="compile")
            self._pending = {name: pool.submit(compiled, lower) for name, lower in programs.items()}
            pool.shutdown(wait=False)

    def wait(self, name: str) -> None:
        """Returns when a program has been compiled, at once where it is none of these; raises what compiling raised."""
        if (pending := self._pending.pop(name, None)) is not None:
            pending.result()
