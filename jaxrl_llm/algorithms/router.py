"""What is trained of the router of a mixture of experts beside the objective: load balance and z-loss."""

from __future__ import annotations

import dataclasses

import jax

from jaxrl_llm.checks import check_fields, not_negative
from jaxrl_llm.losses.router import RouterTokens, router_loss
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.records import Metrics


@dataclasses.dataclass(frozen=True)
class RouterLosses:
    """Losses of routers, and metrics of what they do; see `jaxrl_llm.losses.router_loss`. Trained tokens count."""

    balance_coef: float = 0.0
    """Weight of the load-balancing loss."""
    z_coef: float = 0.0
    """Weight of the z-loss."""

    def __post_init__(self) -> None:
        """Rejects settings that cannot be meant."""
        coefficients = {"balance_coef": not_negative(self.balance_coef), "z_coef": not_negative(self.z_coef)}
        check_fields("router", self, **coefficients)

    def __call__(
        self, tokens: RouterTokens, mask: jax.Array, normalizer: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The rows' part of the losses, and their metrics; `normalizer`: number of tokens of all rows."""
        coefficients = {"balance_coef": self.balance_coef, "z_coef": self.z_coef}
        return router_loss(tokens, mask, **coefficients, normalizer=normalizer)


def check_has_experts(model: Transformer, setting: str) -> None:
    """Raises ValueError if a model has no router that a setting, `name=value`, could speak of."""
    if model.config.experts is None:
        raise ValueError(f"{setting} would have no effect: no layer of the model has experts; leave it out")
