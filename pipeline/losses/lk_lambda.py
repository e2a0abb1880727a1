"""λ·KL + (1 − λ)·TV with λ = exp(−η·sg ᾱ), MATHS (13), arXiv 2602.23881 §4.2: KL first, TV last."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from pipeline.config import Strict
from pipeline.loss import masked_mean


class Config(Strict):
    """Section `losses.<name>` of kind `lk_lambda`."""

    kind: Literal["lk_lambda"]
    eta: Annotated[float, Field(ge=0)]
    """η: 3 in the paper, 10 for MEDUSA; 0 is KL."""
    scope: Literal["depth", "token"] = "depth"
    """One λ per depth from the batch's mean α (the paper's), or one per token."""


def loss(kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor, config: Config) -> Tensor:
    """[S, N]; λ is detached and its ᾱ has the denominator of the loss itself."""
    alpha = alpha_SN.detach()
    if config.scope == "depth":
        alpha = masked_mean(alpha, mask_SN)[:, None]
    weight = (-config.eta * alpha).exp()
    return weight * kl_SN + (1 - weight) * (1 - alpha_SN)
