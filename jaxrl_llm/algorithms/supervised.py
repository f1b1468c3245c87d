"""Supervised fine-tuning on given completions of prompts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from jaxrl_llm.algorithms.offline import Objective
from jaxrl_llm.algorithms.router import RouterLosses, check_has_experts
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.checks import check_fields, one_of
from jaxrl_llm.logprobs import TokenScores
from jaxrl_llm.losses.aggregate import aggregation_normalizer
from jaxrl_llm.losses.router import RouterTokens
from jaxrl_llm.losses.supervised import dft_loss, sft_loss
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rows import layout_of
from jaxrl_llm.models.transformer import Transformer
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
    layout: Any = None
    """Where the texts lie in rows of tokens, if these were laid out ahead (`jaxrl_llm.data.trees`); then prompts are
    not read."""


class PackedDemonstrations(NamedTuple):
    """Rows that hold several demonstrations each, one after another, prompts included; G = 1."""

    prompt: Any
    """`[P, 1]` int32: not read."""
    prompt_lengths: Any
    """`[P]` int32: ones."""
    completion: Any
    """`[P, 1, T]` int32: prompt and completion of the first demonstration, of the second one, …, padding."""
    mask: Any
    """`[P, 1, T]` bool: the tokens that are trained; never the first one of a demonstration."""
    segment_ids: Any
    """`[P, 1, T]` int32: the number of the demonstration in its row; of the padding, −1."""


@dataclasses.dataclass(frozen=True)
class SupervisedObjective(Objective):
    """Makes the masked tokens likely: an `Objective` of `Demonstrations` and of `PackedDemonstrations`.

    Metrics, means over masked tokens: `nll`, `entropy` of the model, and for `dft` `token_prob/mean`.
    """

    kind: SupervisedLoss = "nll"
    """`nll`, the negative log-likelihood (`sft_loss`), or `dft`, that weighted by the token's probability
    (`dft_loss`)."""
    aggregation: Aggregation = "token-mean"
    """One mean over all tokens of a step, or one over completions of their tokens' mean or sum."""
    router: RouterLosses | None = None
    """Balance the load of experts and keep the router's logits small, and tell metrics of it."""

    def __post_init__(self) -> None:
        """Rejects what there is not."""
        check_fields(
            "objective",
            self,
            kind=one_of(self.kind, SupervisedLoss),
            aggregation=one_of(self.aggregation, Aggregation),
        )

    @property
    def needs_reference(self) -> bool:
        """Never."""
        return False

    @property
    def whole_groups(self) -> bool:
        """No: each completion counts by itself."""
        return False

    @property
    def whole_batch(self) -> bool:
        """No."""
        return False

    def normalizer(self, rows: Any) -> tuple[jax.Array, jax.Array]:
        """Number of masked tokens, or of completions that have some; and of masked tokens."""
        own = aggregation_normalizer(rows.mask, mode=self.aggregation, segment_ids=_segments(rows))
        return own, aggregation_normalizer(rows.mask, mode="token-mean")

    def scores(self, model: Transformer, params: Params, texts: Any) -> tuple[TokenScores, RouterTokens | None]:
        """Log-probs and entropies of the tokens; those of the first token of a packed demonstration mean nothing.

        And what routers did, where the losses of these are read.
        """
        if self.router is None:
            return Scorer(model)(params, texts), None
        check_has_experts(model, f"objective.router={self.router}")
        layout = layout_of(texts)
        hidden, router = model.watched(params, layout)
        return layout.unpack((Scorer(model).of_hidden(params, hidden, layout), router))

    def loss(
        self, scores: tuple[TokenScores, RouterTokens | None], rows: Any, normalizer: Any
    ) -> tuple[jax.Array, Metrics]:
        """The rows' part of the loss, and its metrics."""
        (tokens, router), (own, count) = scores, normalizer
        loss = {"nll": sft_loss, "dft": dft_loss}[self.kind]
        value, metrics = loss(
            tokens.logprobs, rows.mask, aggregation=self.aggregation, normalizer=own, segment_ids=_segments(rows)
        )
        metrics["entropy"] = Mean.of(jax.lax.stop_gradient(tokens.entropy), rows.mask)
        if self.router is None or router is None:
            return value, metrics
        extra, of_router = self.router(router, rows.mask, count)
        return value + extra, metrics | of_router


def _segments(rows: Any) -> jax.Array | None:
    return getattr(rows, "segment_ids", None)
