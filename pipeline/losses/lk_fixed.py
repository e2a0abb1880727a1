"""λ·KL + (1 − λ)·TV with λ fixed, MATHS (14): the ablation of arXiv 2602.23881 §5."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from pipeline.config import Strict


class Config(Strict):
    """Section `losses.<name>` of kind `lk_fixed`."""

    kind: Literal["lk_fixed"]
    weight: Annotated[float, Field(ge=0, le=1)]
    """λ: 1 is KL, 0 is TV."""


def loss(kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor, config: Config) -> Tensor:  # noqa: ARG001  one signature for all losses
    """[S, N]."""
    return config.weight * kl_SN + (1 - config.weight) * (1 - alpha_SN)
