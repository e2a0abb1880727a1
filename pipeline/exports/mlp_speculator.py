"""`mlp_speculator`: the folder of IBM's MLP speculator, for legacy engines: vLLM up to 0.9 (V0).

Stages that share a table are written once each, as its readers expect; the copies must be equal
when the folder is opened again. No format of it prunes the vocabulary (draft_training.md §2.4).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.export import ExportConfig, Source, same_logits, save_tensors, write_card
from pipeline.interface import Interface, Shape
from pipeline.keys import Flag, read_flags, read_tensors, same_shapes
from storage.errors import ConfigError, DraftError
from storage.workspace import read_json, write_json

KINDS = ("mlp",)
FLAGS: Mapping[str, Flag] = {
    "architectures": Flag(list, only=(["MLPSpeculatorPreTrainedModel"],)),
    "model_type": Flag(str, only=("mlp_speculator",)),
    "vocab_size": Flag(int),
    "emb_dim": Flag(int),
    "inner_dim": Flag(int),
    "n_predict": Flag(int),
    "top_k_tokens_per_head": Flag(list),
    "n_candidates": Flag(int),
    "tie_weights": Flag(bool),
    "scale_input": Flag(bool),
    "dtype": Flag(str),
}
# ours, their name of stage i
STACKS = {
    "embed": "emb.{i}.weight",
    "norm_weight": "ln.{i}.weight",
    "norm_bias": "ln.{i}.bias",
    "head": "head.{i}.weight",
}
USAGE = """
A folder for **legacy engines**: vLLM up to 0.9 (its V0) reads it; later versions do not.
"""


def require(config: Any) -> None:
    """`ConfigError` for a pruned vocabulary."""
    if config.draft_vocab_size is not None:
        raise ConfigError(
            found=f"an mlp draft with draft_vocab_size {config.draft_vocab_size} for the format "
            "mlp_speculator",
            expected="the whole vocabulary, because the format has no map of draft ids",
            todo="set draft_vocab_size: null and train again",
        )


def write(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """`config.json`, `model.safetensors` and a card."""
    section, state = draft.config, draft.state_dict()
    n, tied = section.num_heads, section.tie_weights
    described = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "vocab_size": source.spec.vocab_size,
        "emb_dim": source.spec.hidden_size,
        "inner_dim": section.inner_size,
        "n_predict": n,
        "top_k_tokens_per_head": [1] * n,  # a chain
        "n_candidates": 1,
        "tie_weights": tied,
        "scale_input": section.scale_input,
        "dtype": config.dtype,
    }
    tensors = {
        theirs.format(i=i): state[ours][0 if tied else i]
        for ours, theirs in STACKS.items()
        for i in range(n)
    }
    for i in range(n):
        matrix = state["first"] if i == 0 else state["later"][0 if tied else i - 1]
        tensors[f"proj.{i}.weight"] = matrix
    save_tensors(folder, tensors, config.dtype)
    write_json(folder / "config.json", described)
    write_card(folder, source, config, USAGE)


def _shapes(flags: Mapping[str, Any]) -> dict[str, list[int]]:
    """Every tensor of the folder and its shape."""
    vocab_size, inner = flags["vocab_size"], flags["inner_dim"]
    shapes: dict[str, list[int]] = {}
    for i in range(flags["n_predict"]):
        shapes[f"emb.{i}.weight"] = shapes[f"head.{i}.weight"] = [vocab_size, inner]
        shapes[f"ln.{i}.weight"] = shapes[f"ln.{i}.bias"] = [inner]
        shapes[f"proj.{i}.weight"] = [inner, inner if i else flags["emb_dim"]]
    return shapes


def read(folder: Path, _: Interface | None) -> Draft:
    """The draft that the folder holds."""
    place, module = folder / "config.json", find("mlp")
    flags = read_flags(read_json(place), FLAGS, place=place, complete=True)
    file, tensors = folder / "model.safetensors", read_tensors(folder)
    same_shapes(file, tensors, _shapes(flags))
    n, tied = flags["n_predict"], flags["tie_weights"]
    section = {
        "kind": "mlp",
        "lr_scale": 1.0,
        "steps_scale": 1.0,
        "num_heads": n,
        "inner_size": flags["inner_dim"],
        "tie_weights": tied,
        "scale_input": flags["scale_input"],
    }

    def stacked(theirs: str, first: int = 0) -> Tensor:
        rows = [tensors[theirs.format(i=i)] for i in range(first, n)]
        if not tied:
            return torch.stack(rows) if rows else torch.empty(0)
        for i, row in enumerate(rows[1:], start=first + 1):
            if not torch.equal(row, rows[0]):
                raise DraftError(
                    found=f"{file}: tensor {theirs.format(i=i)} differs from that of stage {first}",
                    expected="copies, because tie_weights is true",
                    todo="correct the file or its tie_weights",
                )
        return torch.stack(rows[:1])

    config = parse(str(place), section, module.Config)
    draft: Draft = module.Model(config, Shape(flags["vocab_size"], flags["emb_dim"]))
    state = {ours: stacked(theirs) for ours, theirs in STACKS.items()}
    state["first"] = tensors["proj.0.weight"]
    state["later"] = draft.state_dict()["later"] if n == 1 else stacked("proj.{i}.weight", 1)
    draft.load_state_dict(state)
    return draft


def check(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """Open the folder again: the same logits bit for bit."""
    same_logits(folder, draft, read(folder, None), source=source, dtype=config.dtype)
