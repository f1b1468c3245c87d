"""What holds of every preference loss, of pairs and of single completions, whatever its formula."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.losses.aot import aot_loss
from jaxrl_llm.losses.bco import bco_loss
from jaxrl_llm.losses.dpo import cdpo_loss, dpo_loss, robust_dpo_loss
from jaxrl_llm.losses.kto import kto_loss
from jaxrl_llm.losses.online import xpo_loss
from jaxrl_llm.losses.preference import discopop_loss, exo_loss, hinge_loss, ipo_loss
from jaxrl_llm.losses.preference_sides import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_loss
from jaxrl_llm.losses.reference_free import cpo_loss, orpo_loss, simpo_loss, slic_loss

POLICY = ("chosen_logprobs", "rejected_logprobs")
PAIR = (*POLICY, "ref_chosen_logprobs", "ref_rejected_logprobs")
LENGTHS = ("chosen_lengths", "rejected_lengths")
SAMPLE = ("logprobs", "ref_logprobs", "labels")


class Case(NamedTuple):
    loss: Any
    names: tuple[str, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    splits: bool = True

    @property
    def trained(self) -> tuple[str, ...]:
        policy = (*POLICY, "logprobs", "target_logprobs", "nll_logprobs", "ref_sample_logprobs")
        return tuple(name for name in self.names if name in policy)


NO_REFERENCE = {"ref_chosen_logprobs": None, "ref_rejected_logprobs": None}
CASES = {
    "dpo": Case(dpo_loss, (*PAIR, "weights")),
    "dpo_reference_free": Case(dpo_loss, POLICY, NO_REFERENCE),
    "dpo_per_token": Case(dpo_loss, (*PAIR, *LENGTHS)),
    "dpo_forward_kl": Case(dpo_loss, PAIR, {"f_divergence": "forward_kl"}),
    "dpo_js": Case(dpo_loss, PAIR, {"f_divergence": "js"}),
    "dpo_alpha": Case(dpo_loss, PAIR, {"f_divergence": "alpha"}),
    "cdpo": Case(cdpo_loss, (*PAIR, "weights"), {"label_smoothing": 0.1}),
    "robust": Case(robust_dpo_loss, (*PAIR, "weights"), {"label_smoothing": 0.1}),
    "ipo": Case(ipo_loss, (*PAIR, "weights")),
    "ipo_per_token": Case(ipo_loss, (*PAIR, *LENGTHS)),
    "hinge": Case(hinge_loss, (*PAIR, "weights")),
    "exo": Case(exo_loss, (*PAIR, "weights")),
    "discopop": Case(discopop_loss, (*PAIR, "weights")),
    "nca": Case(nca_loss, (*PAIR, "weights")),
    "apo_zero": Case(apo_zero_loss, (*PAIR, "weights")),
    "apo_down": Case(apo_down_loss, (*PAIR, "weights")),
    "sppo_hard": Case(sppo_loss, (*PAIR, "weights")),
    "sppo_soft": Case(sppo_loss, (*PAIR, "chosen_win_probs", "rejected_win_probs"), {"beta": 0.1}),
    "bco_pair": Case(bco_pair_loss, (*PAIR, "weights"), {"reward_shift": 0.1}),
    "aot": Case(aot_loss, PAIR, splits=False),
    "aot_unpaired": Case(aot_loss, PAIR, {"paired": False, "label_smoothing": 0.1}, splits=False),
    "simpo": Case(simpo_loss, (*POLICY, *LENGTHS, "weights")),
    "alpha_po": Case(simpo_loss, (*POLICY, *LENGTHS), {"alpha": 0.25}),
    "cpo": Case(cpo_loss, (*POLICY, "chosen_lengths", "weights")),
    "slic": Case(slic_loss, (*POLICY, "weights")),
    "slic_target": Case(slic_loss, (*POLICY, "target_logprobs")),
    "orpo": Case(orpo_loss, (*POLICY, *LENGTHS, "weights")),
    "orpo_sum": Case(orpo_loss, (*POLICY, *LENGTHS, "nll_logprobs", "nll_lengths"), {"odds_logp": "sum"}),
    "xpo": Case(xpo_loss, (*PAIR, "ref_sample_logprobs"), {"alpha": 0.1}),
    "kto": Case(kto_loss, (*SAMPLE, "kl"), {"lambda_d": 1.5}),
    "kto_one_kl": Case(kto_loss, SAMPLE, {"kl": 0.3, "lambda_u": 1.5}),
    "kto_sides": Case(kto_loss, SAMPLE, {"kl": 0.3, "per_side_mean": True}),
    "kto_one_sided_dpo": Case(kto_loss, SAMPLE, {"kl": None, "variant": "one_sided_dpo"}),
    "kto_apo_zero": Case(kto_loss, SAMPLE, {"kl": None, "variant": "apo_zero_unpaired"}),
    "bco": Case(bco_loss, (*SAMPLE, "weights"), {"reward_shift": 0.1}),
}

every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture
def arrays(ragged_pairs):
    """Every array that a loss may take, by argument name, with 0 at the padding."""
    rng = np.random.default_rng(1)
    pairs = {name: np.nan_to_num(x) if x.dtype.kind == "f" else x for name, x in ragged_pairs.items()}
    return pairs | {
        "target_logprobs": -rng.exponential(size=8),
        "nll_logprobs": 2 * pairs["chosen_logprobs"],
        "nll_lengths": 2 * pairs["chosen_lengths"],
        "ref_sample_logprobs": -rng.exponential(size=8),
        "logprobs": pairs["chosen_logprobs"],
        "ref_logprobs": pairs["ref_chosen_logprobs"],
        "labels": np.array([True, False, True, True, False, False, True, False]),
        "kl": rng.uniform(size=8),
    }


def of(case, arrays, rows=slice(None)):
    return {name: arrays[name][rows] for name in (*case.names, "mask")}


def run(case, arrays, **options):
    """Value, metrics and gradients by name."""
    trained = {name: jnp.asarray(arrays[name]) for name in case.trained}
    rest = {name: x for name, x in arrays.items() if name not in trained}

    def loss(trained):
        return case.loss(**trained, **rest, **case.options, **options)

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
    return value, metrics, gradients


def same(one, other, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(one, other, rtol=rtol, atol=atol)


@every_loss
def test_what_is_at_the_padding_does_not_matter(case, arrays):
    clean = of(case, arrays)
    padding = ~clean["mask"]
    compiled = jax.jit(lambda data: run(case, data))
    expected = compiled(clean)
    assert np.isfinite(expected[0])
    for value in (np.nan, np.inf, -7.0):
        fill = {n: np.where(padding, value, x) if x.dtype.kind == "f" else x for n, x in clean.items()}
        fill |= {n: np.where(padding, 99, x) for n, x in fill.items() if "lengths" in n}
        same(compiled(fill), expected, rtol=0, atol=0)
    for name, gradient in expected[2].items():
        np.testing.assert_array_equal(np.asarray(gradient)[padding], 0, err_msg=name)
        assert np.any(np.asarray(gradient) != 0), name
    valid = {name: x[~padding] for name, x in clean.items()}
    del valid["mask"]
    same(run(case, valid)[:2], expected[:2])


@every_loss
def test_the_gradient_is_that_of_the_value(case, arrays):
    with jax.enable_x64(True):
        data = of(case, arrays)
        trained = {name: jnp.asarray(data.pop(name)) for name in case.trained}
        check_grads(jax.jit(lambda x: case.loss(**x, **data, **case.options)[0]), (trained,), 1, ["rev"], eps=1e-6)


@every_loss
def test_jit_vmap_any_shape_and_types(case, arrays):
    data = of(case, arrays)
    expected = run(case, data)
    compiled = jax.jit(lambda data: run(case, data))  # which knows shapes alone
    same(compiled(data), expected)
    twice = {name: np.stack([x, x[::-1]]) for name, x in data.items()}
    # AOT's ranks do not move when the rows do, either.
    same(jax.vmap(lambda data: run(case, data)[0])(twice), jnp.stack([expected[0]] * 2))
    square = {name: x.reshape(2, 4) for name, x in data.items()}
    same(run(case, square)[:2], expected[:2])
    narrow = {n: jnp.asarray(x, jnp.bfloat16) if x.dtype.kind == "f" else x for n, x in data.items()}
    wide = {n: jnp.asarray(x, jnp.float32) if x.dtype == jnp.bfloat16 else x for n, x in narrow.items()}
    value, _, gradients = run(case, narrow)
    assert value.dtype == jnp.float32 and all(x.dtype == jnp.bfloat16 for x in gradients.values())
    same(value, run(case, wide)[0], rtol=1e-6)


@every_loss
@pytest.mark.parametrize("valid", [0, 1])
def test_no_sample_and_one_sample_are_finite(case, arrays, valid):
    data = of(case, arrays) | {"mask": np.arange(8) < valid}
    value, metrics, gradients = run(case, data)
    chex.assert_tree_all_finite((value, metrics, gradients))
    assert all(np.isfinite(metric.value()) for metric in metrics.values())
    if not valid:
        assert value == 0
        assert not any(np.any(gradient) for gradient in gradients.values())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.splits])
def test_micro_batches_add_up(name, arrays):
    case = CASES[name]
    data = of(case, arrays)
    mask = data["mask"]
    options = {"normalizer": mask.sum()}
    if case.options.get("per_side_mean"):
        options = {"normalizer": np.array([(mask & data["labels"]).sum(), (mask & ~data["labels"]).sum()])}
    for lengths in ("nll_lengths", "chosen_lengths"):
        if case.loss in (cpo_loss, orpo_loss) and lengths in data:
            options["nll_normalizer"] = data[lengths][mask].sum()
            break
    value, metrics, gradients = run(case, data)
    parts = [run(case, of(case, arrays, rows), **options) for rows in (slice(0, 3), slice(3, 8))]
    same(parts[0][0] + parts[1][0], value)
    same(jax.tree.map(lambda x, y: jnp.concatenate([x, y]), parts[0][2], parts[1][2]), gradients)
    for name, metric in metrics.items():
        same(parts[0][1][name].merge(parts[1][1][name]).value(), metric.value())


@every_loss
def test_only_the_policy_is_differentiated(case, arrays):
    data = of(case, arrays)
    constants = [n for n, x in data.items() if x.dtype.kind == "f" and n not in case.trained]
    x = {name: jnp.asarray(data.pop(name)) for name in constants}
    gradients = jax.grad(lambda x: case.loss(**x, **data, **case.options)[0])(x)
    assert not any(np.any(gradient) for gradient in gradients.values())
    _, metrics, _ = run(case, of(case, arrays))
    trained = {name: jnp.asarray(arrays[name]) for name in case.trained}
    rest = {name: x for name, x in of(case, arrays).items() if name not in trained}

    def total(trained):
        return sum(jnp.sum(m.value()) for m in case.loss(**trained, **rest, **case.options)[1].values())

    assert metrics
    assert not any(np.any(gradient) for gradient in jax.grad(total)(trained).values())


@every_loss
@pytest.mark.parametrize("distance", [-3e3, 3e3])
def test_far_policies_are_finite(case, arrays, distance):
    """The two sides, or the policy and its reference, a long way apart, as untrained long completions are."""
    data = of(case, arrays)
    for name, sign in {"chosen_logprobs": 1, "rejected_logprobs": -1, "logprobs": 1}.items():
        if name in data:
            data[name] = data[name] + sign * distance - abs(distance)
    value, _, gradients = run(case, data)
    chex.assert_tree_all_finite((value, gradients))


@every_loss
def test_errors(case, arrays):
    data = of(case, arrays)
    with pytest.raises(ValueError, match="mask must be bool"):
        run(case, data | {"mask": data["mask"].astype(float)})
    for name in case.names:
        with pytest.raises(ValueError, match=r"has shape \(\d,\), but .* has shape \(\d,\)"):
            run(case, data | {name: data[name][:5]})
    if "normalizer" in case.loss.__kwdefaults__:
        with pytest.raises(ValueError, match=r"normalizer has shape \(3,\).* pass "):
            run(case, data, normalizer=np.ones(3))
    if "beta" in case.loss.__kwdefaults__:
        for beta in (0, -0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="beta is"):
                case.loss(**data, **{**case.options, "beta": beta})
