"""KL(q‖p̃), MATHS (53), arXiv 2306.08543: the mode-seeking baseline; whole laws only."""

from typing import ClassVar, Literal

from torch import Tensor

from pipeline.config import Strict


class Config(Strict):
    """Section `losses.<name>` of kind `reverse_kl`."""

    extra_terms: ClassVar[tuple[str, ...]] = ("reverse_kl",)
    whole_law: ClassVar[bool] = True
    """A tail sample would weigh q/p, which has no finite variance: refused on a truncated cache."""
    kind: Literal["reverse_kl"]


def loss(
    kl_SN: Tensor,  # noqa: ARG001  one signature for all losses
    alpha_SN: Tensor,  # noqa: ARG001
    mask_SN: Tensor,  # noqa: ARG001
    reverse_kl_SN: Tensor,
    config: Config,  # noqa: ARG001
) -> Tensor:
    """[S, N] nats."""
    return reverse_kl_SN
