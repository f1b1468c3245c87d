"""Values and gradients of TRL's own code for supervised losses, reward models, distillation and the entropy bonus."""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.logprobs import scores_from_logits
from jaxrl_llm.losses.aggregate import aggregate
from jaxrl_llm.losses.distillation import generalized_jsd_from_hidden, gkd_loss
from jaxrl_llm.losses.entropy import EntropyControl, entropy_bonus, update_entropy_control
from jaxrl_llm.losses.process_reward import prm_loss
from jaxrl_llm.losses.reward import bradley_terry_loss
from jaxrl_llm.losses.supervised import dft_loss, sft_loss
from jaxrl_llm.losses.value import value_loss

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")
    GKDTrainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    distillation_trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    trainer_utils = pytest.importorskip("transformers.trainer_pt_utils")
    GRPOTrainer, RewardTrainer, SFTTrainer = trl.GRPOTrainer, trl.RewardTrainer, trl.SFTTrainer


def tensor(x, grad: bool = True):
    return torch.tensor(np.asarray(x, np.float32), requires_grad=grad)


def same(ours, theirs, arguments) -> None:
    """Compares the value and the gradient by each argument.

    Args:
        ours: function of JAX arrays.
        theirs: the same of tensors.
        arguments: arrays by which both are differentiated.
    """
    value, grads = jax.jit(jax.value_and_grad(ours, argnums=tuple(range(len(arguments)))))(
        *(jnp.float32(x) for x in arguments)
    )
    tensors = [tensor(x) for x in arguments]
    expected = theirs(*tensors)
    expected.backward()
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    for grad, x in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-4, atol=1e-6)


def trainer(**attributes) -> SimpleNamespace:
    """What a trainer's loss looks at besides its arguments."""
    accelerator = SimpleNamespace(
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        parallelism_config=None,
        sync_gradients=True,
    )
    common = {"accelerator": accelerator, "model": SimpleNamespace(training=True), "_tp_size": 1}
    state = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "aux_loss_enabled": False}
    return SimpleNamespace(**common, **state, **attributes)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_trainer(center, with_margin):
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(size=(3, 6))
    stub = trainer(args=SimpleNamespace(center_rewards_coefficient=center))

    def theirs(chosen, rejected):
        inputs = {"attention_mask": torch.ones(12, 3)} | ({"margin": tensor(margin, False)} if with_margin else {})
        scores = torch.cat([chosen, rejected])[:, None]
        return RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=scores), inputs)

    def ours(chosen, rejected):
        return bradley_terry_loss(
            chosen, rejected, margin=jnp.float32(margin) if with_margin else None, center_coef=center or 0.0
        )

    same(lambda *x: ours(*x)[0], theirs, (chosen, rejected))
    metrics = ours(chosen, rejected)[1]
    for name, theirs_name in (("accuracy", "accuracy"), ("margin", "margin"), ("score/mean", "mean_reward")):
        np.testing.assert_allclose(metrics[name].value(), stub._metrics["train"][theirs_name][0], rtol=1e-5)


@pytest.fixture
def rows():
    """Logits `[3, 5, 7]`, the tokens that they score and the mask of the completions."""
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array([[5], [2], [3]])
    mask[:, 0] = False
    tokens = rng.integers(0, 7, (3, 5))
    return SimpleNamespace(logits=2 * rng.normal(size=(3, 5, 7)), tokens=tokens, mask=mask, rng=rng)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("total", [None, 11])
def test_sft_trainer(rows, loss_type, total):
    """The trainer gets log-probs from its model, 0 where the label is ignored, and the count of the whole batch."""
    stub = trainer(
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        compute_loss_func=None,
        label_smoother=None,
    )
    mask = torch.tensor(rows.mask)

    def theirs(logits):
        logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(rows.tokens)[..., None])[..., 0]
        outputs = SimpleNamespace(
            log_probs=torch.where(mask, logprobs, 0.0), label_mask=mask, entropy=torch.zeros(1), is_top1=torch.zeros(1)
        )
        inputs = {"attention_mask": torch.ones(3, 5)}
        return SFTTrainer.compute_loss(stub, lambda **_: outputs, inputs, num_items_in_batch=total)

    def ours(logits):
        logprobs = scores_from_logits(logits, jnp.asarray(rows.tokens)).logprobs
        return (sft_loss if loss_type == "nll" else dft_loss)(logprobs, rows.mask, normalizer=total)[0]

    same(ours, theirs, (rows.logits,))


def test_label_smoother(rows):
    """The one that SFTTrainer takes from transformers."""
    labels = torch.tensor(np.where(rows.mask, rows.tokens, -100))

    def theirs(logits):
        return trainer_utils.LabelSmoother(epsilon=0.1)({"logits": logits}, labels)

    def ours(logits):
        logprobs = scores_from_logits(logits, jnp.asarray(rows.tokens)).logprobs
        mean = jnp.mean(jax.nn.log_softmax(logits), -1)
        return sft_loss(logprobs, rows.mask, label_smoothing=0.1, mean_logprobs=mean)[0]

    same(ours, theirs, (rows.logits,))


@pytest.mark.parametrize("classes", [2, 3])
def test_token_classification(rows, classes):
    """The loss of a process reward model in TRL, as long as it had a trainer for these: transformers' own."""
    labels = rows.rng.integers(0, classes, rows.mask.shape)
    config = SimpleNamespace(num_labels=classes)

    def theirs(logits):
        return loss_utils.ForTokenClassification(logits, torch.tensor(np.where(rows.mask, labels, -100)), config)

    same(lambda logits: prm_loss(logits, labels, rows.mask)[0], theirs, (rows.logits[..., :classes],))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("total", [None, 11])
def test_gkd_trainer(rows, beta, temperature, total):
    teacher = rows.rng.normal(size=rows.logits.shape)
    labels = torch.tensor(np.where(rows.mask, rows.tokens, -100))

    def theirs(logits):
        return GKDTrainer.generalized_jsd_loss(
            logits,
            tensor(teacher, False),
            labels=labels,
            beta=beta,
            temperature=temperature,
            num_items_in_batch=total,
        )

    def ours(logits):
        return gkd_loss(
            logits, jnp.float32(teacher), rows.mask, beta=beta, temperature=temperature, normalizer=total, chunk_size=2
        )[0]

    same(ours, theirs, (rows.logits,))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_trainer(rows, beta):
    """From hidden states, in chunks, with a wider teacher."""
    hidden, head = rows.rng.normal(size=(3, 5, 4)), rows.rng.normal(size=(7, 4))
    teacher_hidden, teacher_head = rows.rng.normal(size=(3, 5, 6)), rows.rng.normal(size=(7, 6))
    teacher = [jnp.float32(teacher_hidden), jnp.float32(teacher_head)]

    def theirs(hidden, head):
        return distillation_trainer._chunked_divergence_loss(
            hidden,
            tensor(teacher_hidden, False),
            head,
            tensor(teacher_head, False),
            torch.tensor(rows.mask),
            beta,
            temperature=1.5,
        )[0]

    def ours(hidden, head):
        divergence = generalized_jsd_from_hidden(hidden, head, *teacher, beta=beta, temperature=1.5, chunk_size=2)
        return aggregate(divergence, rows.mask, mode="token-mean")

    same(ours, theirs, (hidden, head))


def test_adaptive_entropy_of_grpo_trainer(rows):
    """With advantages of 0 the entropy bonus is all that is left of the loss; over steps, its control."""
    target, delta = 1.0, 0.3
    stub = trainer(
        args=SimpleNamespace(
            delta=None, entropy_target=target, entropy_coef_delta=delta, entropy_coef_min=0.1, entropy_coef_max=0.8
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=True,
        use_adaptive_entropy=True,
        entropy_coef=0.4,
        _last_world_entropy=float("inf"),
        _entropy_window_stats=None,
    )
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.tensor(rows.mask).float()
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask}
    inputs["advantages"] = torch.zeros(3)

    def theirs(entropy):
        scores = torch.full((3, 5), -1.0), entropy, None
        stub._get_per_token_logps_and_entropies = lambda *_, **__: scores
        return GRPOTrainer._compute_loss(stub, None, inputs)

    def ours(entropy):
        return entropy_bonus(entropy, rows.mask, entropy_coef=state.active_coef(target=target))[0]

    state, active = EntropyControl.init(0.4), []
    for scale in (0.3, 0.5, 0.6, 0.4, 2.5, 3.0, 2.8, 0.2):
        entropy = np.abs(rows.rng.normal(size=(3, 5))) * scale
        same(ours, theirs, (entropy,))
        mean = np.mean(entropy[rows.mask])
        state = update_entropy_control(state, mean, target=target, delta=delta, minimum=0.1, maximum=0.8)
        assert float(state.coef) == pytest.approx(stub.entropy_coef, rel=1e-5)
        active.append(bool(mean <= target))
    assert set(active) == {True, False}


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_in_torch(rows, clip):
    """TRL has no critic since its PPO trainer is gone; the clip's gradient is that of torch's clamp and max."""
    old = rows.rng.normal(size=(3, 5))
    values, returns = old + 0.4 * rows.rng.normal(size=(3, 5)), old + rows.rng.normal(size=(3, 5))
    mask = torch.tensor(rows.mask)

    def theirs(values):
        target, before = tensor(returns, False), tensor(old, False)
        error = (values - target).square()
        if clip is not None:
            near = torch.clamp(values, before - clip, before + clip)
            error = torch.maximum(error, (near - target).square())
        return 0.5 * error[mask].mean()

    same(lambda values: value_loss(values, jnp.float32(old), returns, rows.mask, clip=clip)[0], theirs, (values,))
