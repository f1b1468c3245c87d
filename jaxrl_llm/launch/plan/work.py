"""What sampling, scoring and updating compute, read and send, in closed form, and which limit of a chip binds.

All completions are taken to be of the greatest length, which is the most that a step can take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm.launch.plan.operations import Forward, forward, weights_of_layers
from jaxrl_llm.launch.plan.settings import Plan
from jaxrl_llm.launch.plan.slices import Chip
from jaxrl_llm.models.config import LayerKind, ModelConfig
from jaxrl_llm.models.integers import BYTES
from jaxrl_llm.sampling.flight import STEPS_BETWEEN_LOOKS
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sampling.traffic import Traffic
from jaxrl_llm.sharding import context_shards, head_shards, row_shards

_HOP_SECONDS = 1e-6
"""From a chip to its neighbour, however little is sent: small sums, as those of a token, take nothing else."""


class Work(NamedTuple):
    """What a program asks of one device."""

    flops: float
    """Operations that the algorithm needs."""
    again: float
    """Those that the backward pass repeats to save memory."""
    read: float
    """Bytes of memory read and written, at least: weights, keys and values, the optimizer's state."""
    turns: int
    """Of the loop whose length the numbers decide: tokens that are decoded one after another, or pieces of a batch."""
    turn: str
    """What a turn is."""
    sent: float = 0
    """Bytes that it takes from others, at least: weights, sums along `tensor`, gradients."""
    kept: int = 0
    """Bytes that the backward pass finds of the layers, at least."""
    hops: int = 0
    """From a chip to the next, one after another, at least: of the sums along `tensor`."""
    stride: int = 1
    """Turns that a loop of known length makes within the open one, between two looks for the end."""
    fills: int | None = None
    """How often an open loop within the open one turns: prompts that are read, some at a time; `None`: as often."""

    epochs: int = 1
    """Over the batch: of `turns` they count."""
    minibatches: int = 1
    """Of a batch, each with its part of the pieces."""

    def runs(self, open_loops: int, loops: int, outside: int = 1) -> float:
        """How often what is within so many open loops runs, known ones apart.

        Args:
            open_loops: around it, one in the other.
            loops: that are beside each other in the program: a sampler's turns are dealt to them.
            outside: how often loops of known length around the open ones turn: there are some around a minibatch, and
                none around what is made of the whole batch.
        """
        if open_loops > 1 and self.fills is not None:
            return self.fills
        if not open_loops:
            return 1
        if self.stride > 1:
            return self.turns / self.stride / loops
        return self.turns / self.epochs / (self.minibatches if outside > 1 else 1)

    def seconds(self, chip: Chip, sent: float, between: float = 0) -> dict[str, float]:
        """How long each limit alone would let it take: a roofline.

        Args:
            chip: what a device can do.
            sent: bytes that it takes from others of its slice.
            between: bytes that it takes from those of other slices.
        """
        slices = between and chip.dcn_gbps
        return {
            "compute": (self.flops + self.again) / (1e12 * chip.tflops),
            "memory": self.read / (1e9 * chip.hbm_gbps),
            "network": sent / (1e9 * chip.ici_gbps) + self.hops * _HOP_SECONDS,
            **({"network between slices": between / (1e9 * slices)} if slices else {}),
        }


def sampling_work(config: ModelConfig, mesh: Mesh, plan: Plan, slots: int, read: Traffic, *, fills: int) -> Work:
    """Sampling with so many slots, of which a token of each reads `read`, and prompts are read so many times."""
    p, g, longest = plan.prompts, plan.group, plan.completion_tokens
    pass_ = forward(config, plan.prompt_tokens, [[longest] * g] * p, unfed=1, scored=p + p * g * (longest - 1))
    shards = head_shards(sampling_mesh(mesh, plan.sampling_tensor))
    groups = mesh.size // shards
    turns = max(1, -(-p * g // groups) // slots) * longest
    sums = 2 * config.num_layers * slots * config.embed_dim
    sent = _weights(config, mesh) + turns * _sum(sums, shards) * jnp.dtype(config.dtype).itemsize
    hops = turns * 2 * config.num_layers * _hops(shards)
    return Work(
        flops=pass_.total / mesh.size,
        again=0,
        read=turns * (read.weights + read.pages),
        turns=turns,
        turn="token",
        sent=sent,
        hops=hops,
        stride=STEPS_BETWEEN_LOOKS,
        fills=fills,
    )


def update_work(config: ModelConfig, mesh: Mesh, plan: Plan, *, state: int) -> Work:
    """Optimizer steps on a batch: a forward pass and the one backward, and the passes that come before them.

    These are of the reference, of the policy where its earlier log-probs are read, and of the critic, which is then
    trained as the policy is. Adapters themselves are left out: of weights that they lie beside there is no gradient,
    which is all that differs.

    Args:
        config: of the policy, and of its critic.
        mesh: the devices.
        plan: sizes and settings.
        state: bytes of parameters and optimizers on a device.
    """
    algorithm, steps = plan.algorithm, plan.update.optimizer_steps
    tokens = plan.prompts * plan.group * plan.completion_tokens
    policy = _of_batch(config, plan, scored=tokens)
    old = steps > 1 or not algorithm.advantage.needs.isdisjoint({"old", "entropy"})
    before = [policy] * (int(algorithm.needs_reference) + int(old))
    parts = [_trained(config, mesh, plan, policy)]
    if algorithm.needs_critic:
        value = _of_batch(config, plan, scored=tokens, outputs=1)
        # Those of what follows the last token are taken of all tokens, prompts among them.
        every = plan.prompts * plan.prompt_tokens + tokens if "final_values" in algorithm.needs else tokens
        values = _of_batch(config, plan, scored=every, outputs=1)
        if plan.critic.shares_trunk:
            before, joint = [*before, values], policy._replace(head=policy.head + value.head)
            parts = [_trained(config, mesh, plan, joint)]
        else:
            trunk = _without_head(config)
            parts += [_trained(trunk, mesh, plan, value), _passes(trunk, mesh, plan, [values])]
    parts.append(_passes(config, mesh, plan, before))
    total = {name: sum(getattr(one, name) for one in parts) for name in ("flops", "again", "read", "sent", "hops")}
    total["read"] += 2 * steps * state
    return parts[0]._replace(**total, kept=max(one.kept for one in parts))


def reward_work(config: ModelConfig, mesh: Mesh, plan: Plan) -> Work:
    """Scores of a batch: one forward pass of a reward model with this `config`, and a number of each token."""
    scored = plan.prompts * plan.group * plan.completion_tokens
    return _passes(_without_head(config), mesh, plan, [_of_batch(config, plan, scored=scored, outputs=1)])


def _of_batch(config: ModelConfig, plan: Plan, *, scored: int, outputs: int | None = None) -> Forward:
    """A forward pass over all prompts and completions; `scored` and `outputs` as for `forward`."""
    texts = [[plan.completion_tokens] * plan.group] * plan.prompts
    return forward(config, plan.prompt_tokens, texts, scored=scored, outputs=outputs)


def _without_head(config: ModelConfig) -> ModelConfig:
    """The configuration with no more parameters than a score model has, but for the few of its head."""
    return dataclasses.replace(config, tie_embeddings=True)


def _pieces(plan: Plan, mesh: Mesh) -> int:
    """In how many pieces a pass over the batch is made, one after another."""
    update, budget = plan.update, plan.update.tokens_per_micro_batch
    if budget is None:
        return update.micro_batches * update.minibatches
    return -(-_tokens(plan) // (budget * row_shards(mesh)))


def _tokens(plan: Plan) -> int:
    """Of the batch, each prompt once."""
    return plan.prompts * (plan.prompt_tokens + plan.group * plan.completion_tokens)


def _passes(config: ModelConfig, mesh: Mesh, plan: Plan, made: Sequence[Forward]) -> Work:
    """Forward passes of a model over the batch, with parameters that nothing changes between them."""
    pieces = _pieces(plan, mesh)
    sent, hops = _layers_sent(config, mesh, plan)
    return Work(
        flops=sum(one.total for one in made) / mesh.size,
        again=0,
        read=_read_weights(config, mesh) * len(made) * pieces,
        turns=pieces,
        turn="piece",
        sent=len(made) * pieces * sent,
        hops=len(made) * pieces * hops,
    )


def _trained(config: ModelConfig, mesh: Mesh, plan: Plan, once: Forward) -> Work:
    """All epochs of a model: a forward pass like `once` and its backward pass for each."""
    epochs, pieces, frozen = plan.update.epochs, _pieces(plan, mesh), config.lora is not None
    turns, gathers = epochs * pieces, 2 + (config.remat not in ("none", "dots"))
    tokens = _tokens(plan) // (pieces * row_shards(mesh) * context_shards(mesh))
    sent, hops = _layers_sent(config, mesh, plan)
    gradients = 0 if frozen else _weights(config, mesh, dtype=config.gradient_sums)
    return Work(
        flops=epochs * (once.total + once.backward(frozen=frozen)) / mesh.size,
        again=epochs * once.again(config.remat) / mesh.size,
        read=_read_weights(config, mesh) * turns * (gathers + (not frozen)),
        turns=turns,
        turn="piece",
        sent=turns * (gathers * sent + gradients),
        kept=int(tokens * sum(_kept(config, kind, head_shards(mesh)) for kind in config.kinds)),
        hops=turns * gathers * hops,
        epochs=epochs,
        minibatches=plan.update.minibatches,
    )


def _read_weights(config: ModelConfig, mesh: Mesh) -> int:
    """Bytes of all weights that a device reads to compute a piece."""
    dense, experts = _bytes(config, config.dtype)
    return int(dense + experts / mesh.shape["expert"]) // head_shards(mesh)


def _layers_sent(config: ModelConfig, mesh: Mesh, plan: Plan) -> tuple[float, int]:
    """Bytes that a device takes from others to compute a piece in one direction, and hops of the sums among them."""
    tokens = _tokens(plan) // (_pieces(plan, mesh) * row_shards(mesh) * context_shards(mesh))
    shards, size = head_shards(mesh), jnp.dtype(config.dtype).itemsize
    sums = 2 * config.num_layers * tokens * config.embed_dim
    # Along `expert` tokens go to all devices, and what these give comes back in float32.
    exchanged = sum(kind.experts for kind in config.kinds) * tokens * config.embed_dim * (mesh.shape["expert"] - 1)
    sent = _weights(config, mesh) + _sum(sums, shards) * size + exchanged * (size + 4)
    return sent, 2 * config.num_layers * _hops(shards)


def _weights(config: ModelConfig, mesh: Mesh, *, dtype: str | None = None) -> float:
    """Bytes of all weights, or of their gradients, that a device has from, or gives to, those that hold other parts."""
    (dense, experts), tensor, shards = _bytes(config, dtype or config.dtype), head_shards(mesh), mesh.shape["expert"]
    parts = mesh.size // tensor // mesh.shape["data"]
    moved = dense * (1 - 1 / parts) + experts / shards * (1 - shards / parts)
    return moved / tensor


def _bytes(config: ModelConfig, dtype: str) -> tuple[float, float]:
    """Bytes of the parameters outside of experts, and in them, in a type; what is kept as integers is read as these."""
    experts, size = 0, jnp.dtype(dtype).itemsize
    if config.experts is not None:
        of_layer = 3 * config.embed_dim * config.experts.count * config.experts.width
        experts = of_layer * sum(kind.experts for kind in config.kinds)
    if config.base_dtype is None:
        return (config.num_parameters - experts) * size, experts * size
    each, rounded = BYTES[config.base_dtype], weights_of_layers(config) - experts - _routers(config)
    return (config.num_parameters - experts - rounded) * size + rounded * each, experts * each


def _routers(config: ModelConfig) -> int:
    """Entries of the matrices that say which experts compute a token, and how much of a shared one is taken."""
    if config.experts is None:
        return 0
    each = config.experts.count + (config.experts.shared is not None)
    return config.embed_dim * each * sum(kind.experts for kind in config.kinds)


def _sum(numbers: int, shards: int) -> float:
    """Numbers that a device takes from others to have a sum over `shards` of them: of a part, then of all parts."""
    return 2 * numbers * (1 - 1 / shards)


def _hops(shards: int) -> int:
    """Of such a sum on a ring: each part goes half around it, and back."""
    return 2 * (shards // 2)


def _kept(config: ModelConfig, kind: LayerKind, tensor: int) -> float:
    """Bytes of a token that the backward pass finds of a layer (`ModelConfig.remat`)."""
    heads, keys = config.num_heads * config.head_dim / tensor, 2 * config.num_kv_heads * config.head_dim / tensor
    width, given = config.mlp_dim, config.embed_dim
    if kind.experts and config.experts is not None:
        experts = config.experts
        width = experts.per_token * experts.width + (experts.shared or 0)
        given = experts.per_token * config.embed_dim
    dots = config.embed_dim + given + 2 * width / tensor + heads + keys
    numbers = {
        "offload": 0,
        "full": config.embed_dim,
        "attention": config.embed_dim + heads,
        "dots": dots,
        "none": dots + width / tensor + config.embed_dim,
    }
    return numbers[config.remat] * jnp.dtype(config.dtype).itemsize
