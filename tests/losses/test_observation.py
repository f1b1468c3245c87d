import numpy as np
import pytest

from jaxrl_llm.losses import echo_loss


def test_golden_number(examples, tok):
    """The second and third token of the first row and the first of the second are what a tool answered."""
    answered = np.array([[False, True, True, False], [True, False, False, False]])
    loss, metrics = echo_loss(tok.logprobs, answered)
    np.testing.assert_allclose(loss, examples["echo.loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["echo/nll"].value(), (0.5 + 2.0 + 0.3) / 3, rtol=1e-6)


def test_equals_the_definition(ragged):
    answered = ragged.mask & (np.arange(6) % 2 == 1)
    both = zip(ragged.logprobs.reshape(-1, 6), answered.reshape(-1, 6), strict=True)
    rows = [-row[held].mean() for row, held in both if held.any()]
    np.testing.assert_allclose(echo_loss(ragged.logprobs, answered, coef=0.3)[0], 0.3 * np.mean(rows), rtol=1e-5)
    loss, _ = echo_loss(ragged.logprobs, answered, coef=0.3, aggregation="token-mean")
    np.testing.assert_allclose(loss, -0.3 * ragged.logprobs[answered].mean(), rtol=1e-5)


def test_holds_of_every_loss(ragged_rows, check_token_loss):
    def loss(logprobs, mask, **options):
        return echo_loss(logprobs, mask, **options)

    check_token_loss(loss, ragged_rows("logprobs", "mask"), mode="seq-mean-token-mean")


def test_a_negative_weight(tok):
    with pytest.raises(ValueError, match="coef is -1: it must be finite and not negative"):
        echo_loss(tok.logprobs, tok.mask, coef=-1)
