"""On-policy distillation: the policy's own samples, and at each token the next-token distributions of teachers.

With one teacher and exact divergences it is GKD on the student's samples (Agarwal et al. 2023, 2306.13649); with
sampled ones, on-policy distillation by token (Lu & Thinking Machines Lab 2025). All models are in one program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.gradient import Carry, Loss, make_gradient_step
from jaxrl_llm.algorithms.interfaces import Algorithm, Feedback, Need
from jaxrl_llm.algorithms.policy_gradient.rollouts import rollout_metrics
from jaxrl_llm.algorithms.policy_gradient.update import UpdateStep, run_epochs
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import step_key
from jaxrl_llm.checks import at_least, check_fields, one_of, share
from jaxrl_llm.losses import AggregationMode, aggregate, aggregation_normalizer, generalized_jsd, kl_k1_straight_through
from jaxrl_llm.losses.distillation import CHUNK_LOGITS, over_positions
from jaxrl_llm.masking import as_float, fill_masked
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rows import Layout, layout_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Mean, Metrics
from jaxrl_llm.sharding import row_shards, token_shards
from jaxrl_llm.types import Rollout, TrainState

Divergence = Literal["exact", "sampled"]


@dataclasses.dataclass(frozen=True)
class Distillation(Algorithm):
    """Σ over teachers of weight × divergence(teacher, policy), at each token that the policy sampled.

    Rewards are told, and not learned from.
    """

    beta: float = 1.0
    """1: reverse KL(policy ‖ teacher); 0: forward KL(teacher ‖ policy); between: see `generalized_jsd`."""
    divergence: Divergence = "exact"
    """exact: over the whole vocabulary; sampled: the log-ratio of the sampled token, an estimate of the reverse KL."""
    weights: tuple[float, ...] | None = None
    """One a teacher; `None`: they are alike, and sum to 1."""
    aggregation: AggregationMode = "token-mean"
    """How token losses become one number."""
    max_length: int | None = None
    """Constant of `seq-mean-token-sum-norm`; `None`: the configured length of completions."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        weights = self.weights
        check_fields(
            "algorithm",
            self,
            beta=share(self.beta),
            divergence=one_of(self.divergence, Divergence),
            weights=(
                weights is None or (any(weights) and all(0 <= weight < math.inf for weight in weights)),
                "be None, or finite numbers that are not negative, nor all 0",
            ),
            aggregation=one_of(self.aggregation, AggregationMode),
            max_length=at_least(self.max_length, 1, optional=True),
        )
        if self.divergence == "sampled" and self.beta != 1:
            raise ValueError(
                f"algorithm.beta={self.beta} would have no effect: the sampled divergence is the reverse KL; pass "
                "--algorithm.beta=1, or --algorithm.divergence=exact"
            )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        if self.aggregation == "seq-mean-token-sum-norm":
            return {}
        return {"max_length": "only algorithm.aggregation='seq-mean-token-sum-norm' divides by it"}

    @property
    def reader(self) -> str:
        """Its own name."""
        return type(self).__name__

    @property
    def smallest_group(self) -> int:
        """Nothing is compared."""
        return 1

    @property
    def needs(self) -> frozenset[Need]:
        """Teachers."""
        return frozenset({"teachers"})

    @property
    def needs_whole_groups(self) -> bool:
        """Whether the aggregation looks at groups."""
        return self.aggregation.startswith("group")

    def weights_of(self, teachers: int) -> tuple[float, ...]:
        """The weight of each of so many teachers.

        Raises:
            ValueError: there is none, or another number of weights.
        """
        if not teachers:
            raise ValueError(f"{self.reader} has nobody to learn from: pass teachers")
        if self.weights is None:
            return (1 / teachers,) * teachers
        if len(self.weights) != teachers:
            raise ValueError(
                f"algorithm.weights={self.weights} are {len(self.weights)} for {teachers} teachers: one each"
            )
        return self.weights


class DistilledRows(NamedTuple):
    """What the loss of some rows reads."""

    prompt: jax.Array
    """`[P, Tp]`."""
    prompt_lengths: jax.Array
    """`[P]`."""
    completion: jax.Array
    """`[P, G, Tc]`."""
    mask: jax.Array
    """`[P, G, Tc]` bool."""


class Divergences(NamedTuple):
    """What a forward pass of policy and teachers gives, `[P, G, Tc]` each."""

    of_teachers: tuple[jax.Array, ...]
    """In nats; differentiable in the policy alone."""
    entropy: jax.Array
    """Of the policy."""


def make_distillation_step(
    policy: Transformer,
    optimizer: optax.GradientTransformation,
    algorithm: Distillation,
    teachers: dict[str, Transformer],
    config: UpdateConfig | None = None,
    *,
    temperature: float = 1.0,
) -> UpdateStep:
    """The pure function `(state, rollout, rewards, reference) -> (state, metrics)`, as `make_update_step`.

    Args:
        policy: the student.
        optimizer: an optax transformation, of the student alone.
        algorithm: the divergence.
        teachers: their models by name, of any size, over the student's tokens.
        config: epochs, minibatches, micro-batches.
        temperature: the one that the rollouts were sampled with; it divides the logits of student and teachers.

    Returns:
        A function as `make_update_step` returns; `reference` are the teachers' parameters by name, constants. Teachers
        read each micro-batch beside the student, so that none of their states outlives it. Rewards (`[P, G]`, by token,
        or `Feedback`) are only reported; `None`: there are none. Metrics: those of the rollout and of the optimizer,
        the `entropy`, `distillation/divergence` (weighted) and `distillation/<teacher>`, per token.

    Raises:
        ValueError: the temperature is 0, or sampled divergences are to make several optimizer steps of a batch; when it
            is traced: there is no teacher, or another number of weights.
    """
    plan = config or UpdateConfig()
    if temperature <= 0:
        raise ValueError(f"a policy sampled at temperature {temperature} (greedily) has no distribution to distil into")
    if algorithm.divergence == "sampled" and plan.optimizer_steps > 1:
        raise ValueError(
            f"update.epochs={plan.epochs} × update.minibatches={plan.minibatches}: from the second optimizer step on, "
            "sampled divergences would be of another policy's samples; pass --update.epochs=1 --update.minibatches=1, "
            "or --algorithm.divergence=exact"
        )
    losses = _Losses(algorithm, policy, teachers, temperature)

    def update_step(
        state: TrainState,
        rollout: Rollout,
        rewards: jax.Array | Feedback | None = None,
        reference: Params | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rollout.check()
        prompts, group = rollout.completion.shape[:2]
        plan.group_split(prompts, group, row_shards(), whole_groups=algorithm.needs_whole_groups)
        weights = algorithm.weights_of(len(teachers))
        rows = DistilledRows(rollout.prompt, rollout.prompt_lengths, rollout.completion, rollout.mask)
        gradient_step = make_gradient_step(losses.against(reference or {}, weights), optimizer, plan.of_minibatch)

        def optimizer_step(carry: Carry, rows: DistilledRows) -> tuple[Carry, Metrics]:
            return gradient_step(carry, rows, aggregation_normalizer(rows.mask, mode=algorithm.aggregation))

        carry, trained = run_epochs(optimizer_step, (state.params, state.opt_state), rows, plan, step_key(state, 1))
        state = state.replace(step=state.step + 1, params=carry[0], opt_state=carry[1])
        metrics = _rollout_metrics(rollout, rewards)
        return state, {name: record.value() for name, record in (metrics | trained).items()}

    return update_step


def _rollout_metrics(rollout: Rollout, rewards: jax.Array | Feedback | None) -> Metrics:
    """Those of the rollout; of rewards where there are any."""
    given = rewards.rewards if isinstance(rewards, Feedback) else rewards
    if given is not None:
        return rollout_metrics(rollout, rollout.of_completions(jnp.asarray(given)))
    metrics = rollout_metrics(rollout, jnp.zeros(rollout.completion_lengths.shape, jnp.float32))
    return {name: record for name, record in metrics.items() if "reward" not in name}


@dataclasses.dataclass(frozen=True)
class _Losses:
    """What the loss is made of but for the teachers' parameters."""

    algorithm: Distillation
    policy: Transformer
    teachers: dict[str, Transformer]
    temperature: float

    def against(self, teachers: Params, weights: Sequence[float]) -> Loss:
        """The loss with these parameters of the teachers, by name."""
        constant = jax.lax.stop_gradient({name: teachers[name] for name in self.teachers})
        of_texts = self._exact if self.algorithm.divergence == "exact" else self._sampled

        def scores(params: Params, texts: Any) -> Divergences:
            layout = layout_of(texts)
            return layout.unpack(of_texts(params, constant, layout))

        def of_scores(made: Divergences, rows: DistilledRows, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
            return self._loss(made, rows, normalizer, weights)

        return Loss(scores, of_scores, whole_groups=self.algorithm.needs_whole_groups)

    def _exact(self, params: Params, teachers: dict[str, Params], layout: Layout) -> Divergences:
        """Divergences over the vocabulary, a chunk of positions at a time."""
        states = (self.policy.hidden(params, layout),)
        states += tuple(model.hidden(teachers[name], layout) for name, model in self.teachers.items())
        head = as_float(self.policy.head(params))  # so that the parts of its gradient are summed in float32
        heads = [model.head(teachers[name]) for name, model in self.teachers.items()]
        width = self.policy.config.known_tokens or self.policy.config.vocab_size

        def of_chunk(state: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
            own = self.policy.project(head, state)[..., :width]
            found = [
                generalized_jsd(
                    own,
                    model.project(head, other)[..., :width],
                    beta=self.algorithm.beta,
                    temperature=self.temperature,
                    chunk_size=own.shape[-2],
                )
                for model, head, other in zip(self.teachers.values(), heads, others, strict=True)
            ]
            logprobs = jax.nn.log_softmax(jax.lax.stop_gradient(own) / self.temperature)
            return (*found, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1))

        rows = math.prod(states[0].shape[:-2])
        size = max(1, CHUNK_LOGITS * token_shards() // (max(1, rows) * width))
        *found, entropy = over_positions(of_chunk, states, size)
        return Divergences(tuple(found), entropy)

    def _sampled(self, params: Params, teachers: dict[str, Params], layout: Layout) -> Divergences:
        """Log-ratios of the sampled tokens, with the gradient of the reverse KL."""
        own = Scorer(self.policy, self.temperature).of_hidden(params, self.policy.hidden(params, layout), layout)
        found = []
        for name, model in self.teachers.items():
            hidden = model.hidden(teachers[name], layout)
            theirs = Scorer(model, self.temperature).of_hidden(teachers[name], hidden, layout)
            found.append(kl_k1_straight_through(own.logprobs, theirs.logprobs))
        return Divergences(tuple(found), own.entropy)

    def _loss(
        self, made: Divergences, rows: DistilledRows, normalizer: jax.Array, weights: Sequence[float]
    ) -> tuple[jax.Array, Metrics]:
        found = [fill_masked(divergence, rows.mask) for divergence in made.of_teachers]
        total = sum((w * d for w, d in zip(weights, found, strict=True)), jnp.zeros(rows.mask.shape))
        loss = aggregate(
            total,
            rows.mask,
            mode=self.algorithm.aggregation,
            normalizer=normalizer,
            max_length=self.algorithm.max_length or rows.mask.shape[-1],
        )
        shown = {"divergence": total} | dict(zip(self.teachers, found, strict=True))
        metrics: Metrics = {
            f"distillation/{name}": Mean.of(jax.lax.stop_gradient(x), rows.mask) for name, x in shown.items()
        }
        return loss, metrics | {"entropy": Mean.of(jax.lax.stop_gradient(made.entropy), rows.mask)}
