"""DeepSeek-V3's layer: latent attention and routed experts, for drafts that begin as its own MTP.

Latent attention (MLA, arXiv:2405.04434) makes queries, keys and values of low-rank projections; one
rotated key is shared by all heads. Here it is unfolded to ordinary heads at once, because a draft
of one layer has little to cache. Experts (arXiv:2412.19437) are chosen by sigmoid scores, a few
groups first, with a bias that no gradient moves. Numbers are those of transformers'
`deepseek_v3`. Knows no draft and no file.

Dims as in `pipeline.blocks`; C channels of a query and key, of which R are turned, Cv of a value;
E experts, N tokens, I inner width of an expert.
"""

from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from pydantic import Field
from torch import Tensor, nn

from pipeline.blocks import Linear, RMSNorm, RopeTable, SwiGLU, rotate
from pipeline.config import Strict

Size = Annotated[int, Field(gt=0)]


class LatentConfig(Strict):
    """Shape of latent attention; transformers' names beside ours."""

    query_rank: Size
    """`q_lora_rank`"""
    key_rank: Size
    """`kv_lora_rank`"""
    rotary_size: Annotated[int, Field(gt=0, multiple_of=2)]
    """R: `qk_rope_head_dim`"""
    plain_size: Size
    """C − R: `qk_nope_head_dim`"""
    value_size: Size
    """Cv: `v_head_dim`"""
    interleaved: bool
    """`rope_interleave`: whether neighbours turn together, not channels of two halves."""


class ExpertsConfig(Strict):
    """Shape of routed experts; transformers' names beside ours."""

    count: Size
    """E: `n_routed_experts`"""
    per_token: Size
    """`num_experts_per_tok`"""
    groups: Size
    """`n_group`"""
    groups_per_token: Size
    """`topk_group`"""
    inner_size: Size
    """I: `moe_intermediate_size`"""
    shared: Size
    """`n_shared_experts`: always asked, one SwiGLU of as many times I."""
    scale: Annotated[float, Field(gt=0)]
    """`routed_scaling_factor`"""
    normed: bool
    """`norm_topk_prob`: whether the chosen scores are made to sum to 1."""


class LatentAttention(nn.Module):
    """Multi-head latent attention, unfolded: q and k [.., H, C], v [.., H, Cv]."""

    def __init__(self, size: int, num_heads: int, shape: LatentConfig, *, scale: float = 1.0):
        """scale: of the scores beside 1/√C (YaRN's mscale², `Rotary.score_scale`)."""
        super().__init__()
        self.num_heads = self.num_kv_heads = num_heads
        self.shape, self.scale = shape, scale
        self.rotary_size, self.value_size = shape.rotary_size, shape.value_size
        self.head_size = shape.plain_size + shape.rotary_size
        self.query_down = Linear(size, shape.query_rank)
        self.query_norm = RMSNorm(shape.query_rank)  # its eps is 1e-6 whatever the model's
        self.query_up = Linear(shape.query_rank, num_heads * self.head_size)
        self.key_down = Linear(size, shape.key_rank + shape.rotary_size)
        self.key_norm = RMSNorm(shape.key_rank)
        self.key_up = Linear(shape.key_rank, num_heads * (shape.plain_size + shape.value_size))
        self.out = Linear(num_heads * shape.value_size, size)

    @property
    def like(self) -> Tensor:
        """A weight, for its dtype and device."""
        return self.key_down.weight.data

    @property
    def pieces(self) -> tuple[int, ...]:
        """No matrix is shared by q, k and v."""
        return ()

    def _turned(self, x: Tensor, table: RopeTable) -> Tensor:
        if self.shape.interleaved:
            x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
        return rotate(x, table)

    def queries(self, x_BQD: Tensor, table: RopeTable) -> Tensor:
        """[B, Q, H, C]"""
        latent = self.query_norm(self.query_down(x_BQD))
        q = self.query_up(latent).unflatten(-1, (self.num_heads, -1))
        plain, turned = q.split([self.shape.plain_size, self.rotary_size], dim=-1)
        return torch.cat([plain, self._turned(turned, table)], dim=-1) * self.scale

    def keys_values(self, x_BWD: Tensor, table: RopeTable) -> tuple[Tensor, Tensor]:
        """[B, W, H, C] and [B, W, H, Cv]"""
        latent, turned = self.key_down(x_BWD).split([self.shape.key_rank, self.rotary_size], dim=-1)
        up = self.key_up(self.key_norm(latent)).unflatten(-1, (self.num_heads, -1))
        plain, v = up.split([self.shape.plain_size, self.value_size], dim=-1)
        shared = self._turned(turned[..., None, :], table).expand(*plain.shape[:-1], -1)
        return torch.cat([plain, shared], dim=-1), v

    def project(self, x_BQD: Tensor, table: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the same tokens."""
        return self.queries(x_BQD, table), *self.keys_values(x_BQD, table)


class Experts(nn.Module):
    """Σ over a token's experts of score · SwiGLU, and a shared SwiGLU.

    Matrices of all experts lie in one tensor, an expert's rows together: gate, then up.
    """

    correction: Tensor
    """[E] what is added to a score before the choice; a buffer, as no gradient moves it."""

    def __init__(self, size: int, shape: ExpertsConfig) -> None:
        super().__init__()
        self.shape = shape
        self.router = Linear(size, shape.count)
        self.register_buffer("correction", torch.zeros(shape.count))
        self.gate_up = nn.Parameter(torch.empty(shape.count * 2 * shape.inner_size, size))
        self.down = nn.Parameter(torch.empty(shape.count * size, shape.inner_size))
        self.shared = SwiGLU(size, shape.shared * shape.inner_size)

    def chosen(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts [N, k] and their scores [N, k]; in float32 or wider."""
        shape = self.shape
        wide = x_ND if x_ND.dtype == torch.float64 else x_ND.float()
        with torch.autocast(x_ND.device.type, enabled=False):
            score_NE = F.linear(wide, self.router.weight.to(wide.dtype)).sigmoid()
        rank_NE = score_NE + self.correction
        grouped = rank_NE.unflatten(-1, (shape.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1)
        kept = best.topk(shape.groups_per_token, dim=-1).indices
        open_NG = torch.zeros_like(best, dtype=torch.bool).scatter_(1, kept, value=True)
        rank_NE = grouped.masked_fill(~open_NG[..., None], -torch.inf).flatten(1)
        expert = rank_NE.topk(shape.per_token, dim=-1).indices
        score = score_NE.gather(1, expert)
        if shape.normed:
            score = score / (score.sum(-1, keepdim=True) + 1e-20)
        return expert, score * shape.scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x_ND = x.flatten(0, -2)
        expert, score = self.chosen(x_ND)
        gate_up = self.gate_up.unflatten(0, (self.shape.count, -1))
        down = self.down.unflatten(0, (self.shape.count, -1))
        out = torch.zeros_like(x_ND)
        for e in expert.unique().tolist():
            token, place = (expert == e).nonzero(as_tuple=True)
            gate, up = F.linear(x_ND[token], gate_up[e]).chunk(2, dim=-1)
            own = F.linear(F.silu(gate) * up, down[e]) * score[token, place, None]
            out = out.index_add(0, token, own.to(out.dtype))
        shared: Tensor = self.shared(x)
        return shared + out.view(x.shape)
