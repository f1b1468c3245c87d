"""One process or many: start-up, and decisions that are equal on all processes.

With one process nothing here communicates or compiles. With several, every function except `is_main_process` is
a collective: all processes must call it, in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import clusters  # what JAX detects has no public name
from jax._src import distributed as _of_jax  # nor has its client
from jax.experimental import multihost_utils

from jaxrl_llm.training.run.gathering import gather
from jaxrl_llm.training.run.lookout import Lookout
from jaxrl_llm.training.run.notices import Notices

_OF_ANOTHER = re.compile(r"gloo|peer|heartbeat|coordination service|barrier|preempted", re.IGNORECASE)
"""Words of collectives that fail because a process is gone."""

_TO_START = 60
"""Seconds that JAX may take to start where all have come."""

_lookout: Lookout | None = None
"""Of this process, as JAX's client is, once it has joined others."""


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """How the processes of one run find each other, where JAX does not detect it."""

    coordinator_address: str | None = None
    """host:port of process 0, the same for all; by default the environment variable JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0."""
    lost_after: int = 30
    """Seconds of silence after which a process is lost, which ends the others."""
    join_within: int = 300
    """Seconds that those who have come wait for the others to start. Who is missing is said every half a minute."""

    def __post_init__(self) -> None:
        """Rejects what cannot be meant."""
        if self.lost_after < 5:
            raise ValueError(f"cluster.lost_after={self.lost_after} must be at least 5 seconds: a host may falter")
        if self.join_within < 1:
            raise ValueError(f"cluster.join_within={self.join_within} must be at least 1 second")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    lost_after: int = 30,
    join_within: int = 300,
) -> None:
    """Joins this process to the others. Call it first, before anything else of JAX, and only when asked for.

    On TPU pods and under Slurm, Open MPI or Kubernetes JAX finds all three values itself: leave them None, or give
    those that it should not look for.

    All wait until all have come (`gather`). From then on a process that is lost ends the others, and one that they wait
    for is named (`Lookout`).

    Args:
        coordinator_address: `host:port` of process 0; None: `JAX_COORDINATOR_ADDRESS`, if it is set.
        num_processes: How many processes there are.
        process_id: Which one this is, from 0.
        lost_after: Seconds of silence after which a process is lost.
        join_within: Seconds that those who have come wait for the others.

    Raises:
        ValueError: If something is neither given nor detected, or cannot be meant.
        ConnectionError: If the processes do not come together.
        RuntimeError: If this process has already joined, or JAX has already computed something.
    """
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator_address is not None and not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"the coordinator's address {coordinator_address!r} must be host:port")
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    coordinator_address, num_processes, process_id, *_ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator_address, num_processes, process_id, None, None, join_within
    )
    joined = _of_jax.global_state
    if (
        coordinator_address
        and num_processes is not None
        and process_id is not None
        and 0 <= process_id < num_processes > 1  # of what cannot be meant JAX says why
        and joined.client is None
    ):
        gather(coordinator_address, process_id, num_processes, join_within)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=_TO_START,
            heartbeat_timeout_seconds=lost_after,
        )
    except ValueError as error:
        missing = [name for name, value in given.items() if value is None]
        if not missing:
            raise
        flags = ", ".join(f"--cluster.{name.replace('_', '-')}" for name in missing)
        raise ValueError(
            f"JAX detects no cluster to join here ({error}): on one machine leave --distributed out; on several give "
            f"what is missing of the address and numbers of the processes: {flags}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            f"process {process_id} of {num_processes} could not join the others at {coordinator_address}: {error}"
        ) from error
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX takes it, for notices that nothing here asks for
    global _lookout
    if joined.client is not None and joined.num_processes > 1:
        where = str(joined.coordinator_address)
        _lookout = Lookout(joined.client, where, joined.process_id, joined.num_processes, lost_after)
        _lookout.begin()
        # Together and now: while the processes tell each other of their devices, no thread of Python runs.
        joined.client.wait_at_barrier("jaxrl_llm/devices", 1_000 * _TO_START)
        jax.devices()


def how_to_resume(flags: str) -> None:
    """Lets what is said where a process is lost name the flags to go on with."""
    if _lookout is not None:
        _lookout.resume = flags


def at(place: str) -> contextlib.AbstractContextManager[None]:
    """Names what all processes do in the same order, and where they may wait for each other; for the `Lookout`."""
    return contextlib.nullcontext() if _lookout is None else _lookout.at(place)


def is_main_process() -> bool:
    """Whether this is process 0, the one that prints and writes."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; the answer is equal on all.

    For decisions such as "stop now", which a signal makes on one host alone. With several processes the call
    waits for the work already given to the devices: make it where the host waits anyway.
    """
    return any_processes([flag])[0]


def any_processes(flags: Sequence[bool], place: str = "a common decision") -> list[bool]:
    """`any_process` of several flags at once, at a place with a name."""
    if jax.process_count() == 1:
        return [bool(flag) for flag in flags]
    with at(place):
        return np.any(multihost_utils.process_allgather(np.array(flags, np.int32)), axis=0).tolist()


def notices() -> Notices:
    """What the processes tell each other beside the devices."""
    joined = _of_jax.global_state
    return Notices(joined.client, joined.process_id, joined.num_processes) if jax.process_count() > 1 else Notices()


def from_main_process(value: Any) -> Any:
    """The value of process 0, on all processes: the name of a run, the step to resume from.

    Args:
        value: Anything that JSON can hold; ignored on processes other than 0.

    Returns:
        Process 0's value, after a round trip through JSON when there are several processes.
    """
    if jax.process_count() == 1:
        return value
    # Two broadcasts, because every process must bring arrays of one shape: first the length, then the text.
    # int32 and not uint8, since the broadcast is a sum over the processes.
    text = np.frombuffer(json.dumps(value).encode() if is_main_process() else b"", np.uint8).astype(np.int32)
    with at("a decision of process 0"):
        length = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
        padded = np.zeros(length, np.int32)
        padded[: text.size] = text
        received = multihost_utils.broadcast_one_to_all(padded)
    return json.loads(np.asarray(received).astype(np.uint8).tobytes())


def from_all_processes(value: Any) -> list[Any]:
    """What each process has, in their order; equal on all.

    Args:
        value: Anything that JSON can hold.

    Returns:
        The values, after a round trip through JSON when there are several processes.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with at("an exchange of results"):
        lengths = np.asarray(multihost_utils.process_allgather(np.int32(text.size)))
        texts = np.asarray(multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - text.size))))
    return [json.loads(one[:length].tobytes()) for one, length in zip(texts, lengths, strict=True)]


@contextlib.contextmanager
def ending_with_the_others() -> Iterator[None]:
    """Ends this process, with a line that says who and status 1, where a collective fails since another one is gone."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # gloo's come as either
        cause = " ".join(str(error).split())
        known = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in cause
        if _lookout is not None and known and _OF_ANOTHER.search(cause):
            _lookout.someone_is_lost(cause)
        raise
