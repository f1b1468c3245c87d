"""Score models in and out: folders that `transformers` loads as classifiers of sequences or of tokens."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxrl_llm.models.checkpoints.hf import (
    CONFIG,
    SafetensorsSource,
    overwrite_problem,
    read_json,
    replace_folder,
    write_json,
    write_weights,
)
from jaxrl_llm.models.checkpoints.locate import locate
from jaxrl_llm.models.checkpoints.pretrained import agree_on_problem, read_description
from jaxrl_llm.models.checkpoints.weights import check_tensors, leaves, load_leaves
from jaxrl_llm.models.config import DType, Params, Remat
from jaxrl_llm.models.entries import check_entries, errors_name, number, require, shown
from jaxrl_llm.models.families import family_for
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.lora import merge_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Moments

STATISTICS = "score_statistics.json"
_MOMENTS = {
    "count": number("scores that were recorded", 0, 1e30),
    "mean": number("of the scores", -1e30, 1e30),
    "squares": number("sum of the squared deviations", 0, 1e38),
}
HEAD_NAMES = {"score_head.weight": "score.weight", "score_head.bias": "score.bias"}


def save_score_model(
    folder: str | os.PathLike[str],
    model: ScoreModel,
    params: Params,
    *,
    statistics: Moments | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes a folder that `transformers` loads: the parameters bit for bit, adapters merged into the weights.

    Without a bias it is one of `AutoModelForSequenceClassification`, a reward model; with one of
    `AutoModelForTokenClassification`, a process reward model. The first reads its score at the last token that is
    not the padding token: where that is also the end of sequence, it reads one token too early.

    Args:
        folder: where to; it appears complete or not at all.
        model: the model.
        params: its parameters.
        statistics: of its scores on a reference set, kept beside them.
        tokenizer: saved beside the weights, if given; its padding token goes into `config.json`.
        overwrite: whether an existing model folder may be replaced.
        max_shard_bytes: size above which the weights are split over several files.

    Returns:
        The folder.

    Raises:
        ValueError: no family expresses the configuration, the model holds a policy's LM head, or the folder exists
            and must not be overwritten.
    """
    if model.lm_head:
        raise ValueError("this score model shares a policy's trunk: take lm_head out of params, and lm_head=False")
    folder, family = Path(os.path.expanduser(folder)), family_for(model.config)
    params = jax.jit(merge_adapters, static_argnums=1)(params, model.config) if model.config.lora else params
    names = {**family.tensor_names, **HEAD_NAMES}
    writer = jax.process_index() == 0
    agree_on_problem(overwrite_problem(folder, overwrite=overwrite) if writer else None, folder)
    if not writer:
        write_weights(None, params, names, model.transformer.stack, max_shard_bytes=max_shard_bytes)
    else:
        with replace_folder(folder) as staging:
            write_weights(staging, params, names, model.transformer.stack, max_shard_bytes=max_shard_bytes)
            write_json(staging / CONFIG, _description(model, params, tokenizer))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(staging))
            if statistics is not None:
                write_statistics(staging, statistics)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_score_model {folder}")
    return folder


def write_statistics(folder: Path, statistics: Moments) -> None:
    """Writes the statistics of a model's scores beside it, or replaces them."""
    write_json(folder / STATISTICS, {name: float(value) for name, value in statistics._asdict().items()})


def load_score_model(
    name: str | os.PathLike[str],
    *,
    shardings: Callable[[ScoreModel], Any] | None = None,
    dtype: DType = "float32",
    param_dtype: DType = "float32",
    remat: Remat = "full",
    revision: str | None = None,
) -> tuple[ScoreModel, Params, Moments | None]:
    """A score model, its parameters, and the statistics of its scores where the folder has them.

    The number of outputs and the bias are those of the head that is there.

    Args:
        name: a folder or hub id, of ours or of `transformers`.
        shardings: from the model to the tree of its parameters' shardings; `None` puts all on the default device.
        dtype: type of activations and matrix products.
        param_dtype: type in which parameters are kept, whatever the checkpoint's.
        remat: what the backward pass computes again.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: there is no such checkpoint, it has no head of this kind, something in it is not implemented, or a
            tensor is missing, unexpected or of the wrong shape; each is named.
    """
    path = locate(name, revision=revision)
    family, trunk = read_description(path, causal=False)
    source = SafetensorsSource(path)
    head = source.shapes.get("score.weight")
    if head is None:
        architectures = read_json(path / CONFIG).get("architectures")
        raise ValueError(f"{path} has no tensor 'score.weight': it is no score model, but {shown(architectures)}")
    if len(head) != 2 or not head[0]:
        raise ValueError(f"{path}: score.weight has shape {list(head)}, and not [outputs, hidden_size]")
    statistics = _read_statistics(path / STATISTICS)
    config = dataclasses.replace(trunk, dtype=dtype, param_dtype=param_dtype, remat=remat)
    model = ScoreModel(Transformer(config), outputs=head[0], bias="score.bias" in source.shapes)
    abstract = model.abstract_params()
    wanted = leaves(abstract, {**family.tensor_names, **HEAD_NAMES}, model.transformer.stack)
    check_tensors(wanted, source.shapes, where=str(path))
    arrays = load_leaves(source, wanted, None if shardings is None else shardings(model), where=str(path))
    return model, jax.tree.unflatten(jax.tree.structure(abstract), arrays), statistics


def _description(model: ScoreModel, params: Params, tokenizer: Any) -> dict[str, Any]:
    family, labels = family_for(model.config), [f"LABEL_{number}" for number in range(model.outputs)]
    kind, dtype = "Token" if model.bias else "Sequence", str(params["embed"]["weight"].dtype)
    return {
        "architectures": [f"{family.scores or family.architecture.removesuffix('ForCausalLM')}For{kind}Classification"],
        "model_type": family.model_type,
        **family.write_config(model.config),
        "id2label": {str(number): label for number, label in enumerate(labels)},  # transformers counts these
        "label2id": {label: number for number, label in enumerate(labels)},
        **{f"{token}_token_id": getattr(tokenizer, f"{token}_token_id", None) for token in ("bos", "eos", "pad")},
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for transformers 4
    }


def _read_statistics(path: Path) -> Moments | None:
    if not path.exists():
        return None
    entries = read_json(path)
    with errors_name(path):
        check_entries(entries, _MOMENTS)
        return Moments(**{name: jnp.float32(require(entries, name)) for name in _MOMENTS})
