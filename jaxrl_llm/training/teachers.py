"""Teachers of a distillation: frozen models beside the policy, over the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxrl_llm.algorithms.distillation.self_teacher import ITSELF
from jaxrl_llm.algorithms.interfaces import Algorithm
from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.models.checkpoints.tokenizers import known_tokens, token_table
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.lora import abstract_reference, in_compute_type
from jaxrl_llm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A model that a policy learns from."""

    name: str
    """For its metric."""
    model: Transformer
    params: Params
    tokenizer: Any

    def over(self, tokens: int) -> Transformer:
        """Its model over so many ids, the policy's."""
        return self.model.with_known_tokens(tokens)

    def kept(self, mesh: jax.sharding.Mesh) -> Params:
        """Its parameters as they are kept: in the type that it computes in, sharded as a policy's."""
        return jax.device_put(in_compute_type(self.params, self.model.config.dtype), self.model.shardings(mesh))


def check_teachers(algorithm: Algorithm, teachers: Sequence[Teacher], tokenizer: Any) -> None:
    """Checks that there are teachers where an algorithm reads them, over the tokens of the policy.

    Raises:
        ValueError: there are none, or too many; two are named alike; one reads other tokens, or fewer.
    """
    if algorithm.needs_teachers and not teachers:
        raise ValueError(f"{algorithm.reader} learns from teachers: pass teachers=")
    if teachers and not (algorithm.needs_teachers or algorithm.needs_hints):
        raise ValueError(f"{algorithm.reader} has no teachers: leave teachers= out")
    names = [teacher.name for teacher in teachers] + [ITSELF] * algorithm.needs_hints
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several teachers are named {', '.join(repeated)}: give each its own name")
    for teacher in teachers:
        check_same_tokens(tokenizer, teacher.tokenizer, teacher.name)
        if (least := known_tokens(tokenizer)) > teacher.model.config.vocab_size:
            raise ValueError(
                f"the teacher {teacher.name!r} has {teacher.model.config.vocab_size} tokens in its head, and the "
                f"tokenizer {least}: it cannot teach the others"
            )


def check_same_tokens(tokenizer: Any, theirs: Any, name: str) -> None:
    """Checks that a teacher's ids are the policy's: distributions are compared token by token.

    Raises:
        ValueError: they are not; names both tokenizers and the first difference.
    """
    own, other = token_table(tokenizer), token_table(theirs)
    if own == other:
        return
    first = min(i for i in own.keys() | other.keys() if own.get(i) != other.get(i))
    raise ValueError(
        f"the teacher {name!r} has another tokenizer ({_described(theirs, other)}) than the policy "
        f"({_described(tokenizer, own)}): token {first} is {other.get(first)!r} there and {own.get(first)!r} here. "
        "Distillation compares distributions token by token: take a teacher with the policy's tokenizer"
    )


def teacher_bytes(teachers: Sequence[Teacher], mesh: jax.sharding.Mesh) -> int:
    """Bytes of each device that they take."""

    def of(teacher: Teacher) -> int:
        shapes = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            teacher.params,
            teacher.model.shardings(mesh),
        )
        return bytes_per_device(abstract_reference(shapes, teacher.model.config.dtype))

    return sum(map(of, teachers))


def _described(tokenizer: Any, table: dict[int, str]) -> str:
    where = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return f"{where}, {len(table)} tokens"
