"""The training state: as it is before the first step, as it lies on a mesh, and the randomness of a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.distillation.self_teacher import start_average
from jaxrl_llm.algorithms.interfaces import Algorithm
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.rounding import Rounding, optimizer_state
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import split_trainable
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import check_host_memory, state_shardings
from jaxrl_llm.types import TrainState

_OF_POLICY, _OF_CRITIC = 2**31, 2**31 + 1
"""Of the root's keys those of their rounding: beyond the numbers of steps, which have the others."""


def make_train_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    algorithm: Algorithm | None = None,
    critic: Critic | None = None,
    critic_params: Params | None = None,
    rounding: Rounding = "master",
) -> TrainState:
    """The state before the first step: `params`, a fresh optimizer of what is trained, and the root of all randomness.

    Of a model with adapters, these and its heads are trained (`split_trainable`), else everything.

    Args:
        params: the policy's; with a critic that shares its trunk, the critic's head among them.
        optimizer: of the policy.
        seed: of all randomness.
        algorithm: whose memory, and average of the policy, start here, if it has them.
        critic: the critic, if it has parameters of its own.
        critic_params: these parameters.
        rounding: how small updates reach parameters that are stored in bfloat16; see `OptimizerConfig.rounding`.
    """
    root = jax.random.key(seed)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer_state(
            split_trainable(params)[0], optimizer, rounding, jax.random.fold_in(root, _OF_POLICY)
        ),
        key=jax.random.key_data(root),
        memory=() if algorithm is None else algorithm.start(),
        critic=(
            None
            if critic is None or critic.shares_trunk
            else critic.start(critic_params, jax.random.fold_in(root, _OF_CRITIC))
        ),
        average=start_average(params) if algorithm is not None and algorithm.averages_policy else None,
    )


def abstract_train_state(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    algorithm: Algorithm | None = None,
    critic: Critic | None = None,
    rounding: Rounding = "master",
    offload: bool = False,
) -> TrainState:
    """Shapes, types and shardings of a training state on `mesh`; arguments beside it as of `make_train_state`.

    Args:
        policy: the model.
        optimizer: of the policy.
        mesh: the devices.
        algorithm: whose memory is part of the state.
        critic: the critic.
        rounding: of the policy's parameters.
        offload: whether the state of the policy's optimizer lies in the host's memory.

    Raises:
        ValueError: the mesh does not divide a parameter or the heads, or its devices cannot do as a setting says; names
            them.
    """
    if policy.config.remat == "offload":
        check_host_memory(mesh, "model.remat='offload'", "model.remat=full")
    if offload or (critic is not None and critic.offload):
        check_host_memory(mesh, "optimizer.offload=True", "optimizer.offload=False")
    model = critic.model if critic is not None and critic.shares_trunk else policy
    params = model.abstract_params()
    shardings = model.shardings(mesh)
    own = None if critic is None or critic.shares_trunk else critic.model.abstract_params()
    abstract = jax.eval_shape(
        lambda p, c: make_train_state(
            p, optimizer, seed=0, algorithm=algorithm, critic=critic, critic_params=c, rounding=rounding
        ),
        params,
        own,
    )
    trained = split_trainable(shardings)[0]
    placed = state_shardings(mesh, abstract.replace(critic=None), shardings, trained, offload=offload)
    if abstract.average is not None:
        placed = placed.replace(average=trained)
    if own is not None:
        assert critic is not None
        of_critic = critic.model.shardings(mesh)
        trained = split_trainable(of_critic)[0]
        placed = placed.replace(
            critic=state_shardings(mesh, abstract.critic, of_critic, trained, offload=critic.offload)
        )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, placed
    )


def step_key(state: TrainState, use: int) -> jax.Array:
    """A key for one use of randomness in the step after `state`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), use)
