"""TRPO for language models: one pure function from a rollout and its rewards to the next training state.

A batch makes one step: the natural gradient of its objective, scaled to the trust region and shortened until the
divergence holds and the objective grows. `natural_gradient.py` has the method on any functions; here
are the functions, for a transformer and in micro-batches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.batching import MicroBatches, cut
from jaxrl_llm.algorithms.gradient import map_scores, pull_scores
from jaxrl_llm.algorithms.interfaces import Feedback
from jaxrl_llm.algorithms.pieces import Pieces
from jaxrl_llm.algorithms.policy_gradient.credit_assignment import NOTHING, CreditAssignment, Observed
from jaxrl_llm.algorithms.policy_gradient.objective import LearnerBatch, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.update import UpdateStep
from jaxrl_llm.algorithms.rounding import rounded, unrounded
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import step_key
from jaxrl_llm.algorithms.trust_region.natural_gradient import trpo_step
from jaxrl_llm.algorithms.trust_region.parameter_subset import ParameterSubset, Part, Trainable
from jaxrl_llm.algorithms.trust_region.policy_divergence import DivergenceRows, FisherKind, PolicyDivergence
from jaxrl_llm.checks import at_least, check_fields, not_negative, one_of, positive
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.losses.aggregate import aggregation_normalizer, aggregation_weights
from jaxrl_llm.masking import safe_divide
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import join, split_trainable
from jaxrl_llm.models.rows import layout_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Mean
from jaxrl_llm.types import Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class TrustRegionConfig:
    """How far a batch moves the policy, and how the step is found."""

    max_kl: float = 0.01
    """Bound on the mean KL(old ‖ new) of a token, in nats."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    cg_iterations: int = 10
    """Products with the Fisher matrix, at most, in the search for the direction."""
    cg_tolerance: float = 1e-10
    """Squared norm of the residual at which it ends early."""
    tries: int = 10
    """Lengths of the step that are tried, at most."""
    shrink: float = 0.8
    """Factor between two tries."""
    kl_tolerance: float = 1.0
    """Slack of the bound: a try with a divergence up to kl_tolerance · max_kl is taken."""
    fisher: FisherKind = "gauss_newton"
    """What products with the Fisher matrix are made of: the logits, the divergence, or the sampled tokens alone."""
    fisher_fraction: float = 1.0
    """Share of the prompts, drawn anew at each step, that these products look at; of prompts a few more, where
    micro-batches and devices would not divide so many."""
    trainable: Trainable = "all"
    """Which parameters move: all (of a model with adapters, these and its heads), or those of the last layers. There
    are five float32 vectors of them beside the model."""
    last_layers: int = 1
    """Layers that `trainable="last_layers"` means."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        check_fields(
            "trust_region",
            self,
            max_kl=positive(self.max_kl),
            damping=not_negative(self.damping),
            cg_iterations=at_least(self.cg_iterations, 1),
            cg_tolerance=not_negative(self.cg_tolerance),
            tries=at_least(self.tries, 1),
            shrink=(0 < self.shrink < 1, "be between 0 and 1"),
            kl_tolerance=positive(self.kl_tolerance),
            fisher=one_of(self.fisher, FisherKind),
            fisher_fraction=(0 < self.fisher_fraction <= 1, "be above 0 and at most 1"),
            trainable=one_of(self.trainable, Trainable),
            last_layers=at_least(self.last_layers, 1),
        )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        if self.trainable == "last_layers":
            return {}
        return {"last_layers": f"with trust_region.trainable={self.trainable!r} no layers are chosen by their place"}


def make_trust_region_step(
    policy: Transformer,
    algorithm: PolicyGradient,
    config: TrustRegionConfig | None = None,
    *,
    temperature: float = 1.0,
    truncated: bool = False,
    plan: MicroBatches | None = None,
    moves: Callable[[str], bool] | None = None,
    chunk_size: int | None = None,
    observed: Observed = NOTHING,
) -> UpdateStep:
    """The pure function `(state, rollout, rewards, reference=None) -> (state, metrics)`, as `make_update_step`.

        maximise −loss(θ)  subject to  Agg[ KL(π_old(· | s) ‖ π_θ(· | s)) ] ≤ max_kl

    The loss is the algorithm's; with `Clipped(clip_low=None, clip_high=None)` as its surrogate it is −Agg[r A], that of
    TRPO. Another surrogate, a KL penalty or an importance correction belong to the objective as anywhere else. The
    divergence is exact, over the same tokens with the same weights (so that with an aggregation that is a sum,
    `max_kl` bounds a sum).

    What is held beside the model and the batch: gradient, solution, residual, direction and a product, float32, of
    the parameters that move; the old policy's hidden states `[P, G, Tc, D]`; and, of one micro-batch, the activations
    and logits of some positions. No optimizer is needed: that of the state may be `optax.identity()`,
    beside which there is only the float32 copy that the step starts from where parameters are stored in bfloat16.

    Args:
        policy: the model.
        algorithm: advantages and objective.
        config: the trust region.
        temperature: as `make_update_step`.
        truncated: as `make_update_step`.
        plan: the pieces in which objective, divergence and products are summed: memory, not the result.
        moves: whether the parameter of a dotted path moves, in place of `config.trainable`.
        chunk_size: positions whose logits exist at a time; `None` chooses.
        observed: as `make_update_step`.

    Returns:
        A function as `make_update_step` returns. A step that cannot be taken (no length holds, or something is not
        finite) leaves the parameters as they are, bit for bit. Metrics: those of the rollout; those of the objective,
        at the old policy; and those of `trpo_step`.

    Raises:
        ValueError: the temperature is 0, or the algorithm has a critic.

    Source: Schulman et al. 2015, "TRPO" (1502.05477).
    """
    region, plan = config or TrustRegionConfig(), plan or MicroBatches()
    scorer = Scorer(policy, temperature)
    assign = CreditAssignment(algorithm, scorer, plan, keeps_old=True, truncated=truncated)
    pose = _Posing(algorithm, scorer, region, plan, chunk_size)
    _check(algorithm)

    def trust_region_step(
        state: TrainState, rollout: Rollout, rewards: jax.Array | Feedback, reference: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        batch, memory, metrics, old = credited = assign(state, rollout, rewards, reference)
        assert old is not None  # they are kept
        normalizer = algorithm.normalizer(batch.mask)
        loss, of_loss = algorithm.loss(old, batch, normalizer)
        subset = ParameterSubset(
            state.params,
            region.trainable,
            last_layers=region.last_layers,
            owners=policy.stack.owners,
            moves=moves,
        )
        trained, frozen = split_trainable(state.params)
        exact, rule = unrounded(trained, state.opt_state)
        posed = pose(state, subset, subset.take(join(exact, frozen)), batch, normalizer)
        part, of_step = trpo_step(
            posed.objective,
            posed.kl,
            posed.start,
            product=posed.product,
            max_kl=region.max_kl,
            damping=region.damping,
            iterations=region.cg_iterations,
            tolerance=region.cg_tolerance,
            tries=region.tries,
            shrink=region.shrink,
            kl_tolerance=region.kl_tolerance,
        )
        not_finite = ~jnp.isfinite(of_step["grad_norm"].value())
        metrics |= of_loss | {"loss": Mean.of(loss)} | of_step | {"frac_steps_skipped": Mean.of(not_finite)}
        moved, others = split_trainable(subset.put(join(exact, frozen), part))
        params, opt_state = rounded(moved, rule, trained, state.opt_state)
        others = jax.tree.map(lambda new, old: new.astype(old.dtype), others, frozen)
        state = state.replace(step=state.step + 1, params=join(params, others), opt_state=opt_state, memory=memory)
        return state, {name: record.value() for name, record in metrics.items()} | credited.observed(observed)

    return trust_region_step


def _check(algorithm: PolicyGradient) -> None:
    """Raises if the algorithm cannot be trained by steps of this kind."""
    if algorithm.needs_critic:
        raise ValueError(
            f"{type(algorithm.advantage).__name__} is made of a critic's values, which are not trained here"
        )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What one batch asks of the parameters that move: the objective, the divergence, and its curvature."""

    algorithm: PolicyGradient
    scorer: Scorer
    divergence: PolicyDivergence
    fisher: FisherKind
    start: Part
    """The parameters that move, as they are."""
    old_head: jax.Array
    """The head that the old policy's states are read with."""
    normalizer: jax.Array
    """Of the objective, over the whole batch."""
    batch: LearnerBatch
    """All of it."""
    rows: Pieces
    """The same in pieces."""
    compared: Pieces
    """Of `DivergenceRows`: what the divergence looks at."""
    curved: Pieces
    """Of `DivergenceRows`: what products with the Fisher matrix look at."""

    def objective(self, part: Part) -> jax.Array:
        """−loss; of one that compares what lies in different pieces, as of the scores of all rows."""

        def scores(part: Part, texts: Any) -> TokenScores:
            return self.scorer(self.divergence.join(part), texts)

        def of_scores(made: TokenScores, rows: LearnerBatch) -> jax.Array:
            return -self.algorithm.loss(made, rows, self.normalizer)[0]

        def of_piece(part: Part, rows: LearnerBatch, texts: Any) -> jax.Array:
            return of_scores(scores(part, texts), rows)

        def value(part: Part) -> jax.Array:
            if self.divided:
                return of_scores(map_scores(self.rows, scores, part), self.batch)
            return self.rows.fold(lambda rows, texts: of_piece(part, rows, texts))

        def with_gradient(part: Part) -> tuple[jax.Array, Part]:
            if self.divided:
                made, slopes = jax.value_and_grad(of_scores)(map_scores(self.rows, scores, part), self.batch)
                return made, pull_scores(self.rows, scores, part, slopes)
            return self.rows.fold(lambda rows, texts: jax.value_and_grad(of_piece)(part, rows, texts))

        return _with_gradient(value, with_gradient, part)

    @property
    def divided(self) -> bool:
        """Whether the loss compares what lies in different pieces."""
        algorithm = self.algorithm
        return self.rows.divide(whole_groups=algorithm.needs_whole_groups, whole_batch=algorithm.surrogate.whole_batch)

    def kl(self, part: Part) -> jax.Array:
        """The divergence from the old policy."""
        return self.compared.fold(lambda rows, texts: self.divergence.kl(part, self.old_head, rows, texts))

    def product(self, vector: Part) -> Part:
        """F v at the old policy."""
        return self.curved.fold(
            lambda rows, texts: self.divergence.product(self.fisher, self.start, vector, self.old_head, rows, texts)
        )


@dataclasses.dataclass(frozen=True)
class _Posing:
    """The function from a state and a batch with its advantages to what they ask; settings as of the step."""

    algorithm: PolicyGradient
    scorer: Scorer
    region: TrustRegionConfig
    plan: MicroBatches
    chunk_size: int | None

    def __call__(
        self, state: TrainState, subset: ParameterSubset, start: Part, batch: LearnerBatch, normalizer: jax.Array
    ) -> _Problem:
        """The problem at the parameters `start`, those of `subset`."""
        algorithm, policy, params = self.algorithm, self.scorer.policy, state.params
        compare = functools.partial(_compared, policy, algorithm, self.plan, params)
        compared = curved = compare(batch)
        if self.region.fisher_fraction < 1:
            curved = compare(self._drawn(batch, step_key(state, 3)))
        return _Problem(
            algorithm=algorithm,
            scorer=self.scorer,
            divergence=PolicyDivergence(
                policy,
                functools.partial(subset.put_stored, params),
                temperature=self.scorer.temperature,
                chunk_size=self.chunk_size,
            ),
            fisher=self.region.fisher,
            start=start,
            old_head=policy.head(params),
            normalizer=normalizer,
            batch=batch,
            rows=cut(batch, self.plan, whole_groups=algorithm.needs_whole_groups),
            compared=compared,
            curved=curved,
        )

    def _drawn(self, batch: LearnerBatch, key: jax.Array) -> LearnerBatch:
        """A share of the prompts, with all their completions: the fewest that can be cut."""
        prompts, group = batch.mask.shape[:2]
        least = math.ceil(self.region.fisher_fraction * prompts)
        whole_groups = self.algorithm.needs_whole_groups
        count = next(n for n in range(least, prompts + 1) if self.plan.can_cut(n, group, whole_groups=whole_groups))
        chosen = jax.random.permutation(key, prompts)[:count]
        return jax.tree.map(lambda x: x[chosen], batch)


def _compared(
    policy: Transformer, algorithm: PolicyGradient, plan: MicroBatches, params: Params, batch: LearnerBatch
) -> Pieces:
    """The batch in pieces, for the divergence from the policy with these parameters."""
    mode, length = algorithm.aggregation, algorithm.max_length or batch.mask.shape[-1]
    weights = aggregation_weights(batch.mask, mode=mode, max_length=length)
    weights = safe_divide(weights, aggregation_normalizer(batch.mask, mode=mode))
    rows = DivergenceRows(batch.prompt, batch.prompt_lengths, batch.completion, batch.mask, weights)

    def hidden(_: DivergenceRows, texts: Any) -> jax.Array:
        layout = layout_of(texts)
        return layout.unpack(policy.hidden(params, layout))

    of_batch = functools.partial(cut, plan=plan, whole_groups=algorithm.needs_whole_groups)
    return of_batch(rows._replace(old_hidden=of_batch(rows).map(hidden)))


def _with_gradient(
    value: Callable[[Part], jax.Array], with_gradient: Callable[[Part], tuple[jax.Array, Part]], part: Part
) -> jax.Array:
    """`value(part)`, differentiated by `with_gradient`, which takes one piece after the other."""

    @jax.custom_vjp
    def total(part: Part) -> jax.Array:
        return value(part)

    def backward(gradient: Part, slope: jax.Array) -> tuple[Part]:
        return (jax.tree.map(lambda x: slope * x, gradient),)

    total.defvjp(with_gradient, backward)
    return total(part)
