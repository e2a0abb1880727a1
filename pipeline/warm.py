"""Weights that a draft begins with: another arm's checkpoint, or a published EAGLE-3 folder.

The folder is pinned by its content (`drafts.<name>.start`), since DVC cannot see what lies behind a
path that only some cells have. Whatever does not fit is a `DraftError` before training: another
architecture or target, layers that the cache does not hold, a tensor that is missing, extra or of
another shape. The start's own draft vocabulary is kept: a new one would leave every row of the head
with the weights of another token.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import load_draft
from pipeline.draft import Draft, DraftConfig, StartFrom
from pipeline.interface import Interface, Shape
from pipeline.keys import same_shapes
from pipeline.published import default_layers, read_eagle3
from pipeline.target import TargetSpec
from storage.errors import DraftError
from storage.workspace import read_json, tree_digest

# how a draft is trained, not what it is
FREE = (
    "attention",
    "depth",
    "draft_vocab_size",
    "init",
    "lr_scale",
    "start",
    "steps_scale",
    "train_head",
)


def check_start(start: StartFrom) -> Path:
    """The folder; `DraftError` where it is absent or holds other files than were pinned."""
    folder = Path(start.folder)
    if not (folder / "config.json").is_file():
        raise DraftError(
            found=f"no config.json in {folder}, which a draft is to start from",
            expected="a checkpoint's or a published draft's folder",
            todo="correct drafts.*.start.folder in params.yaml",
        )
    digest = tree_digest(folder)
    if digest != start.sha256:
        raise DraftError(
            found=f"{folder} with the digest {digest}",
            expected=f"{start.sha256}, which drafts.*.start.sha256 pins",
            todo="bring the pinned files back, or write the new digest to start from these",
        )
    return folder


def begin(
    section: DraftConfig,
    *,
    model: type[Draft],
    spec: TargetSpec,
    interface: Interface | None,
    layers: list[int],
    seed: int,
) -> Draft:
    """A draft of this section with the weights of its start; layers: those of the cache."""
    assert section.start is not None
    folder = check_start(section.start)
    shape = Shape(spec.vocab_size, spec.hidden_size)
    other, theirs = _open(folder, spec, shape, interface)
    if type(other) is not model:
        raise DraftError(
            found=f"{folder} holds a draft of kind {other.config.kind}",
            expected=f"kind {section.kind}, as the draft that starts from it",
            todo="name another folder under drafts.*.start",
        )
    if model.needs(section).num_layers and theirs != layers:
        raise DraftError(
            found=f"{folder} holds a draft that fuses the layers {theirs}",
            expected=f"{layers}, which the cache holds",
            todo="set capture.hidden_layers to the draft's; capture and what follows run again",
        )
    _same_section(folder, other.config, section, shape)
    draft = model.build(section, shape, interface, seed, d2t=other.d2t)
    if getattr(draft, "rotary", None) != getattr(other, "rotary", None):
        raise DraftError(
            found=f"{folder} holds a draft with other rotary angles",
            expected="those of the draft that starts from it",
            todo="set the same init under drafts.*: target takes the target's angles",
        )
    _fill(folder, draft, other.state_dict())
    return draft


def _open(
    folder: Path, spec: TargetSpec, shape: Shape, interface: Interface | None
) -> tuple[Any, list[int]]:
    """The draft in a folder and the layers that it fuses."""
    described = read_json(folder / "config.json")
    if "source" in described:
        expect = {"target": spec.fingerprint}
        draft = load_draft(folder, interface, shape, expect=expect)
        return draft, list(described.get("hidden_layers", []))
    published = read_eagle3(folder, interface.embed if interface else None)
    return published.draft, published.layers or default_layers(spec.num_layers)


def _settings(config: Any, shape: Shape) -> dict[str, Any]:
    """What a section says of the draft itself, defaults written out."""
    values = {k: v for k, v in config.model_dump().items() if k not in FREE}
    heads = values.get("num_heads", 1)
    if "num_kv_heads" in values:
        values["num_kv_heads"] = values["num_kv_heads"] or heads
        values["head_size"] = values["head_size"] or shape.hidden_size // heads
    values["draft_vocab_size"] = getattr(config, "draft_vocab_size", None) or shape.vocab_size
    return values


def _same_section(folder: Path, theirs: Any, ours: Any, shape: Shape) -> None:
    there, here = _settings(theirs, shape), _settings(ours, shape)
    for name, value in here.items():
        if there.get(name) != value:
            raise DraftError(
                found=f"{folder} holds a draft with {name} {there.get(name)}",
                expected=f"{value}, as the draft that starts from it",
                todo=f"correct drafts.*.{name} in params.yaml, or name another folder",
            )


def _fill(folder: Path, draft: Draft, theirs: Mapping[str, Tensor]) -> None:
    """Copy trained tensors; frozen ones must be the target's, as they are in the new draft."""
    ours, trained = draft.state_dict(), draft.trainable()
    same_shapes(folder, theirs, ours)
    for name, tensor in ours.items():
        if name in trained:
            tensor.copy_(theirs[name])
        elif not _copy_of(theirs[name], tensor):
            raise DraftError(
                found=f"{folder}: tensor {name} was trained and is no longer the target's",
                expected="the target's own, which this draft keeps frozen",
                todo="set train_head: true" if name == "head" else "name another folder",
            )


def _copy_of(theirs: Tensor, target: Tensor) -> bool:
    """Whether one is the other in some dtype in which drafts are published."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return any(torch.equal(theirs, target.to(dtype).to(target.dtype)) for dtype in dtypes)
