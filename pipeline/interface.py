"""What drafts may know of the target: its shape, its embedding, its LM head; never its body.

Apart from `pipeline.draft`, so that an edit of the drafts' contract reruns no stage of the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Mtp:
    """The target's own multi-token-prediction module, its first where it has several."""

    layout: str
    """Whose names its tensors have (`pipeline.mtp_keys`)."""
    prefix: str
    """What stood before each of them in the target's files."""
    settings: Mapping[str, Any]
    """num_heads, num_kv_heads, head_size, intermediate_size, rope_theta, rope_type, norm_eps."""
    tensors: Mapping[str, Tensor]
    """Float32, names without the prefix."""


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
    mtp: Callable[[], Mtp] | None = None
    """Reads the target's own MTP module, which may be larger than all else; None without one."""


@dataclass(frozen=True)
class Shape:
    """The target's shape, enough to build a draft without the target."""

    vocab_size: int
    hidden_size: int
