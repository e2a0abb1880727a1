"""`medusa`: the folder of vLLM's `MedusaModel`, a legacy engine: vLLM up to 0.32.0 alone reads it.

It drafts greedily there. `token_map` holds target ids as they are. A shared head is written once
(`original_lm_head`), trained ones each. Any key with "num" and "heads" in it would overwrite the
number of heads, so no other is written (draft_training.md §2.3).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.export import ExportConfig, Source, same_logits, save_tensors, write_card
from pipeline.interface import Interface
from pipeline.keys import Flag, read_flags, read_tensors, same_shapes
from pipeline.vocab import require_d2t
from storage.workspace import read_json, write_json

KINDS = ("medusa",)
FLAGS: Mapping[str, Flag] = {
    "architectures": Flag(list, only=(["MedusaModel"],)),
    "model_type": Flag(str, only=("medusa",)),
    "hidden_size": Flag(int),
    "vocab_size": Flag(int),
    "truncated_vocab_size": Flag(int),
    "num_heads": Flag(int),
    "num_hidden_layers": Flag(int),
    "medusa_fc_bias": Flag(bool, only=(True,)),
    "original_lm_head": Flag(bool),
    "dtype": Flag(str),
}
USAGE = """
A folder for a **legacy engine**: vLLM up to 0.32.0 reads it, and drafts greedily; later versions
have no MEDUSA. The acceptance measured here is that of true rejection sampling.
"""


def require(config: Any) -> None:
    """Every `medusa` draft can be written."""


def _names(flags: Mapping[str, Any]) -> dict[str, list[int]]:
    """Every tensor of the folder and its shape."""
    size, kept = flags["hidden_size"], flags["truncated_vocab_size"]
    heads, layers = range(flags["num_heads"]), range(flags["num_hidden_layers"])
    shapes: dict[str, list[int]] = {}
    for h in heads:
        for layer in layers:
            shapes[f"blocks.{h}.layers.{layer}.weight"] = [size, size]
            shapes[f"blocks.{h}.layers.{layer}.bias"] = [size]
        if not flags["original_lm_head"]:
            shapes[f"lm_heads.{h}.weight"] = [kept, size]
    if flags["original_lm_head"]:
        shapes["lm_head.weight"] = [kept, size]
    if kept != flags["vocab_size"]:
        shapes["token_map"] = [kept]
    return shapes


def write(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """`config.json`, `model.safetensors` and a card."""
    section, vocab_size = draft.config, source.spec.vocab_size
    described = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": source.spec.hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": vocab_size if draft.d2t is None else len(draft.d2t),
        "num_heads": section.num_heads,
        "num_hidden_layers": section.num_layers,
        "medusa_fc_bias": True,
        "original_lm_head": not section.train_heads,
        "dtype": config.dtype,
    }
    state, tensors = draft.state_dict(), {}
    for h in range(section.num_heads):
        for layer in range(section.num_layers):
            for what in ("weight", "bias"):
                tensors[f"blocks.{h}.layers.{layer}.{what}"] = state[what][h, layer]
    for h, head in enumerate(state["head"]):
        tensors[f"lm_heads.{h}.weight" if section.train_heads else "lm_head.weight"] = head
    if draft.d2t is not None:
        tensors["token_map"] = draft.d2t
    save_tensors(folder, tensors, config.dtype)
    write_json(folder / "config.json", described)
    write_card(folder, source, config, USAGE)


def read(folder: Path, _: Interface | None) -> Draft:
    """The draft that the folder holds."""
    place, module = folder / "config.json", find("medusa")
    flags = read_flags(read_json(place), FLAGS, place=place, complete=True)
    tensors = read_tensors(folder)
    same_shapes(folder / "model.safetensors", tensors, _names(flags))
    kept = flags["truncated_vocab_size"]
    section = {
        "kind": "medusa",
        "lr_scale": 1.0,
        "steps_scale": 1.0,
        "num_heads": flags["num_heads"],
        "num_layers": flags["num_hidden_layers"],
        "train_heads": not flags["original_lm_head"],
        "draft_vocab_size": None if kept == flags["vocab_size"] else kept,
    }
    d2t = require_d2t(tensors.get("token_map"), kept, flags["vocab_size"])
    config = parse(str(place), section, module.Config)
    draft: Draft = module.Model(config, torch.zeros(kept, flags["hidden_size"]), d2t=d2t)
    heads, layers = range(flags["num_heads"]), range(flags["num_hidden_layers"])

    def stacked(what: str) -> Tensor:
        rows = [[tensors[f"blocks.{h}.layers.{x}.{what}"] for x in layers] for h in heads]
        return torch.stack([torch.stack(row) for row in rows])

    shared = flags["original_lm_head"]
    names = ["lm_head.weight"] if shared else [f"lm_heads.{h}.weight" for h in heads]
    filled = {"weight": stacked("weight"), "bias": stacked("bias")}
    filled["head"] = torch.stack([tensors[name] for name in names])
    draft.load_state_dict({**draft.state_dict(), **filled})
    return draft


def check(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """Open the folder again: the same logits bit for bit."""
    same_logits(folder, draft, read(folder, None), source=source, dtype=config.dtype)
