"""TV(p, q) = 1 − α, MATHS (11): acceptance itself, whose gradient fades where α is small."""

from typing import Literal

from torch import Tensor

from pipeline.config import Strict


class Config(Strict):
    """Section `losses.<name>` of kind `tv`."""

    kind: Literal["tv"]


def loss(kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor, config: Config) -> Tensor:  # noqa: ARG001  one signature for all losses
    """[S, N] in [0, 1]."""
    return 1 - alpha_SN
