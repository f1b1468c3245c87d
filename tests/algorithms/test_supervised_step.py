"""Supervised steps: the plain cross-entropy of exactly the masked tokens, learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import MicroBatches
from jaxrl_llm.algorithms.offline import make_offline_evaluation, make_offline_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.supervised import Demonstrations, PackedDemonstrations, SupervisedObjective
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.types import Rollout

EOS = 2
OBJECTIVE = SupervisedObjective()


@pytest.fixture(scope="module")
def demonstrations(make_rollout: Callable[..., Rollout]) -> Demonstrations:
    """Four prompts with two completions each, ragged, every one ended by EOS; EOS is the padding id, too."""
    rollout = make_rollout(group=2)
    mask = np.array(rollout.mask)
    is_last = np.arange(mask.shape[-1]) == rollout.completion_lengths[..., None] - 1
    completion = np.where(mask & ~is_last, rollout.completion, EOS)
    return Demonstrations(rollout.prompt, rollout.prompt_lengths, completion, mask)


def step_once(
    model: Transformer,
    params: Params,
    batch: Demonstrations,
    objective: SupervisedObjective = OBJECTIVE,
    **settings: int,
) -> tuple[Params, dict[str, float]]:
    """The gradient (the change under SGD with rate 1), and the metrics."""
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_offline_step(model, optimizer, objective, plan=MicroBatches(**settings)))
    state, metrics = step(make_train_state(params, optimizer, 0), batch)
    assert int(state.step) == 1
    change = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, state.params)
    chex.assert_tree_all_finite(change)  # a comparison takes two NaNs for equal
    return change, {name: float(value) for name, value in metrics.items() if not name.startswith("perf/")}


@pytest.fixture(scope="module")
def whole(tiny_config, lively_params, demonstrations) -> dict[str, Any]:
    model = Transformer(tiny_config(logit_softcap=5.0))
    params = lively_params(model)
    gradient, metrics = step_once(model, params, demonstrations)
    return {"model": model, "params": params, "gradient": gradient, "metrics": metrics}


def test_gradient_is_that_of_the_plain_cross_entropy(whole, demonstrations, make_rollout, repeated_logprobs):
    """Repeated prompts and full logits; one mean over all masked tokens, the final EOS among them."""
    rollout = make_rollout(group=2).replace(completion=demonstrations.completion)

    @jax.jit
    def plain(params: Params) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> jax.Array:
            logprobs = repeated_logprobs(whole["model"], params, rollout)[0]
            return -jnp.sum(jnp.where(demonstrations.mask, logprobs, 0)) / demonstrations.mask.sum()

        return jax.value_and_grad(loss)(params)

    loss, gradient = plain(whole["params"])
    chex.assert_trees_all_close(whole["gradient"], gradient, rtol=0, atol=1e-5)
    assert whole["metrics"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert whole["metrics"]["nll"] == pytest.approx(float(loss), rel=1e-5)
    assert whole["metrics"]["grad_norm"] == pytest.approx(float(jax.jit(optax.tree.norm)(gradient)), rel=1e-4)


def test_micro_batches_do_not_change_the_gradient(whole, demonstrations):
    gradient, metrics = step_once(whole["model"], whole["params"], demonstrations, micro_batches=8)
    chex.assert_trees_all_close(gradient, whole["gradient"], rtol=0, atol=2e-6)
    assert metrics == pytest.approx(whole["metrics"], rel=1e-5)


def test_mesh_does_not_change_the_gradient(whole, demonstrations):
    """Also where there are more devices than prompts: then they share the completions of each."""
    with jax.set_mesh(make_mesh()):
        gradient, metrics = step_once(whole["model"], whole["params"], demonstrations)
    chex.assert_trees_all_close(gradient, whole["gradient"], rtol=0, atol=1e-5)
    assert metrics == pytest.approx(whole["metrics"], rel=1e-5)


def test_rows_that_cannot_be_split_raise(whole, demonstrations):
    with pytest.raises(ValueError, match=r"4 prompts × 2 samples .* update\.micro_batches=3"):
        step_once(whole["model"], whole["params"], demonstrations, micro_batches=3)


def test_a_batch_of_which_all_is_masked_changes_nothing(whole, demonstrations):
    empty = demonstrations._replace(mask=np.zeros_like(demonstrations.mask))
    gradient, metrics = step_once(whole["model"], whole["params"], empty)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert metrics == {"loss": 0, "nll": 0, "entropy": 0, "grad_norm": 0, "frac_steps_skipped": 0}


@pytest.mark.parametrize(
    ("objective", "weigh"),
    [
        (SupervisedObjective(kind="dft"), lambda logprobs, mask: np.exp(logprobs) / mask.sum()),
        (
            SupervisedObjective(aggregation="seq-mean-token-mean"),
            lambda logprobs, mask: 1 / (mask.sum(-1, keepdims=True) * mask.any(-1).sum()),
        ),
    ],
    ids=["dft", "each completion alike"],
)
def test_other_weights_of_tokens(whole, demonstrations, make_rollout, repeated_logprobs, objective, weigh) -> None:
    """The loss is Σ −weight · logprob, with the weight constant."""
    rollout = make_rollout(group=2).replace(completion=demonstrations.completion)
    logprobs = np.asarray(jax.jit(lambda p: repeated_logprobs(whole["model"], p, rollout)[0])(whole["params"]))
    mask = demonstrations.mask
    expected = -np.sum(np.where(mask, weigh(logprobs, mask) * logprobs, 0))
    evaluate = jax.jit(make_offline_evaluation(whole["model"], objective))
    loss, records = evaluate(whole["params"], demonstrations)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(records["nll"].value()) == pytest.approx(whole["metrics"]["nll"], rel=1e-5)
    assert not objective.needs_reference


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_packed_demonstrations_train_as_unpacked_ones(whole, demonstrations, aggregation) -> None:
    """Three to a row, in another order, on eight devices and in micro-batches: the gradient is the same."""
    singles = []
    for p, g in np.ndindex(demonstrations.mask.shape[:2]):
        length, width = demonstrations.prompt_lengths[p], int(demonstrations.mask[p, g].sum())
        tokens = np.concatenate([demonstrations.prompt[p, :length], demonstrations.completion[p, g, :width]])
        singles.append((tokens, np.arange(length + width) >= length))
    rows = [[singles[n] for n in items] for items in ((7, 0, 5), (1,), (6, 2, 3), (4,))]
    completion, mask, segments = np.full((4, 1, 40), 9, np.int32), np.zeros((4, 1, 40), bool), np.full((4, 1, 40), -1)
    for row, members in enumerate(rows):
        at = 0
        for number, (tokens, trained) in enumerate(members):
            here = slice(at, at := at + len(tokens))
            completion[row, 0, here], mask[row, 0, here], segments[row, 0, here] = tokens, trained, number
    packed = PackedDemonstrations(np.zeros((4, 1), np.int32), np.ones(4, np.int32), completion, mask, segments)

    objective = SupervisedObjective(aggregation=aggregation)
    expected, metrics = step_once(whole["model"], whole["params"], demonstrations, objective)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        gradient, same = step_once(whole["model"], whole["params"], packed, objective, micro_batches=2)
    chex.assert_trees_all_close(gradient, expected, rtol=0, atol=1e-5)
    assert same == pytest.approx(metrics, rel=1e-5)


def test_a_kind_that_there_is_not():
    with pytest.raises(ValueError, match=r"objective.kind='mse' must be one of .*'nll', 'dft'"):
        SupervisedObjective(kind="mse")  # pyright: ignore[reportArgumentType]


def test_training_lowers_the_loss_and_learns_to_stop(tiny_config, demonstrations):
    """From scratch: greedy choices become the demonstrations, EOS included; unmasked tokens are not learned."""
    model = Transformer(tiny_config())
    optimizer = optax.adam(0.01)
    mask = demonstrations.mask.copy()
    mask[1] = False  # these must stay unlearned
    batch = demonstrations._replace(mask=mask)
    step = jax.jit(make_offline_step(model, optimizer, OBJECTIVE), donate_argnums=0)
    state = jax.jit(lambda key: make_train_state(model.init(key), optimizer, 0))(jax.random.key(0))
    losses = []
    for _ in range(150):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(64), rel=0.05)
    assert losses[-1] < 0.6  # two completions of one prompt: the first token alone leaves ln 2

    @jax.jit
    def greedy(params: Params) -> jax.Array:
        hidden = model.hidden(params, batch)
        return jnp.argmax(model.head_logits(params, hidden), axis=-1)

    right = np.asarray(greedy(state.params)) == batch.completion
    is_end = demonstrations.mask & (batch.completion == EOS)
    assert right[mask & is_end].mean() > 0.9
    assert right[mask].mean() > 0.8
    unlearned = demonstrations.mask & ~mask & ~is_end
    assert right[unlearned].mean() < 0.3
