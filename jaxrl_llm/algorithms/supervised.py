"""Supervised fine-tuning on given completions of prompts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax

from jaxrl_llm.algorithms.update import make_scorer
from jaxrl_llm.losses.aggregate import aggregation_normalizer
from jaxrl_llm.losses.supervised import dft_loss, sft_loss
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.records import Mean, Metrics

SupervisedLoss = Literal["nll", "dft"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


class Demonstrations(NamedTuple):
    """Prompts, each with G given completions."""

    prompt: Any
    """`[P, Tp]` int32, right-padded."""
    prompt_lengths: Any
    """`[P]` int32."""
    completion: Any
    """`[P, G, Tc]` int32, right-padded, the end-of-sequence token included."""
    mask: Any
    """`[P, G, Tc]` bool: the tokens that are trained. Those between them are read, such as a user's turns."""


@dataclasses.dataclass(frozen=True)
class SupervisedObjective:
    """Makes the masked tokens likely: an `Objective` of `Demonstrations`.

    Metrics, means over masked tokens: `nll`, `entropy` of the model, and for `dft` `token_prob/mean`.
    """

    kind: SupervisedLoss = "nll"
    """`nll`, the negative log-likelihood (`sft_loss`), or `dft`, that weighted by the token's probability
    (`dft_loss`)."""
    aggregation: Aggregation = "token-mean"
    """One mean over all tokens of a step, or one over completions of their tokens' mean or sum."""

    def __post_init__(self) -> None:
        """Rejects what there is not."""
        for field, choices in (("kind", SupervisedLoss), ("aggregation", Aggregation)):
            if getattr(self, field) not in get_args(choices):
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {get_args(choices)}")

    @property
    def needs_reference(self) -> bool:
        """Never."""
        return False

    @property
    def whole_groups(self) -> bool:
        """No: each completion counts by itself."""
        return False

    def normalizer(self, rows: Any) -> jax.Array:
        """Number of masked tokens, or of completions that have some."""
        return aggregation_normalizer(rows.mask, mode=self.aggregation)

    def loss(self, model: Transformer, params: Params, rows: Any, normalizer: Any) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics."""
        scores = make_scorer(model)(params, rows)
        loss = {"nll": sft_loss, "dft": dft_loss}[self.kind]
        value, metrics = loss(scores.logprobs, rows.mask, aggregation=self.aggregation, normalizer=normalizer)
        return value, metrics | {"entropy": Mean.of(jax.lax.stop_gradient(scores.entropy), rows.mask)}
