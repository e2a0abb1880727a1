"""EAGLE-3: one layer over fused hidden states of the target, unrolled on its own outputs.

At anchor j and step k = 0 … S−1 (draft_training.md §3.1, arXiv:2503.01840):

    f = fc(g_j) at step 0, then its own output at the same j      g: L captured layers, concatenated
    e = RMS_in(E x_{j+1+k}),  h = RMS_hid(f),  q, k, v from [e; h]
    r = (h if norm_before_residual else f) + Attn,  out = r + SwiGLU(RMS_post r)
    logits = W_head RMS(out), drafting x_{j+2+k};  state passed on: out, or RMS(out) if norm_output

What a step attends to is `pipeline.unroll`'s: step-0 keys of indices ≤ j, its own steps at j.

Options: `norm_before_fc` norms all of g before fc, `fc_norm` each captured layer of it;
`train_head` trains a copy of the target's head, which else stays frozen, as the embedding always
does. `depth` S is what training unrolls; replay and decoding may go deeper.

Dims as in `pipeline.draft`; n captured layers of width D in g.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.blocks import (
    NORM_EPS,
    ROPE_THETA,
    Attention,
    Linear,
    RMSNorm,
    SwiGLU,
    draw,
    take_rows,
)
from pipeline.config import Gamma
from pipeline.draft import DraftConfig, Needs, require_interface
from pipeline.interface import Interface, Shape
from pipeline.seeds import generator
from pipeline.unroll import Unrolled, require_heads
from pipeline.vocab import require_d2t
from storage.errors import DraftError


class Config(DraftConfig):
    """Section `drafts.<name>` of kind `eagle3`."""

    kind: Literal["eagle3"]
    depth: Gamma
    num_heads: Annotated[int, Field(gt=0)]
    intermediate_size: Annotated[int, Field(gt=0)]
    norm_before_residual: bool
    norm_before_fc: bool
    norm_output: bool
    fc_norm: bool = False
    num_kv_heads: Annotated[int, Field(gt=0)] | None = None
    """G; None for one of each head's own."""
    head_size: Annotated[int, Field(gt=0)] | None = None
    """C; None for the width over the heads."""
    rope_theta: Annotated[float, Field(gt=0)] = ROPE_THETA
    norm_eps: Annotated[float, Field(gt=0)] = NORM_EPS
    fused_layers: Annotated[int, Field(gt=0)] = 3
    """L: how many captured layers `fc` fuses."""
    train_head: bool = False
    draft_vocab_size: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_norm_before_fc(self) -> "Config":
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other: set one of them")
        return self


class Model(Unrolled):
    """fc, one layer on [embedding; feature], norm and head."""

    def __init__(
        self, config: Config, embed: Tensor, *, head: Tensor, d2t: Tensor | None = None
    ) -> None:
        super().__init__(d2t)
        self.config, self.rope_theta = config, config.rope_theta
        size, eps = embed.shape[1], config.norm_eps
        fused = config.fused_layers * size
        self.embed = nn.Parameter(embed, requires_grad=False)
        self.fused_norm = RMSNorm(fused, eps=eps) if config.norm_before_fc else None
        norms = [RMSNorm(size, eps=eps) for _ in range(config.fused_layers)]
        self.layer_norms = nn.ModuleList(norms) if config.fc_norm else None
        self.fc = Linear(fused, size)
        self.input_norm = RMSNorm(size, eps=eps)
        self.hidden_norm = RMSNorm(size, eps=eps)
        self.attention = Attention(
            size,
            config.num_heads,
            in_size=2 * size,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
        )
        self.post_norm = RMSNorm(size, eps=eps)
        self.mlp = SwiGLU(size, config.intermediate_size)
        self.norm = RMSNorm(size, eps=eps)
        head = head.clone() if config.train_head else head
        self.head = nn.Parameter(head, requires_grad=config.train_head)

    @staticmethod
    def needs(config: Config) -> Needs:
        """L captured layers at every token, the embedding and the head."""
        return Needs(num_layers=config.fused_layers, interface=True)

    @staticmethod
    def max_depth(config: Config) -> int | None:
        """No limit: it runs on its own output."""
        return None

    @staticmethod
    def loss_depth(config: Config) -> int:
        """S."""
        return config.depth

    @classmethod
    def build(
        cls,
        config: Config,
        shape: Shape,
        interface: Interface | None,
        seed: int,
        *,
        d2t: Tensor | None = None,
    ) -> "Model":
        """A fresh layer from `seed` between the target's embedding and head."""
        target = require_interface("eagle3", shape, interface)
        require_heads(
            shape.hidden_size,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
        )
        d2t = require_d2t(d2t, config.draft_vocab_size, shape.vocab_size)
        head = target.lm_head if d2t is None else target.lm_head[d2t]
        model = cls(config, target.embed, head=head, d2t=d2t)
        stream = generator(seed, "draft", "eagle3")
        for part in (model.fc, model.attention, model.mlp):
            draw(part, stream)
        return model

    def _start(self, hidden: Tensor | None, last_hidden: Tensor | None) -> Tensor:
        """Fuse captured layers [..., L, D] into f [..., D]."""
        layers = 0 if hidden is None else hidden.shape[-2]
        if hidden is None or layers != self.config.fused_layers:
            raise DraftError(
                found=f"a cache with {layers} hidden layers for a draft of kind eagle3",
                expected=f"the {self.config.fused_layers} that it fuses",
                todo="set capture.hidden_layers to as many and run dvc repro capture",
            )
        hidden = hidden.to(self.fc.weight.dtype)
        if self.layer_norms is not None:
            layered = zip(self.layer_norms, hidden.unbind(-2), strict=True)
            hidden = torch.stack([norm(layer) for norm, layer in layered], dim=-2)
        g = hidden.flatten(-2)
        fused: Tensor = self.fc(g if self.fused_norm is None else self.fused_norm(g))
        return fused

    def _inputs(self, token: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """[e; h] [..., 2D], and what the residual stream starts from [..., D]."""
        h = self.hidden_norm(feature)
        e = self.input_norm(take_rows(self.embed, token))
        return torch.cat([e, h], dim=-1), h if self.config.norm_before_residual else feature

    def _state(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: the state that is passed on, [B, A, D]."""
        r = residual + self.attention.out(attended)
        out = r + self.mlp(self.post_norm(r))
        return self.norm(out) if self.config.norm_output else out

    def _read(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return state if self.config.norm_output else self.norm(state), self.head
