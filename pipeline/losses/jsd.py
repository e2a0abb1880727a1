"""Jensen-Shannon divergence of p and q, MATHS (50): bounded, and it needs no renormalised p."""

from typing import ClassVar, Literal

from torch import Tensor

from pipeline.config import Strict


class Config(Strict):
    """Section `losses.<name>` of kind `jsd`."""

    extra_terms: ClassVar[tuple[str, ...]] = ("jsd",)
    kind: Literal["jsd"]


def loss(
    kl_SN: Tensor,  # noqa: ARG001  one signature for all losses
    alpha_SN: Tensor,  # noqa: ARG001
    mask_SN: Tensor,  # noqa: ARG001
    jsd_SN: Tensor,
    config: Config,  # noqa: ARG001
) -> Tensor:
    """[S, N] nats in [0, log 2]."""
    return jsd_SN
