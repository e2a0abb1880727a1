"""What drafts may know of the target: its shape, its embedding, its LM head; never its body.

Apart from `pipeline.draft`, so that an edit of the drafts' contract reruns no stage of the target.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Interface:
    """What drafts may use of the target: never its body. Frozen tensors, float32."""

    embed: Tensor
    """[V, D]"""
    lm_head: Tensor
    """[V, D]"""
    norm: Tensor
    """[D] weight of the final RMS norm."""
    norm_eps: float


@dataclass(frozen=True)
class Shape:
    """The target's shape, enough to build a draft without the target."""

    vocab_size: int
    hidden_size: int
