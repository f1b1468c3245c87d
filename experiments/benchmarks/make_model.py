"""Writes a random model of a benchmark's size as a `transformers` folder: speed does not depend on the weights.

    python experiments/benchmarks/make_model.py MODELS/tiny-llama --size tiny

The tokenizer has one word a token (`w4 w5 …`), so that a text of 64 words is a prompt of 64 tokens.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

import jax

from jaxrl_llm.models.checkpoints.locate import import_transformers
from jaxrl_llm.models.checkpoints.pretrained import save_pretrained
from jaxrl_llm.models.config import LayerKind, ModelConfig, RopeConfig
from jaxrl_llm.models.transformer import Transformer

Size = Literal["tiny", "smollm2", "qwen3-0.6b"]
SIZES: dict[Size, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=512,
        embed_dim=128,
        mlp_dim=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=True,
    ),
    "smollm2": ModelConfig(
        vocab_size=49_152,
        embed_dim=576,
        mlp_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        layer_kinds=(LayerKind(rope=RopeConfig(theta=100_000.0)),),
        tie_embeddings=True,
    ),
    "qwen3-0.6b": ModelConfig(
        vocab_size=151_936,
        embed_dim=1024,
        mlp_dim=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        norm_eps=1e-6,
        layer_kinds=(LayerKind(rope=RopeConfig(theta=1e6)),),
        qk_norm=True,
        tie_embeddings=True,
    ),
}
"""A toy on which overheads show, and the architectures of SmolLM2-135M and Qwen3-0.6B."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer whose token i is the word `wi`; the first four are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: i for i, name in enumerate(_SPECIAL)} | {f"w{i}": i for i in range(len(_SPECIAL), vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, unknown = _SPECIAL
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown
    )


def make(folder: str, size: Size = "tiny", seed: int = 0) -> None:
    """Writes a random model and its tokenizer.

    Args:
        folder: where to; must not exist.
        size: tiny (4 layers of width 128) or smollm2 (SmolLM2-135M's).
        seed: of the weights.
    """
    model = Transformer(SIZES[size])
    params = jax.jit(model.init)(jax.random.key(seed))
    save_pretrained(folder, model, params, tokenizer=word_tokenizer(model.config.vocab_size))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to; must not exist")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    given = parser.parse_args()
    make(given.folder, given.size, given.seed)
