"""What drafts may know of the target: its shape, its embedding, its LM head; never its body.

`Head` is the LM head as the target applies it, from which a cache of mode `rebuild` gets its laws
again. Apart from `pipeline.draft`, so that an edit of the drafts' contract reruns no stage of the
target.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mtp:
    """The target's own multi-token-prediction module, its first where it has several."""

    layout: str
    """Whose names its tensors have (`pipeline.mtp_keys`)."""
    prefix: str
    """What stood before each of them in the target's files."""
    settings: Mapping[str, Any]
    """What names and shapes do not say, by the names of a section of kind `mtp`; `rotary` holds the
    angles of a `rope_type` that is not `default`."""
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


@dataclass(frozen=True)
class HeadRule:
    """What a family does to the products of its LM head, in this order."""

    factors: tuple[float, ...] = ()
    """Multipliers (Cohere's `logit_scale`, Falcon-H1's `lm_head_multiplier`)."""
    divisor: float | None = None
    """Granite's `logits_scaling`."""
    caps: tuple[float, ...] = ()
    """c of c · tanh(logit / c) (Gemma 2's `final_logit_softcapping`)."""

    def apply(self, logits: Tensor) -> Tensor:
        """Scaled and capped logits, any shape."""
        for factor in self.factors:
            logits = logits * factor
        logits = logits if self.divisor is None else logits / self.divisor
        for cap in self.caps:
            logits = torch.tanh(logits / cap) * cap
        return logits


@dataclass(frozen=True)
class Head:
    """The target's LM head in the target's dtype: the same arithmetic, so the same law."""

    weight: Tensor
    """[V, D]"""
    rule: HeadRule

    def logits(self, last_hidden_ND: Tensor) -> Tensor:
        """[N, V] in the target's dtype."""
        product = torch.nn.functional.linear(last_hidden_ND.to(self.weight.dtype), self.weight)
        return self.rule.apply(product)

    def to(self, device: str | torch.device) -> "Head":
        """The same head there."""
        return Head(self.weight.to(device), self.rule)

    @property
    def digest(self) -> str:
        """sha256 of the weight's type, shape and bytes and of the rule."""
        what = [str(self.weight.dtype), list(self.weight.shape), asdict(self.rule)]
        seen = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
        seen.update(self.weight.cpu().contiguous().view(torch.uint8).numpy().data)
        return seen.hexdigest()
