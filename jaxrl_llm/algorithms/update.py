"""The update step: one pure function from a rollout and its rewards to the next training state.

Old and reference log-probs, advantages, epochs × minibatches × micro-batches and the optimizer are all in it,
so that it compiles to one XLA program per mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.advantages.group import zero_std_groups
from jaxrl_llm.algorithms.gradient import Carry, collect, deal, make_gradient_step, widen
from jaxrl_llm.algorithms.policy_gradient import LearnerBatch, PolicyGradient
from jaxrl_llm.logprobs import MIN_CHUNK, TokenScores, token_scores
from jaxrl_llm.masking import masked_var
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.records import Max, Mean, Metrics
from jaxrl_llm.sharding import on_cpu, parameter_shardings, row_shards, state_shardings
from jaxrl_llm.types import Rollout, TrainState

ACCELERATOR_CHUNK_LOGITS = 2**26
"""Logits that one accelerator holds at a time while it scores tokens: 256 MiB in float32."""

UpdateStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How one batch of rollouts is turned into optimizer steps.

    Prompts per step × samples per prompt = rows. Each epoch cuts the prompts into `minibatches`, one optimizer
    step each; each minibatch is computed in `micro_batches` pieces, which changes memory and not the result.
    """

    epochs: int = 1
    """Passes over the batch."""
    minibatches: int = 1
    """Optimizer steps per pass; must divide the number of prompts."""
    micro_batches: int = 1
    """Pieces in which the gradient of one optimizer step is accumulated."""

    def __post_init__(self) -> None:
        """Rejects counts below 1."""
        for field, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"update.{field}={value} must be at least 1")

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps per batch."""
        return self.epochs * self.minibatches

    def group_split(self, prompts: int, group: int, row_shards: int, *, whole_groups: bool = False) -> int:
        """Into how many rows a prompt's completions must be dealt to fill micro-batches and devices.

        A prompt is computed once in each of them. 1 where there are prompts enough.

        Raises:
            ValueError: the numbers do not fit; names them and the way out.
        """
        if prompts % self.minibatches:
            raise ValueError(f"{prompts} prompts per step are not divisible by update.minibatches={self.minibatches}")
        rows = prompts // self.minibatches
        pieces = self.micro_batches * row_shards
        for split in range(1, group + 1):
            if group % split == 0 and (rows * split) % pieces == 0:
                if split > 1 and whole_groups:
                    break
                return split
        raise ValueError(
            f"{rows} prompts × {group} samples of a minibatch cannot be cut into update.micro_batches="
            f"{self.micro_batches} × {row_shards} row shards of the mesh (data × fsdp)"
            + (" without cutting groups, which this aggregation needs whole" if whole_groups else "")
            + "; change prompts per step, samples per prompt, micro_batches or the mesh"
        )


def make_train_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step: `params`, a fresh optimizer, and the root of all randomness."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(widen(params)),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def abstract_train_state(
    policy: Transformer, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes, types and shardings of a training state on `mesh`.

    Raises:
        ValueError: the mesh does not divide a parameter; names it.
    """
    params = policy.abstract_params()
    shardings = parameter_shardings(mesh, policy.logical_axes(), params)
    abstract = jax.eval_shape(lambda p: make_train_state(p, optimizer, seed=0), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        state_shardings(mesh, abstract, shardings),
    )


def make_update_step(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: PolicyGradient,
    config: UpdateConfig | None = None,
    *,
    temperature: float = 1.0,
    truncated: bool = False,
) -> UpdateStep:
    """The pure function `(state, rollout, rewards, reference=None) -> (state, metrics)`.

    Compile and call it under `jax.set_mesh`, where there is a mesh: it splits rows over that.

    Args:
        policy: the model.
        optimizer: an optax transformation.
        algorithm: the objective.
        config: epochs, minibatches, micro-batches.
        temperature: the one that the rollouts were sampled with; log-probs are scored with it.
        truncated: whether top-k, top-p or min-p excluded tokens. The learner scores without; only the metric
            `sampling/logp_gap` depends on this.

    Returns:
        A function of `TrainState`, `Rollout`, rewards `[P, G]` float32, and the reference's parameters (read
        only if the algorithm needs them). To be compiled with the state donated, hence with a reference that is a
        copy of the state's parameters and not the same arrays.

        Rewards are not looked at: one that is NaN or infinite makes the gradient of its minibatch NaN. An optimizer
        step whose gradient is not finite is skipped: parameters and moments stay, `frac_steps_skipped` is the
        fraction of such steps, and `reward`, `loss` or `grad_norm` show that something was not finite.

    Raises:
        ValueError: the temperature is 0.
    """
    plan = config or UpdateConfig()
    if temperature <= 0:
        raise ValueError(f"a policy sampled at temperature {temperature} (greedily) has no gradient to follow")
    scores = make_scorer(policy, temperature=temperature)
    gap = functools.partial(_sampling_gap, temperature=temperature, truncated=truncated)

    def loss(params: Params, batch: LearnerBatch, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        given = scores(params, batch)
        value, metrics = algorithm.loss(given, batch, normalizer)
        if batch.old_logprobs is None:
            metrics |= gap(jax.lax.stop_gradient(given.logprobs), batch)
        return value, metrics

    gradient_step = make_gradient_step(loss, optimizer, plan.micro_batches)

    def update_step(
        state: TrainState, rollout: Rollout, rewards: jax.Array, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        batch, metrics = _learner_batch(algorithm, rollout, rewards), _rollout_metrics(rollout, rewards)
        prompts, group = rewards.shape
        split = plan.group_split(prompts, group, row_shards(), whole_groups=algorithm.needs_whole_groups)

        def score_all(params: Params) -> jax.Array:
            """Log-probs `[P, G, Tc]` of the whole batch under constant parameters, by micro-batches."""
            parts = deal(split_groups(batch, split), plan.micro_batches * plan.minibatches)
            dealt = jax.lax.map(lambda part: scores(params, part).logprobs, parts)
            return collect(dealt).reshape(batch.mask.shape)

        if algorithm.needs_reference:
            if reference is None:
                raise ValueError("this algorithm reads a reference (kl_coef is not 0): pass its parameters")
            batch = batch._replace(ref_logprobs=score_all(reference))
        if plan.optimizer_steps > 1:  # else the old policy is the policy itself, and no pass is needed
            old_logprobs = score_all(state.params)
            metrics |= gap(old_logprobs, batch)
            batch = batch._replace(old_logprobs=old_logprobs)

        def minibatch_step(carry: Carry, rows: LearnerBatch) -> tuple[Carry, Metrics]:
            return gradient_step(carry, split_groups(rows, split), algorithm.normalizer(rows.mask))

        key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), 1)
        carry, trained = _run_epochs(minibatch_step, (state.params, state.opt_state), batch, plan, key)
        params, opt_state = carry
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {name: record.value() for name, record in (metrics | trained).items()}

    return update_step


def make_scorer(policy: Transformer, *, temperature: float = 1.0) -> Callable[[Params, Any], TokenScores]:
    """The function from parameters and rows to log-probs and entropies `[P, G, Tc]` of the completions' tokens.

    Rows are any record with `prompt`, `prompt_lengths` and `completion`.
    """

    def scores(params: Params, rows: Any) -> TokenScores:
        hidden = policy.hidden(params, rows.prompt, rows.prompt_lengths, rows.completion)
        return token_scores(
            hidden,
            policy.head(params),
            rows.completion,
            temperature=temperature,
            logit_softcap=policy.config.logit_softcap,
            chunk_size=_vocabulary_chunk(rows.completion.size),
        )

    return scores


def _vocabulary_chunk(tokens: int) -> int | None:
    """Vocabulary entries whose logits are made at a time, for so many tokens on all devices.

    On a CPU what its cache likes. On accelerators more: where the head is split, each chunk is a round of messages.
    """
    return None if on_cpu() else max(MIN_CHUNK, ACCELERATOR_CHUNK_LOGITS * row_shards() // max(1, tokens))


def _learner_batch(algorithm: PolicyGradient, rollout: Rollout, rewards: jax.Array) -> LearnerBatch:
    """A rollout with its advantages, as yet without the log-probs of other policies."""
    if rewards.shape != rollout.completion_lengths.shape:
        raise ValueError(
            f"rewards has shape {rewards.shape}, but the rollout holds {rollout.completion_lengths.shape} prompts "
            "and samples: pass one reward for each completion"
        )
    mask = rollout.mask
    if algorithm.mask_truncated:
        mask &= rollout.finished[..., None]
    return LearnerBatch(
        prompt=rollout.prompt,
        prompt_lengths=rollout.prompt_lengths,
        completion=rollout.completion,
        mask=mask,
        advantages=algorithm.advantage(rewards),
        sampler_logprobs=rollout.sampler_logprobs,
        model_logprobs=rollout.logprobs,
    )


def _run_epochs(
    step: Callable[[Carry, LearnerBatch], tuple[Carry, Metrics]],
    carry: Carry,
    batch: LearnerBatch,
    plan: UpdateConfig,
    key: jax.Array,
) -> tuple[Carry, Metrics]:
    """All optimizer steps on a batch; each epoch cuts the prompts into minibatches in an order of its own."""
    if plan.optimizer_steps == 1:
        return step(carry, batch)

    def epoch(carry: Carry, number: jax.Array) -> tuple[Carry, Metrics]:
        order = jax.random.permutation(jax.random.fold_in(key, number), batch.prompt.shape[0])
        shuffled = jax.tree.map(lambda x: x[order], batch)
        parts = jax.tree.map(lambda x: x.reshape(plan.minibatches, -1, *x.shape[1:]), shuffled)
        return jax.lax.scan(step, carry, parts)

    carry, stacked = jax.lax.scan(epoch, carry, jnp.arange(plan.epochs))
    return carry, {name: record.reduce().reduce() for name, record in stacked.items()}


# ---- Rows, groups and pieces ---------------------------------------------------------------------


def split_groups(batch: Any, split: int) -> Any:
    """Deals the completions of each prompt to `split` rows, each with its own copy of the prompt.

    Arrays `[P, G, …]` become `[P·split, G/split, …]`, arrays of prompts are repeated.
    """
    if split == 1:
        return batch

    def one(name: str, x: jax.Array) -> jax.Array:
        if name in ("prompt", "prompt_lengths"):
            return jnp.repeat(x, split, axis=0)
        return x.reshape(x.shape[0] * split, x.shape[1] // split, *x.shape[2:])

    return batch._replace(**{name: one(name, x) for name, x in batch._asdict().items() if x is not None})


# ---- Metrics of a batch --------------------------------------------------------------------------


def _sampling_gap(logprobs: jax.Array, batch: LearnerBatch, *, temperature: float, truncated: bool) -> Metrics:
    """How far the learner's log-probs are from the sampler's of the same distribution, per token.

    The learner scores at the sampling temperature and without truncation. That is what the sampler drew from, unless
    it excluded tokens; then it still reports as much at temperature 1, and at another there is nothing to compare with
    and no metric: a gap would show the mass of what was excluded, not how well the two programs agree.
    """
    reported = batch.sampler_logprobs
    if truncated:
        reported = batch.model_logprobs if temperature == 1 else None
    if reported is None:
        return {}
    gap = jnp.abs(jnp.where(batch.mask, logprobs - reported, 0.0))
    return {
        "sampling/logp_gap_mean": Mean.of(gap, batch.mask),
        "sampling/logp_gap_max": Max.of(gap, batch.mask),
    }


def _rollout_metrics(rollout: Rollout, rewards: jax.Array) -> Metrics:
    lengths = rollout.completion_lengths
    every = jnp.ones(rewards.shape, bool)
    return {
        "reward": Mean.of(rewards),
        "reward_std": Mean.of(jnp.sqrt(masked_var(rewards, every, axis=1))),
        "frac_reward_zero_std": Mean.of(zero_std_groups(rewards)),
        "completions/mean_length": Mean.of(lengths),
        "completions/min_length": Mean.of(jnp.min(lengths)),
        "completions/max_length": Mean.of(jnp.max(lengths)),
        "completions/clipped_ratio": Mean.of(~rollout.finished),
        "num_tokens": Mean.of(jnp.sum(lengths) + jnp.sum(rollout.prompt_lengths)),
    }
