"""The update step: one pure function from a rollout and its rewards to the next training state.

Old and reference log-probs, advantages, epochs × minibatches × micro-batches and the optimizer are all in it,
so that it compiles to one XLA program per mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.advantages.group import zero_std_groups
from jaxrl_llm.algorithms.critic import Critic
from jaxrl_llm.algorithms.gradient import Carry, collect, deal, make_gradient_step, widen
from jaxrl_llm.algorithms.policy_gradient import LearnerBatch, PolicyGradient
from jaxrl_llm.algorithms.signals import Credit, Feedback, Signals
from jaxrl_llm.logprobs import MIN_CHUNK, TokenScores, token_scores
from jaxrl_llm.losses import aggregation_normalizer
from jaxrl_llm.masking import masked_var
from jaxrl_llm.models.lora import reference_of, split_trainable
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.records import Max, Mean, Metrics
from jaxrl_llm.sharding import on_cpu, parameter_shardings, row_shards, state_shardings
from jaxrl_llm.types import CriticState, Rollout, TrainState

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


def make_train_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    algorithm: PolicyGradient | None = None,
    critic: Critic | None = None,
    critic_params: Params | None = None,
) -> TrainState:
    """The state before the first step: `params`, a fresh optimizer of what is trained, and the root of all randomness.

    Of a model with adapters, these and its heads are trained (`split_trainable`), else everything.

    Args:
        params: the policy's; with a critic that shares its trunk, the critic's head among them.
        optimizer: of the policy.
        seed: of all randomness.
        algorithm: whose memory starts here, if it has one.
        critic: the critic, if it has parameters of its own.
        critic_params: these parameters.
    """
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(widen(split_trainable(params)[0])),
        key=jax.random.key_data(jax.random.key(seed)),
        memory=() if algorithm is None else algorithm.advantage.start(),
        critic=None if critic is None or critic.shares_trunk else critic.start(critic_params),
    )


def abstract_train_state(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    algorithm: PolicyGradient | None = None,
    critic: Critic | None = None,
) -> TrainState:
    """Shapes, types and shardings of a training state on `mesh`.

    Raises:
        ValueError: the mesh does not divide a parameter; names it.
    """
    model = critic.model if critic is not None and critic.shares_trunk else policy
    params = model.abstract_params()
    shardings = parameter_shardings(mesh, model.logical_axes(), params)
    own = None if critic is None or critic.shares_trunk else critic.model.abstract_params()
    abstract = jax.eval_shape(
        lambda p, c: make_train_state(p, optimizer, seed=0, algorithm=algorithm, critic=critic, critic_params=c),
        params,
        own,
    )
    placed = state_shardings(mesh, abstract.replace(critic=None), shardings, split_trainable(shardings)[0])
    if own is not None:
        assert critic is not None
        of_critic = parameter_shardings(mesh, critic.model.logical_axes(), own)
        trained = split_trainable(of_critic)[0]
        placed = placed.replace(critic=state_shardings(mesh, abstract.critic, of_critic, trained))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, placed
    )


def make_update_step(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: PolicyGradient,
    config: UpdateConfig | None = None,
    *,
    critic: Critic | None = None,
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
        critic: the value function, where the algorithm's advantages are made of one.
        temperature: the one that the rollouts were sampled with; log-probs are scored with it.
        truncated: whether top-k, top-p or min-p excluded tokens. The learner scores without; only the metric
            `sampling/logp_gap` depends on this.

    Returns:
        A function of `TrainState`, `Rollout` (with an algorithm that needs a greedy baseline, the last sample of each
        group is that; see `Sampler`), rewards (`[P, G]` float32, `[P, G, Tc]` where they are given by token, or
        `Feedback` where the algorithm reads more than that), and the reference's parameters (read
        only if the algorithm needs them; `None`: those of the state without its adapters, if it has any). To be
        compiled with the state donated, hence with a reference that is a copy of the state's parameters and not the
        same arrays.

        Rewards are not looked at: one that is NaN or infinite makes the gradient of its minibatch NaN. An optimizer
        step whose gradient is not finite is skipped: parameters and moments stay, `frac_steps_skipped` is the
        fraction of such steps, and `reward`, `loss` or `grad_norm` show that something was not finite.

    Raises:
        ValueError: the temperature is 0, or the algorithm and what is given do not fit together.
    """
    plan = config or UpdateConfig()
    if temperature <= 0:
        raise ValueError(f"a policy sampled at temperature {temperature} (greedily) has no gradient to follow")
    if algorithm.needs_critic != (critic is not None):
        raise ValueError(
            f"{type(algorithm.advantage).__name__} "
            + ("is made of a critic's values: pass critic=" if algorithm.needs_critic else "reads no critic: pass none")
        )
    if algorithm.surrogate.whole_batch and plan.micro_batches > 1:
        raise ValueError(
            f"{type(algorithm.surrogate).__name__} compares all tokens of a minibatch, so that it cannot be cut into "
            f"update.micro_batches={plan.micro_batches}: pass 1"
        )
    scores = make_scorer(policy, temperature=temperature)
    gap = functools.partial(sampling_gap, temperature=temperature, truncated=truncated)
    shared = critic if critic is not None and critic.shares_trunk else None

    def loss(params: Params, batch: LearnerBatch, normalizers: _Normalizers) -> tuple[jax.Array, Metrics]:
        hidden = policy.hidden(params, batch.prompt, batch.prompt_lengths, batch.completion)
        given = scores.of_hidden(params, hidden, batch.completion)
        value, metrics = algorithm.loss(given, batch, normalizers.policy)
        if batch.old_logprobs is None:
            metrics |= gap(jax.lax.stop_gradient(given.logprobs), batch)
        if shared is not None:
            values = shared.values_of(params, hidden)
            extra, own = algorithm.value_loss(values, batch, normalizers.tokens)
            value, metrics = value + algorithm.value.coef * extra, metrics | own
        return value, metrics

    def critic_loss(params: Params, batch: LearnerBatch, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
        assert critic is not None
        return algorithm.value_loss(critic.values(params, batch), batch, normalizer)

    gradient_step = make_gradient_step(loss, optimizer, plan.micro_batches)
    critic_step = None
    if critic is not None and critic.optimizer is not None:
        critic_step = make_gradient_step(critic_loss, critic.optimizer, plan.micro_batches)

    def update_step(
        state: TrainState, rollout: Rollout, rewards: jax.Array | Feedback, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        feedback = rewards if isinstance(rewards, Feedback) else Feedback(rewards)
        signals, batch, metrics = read_rollout(algorithm, rollout, feedback)
        prompts, group = batch.mask.shape[:2]
        split = plan.group_split(prompts, group, row_shards(), whole_groups=algorithm.needs_whole_groups)
        epochs_key, seeds_key = (
            jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), use)
            for use in (1, 2)
        )
        batch = batch._replace(seeds=jax.random.bits(seeds_key, (prompts,)))

        def pass_over(function: Callable[[Params, LearnerBatch], Any], params: Params) -> Any:
            """What a forward pass gives for the whole batch under constant parameters, by micro-batches."""
            parts = deal(split_groups(batch, split), plan.micro_batches * plan.minibatches)
            dealt = jax.lax.map(lambda part: function(params, part), parts)
            return jax.tree.map(lambda x: collect(x).reshape(batch.mask.shape), dealt)

        needs = algorithm.advantage.needs
        if algorithm.needs_reference:
            reference = reference_of(state.params, reference)
            if reference is None:
                raise ValueError("this algorithm reads a reference (a kl_coef is not 0): pass its parameters")
            ref_logprobs = pass_over(lambda params, part: scores(params, part).logprobs, reference)
            signals = signals._replace(ref_logprobs=ref_logprobs)
            if algorithm.kl_coef:
                batch = batch._replace(ref_logprobs=ref_logprobs)
        # With one optimizer step the old policy is the policy itself, and needs no pass for the ratio.
        if plan.optimizer_steps > 1 or needs & {"old", "entropy"}:
            old = pass_over(scores, state.params)
            signals = signals._replace(old_logprobs=old.logprobs, entropy=old.entropy)
            if plan.optimizer_steps > 1:
                metrics |= gap(old.logprobs, batch)
                batch = batch._replace(old_logprobs=old.logprobs)
        if critic is not None:
            values = pass_over(critic.values, state.params if state.critic is None else state.critic.params)
            signals, batch = signals._replace(values=values), batch._replace(values=values)

        credit = algorithm.advantage(signals, state.memory)
        memory = algorithm.advantage.remember(signals, state.memory)
        batch, metrics = credited(batch, credit), metrics | credit.metrics

        def minibatch_step(carry: _Carry, rows: LearnerBatch) -> tuple[_Carry, Metrics]:
            trained_values = rows.mask if rows.value_mask is None else rows.value_mask
            tokens = aggregation_normalizer(trained_values, mode="token-mean")
            normalizers = _Normalizers(algorithm.normalizer(rows.mask), tokens)
            dealt = split_groups(rows, split)
            policy_carry, trained = gradient_step(carry.policy, dealt, normalizers)
            if critic_step is None:
                return carry._replace(policy=policy_carry), trained
            assert carry.critic is not None  # a critic with a step of its own has a state of its own
            critic_carry, own = critic_step(carry.critic, dealt, tokens)
            own = {f"vf/{name}" if name in _OF_A_STEP else name: record for name, record in own.items()}
            return _Carry(policy_carry, critic_carry), trained | own

        of_critic = None if state.critic is None else (state.critic.params, state.critic.opt_state)
        start = _Carry((state.params, state.opt_state), of_critic)
        carry, trained = _run_epochs(minibatch_step, start, batch, plan, epochs_key)
        params, opt_state = carry.policy
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            memory=memory,
            critic=None if carry.critic is None else CriticState(*carry.critic),
        )
        return state, {name: record.value() for name, record in (metrics | trained).items()}

    return update_step


_OF_A_STEP = ("loss", "grad_norm", "frac_steps_skipped")


class _Normalizers(NamedTuple):
    """Denominators that all micro-batches of one optimizer step share."""

    policy: jax.Array
    tokens: jax.Array


class _Carry(NamedTuple):
    """What the optimizer steps change: parameters and optimizer of the policy, and of a critic of its own."""

    policy: Carry
    critic: Carry | None


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The function from parameters and rows to log-probs and entropies `[P, G, Tc]` of the completions' tokens."""

    policy: Transformer
    temperature: float

    def __call__(self, params: Params, rows: Any) -> TokenScores:
        """Scores rows: any record with `prompt`, `prompt_lengths` and `completion`."""
        hidden = self.policy.hidden(params, rows.prompt, rows.prompt_lengths, rows.completion)
        return self.of_hidden(params, hidden, rows.completion)

    def of_hidden(self, params: Params, hidden: jax.Array, completion: jax.Array) -> TokenScores:
        """Scores of tokens from the states that predict them."""
        return token_scores(
            hidden,
            self.policy.head(params),
            completion,
            temperature=self.temperature,
            logit_softcap=self.policy.config.logit_softcap,
            chunk_size=_vocabulary_chunk(completion.size),
        )


def make_scorer(policy: Transformer, *, temperature: float = 1.0) -> Scorer:
    """The function from parameters and rows to log-probs and entropies; see `Scorer`."""
    return Scorer(policy, temperature)


def _vocabulary_chunk(tokens: int) -> int | None:
    """Vocabulary entries whose logits are made at a time, for so many tokens on all devices.

    On a CPU what its cache likes. On accelerators more: where the head is split, each chunk is a round of messages.
    """
    return None if on_cpu() else max(MIN_CHUNK, ACCELERATOR_CHUNK_LOGITS * row_shards() // max(1, tokens))


def read_rollout(
    algorithm: PolicyGradient, rollout: Rollout, feedback: Feedback
) -> tuple[Signals, LearnerBatch, Metrics]:
    """What the estimator and the losses read of a rollout, as yet without any score, and the rollout's metrics."""
    if algorithm.needs_greedy and feedback.greedy is None:
        rollout, feedback = _without_greedy(rollout, feedback)
    shape, rewards = rollout.completion_lengths.shape, jnp.asarray(feedback.rewards)
    by_token = rewards.ndim == 3
    if rewards.shape != (rollout.completion.shape if by_token else shape):
        raise ValueError(
            f"rewards has shape {rewards.shape}, but the rollout holds {shape} prompts and samples: pass one reward "
            f"for each completion, or for each of its tokens, {rollout.completion.shape}"
        )
    for need, given in (
        ("greedy", feedback.greedy),
        ("by_function", feedback.by_function),
        ("verdicts", feedback.preferred),
    ):
        if need in algorithm.advantage.needs and given is None:
            raise ValueError(f"{type(algorithm.advantage).__name__} reads {need}: pass Feedback with it")
    token_rewards = jnp.where(rollout.mask, rewards, 0.0) if by_token else None
    total = jnp.sum(token_rewards, axis=-1) if token_rewards is not None else rewards
    mask = rollout.mask
    shaped = algorithm.shape(total, rollout.completion_lengths, mask.shape[-1])
    if algorithm.mask_truncated:
        mask &= rollout.finished[..., None]
    signals = Signals(
        rewards=shaped, token_rewards=token_rewards, mask=rollout.mask, finished=rollout.finished, feedback=feedback
    )
    batch = LearnerBatch(
        prompt=rollout.prompt,
        prompt_lengths=rollout.prompt_lengths,
        completion=rollout.completion,
        mask=mask,
        advantages=shaped,
        sampler_logprobs=rollout.sampler_logprobs,
        seeds=jnp.zeros(shape[:1], jnp.uint32),
        model_logprobs=rollout.logprobs,
    )
    return signals, batch, rollout_metrics(rollout, total)


def _without_greedy(rollout: Rollout, feedback: Feedback) -> tuple[Rollout, Feedback]:
    """A rollout whose last samples are greedy, without them; their rewards `[P]` are a baseline."""
    if feedback.rewards.shape != rollout.completion_lengths.shape or feedback.rewards.shape[1] < 2:
        raise ValueError(
            f"rewards has shape {feedback.rewards.shape}, but of {rollout.completion_lengths.shape} samples "
            "the last of each group is the greedy baseline: pass one reward for each of two samples or more"
        )
    rest = jax.tree.map(lambda x: x[:, :-1], feedback)
    return rollout.samples(None, -1), rest._replace(greedy=feedback.rewards[:, -1])


def credited(batch: LearnerBatch, credit: Credit) -> LearnerBatch:
    """Rows with their advantages, and with the critic's targets where there are any."""
    if credit.returns is not None:
        batch = batch._replace(returns=credit.returns, value_mask=batch.mask)
    if credit.keep is not None:
        batch = batch._replace(mask=batch.mask & credit.keep[..., None])
    return batch._replace(advantages=credit.advantages)


def _run_epochs(
    step: Callable[[_Carry, LearnerBatch], tuple[_Carry, Metrics]],
    carry: _Carry,
    batch: LearnerBatch,
    plan: UpdateConfig,
    key: jax.Array,
) -> tuple[_Carry, Metrics]:
    """All optimizer steps on a batch; each epoch cuts the prompts into minibatches in an order of its own."""
    if plan.optimizer_steps == 1:
        return step(carry, batch)

    def epoch(carry: _Carry, number: jax.Array) -> tuple[_Carry, Metrics]:
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
        if x.ndim == 1 or name == "prompt":  # of a prompt, not of its completions
            return jnp.repeat(x, split, axis=0)
        return x.reshape(x.shape[0] * split, x.shape[1] // split, *x.shape[2:])

    return batch._replace(**{name: one(name, x) for name, x in batch._asdict().items() if x is not None})


# ---- Metrics of a batch --------------------------------------------------------------------------


def sampling_gap(logprobs: jax.Array, batch: LearnerBatch, *, temperature: float, truncated: bool) -> Metrics:
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


def rollout_metrics(rollout: Rollout, rewards: jax.Array) -> Metrics:
    """Metrics of a rollout with its rewards `[P, G]`, whatever the algorithm."""
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
