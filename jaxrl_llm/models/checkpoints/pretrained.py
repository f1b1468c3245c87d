"""Checkpoints in and out: folders and hub ids of Hugging Face, and GGUF files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_llm.models.checkpoints.gguf import GGUFSource
from jaxrl_llm.models.checkpoints.gguf_vocabulary import special_ids
from jaxrl_llm.models.checkpoints.hf import (
    CONFIG,
    GENERATION_CONFIG,
    SafetensorsSource,
    overwrite_problem,
    read_json,
    replace_folder,
    write_json,
    write_weights,
)
from jaxrl_llm.models.checkpoints.locate import locate
from jaxrl_llm.models.checkpoints.mxfp4 import Unpacked
from jaxrl_llm.models.checkpoints.text_part import TextPart
from jaxrl_llm.models.checkpoints.tokenizers import stop_token_ids
from jaxrl_llm.models.checkpoints.weights import TensorSource, load_weights
from jaxrl_llm.models.config import DType, ModelConfig, Params, Remat
from jaxrl_llm.models.entries import check_entries, errors_name
from jaxrl_llm.models.families import Family, family_for, family_of
from jaxrl_llm.models.families.config_json import special_tokens
from jaxrl_llm.models.families.wrapped import left_out, text_config
from jaxrl_llm.models.lora import has_adapters, merge_adapters, without_adapters
from jaxrl_llm.models.transformer import Transformer

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    shardings: Callable[[Transformer], Any] | None = None,
    dtype: DType = "float32",
    param_dtype: DType = "float32",
    remat: Remat = "full",
    revision: str | None = None,
) -> tuple[Transformer, Params]:
    """A model and its parameters from a checkpoint.

    >>> transformer, params = from_pretrained("Qwen/Qwen3-0.6B", dtype="bfloat16")

    Each process reads only the slices that its devices hold, straight into sharded arrays.

    Args:
        name: a folder with `config.json` and safetensors, a `.gguf` file, or a hub id. The network is used
            for a hub id alone.
        shardings: from the transformer to the tree of its parameters' shardings; `None` puts all on the
            default device. `load_params` takes the tree itself.
        dtype: type of activations and matrix products.
        param_dtype: type in which parameters are kept, whatever the checkpoint's.
        remat: what the backward pass computes again.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: there is no such checkpoint, something in it is not implemented, a tensor is missing,
            unexpected or of the wrong shape, a file is missing, truncated or corrupt; each is named.
    """
    path = locate(name, revision=revision)
    config = dataclasses.replace(load_config(path), dtype=dtype, param_dtype=param_dtype, remat=remat)
    transformer = Transformer(config)
    return transformer, load_params(path, transformer, None if shardings is None else shardings(transformer))


def load_config(name: str | os.PathLike[str], *, revision: str | None = None) -> ModelConfig:
    """The configuration of a checkpoint (folder, `.gguf` file or hub id), without its weights.

    Raises:
        ValueError: there is no such checkpoint, or something in it is not implemented; it is named.
    """
    return read_description(locate(name, weights=False, revision=revision))[1]


def read_description(path: Path, *, causal: bool = True) -> tuple[Family, ModelConfig]:
    """The family and the configuration of a folder or `.gguf` file.

    Args:
        path: of the checkpoint.
        causal: whether it must be a causal language model, and not one with a head of another kind.

    Raises:
        ValueError: as in `load_config`.
    """
    file = path if _is_gguf(path) else path / CONFIG
    config = GGUFSource(path).config_json() if _is_gguf(path) else read_json(file)
    with errors_name(file):
        config = text_config(config)
        config = config if causal else {**config, "architectures": None}
        family = family_of(config)
        return family, dataclasses.replace(family.read_config(config), family=family.model_type)


def what_is_left_out(name: str | os.PathLike[str], *, revision: str | None = None) -> str | None:
    """A sentence on what of a checkpoint is not read: all but the text model, of one that also sees; or `None`."""
    path = locate(name, weights=False, revision=revision)
    return None if _is_gguf(path) else left_out(read_json(path / CONFIG))


def load_params(
    name: str | os.PathLike[str],
    transformer: Transformer,
    shardings: Any = None,
    *,
    revision: str | None = None,
    told: Callable[[int], None] = lambda size: None,
) -> Params:
    """The parameters of a checkpoint whose configuration is `transformer`'s.

    Of a model with adapters these are the base's alone: `lora.add_adapters` puts fresh ones beside them, and
    `peft.load_adapters` saved ones.

    Args:
        name: as in `from_pretrained`.
        transformer: gives shapes, and the type to which values are cast.
        shardings: tree of shardings like the parameters, or `None` for the default device; those of adapters are
            not used.
        revision: branch, tag or commit of a hub id.
        told: is called with the bytes of each piece that has been read; together they are those of all parameters.

    Raises:
        ValueError: as in `from_pretrained`.
    """
    path = locate(name, revision=revision)
    transformer, shardings = transformer.base, None if shardings is None else without_adapters(shardings)
    if _is_gguf(path):
        source = GGUFSource(path)
        return load_weights(source, source.architecture.names, transformer, shardings, where=str(path), told=told)
    names = read_description(path)[0].tensor_names
    source: TensorSource = SafetensorsSource(path)
    if left_out(read_json(path / CONFIG)):
        source = TextPart(source)
    source = Unpacked(source)
    return load_weights(source, names, transformer, shardings, where=str(path), told=told)


def load_generation_config(name: str | os.PathLike[str], *, revision: str | None = None) -> dict[str, Any]:
    """`generation_config.json` of a checkpoint; what it does not say about special tokens, `config.json` may.

    `eos_token_id` may be one id or a list; `tokenizers.stop_token_ids` makes a tuple of either.

    Raises:
        ValueError: a special token is none of the model's vocabulary, or the files cannot be read.
    """
    path = locate(name, weights=False, revision=revision)
    if _is_gguf(path):
        return special_ids(path)
    described, generating = path / CONFIG, path / GENERATION_CONFIG
    model, generation = (read_json(file) if file.exists() else {} for file in (described, generating))
    model = {**text_config(model), **model}
    allowed = special_tokens(read_description(path, causal=False)[1].vocab_size - 1) if model else special_tokens()
    for file, entries in ((described, model), (generating, generation)):
        with errors_name(file):
            check_entries(entries, allowed)
    return {key: model[key] for key in _SPECIAL_IDS if model.get(key) is not None} | generation


def save_pretrained(
    folder: str | os.PathLike[str],
    transformer: Transformer,
    params: Params,
    *,
    tokenizer: Any = None,
    generation_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes a folder that `transformers`, and all that reads its format, loads: the parameters bit for bit.

    Adapters are merged into the weights; `peft.save_adapters` writes them by themselves.

    The folder appears complete or not at all: it is written beside its place and then renamed. On several
    processes all must call this; process 0 writes.

    Args:
        folder: where to.
        transformer: the model.
        params: its parameters.
        tokenizer: saved beside the weights, if given; its stop tokens go into `generation_config.json`.
        generation_config: entries of `generation_config.json`, for instance those of the checkpoint that was
            trained.
        overwrite: whether an existing model folder may be replaced.
        max_shard_bytes: size above which the weights are split over several files.

    Returns:
        The folder.

    Raises:
        ValueError: no family expresses the configuration, or the folder exists and must not be overwritten.
    """
    folder = Path(os.path.expanduser(folder))
    family = family_for(transformer.config)
    if has_adapters(params) or transformer.config.base_dtype:
        params = jax.jit(merge_adapters, static_argnums=1)(params, transformer.config)
    writer = jax.process_index() == 0
    agree_on_problem(overwrite_problem(folder, overwrite=overwrite) if writer else None, folder)
    if writer:
        with replace_folder(folder) as staging:
            write_weights(staging, params, family.tensor_names, transformer.stack, max_shard_bytes=max_shard_bytes)
            _write_description(staging, family, transformer.config, params, tokenizer, generation_config)
    else:
        write_weights(None, params, family.tensor_names, transformer.stack, max_shard_bytes=max_shard_bytes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_pretrained {folder}")
    return folder


def _write_description(
    folder: Path,
    family: Family,
    config: ModelConfig,
    params: Params,
    tokenizer: Any,
    generation_config: Mapping[str, Any] | None,
) -> None:
    generation = dict(generation_config or {})
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
        stops = list(stop_token_ids(tokenizer, generation_config))
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        }
        generation |= {key: value for key, value in ids.items() if value is not None}
    if generation:
        write_json(folder / GENERATION_CONFIG, generation)
    dtype = str(params["embed"]["weight"].dtype)
    write_json(
        folder / CONFIG,
        {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **family.write_config(config),
            # None must be said: transformers' default is an id.
            **{key: generation.get(key) for key in _SPECIAL_IDS},
            "dtype": dtype,
            "torch_dtype": dtype,  # the same for transformers 4
        },
    )


def agree_on_problem(problem: str | None, folder: Path) -> None:
    """Raises on every process what process 0 found, so that none waits for the others forever."""
    found = problem is not None
    if jax.process_count() > 1:
        found = bool(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found:
        raise ValueError(problem or f"process 0 cannot write {folder}")


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()
