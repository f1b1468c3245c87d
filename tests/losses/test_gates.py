import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.gates import sapo_loss, soft_gate


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def gate_of(r, tau, gate="sigmoid", scale=True):
    if gate == "sech2_literal":
        return 1 / np.cosh(tau * (r - 1) / 2) ** 2
    return (4 / tau if scale else 1) / (1 + np.exp(-tau * (r - 1)))


def sapo_loop(data, advantages, *, tau_pos=1.0, tau_neg=1.05, **options):
    sequences = []
    for row in np.ndindex(data.mask.shape[:-1]):
        terms = []
        for t in np.flatnonzero(data.mask[row]):
            A = advantages[row][t]
            r = np.exp(data.logprobs[row][t] - data.old[row][t])
            terms.append(-A * gate_of(r, tau_pos if A > 0 else tau_neg, **options))
        if terms:
            sequences.append(np.mean(terms))
    return np.mean(sequences)


def test_golden_numbers(examples, tok):
    close(soft_gate(np.zeros(2), np.zeros(2), np.array([1.0, -1])), examples["sapo.gate_r1_tau1_tau1p05"])
    close(soft_gate(np.log(1.5), 0.0, 1.0), examples["sapo.gate_r1p5_tau1"])
    args = (tok.logprobs, tok.old, tok.advantages)
    losses = -tok.advantages[:, None] * soft_gate(*args)
    close(np.where(tok.mask, losses, 0), examples["sapo.token_losses"])
    close(sapo_loss(*args, tok.mask)[0], examples["sapo.loss_seqmean"])


@pytest.mark.parametrize("gate", ["sigmoid", "sech2"])
def test_golden_gradients(examples, gate):
    """Both gates: r sech²(τ (r − 1) / 2)."""
    r = np.array([1.0, 1.5, 2.0])
    grad = jax.vmap(jax.grad(lambda lr: soft_gate(lr, 0.0, 1.0, gate=gate)))(jnp.log(r))
    close(grad / r, examples["sapo.weight_sech2_r1_r1p5_r2_tau1"])
    close(grad[1] / 1.5, examples["sapo.numeric_grad_over_r_at_r1p5_tau1"])


def test_the_literal_gate_warns_and_does_not_learn_from_its_own_samples():
    def gate(lr):
        return soft_gate(lr, 0.0, 1.0, tau_pos=2.0, gate="sech2_literal")

    with pytest.warns(UserWarning, match='"sech2_literal" has gradient 0 at ratio 1'):
        assert jax.value_and_grad(gate)(0.0) == (1, 0)
    with pytest.warns(UserWarning):
        close(gate(np.log(1.7)), gate_of(1.7, 2.0, "sech2_literal"))


def test_scale_and_temperatures(ragged):
    args = (ragged.logprobs, ragged.old, ragged.token_advantages, ragged.mask)
    for options in ({"tau_pos": 0.5, "tau_neg": 3.0}, {"gate_scale": False}):
        scale = {"scale": False} if "gate_scale" in options else options
        close(sapo_loss(*args, **options)[0], sapo_loop(ragged, ragged.token_advantages, **scale))
    with pytest.warns(UserWarning):
        literal = sapo_loss(*args, gate="sech2_literal")[0]
    close(literal, sapo_loop(ragged, ragged.token_advantages, gate="sech2_literal"))


def test_the_two_gates_have_one_gradient(ragged):
    def grad(gate):
        args = (ragged.old, ragged.token_advantages, ragged.mask)
        return jax.grad(lambda x: sapo_loss(x, *args, gate=gate)[0])(jnp.float32(ragged.logprobs))

    close(grad("sech2"), grad("sigmoid"))


@pytest.mark.parametrize("gate", ["sigmoid", "sech2"])
@pytest.mark.parametrize("far", [-1e4, -30.0, 30.0, 1e4])
def test_far_ratios_are_finite_and_fade(gate, far):
    grad = jax.grad(lambda lr: soft_gate(lr, 0.0, 1.0, gate=gate))(far)
    assert np.isfinite(soft_gate(far, 0.0, 1.0, gate=gate))
    assert abs(grad) < 1e-6


@pytest.mark.parametrize("gate", ["sigmoid", "sech2"])
def test_what_holds_of_every_loss(check_token_loss, ragged_rows, gate):
    def loss(**arguments):
        return sapo_loss(**arguments, gate=gate)

    arrays = ragged_rows("logprobs", "old_logprobs", "advantages", "mask", "weights")
    check_token_loss(loss, arrays, mode="seq-mean-token-mean", detached=gate == "sech2")


def test_errors():
    with pytest.raises(ValueError, match="unknown gate 'tanh': choose one of sigmoid, sech2, sech2_literal"):
        soft_gate(0.0, 0.0, 1.0, gate="tanh")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="tau_neg is 0: it must be finite and positive"):
        soft_gate(0.0, 0.0, 1.0, tau_neg=0)
