"""MTP: one decoder layer over the target's last hidden state, reused for every depth.

At anchor j and step k = 0 … S−1 (draft_training.md §3.4, arXiv:2412.19437, arXiv:2509.18362):

    u = W_p [RMS_e(E x_{j+1+k}); RMS_h(h^{(k-1)})],   h^{(-1)} = y_j, the target's last hidden state
    r = u + Attn(RMS_in u),  out = r + SwiGLU(RMS_post r),  h^{(k)} = RMS(out)
    logits = W_head h^{(k)}, the target's own head, drafting x_{j+2+k}

`attention: step0` trains as it is served: step k sees the step-0 keys of indices ≤ j and its own
steps at j (`pipeline.unroll`). `per_step` is what the `speculators` package trains: at every step a
fresh causal pass over that step's own keys, positions not advanced; decoding has no such cache, so
that only depth 0 equals its training.

`init: target` begins with the target's own module, of whose shape the target's settings and the
section must agree: a dense one, or DeepSeek-V3's (`latent` attention, `experts` in place of one
SwiGLU). Its rotary angles are the target's, YaRN and the like included.

Dims as in `pipeline.draft`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.blocks import (
    Attention,
    Linear,
    RMSNorm,
    Rotary,
    SwiGLU,
    attend,
    draw,
    take_rows,
    visible,
)
from pipeline.config import Gamma
from pipeline.deepseek import Experts, ExpertsConfig, LatentAttention, LatentConfig
from pipeline.draft import DraftConfig, Needs, require_interface, require_last_hidden
from pipeline.interface import Interface, Mtp, Shape
from pipeline.mtp_keys import LAYOUTS, SHARED, from_layout, widened
from pipeline.seeds import generator
from pipeline.unroll import Unrolled, require_heads
from pipeline.vocab import require_d2t
from storage.errors import DraftError


class Config(DraftConfig):
    """Section `drafts.<name>` of kind `mtp`."""

    kind: Literal["mtp"]
    depth: Gamma
    init: Literal["fresh", "target"]
    """`target`: the weights of the target's own module."""
    attention: Literal["step0", "per_step"]
    num_heads: Annotated[int, Field(gt=0)]
    num_kv_heads: Annotated[int, Field(gt=0)] | None
    """G; None for one of each head's own."""
    head_size: Annotated[int, Field(gt=0)] | None
    """C; None for the width over the heads."""
    intermediate_size: Annotated[int, Field(gt=0)] | None
    """I; null with `experts`, which have their own."""
    qk_norm: bool
    """Whether each head of q and k is normed (Qwen3)."""
    qkv_bias: bool
    """Whether q, k and v have a bias (Qwen2, MiMo)."""
    rope_theta: Annotated[float, Field(gt=0)]
    norm_eps: Annotated[float, Field(gt=0)]
    draft_vocab_size: Annotated[int, Field(gt=0)] | None = None
    latent: LatentConfig | None = None
    """DeepSeek's attention: no `num_kv_heads`, `head_size`, `qk_norm` or `qkv_bias` with it."""
    experts: ExpertsConfig | None = None

    @model_validator(mode="after")
    def _what_is_set_is_read(self) -> "Config":
        plain = {
            name: getattr(self, name)
            for name in ("num_kv_heads", "head_size", "qk_norm", "qkv_bias")
            if getattr(self, name)
        }
        if self.latent is not None and plain:
            raise ValueError(f"no {', '.join(plain)} with latent, which does not read it")
        if (self.experts is None) == (self.intermediate_size is None):
            raise ValueError("intermediate_size or experts, and not both")
        return self


class Model(Unrolled):
    """Projection of [embedding; hidden], one layer, a norm, and the target's head."""

    mlp: SwiGLU | Experts

    def __init__(
        self,
        config: Config,
        embed: Tensor,
        *,
        head: Tensor,
        d2t: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__(d2t)
        self.config, self.rope_theta, self.rotary = config, config.rope_theta, rotary
        size, eps = embed.shape[1], config.norm_eps
        self.embed = nn.Parameter(embed, requires_grad=False)
        self.token_norm = RMSNorm(size, eps=eps)
        self.hidden_norm = RMSNorm(size, eps=eps)
        self.project = Linear(2 * size, size)
        self.input_norm = RMSNorm(size, eps=eps)
        if config.latent is not None:
            scale = 1.0 if rotary is None else rotary.score_scale
            self.attention = LatentAttention(size, config.num_heads, config.latent, scale=scale)
        else:
            self.attention = Attention(
                size,
                config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_size=config.head_size,
                qkv_bias=config.qkv_bias,
                qk_norm_eps=eps if config.qk_norm else None,
            )
        self.post_norm = RMSNorm(size, eps=eps)
        if config.experts is not None:
            self.mlp = Experts(size, config.experts)
        else:
            assert config.intermediate_size is not None
            self.mlp = SwiGLU(size, config.intermediate_size)
        self.norm = RMSNorm(size, eps=eps)
        self.head = nn.Parameter(head, requires_grad=False)

    @staticmethod
    def needs(config: Config) -> Needs:
        """The last hidden state at every token, the embedding and the head."""
        return Needs(last_hidden=True, interface=True)

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
        """A layer drawn from `seed`, or the target's own; `DraftError` where it has none."""
        target = require_interface("mtp", shape, interface)
        if config.latent is None:
            require_heads(
                shape.hidden_size,
                config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_size=config.head_size,
            )
        d2t = require_d2t(d2t, config.draft_vocab_size, shape.vocab_size)
        head = target.lm_head if d2t is None else target.lm_head[d2t]
        own = _own_module(target) if config.init == "target" else None
        rotary = None if own is None else own_rotary(own)
        model = cls(config, target.embed, head=head, d2t=d2t, rotary=rotary)
        if own is not None:
            model._take(own, target)
        else:
            stream = generator(seed, "draft", "mtp")
            for part in (model.project, model.attention, model.mlp):
                draw(part, stream)
        return model

    @property
    def module(self) -> dict[str, Tensor]:
        """The module alone: what its publishers store."""
        outside = ("d2t", "embed", "head")
        return {k: v for k, v in self.state_dict().items() if k not in outside}

    def _take(self, own: Mtp, target: Interface) -> None:
        """Fill the module from the target's; `DraftError` where shape or settings differ."""
        same_settings(self, own)
        tensors = widened(own.tensors)
        for theirs, ours in SHARED.items():
            copy = tensors.pop(theirs, None)
            if copy is not None and not torch.equal(copy, getattr(target, ours)):
                raise DraftError(
                    found=f"a target whose MTP module has a {theirs} of its own",
                    expected=f"a copy of the target's {ours}, which the draft uses",
                    todo="set init: fresh for this target",
                )
        pieces = {f"attention.qkv.{what}": self.attention.pieces for what in ("weight", "bias")}
        place, module = Path("target/interface/mtp.safetensors"), self.module
        found = from_layout(tensors, module, own.layout, pieces=pieces, place=place)
        for name, tensor in found.items():
            module[name].copy_(tensor)

    def _start(self, hidden: Tensor | None, last_hidden: Tensor | None) -> Tensor:
        return require_last_hidden("mtp", last_hidden).to(self.project.weight.dtype)

    def _residual(self, token: Tensor, feature: Tensor) -> Tensor:
        """U [..., D]."""
        e = self.token_norm(take_rows(self.embed, token))
        u: Tensor = self.project(torch.cat([e, self.hidden_norm(feature)], dim=-1))
        return u

    def _inputs(self, token: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        u = self._residual(token, feature)
        return self.input_norm(u), u

    def _state(self, residual: Tensor, attended: Tensor) -> Tensor:
        r = residual + self.attention.out(attended)
        state: Tensor = self.norm(r + self.mlp(self.post_norm(r)))
        return state

    def _read(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return state, self.head

    def training_states(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Unrolled` does, or a causal pass of its own for every step."""
        if self.config.attention == "step0":
            yield from super().training_states(batch, depth)
            return
        state = self._start(batch.hidden, batch.last_hidden)
        table, mask = self._table(batch.position), None
        if batch.first is not None:
            num_tokens = batch.tokens.shape[1]
            index = torch.arange(num_tokens, device=state.device).expand_as(batch.first)
            mask = visible(index, num_tokens, batch.first)

        def step(tokens: Tensor, before: Tensor) -> Tensor:
            x, residual = self._inputs(tokens, before)
            return self._state(residual, attend(*self.attention.project(x, table), mask))

        for k in range(depth):
            # the last k indices have no token of that step; nobody that is supervised sees them
            state = self._run(step, batch.tokens.roll(-1 - k, dims=1), state)
            yield self._read(take_rows(state.flatten(0, 1), batch.pairs(k).anchor))


def _own_module(target: Interface) -> Mtp:
    """The target's MTP module; `DraftError` where it has none or none that we can run."""
    if target.mtp is None:
        raise DraftError(
            found="a target without a multi-token-prediction module of its own",
            expected="one, because the draft asks for init: target",
            todo="set init: fresh under drafts in params.yaml",
        )
    own = target.mtp()
    if own.layout not in LAYOUTS:
        raise DraftError(
            found=f"a target whose MTP module has the names of {own.layout}, with gated attention "
            "that no draft here computes",
            expected="a module of one of " + ", ".join(k for k in LAYOUTS if k != "speculators"),
            todo="set init: fresh under drafts in params.yaml",
        )
    return own


def own_rotary(own: Mtp) -> Rotary | None:
    """The target's angles; None where they are those of its base alone."""
    found = own.settings.get("rotary")
    if found is None:
        return None
    return Rotary(tuple(found["inv_freq"]), found["scale"], found["score_scale"])


def same_settings(draft: Model, own: Mtp) -> None:
    """`DraftError` where a draft's shape is not that of the target's module."""
    config, theirs = draft.config, dict(own.settings)
    if theirs.get("num_kv_heads") is None and theirs.get("latent") is None:
        theirs["num_kv_heads"] = theirs.get("num_heads")
    latent = config.latent is not None
    ours = {
        "latent": config.latent and config.latent.model_dump(),
        "experts": config.experts and config.experts.model_dump(),
        "num_heads": config.num_heads,
        "num_kv_heads": None if latent else draft.attention.num_kv_heads,
        "head_size": None if latent else draft.attention.head_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_type": theirs.get("rope_type") if draft.rotary else "default",
        "partial_rotary_factor": 1.0,
        "norm_eps": config.norm_eps,
    }
    for name, value in ours.items():
        said = theirs.get(name)
        if said != value and (said is not None or name in ("latent", "experts")):
            raise DraftError(
                found=f"{name} {value} for a target whose MTP module has {said}",
                expected="the target's own, because the draft is to be its module",
                todo=f"correct drafts.*.{name} in params.yaml, or set init: fresh",
            )
