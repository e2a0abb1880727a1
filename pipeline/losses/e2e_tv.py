"""1 − mean over depths of Π α, MATHS (54), arXiv 2606.12370: what a chain loses end to end."""

from typing import Literal

import torch
from torch import Tensor

from pipeline.config import Strict
from pipeline.loss import reach


class Config(Strict):
    """Section `losses.<name>` of kind `e2e_tv`."""

    kind: Literal["e2e_tv"]


def loss(kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor, config: Config) -> Tensor:  # noqa: ARG001  one signature for all losses
    """[S, N]: (1 − Π_{i≤k} α_i) / S, so that `depth_weights: uniform` sums it to (54).

    Its gradient at an anchor is small where the anchor's first depths are rejected: start from a
    trained arm, or from the warm-up.
    """
    through = reach(alpha_SN, mask_SN) * torch.where(mask_SN, alpha_SN, 0.0)
    return (1 - through) / len(alpha_SN)
