"""Models from GGUF files (llama.cpp's format): metadata → `config.json` entries, and dequantised tensors.

The `gguf` package parses the file and dequantises its blocks; this file knows how llama.cpp's converter laid
a model out, of each architecture by `gguf_architectures`, and the table that stands for Llama 3's scaling.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderField
from gguf.quants import dequantize

from jaxrl_llm.models.checkpoints.gguf_architectures import ARCHITECTURES, decimal
from jaxrl_llm.models.checkpoints.weights import Index
from jaxrl_llm.models.config import RopeConfig
from jaxrl_llm.models.entries import (
    Json,
    Table,
    check_entries,
    errors_name,
    number,
    number_between,
    one_of,
    shown,
    whole,
)
from jaxrl_llm.models.families.config_json import CONFIG
from jaxrl_llm.models.rope import frequencies

METADATA: Table = {
    "vocab_size": CONFIG["vocab_size"],
    "context_length": CONFIG["max_position_embeddings"],
    "embedding_length": CONFIG["hidden_size"],
    "feed_forward_length": CONFIG["intermediate_size"],
    "block_count": CONFIG["num_hidden_layers"],
    "expert_count": whole("experts of a layer", 0, 10**6),
    "expert_used_count": whole("experts that compute a token", 0, 10**6),
    "expert_feed_forward_length": whole("width of an expert", 1, 10**9),
    "expert_weights_norm": one_of("whether the shares of a token's experts add up to 1", True),
    "expert_weights_scale": one_of("what they are multiplied by, 0 for nothing", 0.0, 1.0),
    "expert_gating_func": one_of("how they come from logits: 1 and 3 are softmax", 0, 1, 3),
    "attention.head_count": CONFIG["num_attention_heads"],
    "attention.head_count_kv": whole("key and value heads", 1, 10**4),
    "attention.key_length": whole("width of a head", 1, 10**4),
    "attention.value_length": whole("width of a head's values", 1, 10**4),
    "attention.layer_norm_rms_epsilon": CONFIG["rms_norm_eps"],
    "attention.sliding_window": whole("tokens of the attention window", 0, 10**9),
    "attention.sliding_window_pattern": whole("each so manieth layer has no attention window", 1, 10**4),
    "attn_logit_softcapping": number_between("soft-cap of the scores", 0, 1e6),
    "final_logit_softcapping": number("soft-cap of the logits, 0 for none", 0, 1e6),
    "rope.freq_base": number_between("base of the rotary embedding's wavelengths", 1, 1e30),
    "rope.freq_base_swa": number_between("base of the wavelengths in layers with a window", 1, 1e30),
    "rope.dimension_count": whole("dimensions of a head that are rotated", 1, 10**4),
    "rope.scaling.type": one_of("how the context was extended", "none", "linear", "yarn"),
    "rope.scaling.factor": number("by how much the context was extended", 1, 1e6),
    "rope.scale_linear": number("older spelling of rope.scaling.factor, which is not read", 1, 1),
    "rope.scaling.attn_factor": number_between("multiplier of cosine and sine", 0, 1e3),
    "rope.scaling.original_context_length": whole("tokens of context before the extension", 1, 10**9),
    "rope.scaling.yarn_beta_fast": number_between("turns above which a wave is kept", 0, 1e6),
    "rope.scaling.yarn_beta_slow": number_between("turns below which a wave is scaled", 0, 1e6),
}
"""What the metadata of an architecture may say: entries of `config.json` by another name, and those of GGUF alone."""

_ROPE_NEUTRAL = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
# llama.cpp stores factors on the wavelengths instead of Llama 3's parameters; these are the ones in use.
_LLAMA3_CONTEXTS = tuple(2**power for power in range(4, 21))


class GGUFSource:
    """A GGUF file's metadata, and its tensors dequantised row by row."""

    def __init__(self, path: Path):
        """Parses the header.

        Raises:
            ValueError: the file is no GGUF, is truncated, is one part of several, says of its architecture what
                cannot be meant, or uses an architecture or a quantisation that is not known.
        """
        reader = open_gguf(path)
        self.path = path
        self.metadata: Json = {
            name: contents(path, field) for name, field in reader.fields.items() if not name.startswith("tokenizer.")
        }
        architecture = self.metadata.get("general.architecture")
        with errors_name(path):
            check_entries(self.metadata, {"split.count": whole("files of the model", 0, 10**5)})
            if self.metadata.get("split.count", 1) > 1:
                raise ValueError(f"one of {self.metadata['split.count']} parts; merge them (llama-gguf-split)")
            known = next((known for name, known in ARCHITECTURES.items() if name == architecture), None)
            if known is None:
                names = ", ".join(ARCHITECTURES)
                raise ValueError(f"GGUF architecture {shown(architecture)} is not supported; known: {names}")
            own = {name.removeprefix(f"{architecture}."): value for name, value in self.metadata.items()}
            check_entries(own, METADATA, f"{architecture}.")
        self.architecture = known
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in self._tensors.items()}
        for kind, (name, tensor) in {t.tensor_type: (name, t) for name, t in self._tensors.items()}.items():
            try:
                dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
            except NotImplementedError as error:
                raise ValueError(f"{path}: quantisation {kind.name} (of {name!r}) is not supported by gguf") from error

    def read(self, name: str, index: Index) -> np.ndarray:
        """The slice `index` of a tensor in float32; only its rows are dequantised."""
        tensor, order = self._tensors[name], self._rotary_order(name)
        rows: tuple[Any, ...] = index[:-1] or index
        if order is not None:
            rows = (order[rows[0]],)
        values = dequantize(tensor.data[rows], tensor.tensor_type)
        values = values[..., index[-1]] if len(index) > 1 else values
        offset = self.architecture.norm_offset if name.endswith("norm.weight") else 0.0
        return values - np.float32(offset) if offset else values

    def table(self, name: str) -> np.ndarray:
        """A tensor of one axis."""
        return self.read(name, (slice(None),))

    def _rotary_order(self, name: str) -> np.ndarray | None:
        """Row of the file for each row of ours, where llama.cpp's converter permuted them.

        There its rotary embedding turns neighbours (2i, 2i + 1) within a head, ours the halves (i, i + H/2).
        """
        is_query, is_key = ".attn_q." in name, ".attn_k." in name
        if not self.architecture.turns_neighbours or not (is_query or is_key):
            return None
        heads = self.get("attention.head_count")
        if is_key:
            heads = self.get("attention.head_count_kv", heads)
        rows = np.arange(self.shapes[name][0])
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def config_json(self) -> dict[str, Any]:
        """The entries of the `config.json` that this model would have.

        Raises:
            ValueError: experts or a rope scaling that are not implemented, or missing metadata.
        """
        architecture = self.metadata["general.architecture"]
        if (count := self.get("expert_count", 0)) and not self.architecture.experts:
            raise ValueError(
                f"{self.path}: mixtures of experts (expert_count={count}) in architecture {architecture!r} are not "
                "supported"
            )
        heads, width = self.get("attention.head_count"), self.get("embedding_length")
        if width % heads and not self.get("attention.key_length", None):
            raise ValueError(f"{self.path}: embedding_length={width} must be a multiple of head_count={heads}")
        head_dim = self.get("attention.key_length", width // heads)
        if self.get("attention.value_length", head_dim) != head_dim:
            raise ValueError(f"{self.path}: keys of size {head_dim} and values of another size are not supported")
        window = self.get("attention.sliding_window", 0)
        if window and not self.architecture.window:
            raise ValueError(
                f"{self.path}: a sliding window ({window}) in architecture {architecture!r} is not supported"
            )
        config: dict[str, Any] = {
            "model_type": architecture,
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": width,
            "intermediate_size": self.get("feed_forward_length"),
            "num_hidden_layers": self.get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.get("context_length"),
            "rms_norm_eps": decimal(self.get("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "rope_parameters": self._rope(head_dim),
        }
        return config | self.architecture.entries(self, config)

    def get(self, key: str, *default: Any) -> Any:
        """An entry of the architecture's metadata; `ValueError` where it is missing and there is no default."""
        name = f"{self.metadata['general.architecture']}.{key}"
        if name not in self.metadata and not default:
            raise ValueError(f"{self.path} has no metadata {name!r}")
        return self.metadata.get(name, *default)

    def _shape(self, tensor: str) -> tuple[int, ...]:
        if tensor not in self.shapes:
            raise ValueError(f"{self.path} has no tensor {tensor!r}")
        return self.shapes[tensor]

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = self.get("rope.freq_base", 10_000.0)
        rope = {
            "rope_theta": theta,
            "partial_rotary_factor": self.get("rope.dimension_count", head_dim) / head_dim,
        }
        kind = self.get("rope.scaling.type", "none" if self.get("rope.scaling.factor", None) is None else "linear")
        if "rope_freqs.weight" in self.shapes:
            return rope | self._llama3(theta, head_dim)
        if kind == "none":
            return rope | {"rope_type": "default"}
        rope |= {"rope_type": kind, "factor": self.get("rope.scaling.factor")}
        for key, neutral in _ROPE_NEUTRAL.items():
            if self.get(key, neutral) != neutral:
                raise ValueError(f"{self.path}: {key}={self.get(key)} is not implemented; only {neutral} is")
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self.get("rope.scaling.original_context_length")
            rope["beta_fast"] = self.get("rope.scaling.yarn_beta_fast", 32.0)
            rope["beta_slow"] = self.get("rope.scaling.yarn_beta_slow", 1.0)
        return rope

    def _llama3(self, theta: float, head_dim: int) -> dict[str, Any]:
        stored = self.table("rope_freqs.weight")
        plain, _ = frequencies(RopeConfig(theta=theta), head_dim)
        factor = float(stored.max())
        for length in _LLAMA3_CONTEXTS:
            rope = RopeConfig(theta, "llama3", factor, length, low_freq_factor=1.0, high_freq_factor=4.0)
            if stored.shape == plain.shape and np.allclose(plain / frequencies(rope, head_dim)[0], stored, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "original_max_position_embeddings": length,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                }
        raise ValueError(f"{self.path}: rope_freqs.weight is no Llama 3 scaling with factors 1 and 4: {stored}")


def contents(path: Path, field: ReaderField) -> Any:
    """What an entry of a file holds; `ValueError` names one whose text is damaged."""
    try:
        return field.contents()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {field.name} is no text: {error}") from error


def open_gguf(path: Path) -> GGUFReader:
    """A reader of the file; the last one is kept, as parsing a vocabulary takes seconds.

    Raises:
        ValueError: the file is missing, truncated, or no GGUF.
    """
    try:
        status = os.stat(path)
        return _reader(path, status.st_size, status.st_mtime_ns)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is truncated or no GGUF file: {error}") from error


@functools.lru_cache(maxsize=1)
def _reader(path: Path, size: int, modified: int) -> GGUFReader:
    del size, modified  # part of the key: a file that has changed is read again
    return GGUFReader(path)
