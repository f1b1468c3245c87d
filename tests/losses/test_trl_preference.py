"""Values and gradients against the loss code of TRL's trainers, called on a stub with the log-probs of a stub model.

TRL has no trainers any more for BCO of single samples, Nash-MD and XPO.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.aot import aot_loss
from jaxrl_llm.losses.dpo import dpo_loss, robust_dpo_loss
from jaxrl_llm.losses.kto import kto_kl, kto_loss
from jaxrl_llm.losses.online import label_pairs
from jaxrl_llm.losses.preference import discopop_loss, exo_loss, hinge_loss, ipo_loss
from jaxrl_llm.losses.preference_sides import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_loss
from jaxrl_llm.losses.preference_terms import f_divergence_score
from jaxrl_llm.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from jaxrl_llm.losses.sequence_logprobs import sequence_logprobs, wpo_weights
from jaxrl_llm.losses.supervised import sft_loss

REASON = "TRL is needed only to compare with it: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("trl", reason=REASON)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # a warning on import
CPOTrainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
OnlineDPOTrainer = pytest.importorskip("trl.experimental.online_dpo").OnlineDPOTrainer
ORPOTrainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
DPOTrainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
KTOTrainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer

PAIRS, T, PROMPT = 5, 8, 2


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)


@pytest.fixture
def batch():
    """Token arrays `[rows, T − 1]`, rows of chosen completions before those of rejected ones, and their mask."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T - PROMPT, size=2 * PAIRS)
    position = np.arange(1, T) - PROMPT
    mask = (position >= 0) & (position < lengths[:, None])
    logprobs = np.where(mask, -rng.exponential(size=mask.shape), 0).astype(np.float32)
    ref = np.where(mask, logprobs + 0.7 * rng.normal(size=mask.shape), 0).astype(np.float32)
    log_sum_squared = np.where(mask, -rng.exponential(size=mask.shape), 0).astype(np.float32)
    return SimpleNamespace(mask=mask, lengths=lengths, logprobs=logprobs, ref=ref, log_sum_squared=log_sum_squared)


class StubModel(torch.nn.Module):
    """What a trainer calls: returns given log-probs, batch after batch."""

    is_gradient_checkpointing = False

    def __init__(self, *logprobs, log_sum_squared=None):
        super().__init__()
        self.logprobs, self.log_sum_squared = list(logprobs), log_sum_squared

    def forward(self, **_):
        logprobs = self.logprobs.pop(0)
        zeros = torch.zeros(logprobs.shape)
        return SimpleNamespace(
            log_probs=logprobs,
            log_sum_sq_probs=self.log_sum_squared,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def stub_trainer(ref_model, **options):
    """The attributes that loss code reads."""
    identity = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=identity, gather_for_metrics=identity)
    return SimpleNamespace(
        accelerator=accelerator,
        model=StubModel(),
        ref_model=ref_model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        beta=0.3,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )


def trl_dpo(batch, **options):
    """Loss, gradient of the token log-probs and metrics of TRL's DPO trainer."""
    settings = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    settings |= {"loss_types": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0, "use_weighting": False}
    logprobs = torch.tensor(batch.logprobs, requires_grad=True)
    trainer = stub_trainer(StubModel(torch.tensor(batch.ref)), **settings | options)
    completion = torch.tensor(np.pad(batch.mask, ((0, 0), (1, 0))).astype(int))
    ids = torch.zeros(completion.shape, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    model = StubModel(logprobs, log_sum_squared=torch.tensor(batch.log_sum_squared))
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.numpy(), {name: x[-1] for name, x in trainer._metrics["train"].items()}


def sides(batch, logprobs, **options):
    """Sequence log-probs of both sides under the policy and the reference."""
    policy = sequence_logprobs(logprobs, batch.mask, **options)
    ref = sequence_logprobs(batch.ref, batch.mask, **options)
    return policy[:PAIRS], policy[PAIRS:], ref[:PAIRS], ref[PAIRS:]


def side_lengths(batch):
    return {"chosen_lengths": batch.lengths[:PAIRS], "rejected_lengths": batch.lengths[PAIRS:]}


def agrees(batch, loss, expected, **options):
    """Compares `loss`(chosen, rejected, ref_chosen, ref_rejected) with TRL's loss, gradient and metrics."""

    def of_tokens(logprobs):
        return loss(*sides(batch, logprobs, **options))

    (value, metrics), gradient = jax.value_and_grad(of_tokens, has_aux=True)(jnp.asarray(batch.logprobs))
    close(value, expected[0])
    close(np.where(batch.mask, gradient, 0), np.where(batch.mask, expected[1], 0))
    for name, metric in metrics.items():
        close(metric.value(), expected[2][name])


LOSSES = {
    "sigmoid": ({}, dpo_loss),
    "hinge": ({}, hinge_loss),
    "exo_pair": ({"label_smoothing": 1e-3}, exo_loss),
    "nca_pair": ({}, nca_loss),
    "robust": ({"label_smoothing": 0.1}, lambda *x, **kw: robust_dpo_loss(*x, **kw, label_smoothing=0.1)),
    "bco_pair": ({}, bco_pair_loss),
    "sppo_hard": ({}, sppo_loss),
    "aot": ({"label_smoothing": 0.1}, lambda *x, **kw: aot_loss(*x, **kw, label_smoothing=0.1)),
    "aot_unpaired": (
        {"label_smoothing": 0.1},
        lambda *x, **kw: aot_loss(*x, **kw, label_smoothing=0.1, paired=False),
    ),
    "apo_zero": ({}, apo_zero_loss),
    "apo_down": ({}, apo_down_loss),
    "discopop": ({}, discopop_loss),
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type_of_the_dpo_trainer(batch, loss_type):
    options, loss = LOSSES[loss_type]
    agrees(batch, lambda *x: loss(*x, beta=0.3), trl_dpo(batch, loss_types=[loss_type], **options))


@pytest.mark.parametrize(("loss_type", "loss"), [("sigmoid_norm", dpo_loss), ("ipo", ipo_loss)])
def test_loss_types_that_divide_by_lengths(batch, loss_type, loss):
    agrees(batch, lambda *x: loss(*x, beta=0.3, **side_lengths(batch)), trl_dpo(batch, loss_types=[loss_type]))


def test_a_mixture_with_sft_is_a_sum(batch):
    def loss(logprobs):
        dpo = dpo_loss(*sides(batch, logprobs), beta=0.3)[0]
        return 0.8 * dpo + 0.2 * sft_loss(logprobs[:PAIRS], batch.mask[:PAIRS])[0]

    expected = trl_dpo(batch, loss_types=["sigmoid", "sft"], loss_weights=[0.8, 0.2])
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(batch.logprobs))
    close(value, expected[0])
    close(gradient, np.where(batch.mask, expected[1], 0))


DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js": "js_divergence",
    "alpha": "alpha_divergence",
}


@pytest.mark.parametrize("f_alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(batch, divergence, f_alpha):
    expected = trl_dpo(batch, f_divergence_type=DIVERGENCES[divergence], f_alpha_divergence_coef=f_alpha)
    agrees(batch, lambda *x: dpo_loss(*x, beta=0.3, f_divergence=divergence, f_alpha=f_alpha), expected)


@pytest.mark.parametrize("loss_type", ["hinge", "exo_pair", "robust", "discopop", "ipo"])
def test_divergences_in_other_losses(batch, loss_type):
    options, loss = LOSSES.get(loss_type, ({}, lambda *x, **kw: ipo_loss(*x, **kw, **side_lengths(batch))))

    def of_scores(chosen, rejected, ref_chosen, ref_rejected):
        scores = [f_divergence_score(x, f_divergence="js") for x in (chosen - ref_chosen, rejected - ref_rejected)]
        return loss(*scores, None, None, beta=0.3)[0], {}

    agrees(batch, of_scores, trl_dpo(batch, loss_types=[loss_type], f_divergence_type="js_divergence", **options))


def test_length_desensitization(batch):
    shared = np.minimum(batch.lengths[:PAIRS], batch.lengths[PAIRS:])
    options = {"ld_alpha": 0.4, "shared_lengths": np.concatenate([shared, shared])}
    agrees(batch, lambda *x: dpo_loss(*x, beta=0.3), trl_dpo(batch, ld_alpha=0.4), **options)


def test_weighted_preference_optimization(batch):
    per_sequence = wpo_weights(batch.logprobs, batch.log_sum_squared, batch.mask)
    weights = per_sequence[:PAIRS] * per_sequence[PAIRS:]
    agrees(batch, lambda *x: dpo_loss(*x, beta=0.3, weights=weights), trl_dpo(batch, use_weighting=True))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("drift", [-1.0, 1.0])
def test_kto(batch, loss_type, drift):
    """With a KL that the clamp cuts and with one that it does not."""
    rng = np.random.default_rng(1)
    labels = rng.uniform(size=2 * PAIRS) < 0.5
    mismatched = np.where(batch.mask, -rng.exponential(size=batch.mask.shape), 0).astype(np.float32)
    ref_mismatched = np.where(batch.mask, mismatched - 0.1 * drift, 0).astype(np.float32)
    logprobs = torch.tensor(batch.logprobs, requires_grad=True)
    use_kl = loss_type == "kto"
    tensors = [torch.tensor(x) for x in (mismatched, ref_mismatched, batch.ref)]
    ref_model = StubModel(*tensors[1:]) if use_kl else StubModel(tensors[2])
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    trainer = stub_trainer(ref_model, loss_type=loss_type, calculate_KL=use_kl, **weights)
    trainer._compute_kl_logps = lambda model, inputs: KTOTrainer._compute_kl_logps(trainer, model, inputs)
    completion = torch.tensor(np.pad(batch.mask, ((0, 0), (1, 0))).astype(int))
    ids = torch.zeros(completion.shape, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    inputs |= {f"KL_{name}": x for name, x in inputs.items()} | {"label": torch.tensor(labels)}
    model = StubModel(tensors[0], logprobs) if use_kl else StubModel(logprobs)
    expected = KTOTrainer._compute_loss(trainer, model, inputs, False)
    expected.backward()

    def loss(logprobs):
        kl = kto_kl(*(sequence_logprobs(x, batch.mask) for x in (mismatched, ref_mismatched))) if use_kl else None
        sums = [sequence_logprobs(x, batch.mask) for x in (logprobs, batch.ref)]
        return kto_loss(*sums, labels, kl, variant=loss_type, beta=0.3, lambda_d=1.2, lambda_u=0.8)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(batch.logprobs))
    close(value, expected.item())
    assert logprobs.grad is not None
    close(gradient, np.where(batch.mask, logprobs.grad.numpy(), 0))
    for name, metric in metrics.items():
        close(metric.value(), trainer._metrics["train"][name][-1])
    if use_kl:
        assert (metrics["kl"].value() > 0) == (drift > 0)


@pytest.fixture
def logits_batch():
    """Logits for TRL's reference-free trainers, which take the log-probs themselves, and the two masks."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T - PROMPT + 1, size=2 * PAIRS)
    ids = rng.integers(0, 5, size=(2 * PAIRS, T))
    attention = np.arange(T) < (PROMPT + lengths)[:, None]
    labels = np.where(attention & (np.arange(T) >= PROMPT), ids, -100)
    arrays = {"input_ids": ids, "attention_mask": attention.astype(int), "labels": labels}
    inputs = {}
    for side, rows in {"chosen": slice(0, PAIRS), "rejected": slice(PAIRS, None)}.items():
        inputs |= {f"{side}_{name}": torch.tensor(x[rows]) for name, x in arrays.items()}
    return SimpleNamespace(
        logits=rng.normal(size=(2 * PAIRS, T, 5)).astype(np.float32),
        ids=ids,
        mask=labels[:, 1:] != -100,
        every=attention[:, 1:],
        inputs=inputs,
    )


def token_logprobs(data, logits):
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return jnp.take_along_axis(logprobs, data.ids[:, 1:, None], -1)[..., 0]


def trl_reference_free(trainer_class, data, **options):
    logits = torch.tensor(data.logits, requires_grad=True)
    trainer = stub_trainer(None, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **options)
    trainer.concatenated_inputs = trainer_class.concatenated_inputs
    trainer.get_batch_logps = trainer_class.get_batch_logps
    trainer.concatenated_forward = lambda model, batch: trainer_class.concatenated_forward(trainer, model, batch)
    for name in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, name):
            method = getattr(trainer_class, name)
            setattr(trainer, name, lambda *args, method=method: method(trainer, *args))
    model = lambda *_, **__: SimpleNamespace(logits=logits)  # noqa: E731
    loss, metrics = trainer_class.get_batch_loss_metrics(trainer, model, data.inputs)
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad.numpy(), metrics


def agrees_on_logits(data, loss, expected, names):
    def of_logits(logits):
        tokens = token_logprobs(data, logits)
        sums, lengths = sequence_logprobs(tokens, data.mask), data.mask.sum(-1)
        return loss(sums[:PAIRS], sums[PAIRS:], lengths[:PAIRS], lengths[PAIRS:], tokens)

    (value, metrics), gradient = jax.value_and_grad(of_logits, has_aux=True)(jnp.asarray(data.logits))
    close(value, expected[0])
    close(gradient, expected[1])
    for name in names:
        close(metrics[name].value(), expected[2]["nll_loss" if name == "nll" else name])


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")


def cpo_options(**options):
    return {"alpha": 0.0, "cpo_alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5} | options


def test_cpo(logits_batch):
    expected = trl_reference_free(CPOTrainer, logits_batch, **cpo_options(loss_type="sigmoid", cpo_alpha=0.7))

    def loss(chosen, rejected, chosen_lengths, rejected_lengths, tokens):
        return cpo_loss(chosen, rejected, chosen_lengths, beta=0.3, nll_coef=0.7)

    agrees_on_logits(logits_batch, loss, expected, (*REWARDS, *LOGPS, "nll"))


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_simpo_and_alpha_po(logits_batch, alpha):
    expected = trl_reference_free(CPOTrainer, logits_batch, **cpo_options(loss_type="simpo", alpha=alpha))

    def loss(chosen, rejected, chosen_lengths, rejected_lengths, tokens):
        return simpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, beta=0.3, gamma=0.5, alpha=alpha)

    agrees_on_logits(logits_batch, loss, expected, REWARDS)


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_other_loss_types_of_cpo_are_dpo_losses_without_a_reference(logits_batch, loss_type):
    expected = trl_reference_free(CPOTrainer, logits_batch, **cpo_options(loss_type=loss_type))

    def loss(chosen, rejected, chosen_lengths, rejected_lengths, tokens):
        if loss_type == "hinge":
            return hinge_loss(chosen, rejected, None, None, beta=0.3)
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        return ipo_loss(chosen, rejected, None, None, beta=0.3, **lengths)

    agrees_on_logits(logits_batch, loss, expected, REWARDS if loss_type == "hinge" else ())


def test_orpo(logits_batch):
    """TRL's likelihood term has the prompt's tokens, too."""
    expected = trl_reference_free(ORPOTrainer, logits_batch)

    def loss(chosen, rejected, chosen_lengths, rejected_lengths, tokens):
        every = logits_batch.every[:PAIRS]
        nll = {"nll_logprobs": sequence_logprobs(tokens[:PAIRS], every), "nll_lengths": every.sum(-1)}
        return orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, odds_coef=0.3, **nll)

    agrees_on_logits(logits_batch, loss, expected, (*REWARDS, "nll", "log_odds_ratio", "log_odds_chosen"))


@pytest.mark.parametrize(("loss_type", "loss"), [("sigmoid", dpo_loss), ("ipo", ipo_loss)])
def test_online_dpo(batch, loss_type, loss):
    """The labels of its pairs, ties included; its IPO is of sums."""
    rewards = np.array([1.0, 0, 2, 1, 1, 1, 3, 2, 1, 0], np.float32)  # first completions, then second ones
    logprobs = torch.tensor(batch.logprobs, requires_grad=True)
    forward = [logprobs, torch.tensor(batch.ref)]
    identity = lambda x: x  # noqa: E731
    ids = torch.zeros(batch.mask.shape, dtype=torch.long)
    generated = (ids, ids, ids, torch.tensor(batch.mask.astype(int)), None)
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss_type,
            torch_empty_cache_steps=None,
            optim=None,
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        _generate=lambda *_: generated,
        _forward=lambda *_: forward.pop(0),
        _calculate_rewards_from_functions=lambda **_: torch.tensor(rewards),
        eos_token_ids=[0],
        ref_model=object(),
        processing_class=SimpleNamespace(batch_decode=lambda x, **_: [""] * len(x)),
        reward_funcs=None,
        beta=0.3,
        stats=defaultdict(list),
        accelerator=SimpleNamespace(gather_for_metrics=identity, backward=lambda loss: loss.backward()),
    )
    model = SimpleNamespace(train=lambda: None)
    expected = OnlineDPOTrainer.training_step(trainer, model, {"prompt": ["a"] * PAIRS})
    assert logprobs.grad is not None
    pair = label_pairs(rewards.reshape(2, PAIRS).T)

    def of_tokens(logprobs):
        policy, ref = (sequence_logprobs(x, batch.mask).reshape(2, PAIRS).T for x in (logprobs, batch.ref))
        return loss(*pair.select(policy), *pair.select(ref), beta=0.3, mask=pair.mask)

    (value, metrics), gradient = jax.value_and_grad(of_tokens, has_aux=True)(jnp.asarray(batch.logprobs))
    close(value, expected.item())
    close(gradient, np.where(batch.mask, logprobs.grad.numpy(), 0))
    for name, metric in metrics.items():
        close(metric.value(), trainer.stats[name][-1])
