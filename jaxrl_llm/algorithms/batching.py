"""How a batch is cut: prompts into minibatches, these into micro-batches, and groups where prompts are too few."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.algorithms.gradient import collect, deal
from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.sharding import row_shards


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How one batch of rollouts is turned into optimizer steps.

    Prompts per step × samples per prompt = rows. Each epoch cuts the prompts into `minibatches`, one optimizer
    step each; each minibatch is computed in `micro_batches` pieces, which changes memory and not the result.
    """

    epochs: int = 1
    """Passes over the batch."""
    minibatches: int = 1
    """Optimizer steps per pass; must divide the number of prompts."""
    micro_batches: int = 1
    """Pieces in which the gradient of one optimizer step is accumulated."""

    def __post_init__(self) -> None:
        """Rejects counts below 1."""
        check_fields("update", self, **{field: count(value) for field, value in dataclasses.asdict(self).items()})

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps per batch."""
        return self.epochs * self.minibatches

    def group_split(self, prompts: int, group: int, row_shards: int, *, whole_groups: bool = False) -> int:
        """Into how many rows a prompt's completions must be dealt to fill micro-batches and devices.

        A prompt is computed once in each of them. 1 where there are prompts enough.

        Raises:
            ValueError: the numbers do not fit; names them and the way out.
        """
        if prompts % self.minibatches:
            raise ValueError(f"{prompts} prompts per step are not divisible by update.minibatches={self.minibatches}")
        rows = prompts // self.minibatches
        pieces = self.micro_batches * row_shards
        for split in range(1, group + 1):
            if group % split == 0 and (rows * split) % pieces == 0:
                if split > 1 and whole_groups:
                    break
                return split
        raise ValueError(
            f"{rows} prompts × {group} samples of a minibatch cannot be cut into update.micro_batches="
            f"{self.micro_batches} × {row_shards} row shards of the mesh (data × fsdp)"
            + (
                " without cutting groups, which are needed whole here; change prompts per step"
                if whole_groups
                else "; change prompts per step, samples per prompt"
            )
            + ", micro_batches or the mesh"
        )


def split_groups(batch: Any, split: int) -> Any:
    """Deals the completions of each prompt to `split` rows, each with its own copy of the prompt.

    Arrays `[P, G, …]` become `[P·split, G/split, …]`, arrays of prompts are repeated.
    """
    if split == 1:
        return batch

    def one(name: str, x: jax.Array) -> jax.Array:
        if x.ndim == 1 or name == "prompt":  # of a prompt, not of its completions
            return jnp.repeat(x, split, axis=0)
        return x.reshape(x.shape[0] * split, x.shape[1] // split, *x.shape[2:])

    return batch._replace(**{name: one(name, x) for name, x in batch._asdict().items() if x is not None})


def deal_groups(rows: Any, plan: UpdateConfig, *, whole_groups: bool = False) -> Any:
    """A whole batch `[P, G, …]` as micro-batches, `[pieces, rows, …]`, groups split where prompts are too few.

    Raises:
        ValueError: as `UpdateConfig.group_split`.
    """
    prompts, group = rows.completion.shape[:2]
    split = plan.group_split(prompts, group, row_shards(), whole_groups=whole_groups)
    return deal(split_groups(rows, split), plan.micro_batches * plan.minibatches)


def map_groups(function: Callable[[Any], Any], rows: Any, plan: UpdateConfig, *, whole_groups: bool = False) -> Any:
    """What a forward pass makes of a whole batch, one micro-batch after the other: a tree of arrays `[P, G, …]`.

    Args:
        function: of some rows; looks at each of their completions by itself.
        rows: the batch.
        plan: the pieces it is cut into.
        whole_groups: as `UpdateConfig.group_split`.
    """
    made = jax.lax.map(function, deal_groups(rows, plan, whole_groups=whole_groups))

    def whole(x: jax.Array) -> jax.Array:
        x = collect(x)
        return x.reshape(*rows.completion.shape[:2], *x.shape[2:])

    return jax.tree.map(whole, made)
