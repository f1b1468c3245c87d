"""What checkpoints leave out, known again by a fingerprint: what training does not change, and the reference."""

from __future__ import annotations

import hashlib
from typing import Any

from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import join, split_trainable
from jaxrl_llm.training.run.checksums import checksums
from jaxrl_llm.training.run.resume import SavedRun
from jaxrl_llm.training.run.state_tree import leaves_by_path
from jaxrl_llm.types import TrainState


def split_state(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state without its frozen parameters, and these; `join_state` puts them together again.

    Of a policy or critic with adapters, the base is frozen; else nothing is, and the state is returned as it is.
    """
    params, frozen = split_trainable(state.params)
    rest = {"params": frozen} if frozen else {}
    state = state.replace(params=params)
    if state.critic is not None:
        params, frozen = split_trainable(state.critic.params)
        rest |= {"critic": frozen} if frozen else {}
        state = state.replace(critic=state.critic.replace(params=params))
    return state, rest


def join_state(state: TrainState, frozen: dict[str, Any]) -> TrainState:
    """The inverse of `split_state`."""
    state = state.replace(params=join(state.params, frozen.get("params", {})))
    if state.critic is None:
        return state
    return state.replace(critic=state.critic.replace(params=join(state.critic.params, frozen.get("critic", {}))))


def unsaved(state: TrainState, reference: Params | None) -> dict[str, Any]:
    """What no checkpoint holds: frozen parameters, and the reference if a run has one of its own."""
    return split_state(state)[1] | ({} if reference is None else {"reference": reference})


def fingerprint(frozen: dict[str, Any]) -> str | None:
    """A few characters that tell frozen parameters from others, on whatever mesh; `None` where there are none."""
    if not frozen:
        return None
    leaves = leaves_by_path(frozen)
    lines = [f"{path} {leaf.dtype} {leaf.shape}" for path, leaf in leaves.items()]
    lines += [f"{value:08x}" for value in checksums(leaves).values()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_frozen(saved: SavedRun | None, state: TrainState, reference: Params | None) -> None:
    """Checks that a run goes on with the frozen parameters and the reference that it had: no checkpoint holds them.

    Raises:
        ValueError: they are others.
    """
    if saved is None or (now := fingerprint(unsaved(state, reference))) == saved.frozen:
        return
    raise ValueError(
        f"cannot go on from step {saved.step}: the model that the run began with, its reference or the base of its "
        f"adapters, is another one now (fingerprint {saved.frozen}, now {now}). Give the same checkpoint, or choose "
        "another --run-dir"
    )
