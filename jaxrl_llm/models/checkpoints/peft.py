"""LoRA adapters in PEFT's format: a folder of `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args

import jax
from jax.experimental import multihost_utils

from jaxrl_llm.models.checkpoints import expert_adapters
from jaxrl_llm.models.checkpoints.expert_adapters import OfExperts, names_written, target_parameters
from jaxrl_llm.models.checkpoints.fused_adapters import Parted, modules, names_read, to_peft, written_as
from jaxrl_llm.models.checkpoints.hf import (
    SafetensorsSource,
    overwrite_problem,
    read_json,
    replace_folder,
    write_json,
    write_weights,
)
from jaxrl_llm.models.checkpoints.pretrained import agree_on_problem
from jaxrl_llm.models.checkpoints.weights import check_tensors, leaves, load_leaves
from jaxrl_llm.models.config import LoraConfig, LoraTarget, ModelConfig, Params
from jaxrl_llm.models.entries import (
    Json,
    Table,
    check_entries,
    errors_name,
    list_of,
    number_between,
    one_of,
    require,
    shown,
    text,
    truth,
    whole,
)
from jaxrl_llm.models.families import Family, family_for
from jaxrl_llm.models.lora import ADAPTERS, has_adapters, join, split_adapters, without_adapters
from jaxrl_llm.models.transformer import Transformer

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""How adapters may have begun. The other ways change the base's weights, too, which a folder of adapters lacks."""

_ENTRIES: Table = {
    "peft_type": one_of("kind of adapters", "LORA"),
    "r": whole("rank of the adapters", 1, 10**6),
    "lora_alpha": number_between("what their output is multiplied by, over the rank", 0, 1e9),
    "use_rslora": truth("whether it is over the root of the rank").or_null(),
    "bias": one_of("biases that were trained", "none").or_null(),
    "init_lora_weights": one_of("how the adapters began", *_KEEP_THE_BASE).or_null(),
    "target_parameters": list_of(text("a parameter that has adapters, such as mlp.experts.down_proj")).or_null(),
}
"""Entries that are read."""
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "lora_dropout", "megatron_core", "qalora_group_size", "eva_config"),
    *("layers_pattern", "ensure_weight_tying"),
)
"""Entries that say nothing of how given adapters compute; which layers have some is told by the tensors."""


def save_adapters(
    folder: str | os.PathLike[str],
    model: Transformer,
    params: Params,
    *,
    base_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the adapters of `params` as PEFT does, so that it loads them onto the base in `transformers`.

    The folder appears complete or not at all. On several processes all must call this; process 0 writes.

    Args:
        folder: where to.
        model: the model, with `ModelConfig.lora`.
        params: its parameters.
        base_name: folder or hub id of the base, for PEFT to find it.
        overwrite: whether an existing folder of adapters may be replaced.

    Returns:
        The folder.

    Raises:
        ValueError: there are no adapters, no family expresses the configuration, or the folder exists and must not be
            overwritten.
    """
    folder, lora = Path(os.path.expanduser(folder)), _lora_of(model)
    if not has_adapters(params):
        raise ValueError("these parameters have no adapters to save")
    family, weights = family_for(model.config), model.base.abstract_params()
    written = written_as(family, lora)
    adapters = expert_adapters.to_peft(to_peft(split_adapters(params)[0], weights, family, lora), family)
    stack = Transformer(dataclasses.replace(model.config, lora=written)).stack
    names = _tensor_names(family) | names_written(family, target_parameters(family, written.targets))
    writer = jax.process_index() == 0
    problem = overwrite_problem(folder, overwrite=overwrite, marker=ADAPTER_CONFIG) if writer else None
    agree_on_problem(problem, folder)
    if writer:
        with replace_folder(folder) as staging:
            write_weights(staging, adapters, names, stack, file=ADAPTER_WEIGHTS, max_shard_bytes=None)
            write_json(staging / ADAPTER_CONFIG, _describe(lora, family, base_name))
    else:
        write_weights(None, adapters, names, stack, file=ADAPTER_WEIGHTS, max_shard_bytes=None)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_adapters {folder}")
    return folder


def load_lora_config(folder: str | os.PathLike[str], config: ModelConfig) -> LoraConfig:
    """What `ModelConfig.lora` must be for the adapters in a folder.

    Args:
        folder: of PEFT's format.
        config: of the base.

    Raises:
        ValueError: the folder cannot be read, or its adapters are of a kind that is not implemented; says which.
    """
    path = Path(os.path.expanduser(folder))
    settings = read_json(path / ADAPTER_CONFIG)
    _check_supported(settings, path / ADAPTER_CONFIG)
    source, names = _tensors(path, config)
    present = source.shapes
    targets = tuple(
        target
        for target in get_args(LoraTarget)
        if any(
            name.format(layer=layer, expert=0) in present
            for path, name in names.items()
            for layer in range(config.num_layers)
            if path.split(".")[-2] == target
        )
    )
    if not targets:
        raise ValueError(
            f"{path / ADAPTER_WEIGHTS} has no adapters of this model; its first tensor is {next(iter(present), None)}, "
            f"expected are such as {next(iter(names.values())).format(layer=0, expert=0)}"
        )
    lora = LoraConfig(settings["r"], float(settings["lora_alpha"]), targets, bool(settings.get("use_rslora")))
    adapted = Transformer(dataclasses.replace(config, lora=lora))
    check_tensors(leaves(split_adapters(adapted.abstract_params())[0], names, adapted.stack), present, where=str(path))
    return lora


def load_adapters(folder: str | os.PathLike[str], model: Transformer, params: Params, shardings: Any = None) -> Params:
    """The parameters of a base with PEFT's adapters beside them.

    >>> config = load_config(base)
    >>> model = Transformer(dataclasses.replace(config, lora=load_lora_config(folder, config)))
    >>> params = load_adapters(folder, model, load_params(base, model))

    Args:
        folder: of PEFT's format.
        model: the model with these adapters (`ModelConfig.lora`).
        params: of the base; adapters that they have are replaced.
        shardings: tree of the shardings of all parameters of `model`, or `None` for the default device.

    Raises:
        ValueError: as in `load_lora_config`; or the model's adapters are other than those of the folder; or tensors
            are missing, unexpected or of the wrong shape. All are named.
    """
    path, ours = Path(os.path.expanduser(folder)), _lora_of(model)
    theirs = load_lora_config(path, model.config)
    differing = [
        f"{field.name} is {_shown(theirs, field)} there and {_shown(ours, field)} in the model"
        for field in dataclasses.fields(LoraConfig)
        if _shown(theirs, field) != _shown(ours, field)
    ]
    if differing:
        raise ValueError(f"the adapters in {path} are not those of this model: {'; '.join(differing)}")
    (source, names), abstract = _tensors(path, model.config), split_adapters(model.abstract_params())[0]
    wanted = leaves(abstract, names, model.stack)
    placements = None if shardings is None else split_adapters(shardings)[0]
    arrays = load_leaves(source, wanted, placements, where=str(path))
    return join(without_adapters(params), jax.tree.unflatten(jax.tree.structure(abstract), arrays))


def _tensors(path: Path, config: ModelConfig) -> tuple[OfExperts, dict[str, str]]:
    """The tensors of a folder of adapters, and leaf of an adapter → name of its tensor.

    Raises:
        ValueError: a parameter has adapters that are not those of experts in one tensor.
    """
    family, parameters = family_for(config), read_json(path / ADAPTER_CONFIG).get("target_parameters") or ()
    known = target_parameters(family, get_args(LoraTarget))
    if others := [name for name in parameters if name not in known]:
        has = f"has only {', '.join(known)}" if known else "has none"
        raise ValueError(
            f"{path / ADAPTER_CONFIG}: target_parameters={others} are not implemented for {family.model_type}, which "
            f"{has}: merge the adapters into their base with PEFT instead"
        )
    names = names_read(_tensor_names(family))
    parted = Parted(SafetensorsSource(path, ADAPTER_WEIGHTS), names, config)
    source = OfExperts(parted, family, config, parameters)
    return source, names | source.names


def _shown(lora: LoraConfig, field: dataclasses.Field[Any]) -> Any:
    value = getattr(lora, field.name)
    return sorted(value) if isinstance(value, tuple) else value


def _lora_of(model: Transformer) -> LoraConfig:
    if model.config.lora is None:
        raise ValueError("this model has no adapters: set ModelConfig.lora")
    return model.config.lora


def _tensor_names(family: Family) -> dict[str, str]:
    """Leaf of an adapter → name of its tensor, `{layer}` for each layer."""
    return {
        f"{path}.{leaf}": f"base_model.model.{module}.lora_{leaf[-1].upper()}.weight"
        for module, paths in modules(family).items()
        for path in paths
        for leaf in ADAPTERS
    }


def _describe(lora: LoraConfig, family: Family, base_name: str | None) -> dict[str, Any]:
    """The entries of `adapter_config.json`."""
    places = {path.split(".")[-1]: module.split(".")[-1] for module, paths in modules(family).items() for path in paths}
    lora = written_as(family, lora)
    targets = {places[target] for target in lora.targets if target in places}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": sorted(targets),
        **({"target_parameters": given} if (given := target_parameters(family, lora.targets)) else {}),
        "use_rslora": lora.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _check_supported(settings: Json, where: Path) -> None:
    """Refuses what would make the adapters compute something else than B·A·x times one scale."""
    with errors_name(where):
        check_entries(settings, _ENTRIES)
        for key in ("peft_type", "r", "lora_alpha"):
            require(settings, key)
        known = (*_ENTRIES, *_WITHOUT_EFFECT)
        found = [f"{key}={shown(value)}" for key, value in settings.items() if value and key not in known]
        if found:
            listed = ", ".join(found)
            raise ValueError(f"{listed} is not implemented: merge the adapters into their base with PEFT instead")
