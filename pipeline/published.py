"""EAGLE-3 folders as others publish them: their names, flags and layer ids, read into our draft.

Two layouts: that of the `speculators` package and vLLM (`transformer_layer_config`, `layers.0.*`),
and the flat one of the original repository, SpecForge and SGLang (`midlayer.*` or `layers.0.*`).
Shared by the exports, which write them, and by warm starts, which read what others wrote. `d2t` is
an offset there and absolute here; layer ids are `hidden_states` indices here and in speculators,
one less in the flat layout's `eagle_config` (draft_training.md §2.1, §2.2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.keys import Flag, KeyTable, Pieces, read_flags, read_tensors, same_shapes, unname
from pipeline.target import TargetSpec
from pipeline.vocab import from_offsets, kept, require_d2t, to_offsets
from storage.errors import DraftError
from storage.workspace import read_json

CONFIG = "config.json"
NUMBER = (int, float)
MAYBE_INT = (int, type(None))
# of the transformer layer itself, in both layouts; defaults are those of transformers' Llama
LAYER_FLAGS: Mapping[str, Flag] = {
    "model_type": Flag(str, only=("llama",)),
    "vocab_size": Flag(int),
    "hidden_size": Flag(int),
    "intermediate_size": Flag(int),
    "num_hidden_layers": Flag(int, only=(1,)),
    "num_attention_heads": Flag(int),
    "num_key_value_heads": Flag(MAYBE_INT, default=None),
    "head_dim": Flag(MAYBE_INT, default=None),
    "rms_norm_eps": Flag(NUMBER, default=1e-6),
    "rope_parameters.rope_theta": Flag(NUMBER, default=10_000.0),
    "rope_parameters.rope_type": Flag(str, only=("default",), default="default"),
    "hidden_act": Flag(str, only=("silu",), default="silu"),
    "max_position_embeddings": Flag(int, default=2048),
    "attention_bias": Flag(bool, only=(False,), default=False),
    "mlp_bias": Flag(bool, only=(False,), default=False),
}
SPECULATORS_FLAGS: Mapping[str, Flag] = {
    "architectures": Flag(list, default=None),
    "speculators_model_type": Flag(str, only=("eagle3",)),
    "speculators_version": Flag(str, default=""),
    "draft_vocab_size": Flag(int),
    # absent it means true to vLLM and false to speculators: never left out
    "norm_before_residual": Flag(bool),
    "norm_before_fc": Flag(bool, default=False),
    "fc_norm": Flag(bool, default=False),
    "norm_output": Flag(bool, default=False),
    "embed_requires_grad": Flag(bool, default=False),
    "target_hidden_size": Flag(MAYBE_INT, only=(None,), default=None),
    "eagle_aux_hidden_state_layer_ids": Flag((list, type(None)), default=None),
    "tie_word_embeddings": Flag(bool, only=(False,), default=False),
    "dtype": Flag(str, default=""),
    **{f"transformer_layer_config.{key}": flag for key, flag in LAYER_FLAGS.items()},
    "speculators_config.algorithm": Flag(str, only=("eagle3",)),
    "speculators_config.default_proposal_method": Flag(str, default="greedy"),
    "speculators_config.proposal_methods": Flag(list, default=None),
    "speculators_config.verifier.name_or_path": Flag((str, type(None)), default=None),
    "speculators_config.verifier.architectures": Flag(list, default=None),
}
# the original repository's: no norm but those of EAGLE-3, the target's layers by default
EAGLE_FLAGS: Mapping[str, Flag] = {
    "architectures": Flag(list, only=(["LlamaForCausalLMEagle3"],)),
    **LAYER_FLAGS,
    "rope_theta": Flag(NUMBER, default=None),
    "draft_vocab_size": Flag(int),
    "tie_word_embeddings": Flag(bool, only=(False,), default=False),
    "dtype": Flag(str, default=""),
}
SGLANG_FLAGS: Mapping[str, Flag] = {
    **EAGLE_FLAGS,
    "fc_norm": Flag(bool, default=False),
    "num_aux_hidden_states": Flag(int, default=3),
    "eagle_config.eagle_aux_hidden_state_layer_ids": Flag(list, default=None),
    "eagle_config.use_aux_hidden_state": Flag(bool, only=(True,), default=True),
}


@dataclass(frozen=True)
class Published:
    """A draft of kind `eagle3` as a folder holds it."""

    draft: Draft
    layers: list[int] | None
    """Layers that it fuses, `hidden_states` indices; None for the default of its layout."""


def default_layers(num_layers: int) -> list[int]:
    """What engines take where a folder names no layers: (2, n//2, n−3) of the target's n."""
    return [2, num_layers // 2, num_layers - 3]


def eagle3_keys(layer: str) -> KeyTable:
    """Our EAGLE-3 tensors under the published names; layer: `layers.0` or `midlayer`."""
    return {
        "embed": ("embed_tokens.weight",),
        "fused_norm.weight": ("input_norm.weight",),
        "layer_norms.{i}.weight": ("fc_norm.{i}.weight",),
        "fc.weight": ("fc.weight",),
        "input_norm.weight": (f"{layer}.input_layernorm.weight",),
        "hidden_norm.weight": (f"{layer}.hidden_norm.weight",),
        "attention.qkv.weight": (
            f"{layer}.self_attn.q_proj.weight",
            f"{layer}.self_attn.k_proj.weight",
            f"{layer}.self_attn.v_proj.weight",
        ),
        "attention.out.weight": (f"{layer}.self_attn.o_proj.weight",),
        "post_norm.weight": (f"{layer}.post_attention_layernorm.weight",),
        "mlp.gate_up.weight": (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
        "mlp.down.weight": (f"{layer}.mlp.down_proj.weight",),
        "norm.weight": ("norm.weight",),
        "head": ("lm_head.weight",),
    }


def pieces_of(draft: Any) -> Pieces:
    """The rows of q, k and v, which differ where key heads are shared."""
    return {f"attention.qkv.{what}": draft.attention.pieces for what in ("weight", "bias")}


def vocabulary_maps(d2t: Tensor | None, vocab_size: int) -> dict[str, Tensor]:
    """`d2t` as offsets and `t2d`, which a whole vocabulary does not have."""
    if d2t is None:
        return {}
    return {"d2t": to_offsets(d2t), "t2d": kept(d2t, vocab_size)}


def _draft_ids(
    tensors: dict[str, Tensor], size: int, vocab_size: int, *, place: Path, complete: bool
) -> Tensor | None:
    """Take `d2t` and `t2d` out of a folder's tensors and check them: our d2t, or None.

    Engines read `d2t` alone, so that others may leave `t2d` out.
    """
    expected = {} if size == vocab_size else {"d2t": [size], "t2d": [vocab_size]}
    maps: dict[str, Tensor] = {k: tensors.pop(k) for k in ("d2t", "t2d") if k in tensors}
    if not complete and "t2d" not in maps:
        expected.pop("t2d", None)
    same_shapes(place, maps, expected)
    d2t = require_d2t(from_offsets(maps["d2t"]) if maps else None, size, vocab_size)
    if d2t is None or "t2d" not in maps:
        return d2t
    if not torch.equal(kept(d2t, vocab_size), maps["t2d"].bool()):
        raise DraftError(
            found=f"{place}: t2d keeps other ids than d2t names",
            expected="one vocabulary",
            todo="bring the file back from where it was published",
        )
    return d2t


def _section(flags: Mapping[str, Any], prefix: str, layers: int) -> dict[str, Any]:
    """The section of kind `eagle3` that a folder's flags describe; depth is not among them."""
    layer = {key: flags[f"{prefix}{key}"] for key in LAYER_FLAGS}
    whole = flags["draft_vocab_size"] == layer["vocab_size"]
    return {
        "kind": "eagle3",
        "depth": 1,
        "lr_scale": 1.0,
        "steps_scale": 1.0,
        "num_heads": layer["num_attention_heads"],
        "num_kv_heads": layer["num_key_value_heads"],
        "head_size": layer["head_dim"],
        "intermediate_size": layer["intermediate_size"],
        "norm_before_residual": flags.get("norm_before_residual", False),
        "norm_before_fc": flags.get("norm_before_fc", False),
        "fc_norm": flags.get("fc_norm", False),
        "norm_output": flags.get("norm_output", False),
        "rope_theta": float(layer["rope_parameters.rope_theta"]),
        "norm_eps": float(layer["rms_norm_eps"]),
        "fused_layers": layers,
        "train_head": True,
        "draft_vocab_size": None if whole else flags["draft_vocab_size"],
    }


def _build(
    folder: Path,
    section: Mapping[str, Any],
    *,
    table: KeyTable,
    sizes: tuple[int, int, int],
    embed: Tensor | None,
    complete: bool,
) -> Draft:
    """The draft of a section, filled from a folder's tensors; sizes: V, Vd, D."""
    vocab_size, draft_size, width = sizes
    module, place, tensors = find("eagle3"), folder / "model.safetensors", read_tensors(folder)
    config = parse(f"{folder / CONFIG}", section, module.Config)
    if embed is not None:
        tensors.setdefault("embed_tokens.weight", embed)
    d2t = _draft_ids(tensors, draft_size, vocab_size, place=place, complete=complete)
    draft = module.Model(
        config, torch.zeros(vocab_size, width), head=torch.zeros(draft_size, width), d2t=d2t
    )
    like = {name: tensor for name, tensor in draft.state_dict().items() if name != "d2t"}
    found = unname(tensors, like, table, pieces=pieces_of(draft), place=place)
    for name, tensor in found.items():
        like[name].copy_(tensor)
    return draft


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE as transformers 5 writes it, from the two keys of transformers 4."""
    if "rope_parameters" in config:
        return config
    config = dict(config)
    theta, scaling = config.pop("rope_theta", None), config.pop("rope_scaling", None)
    rope = {} if theta is None else {"rope_theta": theta}
    return {**config, "rope_parameters": {**rope, **(scaling or {})}}


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise DraftError(
            found=f"no {folder / CONFIG}",
            expected="a published draft's folder",
            todo="correct the path or complete the folder",
        )
    return read_json(folder / CONFIG)


def read_speculators(folder: Path, *, complete: bool, embed: Tensor | None = None) -> Published:
    """A folder of the speculators layout; complete: as our own export writes it.

    embed: the target's, for a folder that leaves it out.
    """
    config, place = _read_config(folder), folder / CONFIG
    layer = config.get("transformer_layer_config")
    if isinstance(layer, Mapping):
        config["transformer_layer_config"] = _modern(dict(layer))
    flags = read_flags(config, SPECULATORS_FLAGS, place=place, complete=complete)
    layers = flags["eagle_aux_hidden_state_layer_ids"]
    prefix = "transformer_layer_config."
    section = _section(flags, prefix, len(layers or [0] * 3))
    sizes = flags[f"{prefix}vocab_size"], flags["draft_vocab_size"], flags[f"{prefix}hidden_size"]
    keys = eagle3_keys("layers.0")
    draft = _build(folder, section, table=keys, sizes=sizes, embed=embed, complete=complete)
    return Published(draft, layers)


def read_flat(
    folder: Path,
    *,
    flags: Mapping[str, Flag],
    layer: str,
    complete: bool,
    embed: Tensor | None = None,
) -> Published:
    """A folder of the flat layout; flags: `EAGLE_FLAGS` or `SGLANG_FLAGS`."""
    config = _modern(_read_config(folder))
    values = read_flags(config, flags, place=folder / CONFIG, complete=complete)
    theta = values["rope_parameters.rope_theta"]
    if values["rope_theta"] not in (None, theta):
        raise DraftError(
            found=f"{folder / CONFIG}: rope_theta is {values['rope_theta']}",
            expected=f"{theta}, as rope_parameters says",
            todo="correct the file",
        )
    ids = values.get("eagle_config.eagle_aux_hidden_state_layer_ids")
    section = _section(values, "", values.get("num_aux_hidden_states", 3))
    sizes = values["vocab_size"], values["draft_vocab_size"], values["hidden_size"]
    keys = eagle3_keys(layer)
    draft = _build(folder, section, table=keys, sizes=sizes, embed=embed, complete=complete)
    return Published(draft, None if ids is None else input_index(ids))


def output_index(layers: Sequence[int]) -> list[int]:
    """`hidden_states` indices as the flat layout counts: id i is the stream after layer i."""
    return [layer - 1 for layer in layers]


def input_index(ids: Sequence[int]) -> list[int]:
    """The flat layout's ids as `hidden_states` indices."""
    return [layer + 1 for layer in ids]


def read_eagle3(folder: Path, embed: Tensor | None = None) -> Published:
    """A published EAGLE-3 folder of either layout; `DraftError` says what in it does not fit.

    embed: the target's, which most folders leave out because engines share it.
    """
    config = _read_config(folder)
    if "speculators_model_type" in config:
        return read_speculators(folder, complete=False, embed=embed)
    if "LlamaForCausalLMEagle3" not in config.get("architectures", []):
        raise DraftError(
            found=f"{folder} with architectures {config.get('architectures')}",
            expected="an EAGLE-3 folder of the speculators layout or of the original one",
            todo="name another folder under drafts.*.start",
        )
    middle = any(name.startswith("midlayer.") for name in read_tensors(folder))
    flags = SGLANG_FLAGS if "eagle_config" in config or "fc_norm" in config else EAGLE_FLAGS
    layer = "midlayer" if middle else "layers.0"
    return read_flat(folder, flags=flags, layer=layer, complete=False, embed=embed)


def flat_config(draft: Any, spec: TargetSpec, dtype: str) -> dict[str, Any]:
    """The flat layout's `config.json` of a draft."""
    config, attention = draft.config, draft.attention
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "draft_vocab_size": spec.vocab_size if draft.d2t is None else len(draft.d2t),
        "hidden_size": spec.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4 and engines that read it there
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "max_position_embeddings": spec.context_tokens,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
