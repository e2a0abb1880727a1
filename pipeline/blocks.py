"""The layers that drafts share: projections, RMS norm, RoPE, SwiGLU, a ragged K/V cache, a layer.

Knows no architecture, no batch and no target. The conventions are those of Llama in transformers
(rotate-half RoPE, pre-norm, no bias), so that a weight means the same on both sides of an export.

Dims: B rows, Q query tokens, W width of a cache, H heads, G key/value heads, C channels of a head,
D model width, I inner width. Parameters are made empty or constant and drawn by `draw` from a
generator: nothing here touches the global random state.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from torch import Tensor, nn

ROPE_THETA = 10_000.0  # Llama's; written into every export
NORM_EPS = 1e-6  # Llama's; written into every export

RopeTable = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotary:
    """RoPE's angles where they are not those of one base alone (YaRN, Llama 3.1)."""

    inv_freq: tuple[float, ...]
    """[C/2] radians a position."""
    scale: float
    """Of cos and sin."""
    score_scale: float
    """Of attention scores (DeepSeek's mscale², 1 elsewhere)."""


class Linear(nn.Module):
    """x [..., in] -> x Wᵀ (+ b) [..., out]; W [out, in] is empty until `draw` fills it."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(out_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) · w over the last dim (arXiv:1910.07467), in float32 or wider."""

    def __init__(self, size: int, *, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) ⊙ W_up x) (arXiv:2002.05202); gate and up are one matrix [2I, D]."""

    def __init__(self, size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * inner_size)
        self.down = Linear(inner_size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def draw(module: nn.Module, generator: torch.Generator) -> None:
    """Fill every trainable matrix [out, in] with N(0, 1/in), in the order of registration.

    Llama's fixed 0.02 is that of a width of 2,500. At the width of a small draft it starves every
    layer: on tokenised Python, width 32, AdamW 6e-3, 200 steps ended at 3.79 nats with it and at
    3.36 with this; width 128, 3e-3, 80 steps at 3.73 and 3.42 (one seed).
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.ndim >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def take_rows(x_ND: Tensor, index: Tensor) -> Tensor:
    """x[index]: [*index, D].

    Through `embedding`, whose gradient is deterministic on every device and whose CPU kernel is
    several times faster than that of advanced indexing.
    """
    return F.embedding(index, x_ND)


def rope_table(
    position: Tensor,
    head_size: int,
    *,
    dtype: torch.dtype,
    theta: float = ROPE_THETA,
    rotary: Rotary | None = None,
) -> RopeTable:
    """RoPE's cos and sin [..., 1, C/2] at integer positions [...] (arXiv:2104.09864)."""
    place = position.float().unsqueeze(-1).unsqueeze(-1)
    if rotary is not None:
        angle = place * torch.tensor(rotary.inv_freq, device=position.device)
        return (angle.cos() * rotary.scale).to(dtype), (angle.sin() * rotary.scale).to(dtype)
    # float32 whatever the model's dtype, as transformers does: an angle in bfloat16 is useless
    exponent = torch.arange(0, head_size, 2, device=position.device).float() / head_size
    angle = place * theta**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """Turn x [..., H, C] by its position: channel c pairs with c + C/2."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _per_query_head(x_BWGC: Tensor, num_heads: int) -> Tensor:
    """Each of G key or value heads once for every query head that it serves: [B, W, H, C]."""
    shared = num_heads // x_BWGC.shape[2]
    return x_BWGC if shared == 1 else x_BWGC.repeat_interleave(shared, dim=2)


def attend(q_BQHC: Tensor, k_BWGC: Tensor, v_BWGC: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √C) v -> [B, Q, H·C]; mask [B|1, 1, Q, W] bool, True where q may see k.

    Without a mask it is causal, Q = W. G key heads serve H/G query heads each.
    """
    k_BWHC, v_BWHC = (_per_query_head(x, q_BQHC.shape[2]) for x in (k_BWGC, v_BWGC))
    out = F.scaled_dot_product_attention(
        q_BQHC.transpose(1, 2),
        k_BWHC.transpose(1, 2),
        v_BWHC.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
    )
    return out.transpose(1, 2).flatten(2)


def attend_diagonal(
    q_BQHC: Tensor,
    base: tuple[Tensor, Tensor],
    mask: Tensor,
    *,
    own: tuple[list[Tensor], list[Tensor]],
) -> Tensor:
    """`attend` over keys and values [B, W, G, C] shared by all queries, and n of each query's own.

    `own` holds keys and values [B, Q, G, C]: query q sees the q-th of each, as if n more columns
    were added to its row of scores. [B, Q, H·C].
    """
    heads = q_BQHC.shape[2]
    q = q_BQHC.transpose(1, 2) * q_BQHC.shape[-1] ** -0.5
    k, v = (_per_query_head(x, heads).transpose(1, 2) for x in base)
    shared = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf)
    own_k, own_v = (  # [B, H, Q, n, C]
        torch.stack([_per_query_head(x, heads) for x in part], dim=-2).transpose(1, 2)
        for part in own
    )
    diagonal = (own_k @ q.unsqueeze(-1)).squeeze(-1)
    weight = torch.cat([shared, diagonal], dim=-1).softmax(-1)
    to_shared, to_own = weight.split([k.shape[-2], own_k.shape[-2]], dim=-1)
    out = to_shared @ v + (to_own.unsqueeze(-2) @ own_v).squeeze(-2)
    return out.transpose(1, 2).flatten(2)


@dataclass
class KVCache:
    """Keys and values of one attention for B rows of different length.

    Column W is spare: padding of a ragged write lands there, and no reader looks at it (padding may
    hold anything, NaN included, and a masked NaN is still a NaN). A reader masks by position, so
    that what a row holds beyond the position it asks for is never seen.
    """

    k: Tensor
    """[B, W + 1, H, C], rotated by position."""
    v: Tensor
    """[B, W + 1, H, C], or of another C."""

    @classmethod
    def empty(
        cls,
        num_rows: int,
        width: int,
        *,
        heads: tuple[int, int],
        like: Tensor,
        value_size: int | None = None,
    ) -> "KVCache":
        """Zeros for W = `width` positions of H, C = `heads`, with `like`'s dtype and device."""
        shape = (num_rows, width + 1, *heads)
        values = (*shape[:-1], value_size or heads[1])
        return cls(like.new_zeros(shape), like.new_zeros(values))

    @property
    def width(self) -> int:
        """W."""
        return self.k.shape[1] - 1

    def write(self, position_BQ: Tensor, k_BQHC: Tensor, v_BQHC: Tensor) -> None:
        """Put keys and values at each row's positions, at most W."""
        row = torch.arange(len(position_BQ), device=position_BQ.device)[:, None]
        self.k[row, position_BQ] = k_BQHC
        self.v[row, position_BQ] = v_BQHC

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in that order."""
        self.k, self.v = self.k[rows], self.v[rows]


def span(start_B: Tensor, end_B: Tensor, *, spare: int) -> Tensor:
    """Positions [B, Q] = start … end − 1 of each row, Q the longest; `spare` pads the others."""
    longest = int((end_B - start_B).max())
    position = start_B[:, None] + torch.arange(longest, device=start_B.device)
    return torch.where(position < end_B[:, None], position, spare)


def visible(position_BQ: Tensor, width: int, first_BQ: Tensor | None = None) -> Tensor:
    """[B, 1, Q, width] bool: key w is visible to a query at position ≥ w, from `first` ≤ w on."""
    key = torch.arange(width, device=position_BQ.device)
    seen = key <= position_BQ[..., None]
    if first_BQ is not None:
        seen &= key >= first_BQ[..., None]
    return seen[:, None]


class Attention(nn.Module):
    """Self-attention with RoPE; q, k, v are one matrix [(H + 2G)·C, in].

    G key/value heads serve H/G query heads each, all H by default (arXiv:2305.13245). `qk_norm_eps`
    norms each head of q and of k before it is turned (Qwen3); without it nothing is normed.
    """

    def __init__(
        self,
        size: int,
        num_heads: int,
        *,
        in_size: int | None = None,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size = head_size or size // num_heads
        rows = (num_heads + 2 * self.num_kv_heads) * self.head_size
        self.qkv = Linear(in_size or size, rows, bias=qkv_bias)
        self.out = Linear(num_heads * self.head_size, size)
        eps = qk_norm_eps
        self.q_norm = None if eps is None else RMSNorm(self.head_size, eps=eps)
        self.k_norm = None if eps is None else RMSNorm(self.head_size, eps=eps)

    @property
    def rotary_size(self) -> int:
        """Channels of a head that are turned: all."""
        return self.head_size

    @property
    def value_size(self) -> int:
        """Channels of a value."""
        return self.head_size

    @property
    def like(self) -> Tensor:
        """A weight, for its dtype and device."""
        return self.qkv.weight.data

    @property
    def pieces(self) -> tuple[int, ...]:
        """Rows of q, k and v in `qkv`."""
        shared = self.num_kv_heads * self.head_size
        return self.num_heads * self.head_size, shared, shared

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))

    def _turned(self, x: Tensor, norm: RMSNorm | None, table: RopeTable) -> Tensor:
        return rotate(x if norm is None else norm(x), table)

    def _rows(self, x: Tensor, part: slice) -> Tensor:
        bias = None if self.qkv.bias is None else self.qkv.bias[part]
        return self._heads(F.linear(x, self.qkv.weight[part], bias))

    def project(self, x_BQD: Tensor, table: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [B, Q, H, C] and k [B, Q, G, C], and v [B, Q, G, C]."""
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = self._heads(self.qkv(x_BQD)).split(counts, dim=-2)
        return self._turned(q, self.q_norm, table), self._turned(k, self.k_norm, table), v

    def queries(self, x_BQD: Tensor, table: RopeTable) -> Tensor:
        """Rotated q alone [B, Q, H, C], where a token asks but is not asked."""
        return self._turned(self._rows(x_BQD, slice(None, self.pieces[0])), self.q_norm, table)

    def keys_values(self, x_BWD: Tensor, table: RopeTable) -> tuple[Tensor, Tensor]:
        """Rotated k, and v, each [B, W, G, C], where a token is asked but does not ask."""
        k, v = self._rows(x_BWD, slice(self.pieces[0], None)).chunk(2, dim=-2)
        return self._turned(k, self.k_norm, table), v


class Layer(nn.Module):
    """A Llama layer: x + Attn(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, size: int, num_heads: int, *, inner_size: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(size)
        self.attention = Attention(size, num_heads)
        self.post_norm = RMSNorm(size)
        self.mlp = SwiGLU(size, inner_size)

    def _after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention.out(attended)
        out: Tensor = x + self.mlp(self.post_norm(x))
        return out

    def forward(self, x_BTD: Tensor, table: RopeTable, mask: Tensor | None = None) -> Tensor:
        """Causal over whole, right-padded rows, or as `mask` says: [B, T, D] -> [B, T, D]."""
        q, k, v = self.attention.project(self.input_norm(x_BTD), table)
        return self._after(x_BTD, attend(q, k, v, mask))

    def extend(
        self, x_BQD: Tensor, table: RopeTable, *, cache: KVCache, position_BQ: Tensor, width: int
    ) -> Tensor:
        """The same over a ragged piece at `position_BQ`, reading the first `width` cached keys."""
        q, k, v = self.attention.project(self.input_norm(x_BQD), table)
        cache.write(position_BQ, k, v)
        seen = attend(q, cache.k[:, :width], cache.v[:, :width], visible(position_BQ, width))
        return self._after(x_BQD, seen)
