"""KL(p̃‖q), MATHS (10): the baseline, and the start that all losses share."""

from typing import Literal

from torch import Tensor

from pipeline.config import Strict


class Config(Strict):
    """Section `losses.<name>` of kind `kl`."""

    kind: Literal["kl"]


def loss(kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor, config: Config) -> Tensor:  # noqa: ARG001  one signature for all losses
    """[S, N] nats."""
    return kl_SN
