"""−log α, MATHS (12), arXiv 2602.23881 §4: the gradient of TV, rescaled to the size of KL's."""

from typing import Literal

import torch
from torch import Tensor

from pipeline.config import Strict


class Config(Strict):
    """Section `losses.<name>` of kind `lk_alpha`."""

    kind: Literal["lk_alpha"]


def loss(kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor, config: Config) -> Tensor:  # noqa: ARG001  one signature for all losses
    """[S, N] nats, the logarithm taken per token.

    α̂ = 0 only where no entry lies in the draft vocabulary: no draft can help there, the loss is 0
    and pulls nowhere. Any α > 0, however small, keeps its exact gradient (no clamp).
    """
    return -torch.where(alpha_SN > 0, alpha_SN, 1.0).log()
