from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import clipped_surrogate
from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.losses.value import clipped_value_error, value_loss


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def critic(tok):
    """Values of the specification's two sequences: at collection, and now."""
    tok.old_values = np.array([[0.2, 0.1, 0.3, 0.4], [-0.1, -0.2, np.nan, 7]])
    tok.values = np.array([[0.5, 0.1, 0.2, 1.0], [0.3, -0.2, 7, np.inf]])
    return tok


def test_golden_numbers(examples, critic):
    returns = np.array(examples["ppo.gae_g1_l095_ret"])

    def loss(**options):
        return value_loss(critic.values, critic.old_values, returns, critic.mask, **options)[0]

    close(loss(), examples["ppo.value_loss_half_clip0p2"])
    close(loss(clip=None), examples["ppo.value_loss_half_noclip"])
    close(loss(clip=None, kind="mse"), examples["ppo.value_loss_seed003_mse"])
    suffix = np.array(examples["ppo.return_suffix_seed"])
    by_sequence, _ = value_loss(critic.values, None, suffix, critic.mask, clip=None, aggregation="seq-mean-token-mean")
    close(by_sequence, examples["ppo.critic_seed000"])


def test_golden_totals(examples, critic):
    """The policy's loss and the critic's, as two of the source notes add them."""
    advantages, suffix = np.array(examples["ppo.adv_seed"]), np.array(examples["ppo.return_suffix_seed"])

    def policy(clip):
        losses = clipped_surrogate(critic.logprobs, critic.old, advantages, clip_low=clip, clip_high=clip)
        return aggregate(losses, critic.mask, mode="token-mean")

    critic_loss, _ = value_loss(critic.values, None, suffix, critic.mask, clip=None, aggregation="seq-mean-token-mean")
    close(policy(None) + 0.1 * critic_loss, examples["ppo.total_seed000"])
    critic_loss, _ = value_loss(critic.values, None, suffix, critic.mask, clip=None, kind="mse")
    close(policy(0.2) + 0.5 * critic_loss, examples["ppo.total_seed003"])


@pytest.fixture
def rows(ragged, ragged_rows):
    """Ragged rows with values far enough from the old ones that the clip acts on both sides."""
    rng = np.random.default_rng(1)
    mask = ragged_rows("mask")["mask"]

    def padded(x):
        return np.where(mask, x, np.nan)

    old = rng.normal(size=mask.shape)
    values = old + 0.4 * rng.normal(size=mask.shape)
    return {
        "values": padded(values),
        "old_values": padded(old),
        "returns": padded(old + rng.normal(size=mask.shape)),
        "mask": mask,
    }


def value_loop(values, old_values, returns, mask, clip=0.2, factor=0.5, by_sequence=False):
    """The equation, token by token; also the share of clipped tokens."""
    means, losses, clipped = [], [], 0
    for b in range(len(mask)):
        row = []
        for t in np.flatnonzero(mask[b]):
            loss = (values[b, t] - returns[b, t]) ** 2
            if clip is not None:
                near = min(max(values[b, t], old_values[b, t] - clip), old_values[b, t] + clip)
                clipped += (near - returns[b, t]) ** 2 > loss
                loss = max(loss, (near - returns[b, t]) ** 2)
            row.append(factor * loss)
        losses += row
        if row:
            means.append(np.mean(row))
    return np.mean(means if by_sequence else losses), clipped / mask.sum()


@pytest.mark.parametrize("clip", [0.2, 0.5, None])
@pytest.mark.parametrize("by_sequence", [False, True])
def test_it_equals_the_definition(rows, clip, by_sequence):
    aggregation = "seq-mean-token-mean" if by_sequence else "token-mean"
    for kind, factor in (("half_mse", 0.5), ("mse", 1.0)):
        loss, metrics = value_loss(**rows, clip=clip, kind=kind, aggregation=aggregation)
        expected, share = value_loop(**rows, clip=clip, factor=factor, by_sequence=by_sequence)
        close(loss, expected)
        close(metrics["vf/clip_frac"].value(), share)
        assert share > 0 or clip is None


def test_metrics_equal_the_definition(rows):
    _, metrics = value_loss(**rows)
    values, returns = rows["values"][rows["mask"]], rows["returns"][rows["mask"]]
    assert set(metrics) == {"vf/clip_frac", "value/mean", "value/returns_mean", "value/explained_variance"}
    close(metrics["value/mean"].value(), values.mean())
    close(metrics["value/returns_mean"].value(), returns.mean())
    close(metrics["value/explained_variance"].value(), 1 - np.var(returns - values) / np.var(returns))


@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_what_holds_of_every_token_loss(check_token_loss, rows, clip, mode):
    def loss(**arrays):
        return value_loss(**arrays, clip=clip, aggregation=mode)

    check_token_loss(loss, rows, mode=mode, trained="values")


def test_only_the_values_are_differentiated(rows):
    clean = {name: jnp.asarray(np.where(rows["mask"], x, 0.0)) for name, x in rows.items() if name != "mask"}
    grads = jax.grad(lambda x: value_loss(**x, mask=rows["mask"])[0])(clean)
    assert np.any(grads["values"])
    assert not np.any(grads["old_values"]) and not np.any(grads["returns"])


def test_the_gradient_is_cut_where_a_value_has_moved_far_enough_towards_its_return():
    old, returns = jnp.zeros(4), jnp.array([1.0, 1.0, 1.0, -1.0])
    values = jnp.array([0.1, 0.3, -0.3, 0.3])  # inside; beyond, towards; beyond, away; beyond, away
    grad = jax.grad(lambda x: jnp.sum(clipped_value_error(x, old, returns)))(values)
    close(grad, [2 * (0.1 - 1), 0, 2 * (-0.3 - 1), 2 * (0.3 + 1)])


def test_micro_batches_merge_into_the_metrics_of_the_whole(rows):
    _, whole = value_loss(**rows)
    parts = [value_loss(**{name: x[part] for name, x in rows.items()})[1] for part in (slice(3), slice(3, 12))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    for name, record in whole.items():
        close(parts[0][name].merge(parts[1][name]).value(), record.value())
        close(stacked[name].reduce().value(), record.value())


def test_errors(rows):
    with pytest.raises(ValueError, match=r"clip is 0\.2, but there are no old_values: pass them, or clip=None"):
        value_loss(rows["values"], None, rows["returns"], rows["mask"])
    with pytest.raises(ValueError, match="clip is -1: it is a distance"):
        value_loss(**rows, clip=-1)
    with pytest.raises(ValueError, match="unknown kind 'huber': choose one of half_mse, mse"):
        value_loss(**rows, kind="huber")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"returns has shape \(12, 5\), but mask has shape \(12, 6\)"):
        value_loss(rows["values"], rows["old_values"], rows["returns"][:, :5], rows["mask"])
    with pytest.raises(ValueError, match="mask must be bool"):
        value_loss(rows["values"], rows["old_values"], rows["returns"], rows["mask"].astype(float))
