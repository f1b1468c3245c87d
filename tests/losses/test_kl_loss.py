import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.kl_loss import kl_loss
from jaxrl_llm.losses.policy import grpo_loss


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_golden_numbers(examples, tok):
    args = (tok.logprobs, tok.ref, tok.mask)
    loss, metrics = kl_loss(*args, kl_coef=1.0, aggregation="token-mean")
    close(loss, examples["kl.k3_token_mean"])
    close(metrics["kl"].value(), examples["kl.k3_token_mean"])
    close(kl_loss(*args, kl_coef=1.0, aggregation="seq-mean-token-mean")[0], examples["kl.k3_seq_mean_token_mean"])


@pytest.mark.parametrize("estimator", ["k3", "k3-ratio", "k1+"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum-norm", "group-mean-token-mean"])
def test_it_is_the_term_that_grpo_has_built_in(ragged, estimator, mode):
    options = {"aggregation": mode, "max_length": 9, "kl_coef": 0.3, "kl_estimator": estimator, "kl_clip": 2.0}

    def added(x):
        return kl_loss(x, ragged.ref, ragged.mask, old_logprobs=ragged.old, **options)[0]

    def built_in(x):
        return grpo_loss(x, ragged.old, jnp.zeros((4, 3)), ragged.mask, ref_logprobs=ragged.ref, **options)[0]

    x = jnp.float32(ragged.logprobs)
    chex.assert_trees_all_close(jax.value_and_grad(added)(x), jax.value_and_grad(built_in)(x), rtol=1e-5, atol=1e-6)


def test_what_holds_of_every_loss(check_token_loss, ragged_rows):
    def loss(**arguments):
        return kl_loss(**arguments, kl_coef=0.5, kl_estimator="k3-ratio", aggregation="seq-mean-token-mean")

    arrays = ragged_rows("logprobs", "old_logprobs", "ref_logprobs", "mask")
    check_token_loss(loss, arrays, mode="seq-mean-token-mean")


def test_errors(tok):
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(3,\), but mask has shape \(2, 4\)"):
        kl_loss(tok.logprobs, np.zeros(3), tok.mask, kl_coef=1.0, aggregation="token-mean")
