"""Golden logits of PyTorch `transformers` on tiny random checkpoints, and the cases themselves.

    python tests/models/make_golden.py [CASE …]

writes tests/models/golden/<case>.json (config.json as transformers writes it, names and shapes of tensors)
and <case>.npz (tokens and logits). It needs torch and transformers (`pip install -e '.[parity]'`). The tests
that read the files need neither: weights are not stored but drawn from a seed, by `tensor` below. Run it
again after a change of CASES, and compare the files: logits of unchanged cases must stay within rounding.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).with_name("golden")

_BASE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


def _rope(kind: str, **entries: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **entries}}


_SOFTCAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 8.0}
_FACTORS = {"short_factor": [1.0, 1.25, 2.0], "long_factor": [1.5, 3.0, 8.0]}
_LONGROPE = {
    "original_max_position_embeddings": 32,
    **_rope("longrope", partial_rotary_factor=0.75, original_max_position_embeddings=32, **_FACTORS),
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied_mha": (
        "llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    ),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "llama_long": ("llama", {"max_position_embeddings": 32, **_rope("default", rope_theta=100.0)}),
    "llama_linear_long": ("llama", _rope("linear", factor=4.0)),
    "llama_llama3_long": (
        "llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama_yarn_mscale_long": (
        "llama",
        _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=1.5,
            mscale_all_dim=0.5,
            truncate=False,
            beta_fast=4.0,
        ),
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12, "num_key_value_heads": 1}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied_yarn_long": (
        "qwen2",
        {"tie_word_embeddings": True, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "qwen2_upper_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_MOE, "shared_expert_intermediate_size": 20, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "norm_topk_prob": True}),
    "qwen3_moe_some_dense": (
        "qwen3_moe",
        {**_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts_per_tok": 3, "head_dim": 12},
    ),
    "gpt_oss_long": (
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "intermediate_size": 20,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False, beta_fast=4.0),
        },
    ),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 11, "sliding_window": 5, **_SOFTCAPS}),
    "gemma2_plain": (
        "gemma2",
        {
            "head_dim": 12,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "gemma3_long": (
        "gemma3_text",
        {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 6,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            },
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2_bias_mha": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "rms_norm_eps": 1e-5}),
    "smollm3_window": (
        "smollm3",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 4,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "phi3": ("phi3", {"num_key_value_heads": 4, "sliding_window": 6}),
    "phi3_partial_tied": ("phi3", {"tie_word_embeddings": True, **_rope("default", partial_rotary_factor=0.5)}),
    "phi3_longrope": ("phi3", {"max_position_embeddings": 128, **_LONGROPE}),
    "phi3_longrope_long": ("phi3", {"max_position_embeddings": 128, **_LONGROPE}),
    "qwen3_tied_bias": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
}
"""Name → model_type, and what differs from the base. Cases named `long` run past the original context."""


def tensor(name: str, shape: list[int] | tuple[int, ...]) -> np.ndarray:
    """The weights of a tensor: uniform, from a seed made of its name, the same on every machine.

    They are large enough for attention to be far from uniform and for logits of the order of one.
    """
    uniform = 2 * np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape) - 1
    if "norm" in name:
        return (1 + 0.5 * uniform).astype(np.float32)
    scale = 0.5 if name.endswith("bias") else 1.0 if "embed" in name else 3.0 / np.sqrt(shape[-1])
    return (scale * uniform).astype(np.float32)


def tokens(case: str) -> dict[str, np.ndarray]:
    """Two prompts of different lengths with two completions each; padding is random: it must not matter."""
    random = np.random.RandomState(zlib.crc32(case.encode()) ^ 1)
    width, own = (56, 24) if case.endswith("long") else (9, 7)
    return {
        "prompt": random.randint(0, _BASE["vocab_size"], (2, width)).astype(np.int32),
        "prompt_lengths": np.array([width, width - 4], np.int32),
        "completion": random.randint(0, _BASE["vocab_size"], (2, 2, own)).astype(np.int32),
        "completion_lengths": np.array([[own, own - 3], [own - 2, 1]], np.int32),
    }


def sequences(batch: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    """Each prompt followed by each of its completions, unpadded: [P][G] arrays of tokens."""
    return [
        [
            np.concatenate([prompt[:length], own[:own_length]])
            for own, own_length in zip(completions, own_lengths, strict=True)
        ]
        for prompt, length, completions, own_lengths in zip(*batch.values(), strict=True)
    ]


def torch_model(case: str, **more: Any) -> Any:
    """The PyTorch model of a case, with `more` changes, its weights drawn by `tensor`.

    Weights are drawn by the names that they have in a checkpoint: PyTorch's modules hold some together.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = CASES[case]
    config = AutoConfig.for_model(model_type, **{**_BASE, **changes, **more})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        drawn = {name: tensor(name, shape) for name, shape in tensor_shapes(model, folder).items()}
        save_file(drawn, Path(folder, "model.safetensors"), {"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def tensor_shapes(model: Any, folder: str) -> dict[str, list[int]]:
    """Saves a PyTorch model in a folder, and tells the tensors that lie there."""
    model.save_pretrained(folder)
    return {name: list(value.shape) for name, value in load_file(Path(folder, "model.safetensors")).items()}


def torch_logits(model: Any, row: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one unpadded sequence."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(row[None].astype(np.int64))).logits[0].numpy()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for case in sys.argv[1:] or CASES:
        model = torch_model(case)
        batch = tokens(case)
        rows = [row for group in sequences(batch) for row in group]
        kept = 16 if case.endswith("long") else 0  # the last positions are the ones past the original context
        logits = [torch_logits(model, row)[-kept:] for row in rows]
        print(case, "logits' standard deviation", np.concatenate(logits).std())
        config = json.loads(model.config.to_json_string(use_diff=False))
        config["architectures"] = [type(model).__name__]
        with tempfile.TemporaryDirectory() as folder:
            description = {"config": config, "tensors": tensor_shapes(model, folder)}
        (GOLDEN / f"{case}.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n")
        arrays = {f"logits_{number}": value for number, value in enumerate(logits)}
        np.savez_compressed(GOLDEN / f"{case}.npz", **batch, **arrays)


if __name__ == "__main__":
    main()
