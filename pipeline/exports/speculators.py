"""`speculators`: the folder that the speculators package and vLLM read, of `eagle3` and `mtp`.

EAGLE-3: layer ids are `hidden_states` indices, as ours; `d2t` becomes an offset. vLLM takes an
absent `norm_before_residual` for true and the package for false: it is always written. MTP: of a
module shaped as Qwen3's; embedding and head stay the target's, and the package trains another
attention than serving has (`attention: per_step`). draft_training.md §2.1, §2.5.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import parse
from pipeline.draft import Draft, find, require_interface
from pipeline.export import (
    ExportConfig,
    Source,
    ascending,
    own_tensors,
    same_logits,
    save_tensors,
    write_card,
)
from pipeline.interface import Interface, Shape
from pipeline.keys import Flag, read_flags, read_tensors, rename
from pipeline.mtp_keys import from_layout, to_layout
from pipeline.published import (
    LAYER_FLAGS,
    eagle3_keys,
    pieces_of,
    read_speculators,
    vocabulary_maps,
)
from storage.errors import ConfigError, DraftError
from storage.workspace import read_json, write_json

KINDS = ("eagle3", "mtp")
VERSION = "0.9.0"  # of the package whose format this is
MTP_PREFIX = "mtp_layers.0."
MTP_FLAGS: Mapping[str, Flag] = {
    "architectures": Flag(list, only=(["MTPDraftModel"],)),
    "speculators_model_type": Flag(str, only=("mtp",)),
    "speculators_version": Flag(str),
    "num_nextn_predict_layers": Flag(int, only=(1,)),
    "tie_word_embeddings": Flag(bool, only=(False,)),
    "dtype": Flag(str),
    **{
        f"transformer_layer_config.{key}": flag
        for key, flag in LAYER_FLAGS.items()
        if key != "mlp_bias"  # which Qwen3 does not know
    },
    "transformer_layer_config.model_type": Flag(str, only=("qwen3",)),
    "speculators_config.algorithm": Flag(str, only=("mtp",)),
    "speculators_config.default_proposal_method": Flag(str, only=("greedy",)),
    "speculators_config.proposal_methods": Flag(list),
    "speculators_config.verifier.name_or_path": Flag(str),
    "speculators_config.verifier.architectures": Flag(list),
}
USAGE = """
A folder of the speculators format, which vLLM reads:

```shell
vllm serve TARGET --speculative-config '{"model": "FOLDER", "num_speculative_tokens": GAMMA}'
```

Set vLLM's `draft_sample_method` to a probabilistic one at T > 0: it drafts greedily by default, and
this draft was trained for rejection sampling.
"""
MTP_USAGE = """
A folder of the speculators format; embedding and head are the target's. vLLM reads the target's
native key names instead: the package's `stitch-mtp`, or our format `native`.
"""


def require(config: Any) -> None:
    """`ConfigError` for an MTP module that the package has no class for."""
    if config.kind != "mtp":
        return
    if config.latent is not None or config.experts is not None:
        raise ConfigError(
            found="an mtp draft with latent attention or experts for the format speculators",
            expected="a module as Qwen3 has it, over the whole vocabulary",
            todo="export the format native, or train a module without latent and experts",
        )
    for wrong, found, todo in (
        (not config.qk_norm, "qk_norm false", "set qk_norm: true"),
        (config.qkv_bias, "qkv_bias true", "set qkv_bias: false"),
        (config.draft_vocab_size is not None, "a pruned vocabulary", "remove draft_vocab_size"),
    ):
        if wrong:
            raise ConfigError(
                found=f"an mtp draft with {found} for the format speculators",
                expected="a module as Qwen3 has it, over the whole vocabulary",
                todo=f"{todo}, or export another format",
            )


def _layer(draft: Any, source: Source, model_type: str) -> dict[str, Any]:
    """The transformer layer as transformers describes it."""
    config, attention = draft.config, draft.attention
    return {
        "model_type": model_type,
        "vocab_size": source.spec.vocab_size,
        "hidden_size": source.spec.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "max_position_embeddings": source.spec.context_tokens,
        "attention_bias": False,
    }


def _config(draft: Any, source: Source, config: ExportConfig) -> dict[str, Any]:
    kind = draft.config.kind
    if getattr(draft, "rotary", None) is not None:
        raise DraftError(
            found="a draft that turns with its target's scaled rotary angles",
            expected="angles of rope_theta alone, which the format's readers are given here",
            todo="export the format native, or train with init: fresh",
        )
    architectures = read_json(source.home / "config.json").get("architectures", [])
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": config.num_assistant_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    common = {
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": source.target, "architectures": architectures},
        },
    }
    if kind == "mtp":
        return {
            **common,
            "architectures": ["MTPDraftModel"],
            "num_nextn_predict_layers": 1,
            "transformer_layer_config": _layer(draft, source, "qwen3"),
        }
    vocab_size = source.spec.vocab_size
    return {
        **common,
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": vocab_size if draft.d2t is None else len(draft.d2t),
        "norm_before_residual": draft.config.norm_before_residual,
        "norm_before_fc": draft.config.norm_before_fc,
        "fc_norm": draft.config.fc_norm,
        "norm_output": draft.config.norm_output,
        "embed_requires_grad": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": ascending(source.layers, "vLLM"),
        "transformer_layer_config": {**_layer(draft, source, "llama"), "mlp_bias": False},
    }


def write(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """`config.json`, `model.safetensors` and a card."""
    tensors, pieces = own_tensors(draft), pieces_of(draft)
    described = _config(draft, source, config)
    if described["speculators_model_type"] == "mtp":
        module = {name: x for name, x in tensors.items() if name not in ("embed", "head")}
        theirs = to_layout(module, "speculators", pieces=pieces, prefix=MTP_PREFIX)
    else:
        theirs = rename(tensors, eagle3_keys("layers.0"), pieces=pieces)
        theirs |= vocabulary_maps(draft.d2t, source.spec.vocab_size)
    save_tensors(folder, theirs, config.dtype)
    write_json(folder / "config.json", described)
    usage = MTP_USAGE if described["speculators_model_type"] == "mtp" else USAGE
    write_card(folder, source, config, usage)


def read(folder: Path, target: Interface | None) -> Draft:
    """The draft that the folder holds; an MTP module takes embedding and head of the target."""
    place = folder / "config.json"
    described = read_json(place)
    is_mtp = "num_nextn_predict_layers" in described
    if not is_mtp and described.get("speculators_model_type") != "mtp":
        return read_speculators(folder, complete=True).draft
    flags = read_flags(described, MTP_FLAGS, place=place, complete=True)
    layer: dict[str, Any] = {
        key: flags.get(f"transformer_layer_config.{key}") for key in LAYER_FLAGS
    }
    section = {
        "kind": "mtp",
        "depth": flags["speculators_config.proposal_methods"][0]["speculative_tokens"],
        "lr_scale": 1.0,
        "steps_scale": 1.0,
        "init": "fresh",
        "attention": "step0",
        "num_heads": layer["num_attention_heads"],
        "num_kv_heads": layer["num_key_value_heads"],
        "head_size": layer["head_dim"],
        "intermediate_size": layer["intermediate_size"],
        "qk_norm": True,
        "qkv_bias": False,
        "rope_theta": layer["rope_parameters.rope_theta"],
        "norm_eps": layer["rms_norm_eps"],
    }
    mtp, shape = find("mtp"), Shape(layer["vocab_size"], layer["hidden_size"])
    interface = require_interface("mtp", shape, target)
    draft: Any = mtp.Model.build(parse(str(place), section, mtp.Config), shape, interface, 0)
    tensors, module = read_tensors(folder), draft.module
    found = from_layout(
        tensors,
        module,
        "speculators",
        pieces=pieces_of(draft),
        place=folder / "model.safetensors",
        prefix=MTP_PREFIX,
    )
    for name, tensor in found.items():
        module[name].copy_(tensor)
    return draft


def check(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """Open the folder again: the same logits bit for bit."""
    opened: Any = read(folder, source.interface)
    kept: tuple[str, ...] = ()
    if draft.config.kind == "mtp":
        opened.config = draft.config  # how it attended in training, which the format does not say
        kept = ("embed", "head")
    same_logits(folder, draft, opened, source=source, dtype=config.dtype, kept=kept)
