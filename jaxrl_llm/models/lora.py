"""LoRA: adapters in a tree of parameters, told apart from the base, merged into it, or left out.

An adapter is two leaves beside the `weight` `[out, in]` of a linear layer: `lora_a` `[rank, in]` and `lora_b`
`[out, rank]`, both stacked over the layers as the weight is. `ModelConfig.lora` says which layers have one.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxrl_llm.models.config import DType, ModelConfig, Params
from jaxrl_llm.models.integers import blocks_in, with_floats
from jaxrl_llm.sharding import is_rounded

ADAPTERS = ("lora_a", "lora_b")
"""Names of an adapter's leaves."""

TRUNK = ("embed", "layers", "final_norm", "lm_head")
"""Entries of a model's parameters that are the model; what lies beside them is a head."""


class Initialized(Protocol):
    """A model as far as fresh adapters need it, such as `Transformer`."""

    @property
    def config(self) -> ModelConfig:
        """Says where adapters are, and of which rank."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Random parameters, adapters included."""
        ...


def has_adapters(params: Any) -> bool:
    """Whether there are adapters in a tree of parameters, or in a part of one."""
    if not isinstance(params, dict):
        return False
    return any(name in params for name in ADAPTERS) or any(has_adapters(part) for part in params.values())


def split_adapters(params: Any) -> tuple[Params, Params]:
    """The adapters alone, and everything else; `join` puts them together again.

    Works on any tree that has the structure of the parameters, such as their logical axes or shardings.
    """
    adapters, base = {}, {}
    for name, part in params.items():
        if isinstance(part, dict):
            of_adapters, of_base = split_adapters(part)
            adapters |= {name: of_adapters} if of_adapters else {}
            base |= {name: of_base} if of_base else {}
        else:
            (adapters if name in ADAPTERS else base)[name] = part
    return adapters, base


def without_adapters(params: Any) -> Params:
    """The base: the same arrays, those of the adapters left out. A tree without adapters is itself."""
    return split_adapters(params)[1] if has_adapters(params) else params


def read_by_sampler(tree: Any, config: ModelConfig) -> Any:
    """Of a tree like a model's parameters what its sampler reads.

    Adapters are merged into floats, and are left out; beside integers they stay what they are.
    """
    return tree if config.base_dtype else without_adapters(tree)


def join(one: Any, other: Any) -> Any:
    """One tree of two parts of it that share no leaf."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    both = {name: join(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def split_trainable(params: Any) -> tuple[Any, Any]:
    """What training changes, and what it leaves as it is; `join` puts them together again.

    Of a model that has adapters, training changes these and its heads (`value_head`, `score_head`: whatever lies
    beside `TRUNK`). Of any other it changes everything. A tree may hold several models by name (policy and critic),
    each of which is judged by itself.
    """
    if not has_adapters(params):
        return params, {}
    if "layers" in params:
        trainable, frozen = split_adapters({name: part for name, part in params.items() if name in TRUNK})
        return {**trainable, **{name: part for name, part in params.items() if name not in TRUNK}}, frozen
    parts = {name: split_trainable(part) for name, part in params.items()}
    trainable = {name: part for name, (part, _) in parts.items()}
    return trainable, {name: part for name, (_, part) in parts.items() if part}


def reference_of(params: Params, reference: Params | None) -> Params | None:
    """The parameters of the reference of a model that is trained.

    Of parameters that have adapters it shares the base, the same arrays: `reference` holds the adapters that it has in
    place of theirs (`start_reference`), or is `None`: it has none. Parameters of a whole model are it themselves.

    Returns:
        `None` where there are neither adapters nor a reference: then it is missing.
    """
    is_whole = reference is not None and "embed" in reference
    if is_whole or not has_adapters(params):
        return reference
    return join(without_adapters(params), reference or {})


def starting_adapters(params: Params) -> Params | None:
    """The adapters that a model starts with; `None` where it has none, or new ones, whose B is zero."""
    adapters, _ = split_adapters({name: part for name, part in params.items() if name in TRUNK})
    outer = [leaf for path, leaf in jax.tree.leaves_with_path(adapters) if path[-1].key == "lora_b"]
    if not outer or not jax.jit(lambda leaves: jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in leaves])))(outer):
        return None
    return adapters


def start_reference(
    params: Params, shardings: Any, dtype: DType, *, with_adapters: bool, whole: bool = False
) -> tuple[Params | None, str]:
    """What a run keeps of the model that it starts from, for `reference_of`, and a sentence that says which that is.

    Args:
        params: of the model at the start.
        shardings: of all parameters, where they are kept.
        dtype: in which the model computes. A reference of its own is kept in it (`in_compute_type`).
        with_adapters: whether adapters that the model starts with are the reference's, too; else it is the base.
        whole: keep all parameters of the reference, though it shares the base of the model that is trained.
    """
    if not has_adapters(params):
        return jax.device_put(in_compute_type(params, dtype), _like(shardings, params)), ""
    adapters = starting_adapters(params)
    said = " The reference is the base, without adapters."
    if adapters is not None and with_adapters:
        said = " The reference is the model that the run starts from, with its adapters (bare: --model.bare-reference)."
    else:
        adapters = None
    kept = reference_of(params, adapters) if whole else adapters
    if kept is None:
        return None, said
    return jax.device_put(kept, _like(shardings, kept)), said


def in_compute_type(params: Params, dtype: DType) -> Params:
    """Parameters that are only computed with, no wider than the model's `dtype`: half the memory of float32 ones.

    Products take them in that type anyway. Norms, sinks and routers of experts are computed in float32, and their
    parameters stay as they are, as do heads beside the model. What need not be narrowed is the same arrays.
    """

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        *_, module, name = (entry.key for entry in path)
        by_name = name in ("scale", "sinks") or module == "router" or path[0].key not in TRUNK
        is_read_wide = is_rounded(leaf.dtype) or by_name
        return leaf if is_read_wide or leaf.dtype.itemsize <= jnp.dtype(dtype).itemsize else leaf.astype(dtype)

    return jax.tree.map_with_path(one, params)


def abstract_reference(params: Params, dtype: DType) -> Params:
    """Shapes, types and shardings of a whole reference, which `start_reference` makes of such abstract parameters."""
    kept = jax.eval_shape(lambda params: in_compute_type(params, dtype), params)
    return jax.tree.map(
        lambda leaf, kept: jax.ShapeDtypeStruct(leaf.shape, kept.dtype, sharding=leaf.sharding), params, kept
    )


def _like(tree: Any, part: Any) -> Any:
    """The entries of a tree that a part of it has."""
    return {name: _like(tree[name], part[name]) for name in part} if isinstance(part, dict) else tree


def merge_adapters(params: Params, config: ModelConfig) -> Params:
    """Parameters of the plain model that computes the same: W + (alpha / rank)·B·A in place of W.

    Computed in float32 and rounded to the type of W, or to `param_dtype` where W was rounded to integers. Pure;
    parameters without adapters and integers are returned as they are.

    Args:
        params: of the model that `config` describes, heads beside it included.
        config: says by how much adapters are scaled.

    Raises:
        ValueError: the parameters have adapters, of which `config` knows nothing.
    """
    if not has_adapters(params):
        return with_floats(params, config.param_dtype)
    if config.lora is None:
        raise ValueError("the parameters have LoRA adapters, but ModelConfig.lora is None: how they scale is not known")
    if "lora_a" not in params:
        return {name: merge_adapters(part, config) if isinstance(part, dict) else part for name, part in params.items()}
    dtype = params["weight"].dtype if blocks_in(params) is None else config.param_dtype
    params = with_floats(params, jnp.float32)
    weight, a, b = (params[name].astype(jnp.float32) for name in ("weight", *ADAPTERS))
    product = jnp.einsum("...or,...ri->...oi", b, a, precision=jax.lax.Precision.HIGHEST)
    merged = (weight + config.lora.scale * product).astype(dtype)
    return {name: part for name, part in params.items() if name not in ADAPTERS} | {"weight": merged}


def add_adapters(params: Params, model: Initialized, key: jax.Array, shardings: Any = None) -> Params:
    """Parameters of a base with fresh adapters beside them: the base's arrays, and the same output as without.

    Args:
        params: of the base; adapters that they have are replaced.
        model: the model with adapters (`ModelConfig.lora`).
        key: of the adapters' random part.
        shardings: tree of the shardings of all parameters of `model`, or `None`: wherever JAX puts what it computes.

    Raises:
        ValueError: the model has no adapters.
    """
    if model.config.lora is None:
        raise ValueError("this model has no adapters: set ModelConfig.lora")
    placed = None if shardings is None else split_adapters(shardings)[0]
    fresh = jax.jit(lambda key: split_adapters(model.init(key))[0], out_shardings=placed)(key)
    return join(without_adapters(params), fresh)
