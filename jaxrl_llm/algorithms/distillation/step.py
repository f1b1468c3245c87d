"""The update step of a distillation: all models are in one program, teachers beside the student."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.distillation.self_teacher import ITSELF, averaged, hinted_layout
from jaxrl_llm.algorithms.gradient import Carry, Loss, make_gradient_step
from jaxrl_llm.algorithms.interfaces import Feedback
from jaxrl_llm.algorithms.policy_gradient.rollouts import rollout_metrics
from jaxrl_llm.algorithms.policy_gradient.update import UpdateStep, run_epochs
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import step_key
from jaxrl_llm.losses import aggregate, aggregation_normalizer, generalized_jsd, kl_k1_straight_through
from jaxrl_llm.losses.distillation import CHUNK_LOGITS, over_positions
from jaxrl_llm.masking import as_float, fill_masked
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rows import Layout, layout_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Mean, Metrics
from jaxrl_llm.sharding import row_shards, token_shards
from jaxrl_llm.types import Rollout, TrainState


class DistilledRows(NamedTuple):
    """What the loss of some rows reads."""

    prompt: jax.Array
    """`[P, Tp]`."""
    prompt_lengths: jax.Array
    """`[P]`."""
    completion: jax.Array
    """`[P, G, Tc]`."""
    mask: jax.Array
    """`[P, G, Tc]` bool: the tokens that are learned from."""
    hinted_tokens: jax.Array | None = None
    """`[P, G, Tt]`: the prompts that the policy reads as its own teacher."""
    hinted_lengths: jax.Array | None = None
    """`[P, G]`."""


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
        A function as `make_update_step` returns; `reference` are the teachers' parameters by name, constants; under
        "itself" those of the policy at the start, if it is its own teacher as it was then. Teachers read each
        micro-batch beside the student, so that none of their states outlives it. Rewards (`[P, G]`, by token, or
        `Feedback`) are only reported; `None`: there are none. A policy that teaches itself needs `Feedback.hinted`.
        Metrics: those of the rollout and of the optimizer, the `entropy`, `distillation/divergence` (weighted) and
        `distillation/<teacher>`, per token that is learned from.

    Raises:
        ValueError: the temperature is 0, or sampled divergences are to make several optimizer steps of a batch, or
            rows are to be packed that teachers read behind other prompts; when it is traced: there is no teacher, or
            another number of weights.
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
    itself = algorithm.itself
    if itself is not None and plan.tokens_per_micro_batch is not None:
        raise ValueError(
            f"update.tokens_per_micro_batch={plan.tokens_per_micro_batch} packs completions behind the policy's "
            "prompts, and as its own teacher it reads others: pass --update.micro_batches instead"
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
        weights, reference = algorithm.weights_of(len(teachers)), reference or {}
        rows = _rows(algorithm, rollout, rewards)
        own = None if itself is None else itself.params_of(state, reference.get(ITSELF))
        gradient_step = make_gradient_step(losses.against(reference, own, weights), optimizer, plan.of_minibatch)

        def optimizer_step(carry: Carry, rows: DistilledRows) -> tuple[Carry, Metrics]:
            return gradient_step(carry, rows, aggregation_normalizer(rows.mask, mode=algorithm.aggregation))

        carry, trained = run_epochs(optimizer_step, (state.params, state.opt_state), rows, plan, step_key(state, 1))
        average = state.average
        if itself is not None and algorithm.averages_policy:
            average = averaged(average, carry[0], itself.rate)
        state = state.replace(step=state.step + 1, params=carry[0], opt_state=carry[1], average=average)
        metrics = _rollout_metrics(rollout, rewards)
        return state, {name: record.value() for name, record in (metrics | trained).items()}

    return update_step


def _rows(algorithm: Distillation, rollout: Rollout, feedback: Any) -> DistilledRows:
    """What is learned from: everything, or what the policy as its own teacher is told something of."""
    rows = DistilledRows(rollout.prompt, rollout.prompt_lengths, rollout.completion, rollout.mask)
    if algorithm.itself is None:
        return rows
    hinted = feedback.hinted if isinstance(feedback, Feedback) else None
    if hinted is None:
        raise ValueError(f"{algorithm.reader} reads what its own teacher is told: pass Feedback with hinted")
    lengths = jnp.asarray(hinted.lengths)
    return rows._replace(
        mask=rows.mask & (lengths > 0)[..., None], hinted_tokens=jnp.asarray(hinted.tokens), hinted_lengths=lengths
    )


def _rollout_metrics(rollout: Rollout, rewards: jax.Array | Feedback | None) -> Metrics:
    """Those of the rollout; of rewards where there are any."""
    given, told, scored = rewards, {}, None
    if isinstance(rewards, Feedback):
        given, scored = rewards.rewards, rewards.scored
        if (hinted := rewards.hinted) is not None:
            told["distillation/frac_taught"] = Mean.of(jnp.asarray(hinted.lengths) > 0)
            told["distillation/frac_too_long"] = Mean.of(jnp.asarray(hinted.too_long))
    if given is not None:
        return told | rollout_metrics(rollout, rollout.of_completions(jnp.asarray(given)), scored)
    metrics = rollout_metrics(rollout, jnp.zeros(rollout.completion_lengths.shape, jnp.float32))
    return told | {name: record for name, record in metrics.items() if "reward" not in name}


class _Reading(NamedTuple):
    """A model that has read completions, behind the policy's prompts or behind others."""

    model: Transformer
    params: Params
    layout: Layout
    states: jax.Array
    """Those that predict the layout's targets, `[…, D]`."""
    shape: tuple[int, ...] | None = None
    """`[P, G, Tc]` of completions whose prompts are their own."""

    @classmethod
    def of(cls, model: Transformer, params: Params, layout: Layout, shape: tuple[int, ...] | None = None) -> _Reading:
        """After the forward pass."""
        return cls(model, params, layout, model.hidden(params, layout), shape)

    def unpack(self, values: Any) -> Any:
        """What was made of the targets, as `[P, G, Tc, *]`."""
        values, shape = self.layout.unpack(values), self.shape
        return values if shape is None else jax.tree.map(lambda x: x.reshape(*shape, *x.shape[3:]), values)


@dataclasses.dataclass(frozen=True)
class _Losses:
    """What the loss is made of but for the teachers' parameters."""

    algorithm: Distillation
    policy: Transformer
    teachers: dict[str, Transformer]
    temperature: float

    def against(self, teachers: Params, own: Params | None, weights: Sequence[float]) -> Loss:
        """The loss with these parameters of the teachers, by name.

        Args:
            teachers: of other models.
            own: of the policy as its own teacher; `None`: the current ones.
            weights: of all.
        """
        constant = jax.lax.stop_gradient({name: teachers[name] for name in self.teachers})
        divergences = self._exact if self.algorithm.divergence == "exact" else self._sampled

        def scores(params: Params, texts: Any) -> Divergences:
            layout = layout_of(texts)
            others = [_Reading.of(model, constant[name], layout) for name, model in self.teachers.items()]
            if self.algorithm.itself is not None:
                hinted = hinted_layout(texts.hinted_tokens, texts.hinted_lengths, texts.completion)
                taught = jax.lax.stop_gradient(params if own is None else own)
                others.append(_Reading.of(self.policy, taught, hinted, texts.completion.shape))
            return divergences(_Reading.of(self.policy, params, layout), others)

        def of_scores(made: Divergences, rows: DistilledRows, normalizer: jax.Array) -> tuple[jax.Array, Metrics]:
            return self._loss(made, rows, normalizer, weights)

        return Loss(scores, of_scores, whole_groups=self.algorithm.needs_whole_groups)

    def _exact(self, student: _Reading, teachers: Sequence[_Reading]) -> Divergences:
        """Divergences over the vocabulary, a chunk of positions at a time."""
        readings = (student, *teachers)
        states, alike = tuple(reading.states for reading in readings), self.algorithm.itself is None
        if not alike:
            states = tuple(reading.unpack(reading.states) for reading in readings)
        head = as_float(student.model.head(student.params))  # so that parts of its gradient are summed in float32
        heads = [reading.model.head(reading.params) for reading in teachers]
        width = self.policy.config.known_tokens or self.policy.config.vocab_size

        def of_chunk(state: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
            own = self.policy.project(head, state)[..., :width]
            found = [
                generalized_jsd(
                    own,
                    reading.model.project(head, other)[..., :width],
                    beta=self.algorithm.beta,
                    temperature=self.temperature,
                    chunk_size=own.shape[-2],
                )
                for reading, head, other in zip(teachers, heads, others, strict=True)
            ]
            logprobs = jax.nn.log_softmax(jax.lax.stop_gradient(own) / self.temperature)
            return (*found, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1))

        rows = math.prod(states[0].shape[:-2])
        size = max(1, CHUNK_LOGITS * token_shards() // (max(1, rows) * width))
        *found, entropy = over_positions(of_chunk, states, size)
        made = Divergences(tuple(found), entropy)
        return student.unpack(made) if alike else made

    def _sampled(self, student: _Reading, teachers: Sequence[_Reading]) -> Divergences:
        """Log-ratios of the sampled tokens, with the gradient of the reverse KL."""

        def scored(reading: _Reading) -> Any:
            scorer = Scorer(reading.model, self.temperature)
            return reading.unpack(scorer.of_hidden(reading.params, reading.states, reading.layout))

        own = scored(student)
        found = [kl_k1_straight_through(own.logprobs, scored(reading).logprobs) for reading in teachers]
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
        names = [*self.teachers] + [ITSELF] * (self.algorithm.itself is not None)
        shown = {"divergence": total} | dict(zip(names, found, strict=True))
        metrics: Metrics = {
            f"distillation/{name}": Mean.of(jax.lax.stop_gradient(x), rows.mask) for name, x in shown.items()
        }
        return loss, metrics | {"entropy": Mean.of(jax.lax.stop_gradient(made.entropy), rows.mask)}
