"""Adapters beside PEFT's own, on PyTorch's model: the same logits in both directions, and merged."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.checkpoints.peft import _tensor_names, load_adapters, load_lora_config, save_adapters
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, load_config, load_params, save_pretrained
from jaxrl_llm.models.config import LoraConfig, Params
from jaxrl_llm.models.families import family_for
from jaxrl_llm.models.lora import add_adapters, join, merge_adapters, split_adapters
from jaxrl_llm.models.stack import flat
from jaxrl_llm.models.transformer import Transformer

torch = pytest.importorskip("torch", reason="PyTorch is needed only to compare with it: pip install -e '.[parity]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="PEFT is needed only to compare with it: pip install peft")

TOLERANCE = 1e-4
CASES = ["llama_biases", "mistral", "qwen2", "qwen3_tied_bias", "gemma2", "olmo2", "phi3_partial_tied"]
MIXTURES = ["mixtral", "qwen3_moe"]
FUSED = "gpt_oss_long"  # whose experts lie in one tensor

# transformers, torch and PEFT warn of their own deprecations; ours stay errors in every other file
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def theirs(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def ours(model: Transformer, params: Params, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model.logits)(params, tokens.astype(np.int32)))


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 48, (3, 9))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("case", "use_rslora"), [*itertools.product(CASES, (False, True)), *((case, False) for case in (*MIXTURES, FUSED))]
)
def test_peft_reads_ours(case: str, use_rslora: bool, golden_module: Any, tokens: np.ndarray, tmp_path: Any) -> None:
    base = golden_module.torch_model(case)
    base.save_pretrained(tmp_path / "base")
    # Of experts PEFT reads adapters of one at a time, and then wants those of all three projections.
    mlp: Any = ("gate", "up", "down") if case in MIXTURES else ("up", "down") if case == FUSED else ("up",)
    lora = LoraConfig(rank=4, alpha=6.0, targets=("query", "value", "output", *mlp), use_rslora=use_rslora)
    model = Transformer(dataclasses.replace(load_config(tmp_path / "base"), lora=lora))
    params = add_adapters(load_params(tmp_path / "base", model), model, jax.random.key(0))
    np.testing.assert_allclose(ours(model, params, tokens), theirs(base, tokens), atol=TOLERANCE, rtol=0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.2 * jax.random.normal(jax.random.key(1), leaf.shape) if path[-1].key == "lora_b" else leaf,
        params,
    )
    folder = save_adapters(tmp_path / "adapters", model, params, base_name=str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    expected = theirs(adapted, tokens)
    np.testing.assert_allclose(ours(model, params, tokens), expected, atol=TOLERANCE, rtol=0)
    merged = merge_adapters(params, model.config)
    assert np.abs(ours(model.base, merged, tokens) - theirs(adapted.get_base_model(), tokens)).max() < TOLERANCE
    with adapted.disable_adapter():
        assert np.abs(theirs(adapted, tokens) - expected).max() > 100 * TOLERANCE
    # What transformers loads of our merged export is what PEFT merges.
    from transformers import AutoModelForCausalLM

    exported = save_pretrained(tmp_path / "merged", model, params)
    loaded = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
    np.testing.assert_allclose(theirs(loaded, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["k_proj", "qkv_proj", "gate_proj", "down_proj"], r".*\.(q_proj|up_proj|gate_up_proj)"],
    ids=["all", "some", "pattern"],
)
@pytest.mark.parametrize("case", CASES)
def test_we_read_pefts(case: str, targets: Any, golden_module: Any, tokens: np.ndarray, tmp_path: Any) -> None:
    base = golden_module.torch_model(case)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, lora_dropout=0.1, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(str(tmp_path / "adapters"))
    config = load_config(tmp_path / "base")
    model = Transformer(dataclasses.replace(config, lora=load_lora_config(tmp_path / "adapters", config)))
    params = load_adapters(tmp_path / "adapters", model, load_params(tmp_path / "base", model))
    expected = theirs(adapted, tokens)
    np.testing.assert_allclose(ours(model, params, tokens), expected, atol=TOLERANCE, rtol=0)
    plain, loaded = from_pretrained(tmp_path / "base")
    assert np.abs(ours(plain, loaded, tokens) - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [(["q_proj"], ["gate_up_proj", "down_proj"]), ([], ["down_proj"])],
    ids=["all", "one"],
)
def test_we_read_pefts_of_experts(modules, parameters, golden_module: Any, tokens: np.ndarray, tmp_path: Any) -> None:
    base = golden_module.torch_model(FUSED)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    names = [f"mlp.experts.{name}" for name in parameters]
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, target_parameters=names, init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(str(tmp_path / "adapters"))
    config = load_config(tmp_path / "base")
    model = Transformer(dataclasses.replace(config, lora=load_lora_config(tmp_path / "adapters", config)))
    params = load_adapters(tmp_path / "adapters", model, load_params(tmp_path / "base", model))
    expected = theirs(adapted, tokens)
    np.testing.assert_allclose(ours(model, params, tokens), expected, atol=TOLERANCE, rtol=0)
    again = save_adapters(tmp_path / "again", model, params)
    assert load_lora_config(again, config).rank == 3 * len(parameters)  # twice, where gate and up are one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_what_peft_can_and_we_cannot(settings: Any, message: str, golden_module: Any, tmp_path: Any) -> None:
    base = golden_module.torch_model("llama")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "adapters"))
    with pytest.raises(ValueError, match=message):
        load_lora_config(tmp_path / "adapters", load_config(tmp_path / "base"))


@pytest.mark.parametrize("case", ["gemma2", "olmo2", "smollm3", "phi3_partial_tied"])
def test_gradients_of_adapters(case: str, golden_module: Any, tokens: np.ndarray, tmp_path: Any) -> None:
    """Of a weighted sum of logits, by every adapter; of one that parts share, the sum over these."""
    base = golden_module.torch_model(case)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(str(tmp_path / "adapters"))
    config = load_config(tmp_path / "base")
    model = Transformer(dataclasses.replace(config, lora=load_lora_config(tmp_path / "adapters", config)))
    params = load_adapters(tmp_path / "adapters", model, load_params(tmp_path / "base", model))
    weights = np.random.default_rng(1).normal(size=(*tokens.shape, 48)).astype(np.float32) / tokens.size

    (adapted(torch.tensor(tokens)).logits * torch.tensor(weights)).sum().backward()
    expected = {
        name.replace(".default.", "."): p.grad.numpy() for name, p in adapted.named_parameters() if "lora" in name
    }
    adapters, rest = split_adapters(params)
    gradient = jax.jit(jax.grad(lambda some: jnp.sum(model.logits(join(some, rest), tokens) * weights)))(adapters)
    found: dict[str, list[np.ndarray]] = {}
    for path, name in _tensor_names(family_for(config)).items():
        for layer, rows in enumerate(np.asarray(flat(gradient)[path])):
            found.setdefault(name.format(layer=layer), []).append(rows)
    ours = {name: np.sum(parts, axis=0) if "lora_A" in name else np.concatenate(parts) for name, parts in found.items()}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-5 * max(1, np.abs(value).max()), rtol=1e-4, err_msg=name)
    assert max(np.abs(value).max() for value in expected.values()) > 0.01


@pytest.mark.parametrize(
    "case",
    [
        "mixtral",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("llama", "mistral_window", "qwen2", "qwen3", "gemma3_long", "qwen3_moe", "qwen2_moe", FUSED)
        ),
    ],
)
def test_gradients_of_adapters_on_everything(
    case: str, golden_module: Any, tokens: np.ndarray, tmp_path: Any, load_case: Any
) -> None:
    """Also on experts, whatever PEFT can hold: of W + s·B·A, s·∇W·Aᵀ is B's and s·Bᵀ·∇W is A's, with PyTorch's ∇W."""
    from transformers import AutoModelForCausalLM

    golden_module.torch_model(case).save_pretrained(tmp_path / "base")
    base, params = load_case(case, tmp_path / "base")
    targets = ("query", "key", "value", "output", "gate", "up", "down")
    model = Transformer(dataclasses.replace(base.config, lora=LoraConfig(rank=3, alpha=5.0, targets=targets)))
    params = add_adapters(params, model, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.2 * jax.random.normal(jax.random.key(1), leaf.shape) if path[-1].key == "lora_b" else leaf,
        params,
    )
    weights = np.random.default_rng(1).normal(size=(*tokens.shape, 48)).astype(np.float32) / tokens.size
    adapters, rest = split_adapters(params)
    found = flat(jax.jit(jax.grad(lambda some: jnp.sum(model.logits(join(some, rest), tokens) * weights)))(adapters))

    folder = save_pretrained(tmp_path / "merged", model, params)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    (merged(torch.tensor(tokens)).logits * torch.tensor(weights)).sum().backward()
    with torch.no_grad():
        for weight in merged.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    merged.save_pretrained(tmp_path / "gradients")  # as if it were a model, by which its parts have our names
    slopes, given = flat(load_params(tmp_path / "gradients", model.base)), flat(adapters)
    scale = 5.0 / 3
    for path, value in found.items():
        part, _, which = path.rpartition(".")
        slope = scale * np.asarray(slopes[f"{part}.weight"])
        a, b = (np.asarray(given[f"{part}.{name}"]).swapaxes(-1, -2) for name in ("lora_a", "lora_b"))
        expected = b @ slope if which == "lora_a" else slope @ a
        bound = 2e-5 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(value, expected, atol=bound, rtol=1e-4, err_msg=path)
        assert np.abs(expected).max() > 1e-3, path
