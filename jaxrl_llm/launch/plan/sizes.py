"""Shapes of models that are planned for without a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from jaxrl_llm.models.config import ExpertsConfig, LayerKind, ModelConfig, RopeConfig
from jaxrl_llm.models.families.gemma3 import GEMMA3

Size = Literal[
    "smollm2-135m",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-4b",
    "qwen3-32b",
    "qwen3-30b-a3b",
    "gemma3-12b",
    "llama3.1-8b",
]
_QWEN: Any = {
    "layer_kinds": (LayerKind(rope=RopeConfig(theta=1e6)),),
    "max_position_embeddings": 32_768,
    "attention_bias": True,
    "num_kv_heads": 2,
}
_QWEN3: Any = {"layer_kinds": _QWEN["layer_kinds"], "max_position_embeddings": 40_960, "qk_norm": True}
SIZES: Mapping[Size, ModelConfig] = MappingProxyType(
    {
        "smollm2-135m": ModelConfig(49_152, 576, 1536, 30, 9, 3, 64, max_position_embeddings=8192, tie_embeddings=True),
        "qwen2.5-0.5b": ModelConfig(151_936, 896, 4864, 24, 14, head_dim=64, tie_embeddings=True, **_QWEN),
        "qwen2.5-1.5b": ModelConfig(151_936, 1536, 8960, 28, 12, head_dim=128, tie_embeddings=True, **_QWEN),
        "qwen2.5-7b": ModelConfig(152_064, 3584, 18_944, 28, 28, head_dim=128, **(_QWEN | {"num_kv_heads": 4})),
        "qwen3-0.6b": ModelConfig(151_936, 1024, 3072, 28, 16, 8, 128, tie_embeddings=True, **_QWEN3),
        "qwen3-4b": ModelConfig(151_936, 2560, 9728, 36, 32, 8, 128, tie_embeddings=True, **_QWEN3),
        "qwen3-32b": ModelConfig(151_936, 5120, 25_600, 64, 64, 8, 128, **_QWEN3),
        "qwen3-30b-a3b": ModelConfig(
            *(151_936, 2048, 6144, 48, 32, 4, 128),
            experts=ExpertsConfig(128, 8, 768),
            **(_QWEN3 | {"layer_kinds": (LayerKind(rope=RopeConfig(theta=1e6), experts=True),)}),
        ),
        "gemma3-12b": GEMMA3.read_config(
            {
                "vocab_size": 262_208,
                "hidden_size": 3840,
                "intermediate_size": 15_360,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "sliding_window": 1024,
                "max_position_embeddings": 131_072,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rms_norm_eps": 1e-6,
            }
        ),
        "llama3.1-8b": ModelConfig(128_256, 4096, 14_336, 32, 32, 8, 128, max_position_embeddings=131_072),
    }
)
"""By name."""
