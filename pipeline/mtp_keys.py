"""Multi-token-prediction modules under the names of those who publish them.

Ours has one order of the projected input, [embedding; hidden], and one matrix of q, k and v. Three
layouts are known: `deepseek` (DeepSeek, GLM; `model.layers.{n}.` in a target's own files; dense,
or with DeepSeek-V3's latent attention and experts), `mimo` (`model.mtp_layers.0.`, its projection
takes [hidden; embedding]) and `speculators` (the package's own, `mtp_layers.0.`); the latter two of
dense modules. Knows no file (draft_training.md §2.5).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.keys import KeyTable, Pieces, rename, unname

_BLOCK: KeyTable = {
    "input_norm.weight": ("input_layernorm.weight",),
    **{
        f"attention.qkv.{what}": tuple(f"self_attn.{x}_proj.{what}" for x in "qkv")
        for what in ("weight", "bias")
    },
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "post_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}
_LATENT: KeyTable = {
    "attention.query_down.weight": ("self_attn.q_a_proj.weight",),
    "attention.query_norm.weight": ("self_attn.q_a_layernorm.weight",),
    "attention.query_up.weight": ("self_attn.q_b_proj.weight",),
    "attention.key_down.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attention.key_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "attention.key_up.weight": ("self_attn.kv_b_proj.weight",),
}
_FASTMTP: KeyTable = {
    "token_norm.weight": ("token_layernorm.weight",),
    "hidden_norm.weight": ("hidden_layernorm.weight",),
    "project.weight": ("input_proj.weight",),
    "norm.weight": ("final_layernorm.weight",),
    **_BLOCK,
}
LAYOUTS: Mapping[str, KeyTable] = {
    "deepseek": {
        "token_norm.weight": ("enorm.weight",),
        "hidden_norm.weight": ("hnorm.weight",),
        "project.weight": ("eh_proj.weight",),
        "norm.weight": ("shared_head.norm.weight",),
        **_BLOCK,
        **_LATENT,
    },
    "mimo": _FASTMTP,
    "speculators": _FASTMTP,
}
# copies of the target's embedding and head that a module may carry
SHARED = {"embed_tokens.weight": "embed", "shared_head.head.weight": "lm_head"}


# rows and columns of a block of DeepSeek-V3's 8-bit weights, which share a scale
FP8_BLOCK = 128


def _table(layout: str, state: Mapping[str, Tensor]) -> KeyTable:
    """A layout's names; of the module's experts too, where it has them."""
    table = LAYOUTS[layout]
    if layout != "deepseek" or "mlp.router.weight" not in state:
        return table
    expert = range(len(state["mlp.router.weight"]))
    place = "mlp.experts.{e}.{what}_proj.weight"
    return {
        **table,
        "mlp.router.weight": ("mlp.gate.weight",),
        "mlp.correction": ("mlp.gate.e_score_correction_bias",),
        "mlp.gate_up": tuple(place.format(e=e, what=x) for e in expert for x in ("gate", "up")),
        "mlp.down": tuple(place.format(e=e, what="down") for e in expert),
        "mlp.shared.gate_up.weight": tuple(
            f"mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up")
        ),
        "mlp.shared.down.weight": ("mlp.shared_experts.down_proj.weight",),
    }


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, 8-bit matrices multiplied by the scales of their blocks (DeepSeek-V3's files)."""
    wide = {name: x for name, x in tensors.items() if not name.endswith("_scale_inv")}
    for name in tensors.keys() - wide.keys():
        matrix = wide[name.removesuffix("_scale_inv")]
        scale = tensors[name].repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        rows, columns = matrix.shape
        wide[name.removesuffix("_scale_inv")] = matrix.float() * scale[:rows, :columns]
    return wide


def _swap(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The projection's columns in the other order where a layout has them so; its own inverse."""
    if layout == "mimo":
        name = next(name for name in ("project.weight", "input_proj.weight") if name in state)
        state[name] = torch.cat(state[name].chunk(2, dim=1)[::-1], dim=1)
    return state


def to_layout(
    state: Mapping[str, Tensor], layout: str, *, pieces: Pieces, prefix: str
) -> dict[str, Tensor]:
    """Our module's tensors under a layout's names."""
    named = _swap(rename(state, _table(layout, state), pieces=pieces), layout)
    return {f"{prefix}{name}": tensor for name, tensor in named.items()}


def from_layout(
    tensors: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    layout: str,
    *,
    pieces: Pieces,
    place: Path,
    prefix: str = "",
) -> dict[str, Tensor]:
    """A layout's tensors under our names; `DraftError` names the first that does not fit."""
    table = _table(layout, like)
    found = unname(tensors, like, table, pieces=pieces, place=place, prefix=prefix)
    return _swap(found, layout)
