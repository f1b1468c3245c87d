"""Value, gradient and metrics of the policy losses beside TRL's own code, run on a trainer that has no model."""

from __future__ import annotations

import collections
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses import (
    aggregate,
    cispo_loss,
    clipped_surrogate,
    dapo_loss,
    dr_grpo_loss,
    gmpo_loss,
    grpo_loss,
    gspo_loss,
    kl_loss,
    luspo_loss,
    mis_weights,
    off_policy_sequence_mask,
    ppo_loss,
    sapo_loss,
    sequence_log_ratio,
    tis_weights,
    top_entropy_mask,
    vespo_loss,
)

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl")
    from trl.experimental.gmpo import GMPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

MAX_LENGTH = 7


@pytest.fixture(scope="module")
def data() -> types.SimpleNamespace:
    """Six sequences of one to five tokens; an observation amid the second."""
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array([[5], [4], [1], [3], [5], [2]])
    mask[1, 1] = False
    logprobs = -rng.exponential(size=mask.shape)
    return types.SimpleNamespace(
        mask=mask,
        logprobs=logprobs,
        old=logprobs + 0.4 * rng.normal(size=mask.shape),
        ref=logprobs + 0.5 * rng.normal(size=mask.shape),
        sampler=logprobs + 0.4 * rng.normal(size=mask.shape),
        entropy=rng.exponential(size=mask.shape),
        advantages=rng.normal(size=6),
    )


def trainer(cls: type, settings: dict[str, Any]) -> types.SimpleNamespace:
    """What `_compute_loss` reads of a trainer, in one process."""
    accelerator = types.SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
        sync_gradients=True,
    )
    args = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    args |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    args |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    fields = {"loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.28}
    fields |= {"beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "aux_loss_enabled": False}
    fields |= {"use_vllm": False, "vllm_importance_sampling_correction": True, "entropy_coef": 0.0}
    fields |= {"use_adaptive_entropy": False, "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1}
    fields |= {"max_completion_length": MAX_LENGTH, "model": types.SimpleNamespace(training=True)}
    assert set(settings) <= set(args) | set(fields)
    stub = types.SimpleNamespace(
        **{name: settings.get(name, x) for name, x in fields.items()},
        args=types.SimpleNamespace(**{name: settings.get(name, x) for name, x in args.items()}),
        accelerator=accelerator,
        _metrics={"train": collections.defaultdict(list)},
    )
    if cls is not RLOOTrainer:
        stub.get_off_policy_mask = cls.get_off_policy_mask
        stub.get_gamma_weights = cls.get_gamma_weights
        stub.get_high_entropy_mask = types.MethodType(cls.get_high_entropy_mask, stub)
    return stub


def run_trl(data, settings, *, cls=GRPOTrainer, rows=slice(None), on_policy=False, ratio=None, **inputs):
    """Loss, gradient with respect to the log-probs, and metrics."""

    def tensor(x):
        return torch.tensor(np.asarray(x)[rows], dtype=torch.float32)

    logprobs = tensor(data.logprobs).requires_grad_()
    entropy = tensor(data.entropy).requires_grad_()
    stub = trainer(cls, settings)
    stub._get_per_token_logps_and_entropies = lambda *args, **options: (logprobs, entropy, None)
    mask = tensor(data.mask)
    ones = torch.ones(len(mask), 1, dtype=torch.int64)
    batch = {"prompt_ids": ones, "prompt_mask": ones, "completion_ids": mask.long(), "completion_mask": mask.long()}
    batch |= {"advantages": tensor(data.advantages), "ref_per_token_logps": tensor(data.ref)}
    batch |= {"num_items_in_batch": torch.tensor(data.mask.sum()), "sampling_per_token_logps": tensor(data.sampler)}
    batch |= {"old_logps": (tensor(data.old) * mask).sum(1)} if cls is RLOOTrainer else {}
    if not on_policy:
        batch["old_per_token_logps"] = tensor(data.old)
    if ratio is not None:
        batch["importance_sampling_ratio"] = tensor(ratio)
    loss = cls._compute_loss(stub, None, batch | inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in stub._metrics["train"].items()}
    return loss.item(), logprobs.grad.numpy(), None if entropy.grad is None else entropy.grad.numpy(), metrics


def agree(expected, loss, data):
    """Compares loss(logprobs) with what TRL returned."""
    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.float32(data.logprobs))
    np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-6)
    assert np.any(expected[1])
    for name in set(metrics) & set(expected[3]):
        np.testing.assert_allclose(metrics[name].value(), expected[3][name], rtol=1e-5, atol=1e-6, err_msg=name)
    return metrics


@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_clipped_losses(data, loss_type, delta):
    args = (data.old, data.advantages, data.mask)
    if delta is not None:
        modes = {"grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}
        mode = modes.get(loss_type, "token-mean")
        options = {"clip_high": 0.28, "ratio_cap": delta, "kl_coef": 0, "aggregation": mode}

        def loss(x):
            return grpo_loss(x, *args, **options, max_length=MAX_LENGTH)
    elif loss_type == "grpo":

        def loss(x):
            return grpo_loss(x, *args, clip_high=0.28, kl_coef=0)
    elif loss_type == "dr_grpo":

        def loss(x):
            return dr_grpo_loss(x, *args, max_length=MAX_LENGTH, clip_high=0.28)
    else:

        def loss(x):
            return dapo_loss(x, *args)

    metrics = agree(run_trl(data, {"loss_type": loss_type, "delta": delta}), loss, data)
    assert metrics["clip_ratio/low_mean"].total > 0
    assert metrics["clip_ratio/high_mean"].total > 0


@pytest.mark.parametrize("corrected", [False, True])
def test_kl(data, corrected):
    settings = {"beta": 0.3, "use_bias_correction_kl": corrected}
    options = {"kl_coef": 0.3, "kl_estimator": "k3-ratio" if corrected else "k3"}

    def loss(x):
        return grpo_loss(x, data.old, data.advantages, data.mask, ref_logprobs=data.ref, clip_high=0.28, **options)

    assert "kl" in agree(run_trl(data, settings), loss, data)


def test_without_old_logprobs(data):
    def loss(x):
        return grpo_loss(x, None, data.advantages, data.mask, kl_coef=0)

    agree(run_trl(data, {}, on_policy=True), loss, data)


def test_a_sequence_without_tokens_counts_in_trl(data):
    empty = types.SimpleNamespace(**{**vars(data), "mask": data.mask & (np.arange(6) != 3)[:, None]})

    def loss(x):
        return grpo_loss(x, data.old, data.advantages, empty.mask, kl_coef=0, clip_high=0.28, count_empty=True)

    expected = run_trl(empty, {})
    agree((*expected[:3], {}), loss, data)


def test_sequence_level(data):
    settings = {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1}
    clip = {"clip_low": 0.05, "clip_high": 0.1}

    def loss(x):
        return gspo_loss(x, data.old, data.advantages, data.mask, **clip)

    metrics = agree(run_trl(data, settings), loss, data)
    assert metrics["clip_ratio/region_mean"].total > 0

    def by_default(x):
        return gspo_loss(x, data.old, data.advantages, data.mask, **clip, aggregation="token-mean")

    agree((*run_trl(data, settings | {"loss_type": "dapo"})[:3], {}), by_default, data)

    def by_tokens(x):
        """From the terms, with a cap that no named loss of sequences has."""
        log_ratio = sequence_log_ratio(x, data.old, data.mask)
        losses = clipped_surrogate(log_ratio, jnp.zeros_like(log_ratio), data.advantages, **clip, ratio_cap=1.3)
        return aggregate(losses, data.mask, mode="token-mean"), {}

    agree(run_trl(data, settings | {"loss_type": "dapo", "delta": 1.3}), by_tokens, data)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_luspo(data, beta):
    settings = {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": beta}

    def loss(x):
        args = (data.old, data.advantages, data.mask)
        policy, metrics = luspo_loss(x, *args, clip_low=0.2, clip_high=0.28)
        kl, kl_metrics = kl_loss(x, data.ref, data.mask, kl_coef=beta, aggregation="seq-mean-token-sum")
        return policy + kl, metrics | kl_metrics

    agree(run_trl(data, settings), loss, data)


@pytest.mark.parametrize("maximum", [1.2, 5.0])
def test_cispo(data, maximum):
    def loss(x):
        return cispo_loss(x, data.old, data.advantages, data.mask, w_max=maximum)

    agree(run_trl(data, {"loss_type": "cispo", "epsilon_high": maximum}), loss, data)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_sapo(data, beta):
    settings = {"loss_type": "sapo", "beta": beta, "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 2.0}

    def loss(x):
        args = (data.old, data.advantages, data.mask)
        policy, metrics = sapo_loss(x, *args, tau_pos=0.8, tau_neg=2.0)
        kl, _ = kl_loss(x, data.ref, data.mask, kl_coef=beta, aggregation="seq-mean-token-mean")
        return policy + kl, metrics

    agree(run_trl(data, settings), loss, data)


def test_sapo_on_ratios_of_sequences(data):
    settings = {"loss_type": "sapo", "importance_sampling_level": "sequence", "sapo_temperature_neg": 2.0}

    def loss(x):
        return sapo_loss(x, data.old, data.advantages, data.mask, tau_neg=2.0, ratio_level="sequence")

    agree(run_trl(data, settings), loss, data)


@pytest.mark.parametrize("corrected", [False, True])
def test_vespo(data, corrected):
    """TRL multiplies the ratio of the sequence by the importance weights of the sampler."""
    ratio = np.asarray(tis_weights(data.old, data.sampler, np.ones_like(data.mask)))
    old = data.old - np.log(ratio) if corrected else data.old

    def loss(x):
        return vespo_loss(x, old, data.advantages, data.mask)

    settings = {"loss_type": "vespo", "use_vllm": corrected}
    # TRL sums the logarithms of the weights over the padding, too, where they are 0 in its own pipeline.
    agree(run_trl(data, settings, ratio=np.where(data.mask, ratio, 1.0) if corrected else None), loss, data)


def test_gmpo(data):
    settings = {"epsilon_low": 0.1, "epsilon_high": 0.2, "beta": 0.3}

    def loss(x):
        policy, metrics = gmpo_loss(x, data.old, data.advantages, data.mask, clip_low=0.1, clip_high=0.2)
        kl, kl_metrics = kl_loss(x, data.ref, data.mask, kl_coef=0.3, aggregation="seq-mean-token-mean")
        return policy + kl, metrics | kl_metrics

    metrics = agree(run_trl(data, settings, cls=GMPOTrainer), loss, data)
    assert metrics["clip_ratio/region_mean"].total > 0


def test_rloo(data):
    def loss(x):
        args = (data.old, data.advantages, data.mask)
        return gspo_loss(x, *args, length_normalize=False, clip_low=0.2, clip_high=0.28)

    metrics = agree(run_trl(data, {}, cls=RLOOTrainer), loss, data)
    assert metrics["clip_ratio/region_mean"].total > 0


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.2])
def test_off_policy_sequence_mask(data, threshold):
    def loss(x):
        keep = off_policy_sequence_mask(x, data.sampler, data.advantages, data.mask, threshold=threshold)
        args = (data.old, data.advantages, data.mask)
        return grpo_loss(x, *args, ref_logprobs=data.ref, kl_coef=0.3, clip_high=0.28, weights=keep)

    agree(run_trl(data, {"beta": 0.3, "off_policy_mask_threshold": threshold}), loss, data)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.83])
def test_top_entropy(data, fraction):
    def loss(x):
        keep = top_entropy_mask(data.entropy, data.mask, fraction=fraction)
        args = (data.old, data.advantages, data.mask)
        return grpo_loss(x, *args, ref_logprobs=data.ref, kl_coef=0.3, clip_high=0.28, weights=keep)

    agree(run_trl(data, {"beta": 0.3, "top_entropy_quantile": fraction}), loss, data)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rule", ["truncate", "mask"])
@pytest.mark.parametrize("minimum", [None, 0.8])
def test_importance_sampling(data, level, rule, minimum):
    """TRL computes the weights amid its generation; here they follow its documentation."""
    log_ratio = np.where(data.mask, data.old - data.sampler, 0)
    ratio = np.exp(log_ratio if level == "token" else log_ratio.sum(-1, keepdims=True))
    low, high = minimum or 0.0, 1.2
    ratio = np.clip(ratio, low, high) if rule == "truncate" else np.where((ratio < low) | (ratio > high), 0, ratio)

    function = tis_weights if rule == "truncate" else mis_weights
    weights = function(data.old, data.sampler, data.mask, level=level, w_min=minimum, w_max=high)
    assert 0 < np.mean(np.asarray(weights)[data.mask] == (high if rule == "truncate" else 0)) < 1

    def loss(x):
        args = (data.old, data.advantages, data.mask)
        return grpo_loss(x, *args, ref_logprobs=data.ref, kl_coef=0.3, clip_high=0.28, weights=weights)

    agree(run_trl(data, {"beta": 0.3, "use_vllm": True}, ratio=ratio), loss, data)


def test_entropy_bonus(data):
    settings = {"loss_type": "dapo", "entropy_coef": 0.3, "_entropy_bonus_enabled": True}
    expected = run_trl(data, settings)

    def loss(x, entropy=data.entropy):
        args = (data.old, data.advantages, data.mask)
        return ppo_loss(x, *args, clip_high=0.28, entropy=entropy, entropy_coef=0.3)

    assert "entropy" in agree(expected, loss, data)
    grad = jax.grad(lambda entropy: loss(data.logprobs, entropy)[0])(jnp.float32(data.entropy))
    np.testing.assert_allclose(grad, expected[2], atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_micro_batches(data, loss_type):
    settings = {"loss_type": loss_type, "current_gradient_accumulation_steps": 2, "steps_per_generation": 2}
    function = grpo_loss if loss_type == "grpo" else dapo_loss
    options = {"kl_coef": 0} if loss_type == "grpo" else {}
    normalizer = 6 if loss_type == "grpo" else data.mask.sum()
    for rows in (slice(3), slice(3, None)):
        part = types.SimpleNamespace(**{name: x[rows] for name, x in vars(data).items()})

        def loss(x, part=part):
            args = (part.old, part.advantages, part.mask)
            return function(x, *args, clip_high=0.28, normalizer=normalizer, **options)

        agree(run_trl(data, settings, rows=rows), loss, part)
