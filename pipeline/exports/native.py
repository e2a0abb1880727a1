"""`native`: an `mtp` draft under the names that its target gives its own module.

`model.safetensors` holds that module alone, to be laid over the target's own files: engines that
serve a target's MTP (vLLM, SGLang) read it there and take embedding, head and settings from the
target. So shape and rotary angles must be the target's. `config.json` keeps them, the layout and
the prefix (draft_training.md §2.5).
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.blocks import Rotary
from pipeline.config import parse
from pipeline.deepseek import ExpertsConfig, LatentConfig
from pipeline.draft import Draft, find, require_interface
from pipeline.export import ExportConfig, Source, same_logits, save_tensors, write_card
from pipeline.interface import Interface, Shape
from pipeline.keys import Flag, read_flags, read_tensors
from pipeline.mtp_keys import LAYOUTS, from_layout, to_layout
from pipeline.published import pieces_of
from storage.errors import ConfigError, DraftError
from storage.workspace import read_json, write_json

KINDS = ("mtp",)
NATIVE = tuple(layout for layout in LAYOUTS if layout != "speculators")
MODULE = ("num_heads", "num_kv_heads", "head_size", "intermediate_size", "qk_norm", "qkv_bias")
FLAGS: Mapping[str, Flag] = {
    "layout": Flag(str, only=NATIVE),
    "prefix": Flag(str),
    "dtype": Flag(str),
    "depth": Flag(int),
    "vocab_size": Flag(int),
    "hidden_size": Flag(int),
    **{name: Flag(bool if name.startswith("qk") else (int, type(None))) for name in MODULE},
    "rope_theta": Flag((int, float)),
    "norm_eps": Flag((int, float)),
}
# sections that a module may lack
OPTIONAL: Mapping[str, Mapping[str, Flag]] = {
    "latent": {
        name: Flag(bool if name == "interleaved" else int) for name in LatentConfig.model_fields
    },
    "experts": {
        name: Flag(bool if name == "normed" else float if name == "scale" else int)
        for name in ExpertsConfig.model_fields
    },
    "rotary": {"inv_freq": Flag(list), "scale": Flag(float), "score_scale": Flag(float)},
}
USAGE = """
The target's own multi-token-prediction module, trained further, under the target's key names. Lay
`model.safetensors` over a copy of the target's files in place of the tensors of the same names.
"""


def require(config: Any) -> None:
    """`ConfigError` for a pruned vocabulary: the module drafts with the target's own head."""
    if config.draft_vocab_size is not None:
        raise ConfigError(
            found="an mtp draft with a pruned vocabulary for the format native",
            expected="the target's own head, with which engines run the module",
            todo="set draft_vocab_size: null and train again",
        )


def write(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """`config.json`, `model.safetensors` and a card."""
    own = source.interface.mtp if source.interface else None
    described = own() if own else None
    if described is None or described.layout not in NATIVE:
        raise DraftError(
            found="a target without an MTP module whose key names we know"
            if described is None
            else f"a target whose MTP module has the names of {described.layout}",
            expected=f"one of the layouts {', '.join(NATIVE)}",
            todo="export the format speculators",
        )
    state: Any = draft
    find("mtp").same_settings(draft, described)
    tensors = to_layout(
        state.module, described.layout, pieces=pieces_of(draft), prefix=described.prefix
    )
    save_tensors(folder, tensors, config.dtype)
    section, attention = draft.config, state.attention
    shape = {"num_heads": attention.num_heads}
    if section.latent is None:
        shape |= {"num_kv_heads": attention.num_kv_heads, "head_size": attention.head_size}
    optional = {
        "latent": section.latent and section.latent.model_dump(),
        "experts": section.experts and section.experts.model_dump(),
        "rotary": state.rotary and asdict(state.rotary),
    }
    write_json(
        folder / "config.json",
        {
            "layout": described.layout,
            "prefix": described.prefix,
            "dtype": config.dtype,
            "depth": section.depth,
            "vocab_size": source.spec.vocab_size,
            "hidden_size": source.spec.hidden_size,
            **{name: shape.get(name, getattr(section, name)) for name in MODULE},
            "rope_theta": section.rope_theta,
            "norm_eps": section.norm_eps,
            **{name: values for name, values in optional.items() if values is not None},
        },
    )
    write_card(folder, source, config, USAGE)


def read(folder: Path, target: Interface | None) -> Draft:
    """The draft that the folder holds, between the target's embedding and head."""
    place, module = folder / "config.json", find("mtp")
    described = read_json(place)
    known = dict(FLAGS)
    for part in OPTIONAL.keys() & described.keys():
        known |= {f"{part}.{name}": flag for name, flag in OPTIONAL[part].items()}
    flags = read_flags(described, known, place=place, complete=True)
    section: dict[str, Any] = {
        "kind": "mtp",
        "lr_scale": 1.0,
        "steps_scale": 1.0,
        "init": "fresh",
        "attention": "step0",
        **{name: flags[name] for name in ("depth", *MODULE, "rope_theta", "norm_eps")},
        **{part: described[part] for part in ("latent", "experts") if part in described},
    }
    shape = Shape(flags["vocab_size"], flags["hidden_size"])
    interface = require_interface("mtp", shape, target)
    config = parse(str(place), section, module.Config)
    rotary = described.get("rotary")
    if rotary is not None:
        rotary = Rotary(tuple(rotary["inv_freq"]), rotary["scale"], rotary["score_scale"])
    draft: Any = module.Model(config, interface.embed, head=interface.lm_head, rotary=rotary)
    own = draft.module
    found = from_layout(
        read_tensors(folder),
        own,
        flags["layout"],
        pieces=pieces_of(draft),
        place=folder / "model.safetensors",
        prefix=flags["prefix"],
    )
    for name, tensor in found.items():
        own[name].copy_(tensor)
    return draft


def check(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """Open the folder again: the same logits bit for bit."""
    opened: Any = read(folder, source.interface)
    opened.config = draft.config  # how it attended in training, which no layout says
    same_logits(folder, draft, opened, source=source, dtype=config.dtype, kept=("embed", "head"))
