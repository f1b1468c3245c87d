"""The update step: one pure function from a rollout and its rewards to the next training state.

Old and reference log-probs, advantages, epochs × minibatches × micro-batches and the optimizer are all in it,
so that it compiles to one XLA program per mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.gradient import Carry, Loss, make_gradient_step
from jaxrl_llm.algorithms.interfaces import Feedback
from jaxrl_llm.algorithms.policy_gradient.credit_assignment import NOTHING, OBSERVED, CreditAssignment, Observed
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.rollouts import sampling_gap
from jaxrl_llm.algorithms.router import check_has_experts
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import step_key
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.losses import RouterTokens, aggregation_normalizer
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rows import layout_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Mean, Metrics
from jaxrl_llm.sharding import row_shards
from jaxrl_llm.types import CriticState, Rollout, TrainState

UpdateStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]

CarryT = TypeVar("CarryT")


def make_update_step(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: PolicyGradient,
    config: UpdateConfig | None = None,
    *,
    critic: Critic | None = None,
    temperature: float = 1.0,
    truncated: bool = False,
    observed: Observed = NOTHING,
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
        truncated: whether top-k, top-p or min-p excluded tokens. The learner scores without, unless the algorithm
            keeps the sampling mask; only the metric `sampling/logp_gap` depends on this.
        observed: of which completions advantages and scores are among the metrics, as arrays (`Credited.observed`,
            from the gradient's own pass where there is no other: `_seen`).

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

        A rollout whose arrays do not fit together raises AssertionError when the function is traced.

    Raises:
        ValueError: the temperature is 0, the algorithm and what is given do not fit together, or a loss without a
            ratio is to make several optimizer steps of a batch.
    """
    plan, scorer = config or UpdateConfig(), Scorer(policy, temperature)
    assign = CreditAssignment(
        algorithm, scorer, plan.of_batch, keeps_old=plan.optimizer_steps > 1, truncated=truncated, critic=critic
    )
    _check(algorithm, plan, critic)
    if algorithm.watches_router:
        setting = f"algorithm.routing={algorithm.routing!r}" if algorithm.keeps_experts else "algorithm.router"
        check_has_experts(policy, setting)
    losses = _Losses(algorithm, scorer, truncated, critic, observed.by_token)
    optimizer_step = _make_optimizer_step(losses, optimizer, plan)

    def update_step(
        state: TrainState, rollout: Rollout, rewards: jax.Array | Feedback, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        prompts, group = rollout.completion.shape[:2]  # raises, if these do not fit:
        plan.group_split(prompts, group, row_shards(), whole_groups=algorithm.needs_whole_groups)
        credited = assign(state, rollout, rewards, reference)
        batch = credited.batch
        if observed.by_token and credited.old is None:  # else that pass has told all that there is
            shape = batch.mask.shape[:2]
            batch = batch._replace(numbers=jnp.arange(math.prod(shape)).reshape(shape))
        carry, trained = run_epochs(optimizer_step, _Carry.of(state), batch, plan, step_key(state, 1))
        state = carry.into(state).replace(step=state.step + 1, memory=credited.memory)
        metrics = {name: record.value() for name, record in (credited.metrics | trained).items()}
        group = batch.mask.shape[1]
        seen = {name: _by_prompt(trained[name], group) for name in metrics if name.startswith(OBSERVED)}
        return state, metrics | seen | credited.observed(observed)

    return update_step


def _seen(scores: TokenScores, batch: LearnerBatch, count: int) -> Metrics:
    """Scores of the batch's first `count` completions, `[count, Tc]`, of which these rows are some.

    Log-probs (`old_logprobs`, since the one optimizer step is still to come) and entropies, from the pass that the
    gradient is taken of. Pieces add up to the whole: a record for each token, of those that a loss reads.
    """
    assert batch.numbers is not None
    numbers, width = batch.numbers.reshape(-1), batch.mask.shape[-1]

    def placed(values: jax.Array) -> jax.Array:
        values = jnp.where(batch.mask, jax.lax.stop_gradient(values), 0.0).reshape(-1, width)
        return jnp.zeros((count, width)).at[numbers].add(values, mode="drop")

    read = placed(jnp.ones(batch.mask.shape))
    told = {"old_logprobs": scores.logprobs, "entropy": scores.entropy}
    return {f"{OBSERVED}{name}": Mean(placed(values), read) for name, values in told.items()}


def _by_prompt(seen: Any, group: int) -> jax.Array:
    """What was seen as `[prompts, G, Tc]`: NaN for tokens that no loss reads, and other completions."""
    values = jnp.where(seen.count > 0, seen.value(), jnp.nan)
    values = jnp.pad(values, ((0, -len(values) % group), (0, 0)), constant_values=jnp.nan)
    return values.reshape(-1, group, values.shape[-1])


def _check(algorithm: PolicyGradient, plan: UpdateConfig, critic: Critic | None) -> None:
    """Raises if the algorithm and what is given do not fit together."""
    if algorithm.needs_critic != (critic is not None):
        raise ValueError(
            f"{type(algorithm.advantage).__name__} "
            + ("is made of a critic's values: pass critic=" if algorithm.needs_critic else "reads no critic: pass none")
        )
    if algorithm.surrogate.on_policy and plan.optimizer_steps > 1:
        raise ValueError(
            f"update.epochs={plan.epochs} × update.minibatches={plan.minibatches}: from the second optimizer step on, "
            f"{type(algorithm.surrogate).__name__} would learn from samples of another policy, and it has no ratio to "
            "correct that; pass --update.epochs=1 --update.minibatches=1 (update.micro_batches saves memory, too), or "
            "a surrogate with a ratio, as --preset=cispo has"
        )


# ---- Losses of some rows -------------------------------------------------------------------------


class _Normalizers(NamedTuple):
    """Denominators that all micro-batches of one optimizer step share."""

    policy: jax.Array
    tokens: jax.Array
    trained: jax.Array
    """Tokens that the policy is trained on."""

    @classmethod
    def of(cls, algorithm: PolicyGradient, rows: LearnerBatch) -> _Normalizers:
        """Those of all rows of the optimizer step."""
        trained_values = rows.mask if rows.value_mask is None else rows.value_mask
        tokens, trained = (aggregation_normalizer(mask, mode="token-mean") for mask in (trained_values, rows.mask))
        return cls(algorithm.normalizer(rows.mask), tokens, trained)


class _Scores(NamedTuple):
    """What the policy's loss reads of a forward pass."""

    scores: TokenScores
    values: jax.Array | None
    """`[P, G, Tc]` of a critic that shares the trunk."""
    router: RouterTokens | None
    """`[P, G, Tc]`: what routers did, where that is read."""


@dataclasses.dataclass(frozen=True)
class _Losses:
    """The functions that are differentiated, and what they share."""

    algorithm: PolicyGradient
    scorer: Scorer
    truncated: bool
    critic: Critic | None
    by_token: int = 0
    """Completions whose scores are told, where `LearnerBatch.numbers` says which those are."""

    @property
    def policy(self) -> Loss:
        """The policy's loss; with a critic that shares its trunk, the joint one."""
        algorithm = self.algorithm
        return Loss(
            self._scores,
            self._of_scores,
            whole_groups=algorithm.needs_whole_groups,
            whole_batch=algorithm.surrogate.whole_batch,
        )

    def _scores(self, params: Params, texts: Any) -> _Scores:
        layout = layout_of(texts)
        policy, router = self.scorer.policy, None
        if self.algorithm.watches_router:
            hidden, router = policy.watched(params, layout, replay=self.algorithm.routing == "replayed")
        else:
            hidden = policy.hidden(params, layout)
        scores, values = self.scorer.of_hidden(params, hidden, layout), None
        if self.critic is not None and self.critic.shares_trunk:
            values = self.critic.values_of(params, hidden)
        return layout.unpack(_Scores(scores, values, router))

    def _of_scores(self, made: _Scores, batch: LearnerBatch, normalizers: _Normalizers) -> tuple[jax.Array, Metrics]:
        scores, values, router = made
        value, metrics = self.algorithm.loss(scores, batch, normalizers.policy)
        if batch.old_logprobs is None:
            logprobs = jax.lax.stop_gradient(scores.logprobs)
            metrics |= sampling_gap(logprobs, batch, temperature=self.scorer.temperature, truncated=self.truncated)
        if batch.numbers is not None:
            metrics |= _seen(scores, batch, self.by_token)
        if router is not None and self.algorithm.router is not None:
            extra, own = self.algorithm.router(router, batch.mask, normalizers.trained)
            value, metrics = value + extra, metrics | own
        if router is not None and self.algorithm.keeps_experts:
            metrics["sampling/routing_mismatch"] = Mean.of(jax.lax.stop_gradient(router.differs), batch.mask)
        if values is not None:
            extra, own = self.algorithm.value_loss(values, batch, normalizers.tokens)
            value, metrics = value + self.algorithm.value.coef * extra, metrics | own
        return value, metrics

    @property
    def of_critic(self) -> Loss:
        """The loss of a critic with parameters of its own."""
        assert self.critic is not None
        return Loss(self.critic.values, self.algorithm.value_loss)


# ---- Optimizer steps -----------------------------------------------------------------------------


class _Carry(NamedTuple):
    """What the optimizer steps change: parameters and optimizer of the policy, and of a critic of its own."""

    policy: Carry
    critic: Carry | None

    @classmethod
    def of(cls, state: TrainState) -> _Carry:
        """That of a training state."""
        critic = None if state.critic is None else (state.critic.params, state.critic.opt_state)
        return cls((state.params, state.opt_state), critic)

    def into(self, state: TrainState) -> TrainState:
        """The state with what the steps made of it."""
        params, opt_state = self.policy
        critic = None if self.critic is None else CriticState(*self.critic)
        return state.replace(params=params, opt_state=opt_state, critic=critic)


_OF_A_STEP = ("loss", "grad_norm", "frac_steps_skipped")
"""Metrics that each optimizer has."""


def _make_optimizer_step(
    losses: _Losses, optimizer: optax.GradientTransformation, plan: UpdateConfig
) -> Callable[..., tuple[_Carry, Metrics]]:
    """The function `(carry, rows) -> (carry, metrics)`: one step of the policy, and one of its critic."""
    pieces = plan.of_minibatch
    policy_step, critic_step = make_gradient_step(losses.policy, optimizer, pieces), None
    if losses.critic is not None and losses.critic.optimizer is not None:
        critic_step = make_gradient_step(losses.of_critic, losses.critic.optimizer, pieces)

    def optimizer_step(carry: _Carry, rows: LearnerBatch) -> tuple[_Carry, Metrics]:
        normalizers = _Normalizers.of(losses.algorithm, rows)
        policy, trained = policy_step(carry.policy, rows, normalizers)
        if critic_step is None:
            return carry._replace(policy=policy), trained
        assert carry.critic is not None  # a critic with a step of its own has a state of its own
        critic, own = critic_step(carry.critic, rows.with_own_experts(), normalizers.tokens)
        own = {f"vf/{name}" if name in _OF_A_STEP else name: record for name, record in own.items()}
        return _Carry(policy, critic), own | trained

    return optimizer_step


def run_epochs(
    step: Callable[[CarryT, Any], tuple[CarryT, Metrics]], carry: CarryT, batch: Any, plan: UpdateConfig, key: jax.Array
) -> tuple[CarryT, Metrics]:
    """All optimizer steps on a batch; each epoch cuts the prompts into minibatches in an order of its own."""
    if plan.optimizer_steps == 1:
        return step(carry, batch)

    def epoch(carry: CarryT, number: jax.Array) -> tuple[CarryT, Metrics]:
        order = jax.random.permutation(jax.random.fold_in(key, number), batch.prompt.shape[0])
        shuffled = jax.tree.map(lambda x: x[order], batch)
        parts = jax.tree.map(lambda x: x.reshape(plan.minibatches, -1, *x.shape[1:]), shuffled)
        return jax.lax.scan(step, carry, parts)

    carry, stacked = jax.lax.scan(epoch, carry, jnp.arange(plan.epochs))
    return carry, {name: record.reduce().reduce() for name, record in stacked.items()}
