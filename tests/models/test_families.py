"""Every family against golden logits of PyTorch (see make_golden.py), and its config.json map."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.config import ModelSource
from jaxrl_llm.models.config import LayerKind, ModelConfig, RopeConfig
from jaxrl_llm.models.families import FAMILIES, family_for, family_of
from jaxrl_llm.models.rows import PaddedLayout
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh

CASES = sorted(path.stem for path in Path(__file__).with_name("golden").glob("*.npz"))
TOLERANCE = 1e-4


def read_golden(case: str) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    with np.load(Path(__file__).with_name("golden") / f"{case}.npz") as file:
        arrays = dict(file)
    logits = [arrays.pop(f"logits_{number}") for number in range(4)]
    return arrays, logits


def plain_rows(batch: dict[str, np.ndarray], sequences: list[list[np.ndarray]]) -> np.ndarray:
    """The concatenated sequences, right-padded with tokens that must not matter."""
    rows = [row for group in sequences for row in group]
    out = np.full((len(rows), batch["prompt"].shape[1] + batch["completion"].shape[2]), 7, np.int32)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pytorch(case, checkpoint, golden_module, load_case):
    transformer, params = load_case(case, checkpoint(case))
    batch, expected = read_golden(case)

    @jax.jit
    def both(params: Any, rows: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        texts = PaddedLayout.of(batch["prompt"], batch["prompt_lengths"], batch["completion"])
        hidden = transformer.hidden(params, texts)
        return transformer.logits(params, rows), transformer.head_logits(params, hidden)

    plain, shared = map(np.asarray, both(params, plain_rows(batch, golden_module.sequences(batch)), batch))
    for number, torch in enumerate(expected):
        prompt, sample = divmod(number, 2)
        own = batch["completion_lengths"][prompt, sample]
        end = batch["prompt_lengths"][prompt] + own
        ours = plain[number, end - len(torch) : end]
        np.testing.assert_allclose(ours, torch, atol=TOLERANCE, rtol=0, err_msg=f"sequence {number}")

        # The same through the layout of training, each prompt computed once for its completions: the state at
        # t predicts token t + 1, and the file may hold fewer positions than the completion has.
        before = torch[-own - 1 : -1]
        ours = shared[prompt, sample, own - len(before) : own]
        np.testing.assert_allclose(ours, before, atol=TOLERANCE, rtol=0, err_msg=f"shared prompt, sequence {number}")


def test_every_case_has_a_golden_file(golden_module):
    assert set(golden_module.CASES) == set(CASES)
    assert {model_type for model_type, _ in golden_module.CASES.values()} == {f.model_type for f in FAMILIES}


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama_linear_long", {"rope": RopeConfig()}),
        ("llama_llama3_long", {"rope": RopeConfig()}),
        ("llama_yarn_mscale_long", {"rope": RopeConfig()}),
        ("mistral_window", {"window": 6}),
        ("qwen2_upper_window", {"window": 4}),
        ("llama_biases", {"activation": "silu"}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"query_scalar": None}),
        ("gemma2", {"norm_offset": 0.0}),
        ("gemma2", {"scale_embeddings": False}),
        ("gemma3_long", {"rope": RopeConfig(1000.0, "linear", 8.0)}),
        ("smollm3", {"rope": RopeConfig(2e6)}),
        ("phi3", {"window": None}),
        ("phi3_partial_tied", {"rope": RopeConfig()}),
        ("phi3_longrope_long", {"rope": RopeConfig(partial=0.75)}),
        ("gpt_oss_long", {"window": None}),
        ("gpt_oss_long", {"activation": "silu"}),
    ],
)
def test_golden_logits_depend_on_what_they_check(case, change, checkpoint, golden_module, load_case):
    """A model that ignored the setting would fail the comparison by a wide margin."""
    transformer, params = load_case(case, checkpoint(case))
    of_kind = {field: value for field, value in change.items() if field in LayerKind.__dataclass_fields__}
    of_model = {field: value for field, value in change.items() if field not in of_kind}
    kinds = tuple(dataclasses.replace(kind, **of_kind) for kind in transformer.config.layer_kinds)
    other = Transformer(dataclasses.replace(transformer.config, layer_kinds=kinds, **of_model))
    batch, expected = read_golden(case)
    row = plain_rows(batch, golden_module.sequences(batch))[:1]  # the longest, without padding
    ours = np.asarray(jax.jit(other.logits)(params, row))[0, -len(expected[0]) :]
    assert np.abs(ours - expected[0]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_config_survives_both_spellings(case, golden_config):
    """transformers 5 (rope_parameters, layer_types), 4 (rope_theta, rope_scaling), and what we export."""
    new = golden_config(case)
    config = family_of(new).read_config(new)
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    rope = dict(new["rope_parameters"])
    if "full_attention" in rope:
        old |= {"sliding_window_pattern": 3, "rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        rope = dict(rope["full_attention"])
    old |= {
        "rope_theta": rope.pop("rope_theta"),
        "partial_rotary_factor": rope.pop("partial_rotary_factor", None),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }
    assert family_of(old).read_config(old) == config
    if old["rope_scaling"]:
        rope["type"] = rope.pop("rope_type")  # older still
        assert family_of(old).read_config(old) == config

    family = family_for(config)
    exported = {"model_type": family.model_type, **family.write_config(config)}
    assert family_of(exported).read_config(exported) == config
    without_new = {key: value for key, value in exported.items() if key not in ("rope_parameters", "layer_types")}
    assert family_of(without_new).read_config(without_new) == config


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("llama", "llama"),
        ("llama_biases", "llama"),
        ("mistral_window", "mistral"),
        ("mistral", "llama"),  # without a window there is no difference
        ("qwen2", "qwen2"),
        ("qwen2_upper_window", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma2_plain", "gemma2"),
        ("gemma3_long", "gemma3_text"),
        ("olmo2", "olmo2"),
        ("smollm3", "smollm3"),
        ("phi3", "mistral"),  # but for what its tensors are called
        ("phi3_partial_tied", "phi3"),
        ("gpt_oss_long", "gpt_oss"),
    ],
)
def test_family_of_export(case, expected, golden_config):
    config = golden_config(case)
    config = family_of(config).read_config(config)
    assert family_for(config).model_type == expected
    own = golden_config(case)["model_type"]
    assert family_for(dataclasses.replace(config, family=own)).model_type == own


def test_transformers_reads_the_exported_config_as_the_original(golden_config, golden_module):
    from jaxrl_llm.models.checkpoints.locate import import_transformers

    auto = import_transformers().AutoConfig
    for case, (model_type, _) in golden_module.CASES.items():
        original = golden_config(case)
        config = family_of(original).read_config(original)
        family = family_for(config)
        if family.model_type != model_type:
            continue
        ours = auto.for_model(**{"model_type": model_type, **family.write_config(config)}).to_dict()
        spelt_anew = {"rope_theta", "rope_scaling", "rope_parameters", "max_window_layers", "hidden_act"}
        spelt_anew |= {"rope_local_base_freq", "partial_rotary_factor", "sliding_window_pattern", "num_experts"}
        for key in set(family.write_config(config)) - spelt_anew:
            assert ours[key] == original.get(key, ours[key]), (case, key)
        rope = {key: value for key, value in original["rope_parameters"].items() if value is not None}
        assert rope.items() <= ours["rope_parameters"].items(), case


def test_every_second_layer_has_experts(golden_config):
    config = golden_config("qwen2_moe")
    listed, stepped = (
        family_of(config).read_config({**config, **change})
        for change in ({"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [], "decoder_sparse_step": 2})
    )
    assert listed == stepped
    with pytest.raises(ValueError, match="leave no layer with experts"):
        family_of(config).read_config({**config, "decoder_sparse_step": 9})


def test_known_checkpoints():
    """Entries of well-known config.json files, which spell things differently."""
    llama32 = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": [128001, 128008, 128009],
    }
    config = family_of(llama32).read_config(llama32)
    assert config.layer_kinds == (LayerKind(rope=RopeConfig(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)),)
    assert config.num_parameters == 1_235_814_400  # as its model card says: 1.24 billion

    qwen25 = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    config = family_of(qwen25).read_config(qwen25)
    assert config.attention_bias and config.layer_kinds == (LayerKind(rope=RopeConfig(1e6)),)
    assert config.num_parameters == 494_032_768


def _entries(kind: str, *sizes: int, **more: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings")
    return {"model_type": kind, **dict(zip(names, sizes, strict=True)), **more}


KNOWN = {
    "gemma-2-2b": (
        _entries("gemma2", 256_000, 2304, 9216, 26, 8, 4, 8192, head_dim=256, cache_implementation="hybrid"),
        2_614_341_888,
    ),
    "gemma-3-1b": (
        _entries(
            *("gemma3_text", 262_144, 1152, 6912, 26, 4, 1, 32_768),
            **{"head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6, "rope_scaling": None},
            **{"rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "attn_logit_softcapping": None},
        ),
        999_885_952,
    ),
    "phi-4-mini": (
        _entries(
            *("phi3", 200_064, 3072, 8192, 32, 24, 8, 131_072),
            **{"partial_rotary_factor": 0.75, "sliding_window": 262_144, "tie_word_embeddings": True},
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            original_max_position_embeddings=4096,
        ),
        3_836_021_760,
    ),
    "olmo-2-1b": (_entries("olmo2", 100_352, 2048, 8192, 16, 16, 16, 4096, rope_theta=500_000), 1_484_916_736),
    "smollm3-3b": (
        _entries("smollm3", 128_256, 2048, 11_008, 36, 16, 4, 65_536, no_rope_layers=[1, 1, 1, 0] * 9, rope_theta=5e6),
        3_075_098_624,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_known_checkpoints(name):
    """As their model cards count them."""
    entries, parameters = KNOWN[name]
    config = family_of(entries).read_config(entries)
    assert config.num_parameters == parameters
    assert family_for(config).model_type == entries["model_type"]
    if name == "gemma-3-1b":
        kinds = [(kind.window, kind.rope) for kind in config.layer_kinds]
        assert kinds == [(512, RopeConfig(1e4))] * 5 + [(None, RopeConfig(1e6))] + kinds[6:]


def test_longrope_reads_texts_of_its_first_context_unless_asked():
    entries, _ = KNOWN["phi-4-mini"]
    config = family_of(entries).read_config(entries)
    assert config.longest_text == 4096 and "model.long_rope=True: 131072" in config.way_to_longer
    longer = ModelSource(long_rope=True).applied_to(config)
    assert longer.longest_text == 131_072 and not longer.way_to_longer
    with pytest.raises(ValueError, match=r"model.long_rope=True would have no effect"):
        ModelSource(long_rope=True).applied_to(ModelConfig(32, 16, 32, 1, 2, 2, 8))
    sampler = Sampler(
        Transformer(config),
        SamplingConfig(max_tokens=96),
        group=1,
        stop_tokens=(),
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
    sampler.check_length(4000)
    with pytest.raises(ValueError, match=r"model's 4096 positions \(model.long_rope=True"):
        sampler.check_length(4001)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "'gpt2'.*known: llama, mistral, qwen2, qwen3"),
        ("llama", {"model_type": "gemma3n"}, "the nearest is 'gemma3_text'"),
        (
            "llama",
            {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_shared_experts": 1, "kv_lora_rank": 512},
            "by its settings the nearest is 'qwen2_moe', which has not kv_lora_rank=512, keys and values of a low rank",
        ),
        (
            "llama",
            {"model_type": "cohere2", "sliding_window": 9, "logit_scale": 0.5, "layer_norm_eps": 1e-5},
            "nearest is 'mistral', which has not layer_norm_eps=1e-05, LayerNorm.*logit_scale=0.5, scaled logits",
        ),
        (
            "llama",
            {"model_type": "falcon", "alibi": False, "parallel_attn": True},
            "nearest is 'llama', which has not parallel_attn=True, attention and MLP side by side",
        ),
        ("llama", {"model_type": "glm4_moe", "n_routed_experts": 8, "use_qk_norm": True}, "nearest is 'qwen3_moe'"),
        ("llama", {"model_type": "ministral"}, "did you mean 'mistral'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act='relu2'.*silu"),
        ("llama", {"hidden_size": None}, "hidden_size=None must be a whole number"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "'short_factor' is missing"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'.*linear, llama3, yarn, longrope"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "'factor' is missing"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "'low_freq_factor'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers=2"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ("qwen3", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("gemma2", {"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers=2"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_long", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50"),
        ("gemma3_long", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.*full_attention"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear' is none of Phi-3's"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "partial=0.4 of head_dim=8 is 3"),
        ("phi3_longrope", {"num_attention_heads": 2}, "3 short_factors for the 6 planes of head_dim=16"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
    ],
)
def test_what_is_not_implemented_is_named(case, change, message, golden_config):
    config = {**golden_config(case), **change}
    with pytest.raises(ValueError, match=message):
        family_of(config).read_config(config)


def test_harmless_entries_are_accepted(golden_config):
    config = {**golden_config("llama"), "attention_dropout": 0.1, "pretraining_tp": 2, "hidden_act": "swish"}
    assert family_of(config).read_config(config).layer_kinds[0].activation == "silu"


def test_export_refuses_what_no_family_has():
    config = ModelConfig(32, 16, 32, 1, 2, 2, 8, qk_norm=True, mlp_bias=True)
    with pytest.raises(ValueError, match=r"qk_norm=True.*mlp_bias=True"):
        family_for(config)
