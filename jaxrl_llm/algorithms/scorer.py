"""Log-probs and entropies of given completions under a policy, as every algorithm reads them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jaxrl_llm.logprobs import MIN_CHUNK, TokenScores, token_scores
from jaxrl_llm.models.batch_invariant import of_rows, scores_of_states, with_plain_backward
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.rows import Layout, layout_of
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import on_cpu, token_shards

ACCELERATOR_CHUNK_LOGITS = 2**26
"""Logits that one accelerator holds at a time while it scores tokens: 256 MiB in float32."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The function from parameters and rows to log-probs and entropies `[P, G, Tc]` of the completions' tokens.

    Of rows with the tokens that each was drawn from (`kept`), under the distribution over these alone.
    """

    policy: Transformer
    temperature: float = 1.0

    def __call__(self, params: Params, texts: Any) -> TokenScores:
        """Scores texts: a `Layout`, or any record with `prompt`, `prompt_lengths` and `completion`."""
        layout = layout_of(texts)
        return layout.unpack(self.of_hidden(params, self.policy.hidden(params, layout), layout))

    def of_hidden(self, params: Params, hidden: jax.Array, layout: Layout) -> TokenScores:
        """Scores of a layout's targets from the states that predict them."""
        kept = None if layout.kept is None else layout.pack(layout.kept)
        score = self._in_chunks
        if self.policy.config.batch_invariant:
            score = with_plain_backward(self._by_tile, score)
        return score((hidden, self.policy.head(params)), layout.targets, kept)

    def _in_chunks(self, trained: Any, tokens: jax.Array, kept: jax.Array | None) -> TokenScores:
        hidden, head = trained
        return token_scores(
            hidden,
            head,
            tokens,
            temperature=self.temperature,
            logit_softcap=self.policy.config.logit_softcap,
            known_tokens=self.policy.config.known_tokens,
            kept=kept,
            chunk_size=_vocabulary_chunk(tokens.size),
        )

    def _by_tile(self, trained: Any, tokens: jax.Array, kept: jax.Array | None) -> TokenScores:
        """The same as the sampler's, to the bit."""

        def on_device(head: jax.Array, *rows: Any) -> TokenScores:
            project = functools.partial(self.policy.plain.project, head)
            return scores_of_states(project, *rows, temperature=self.temperature)

        hidden, head = trained
        return of_rows(on_device, head.astype(hidden.dtype), hidden, tokens, kept)


def _vocabulary_chunk(tokens: int) -> int | None:
    """Vocabulary entries whose logits are made at a time, for so many tokens on all devices.

    On a CPU what its cache likes. On accelerators more: where the head is split, each chunk is a round of messages.
    """
    return None if on_cpu() else max(MIN_CHUNK, ACCELERATOR_CHUNK_LOGITS * token_shards() // max(1, tokens))
