"""A draft on disk: `model.safetensors` and a `config.json` that says what it is and came from.

Knows no kind of draft: its file is found by the name in `config.json`, its tensors are those of
`Draft.trainable()`. What belongs to the target (embedding, LM head) is not stored again. No pickle
is read or written; equal drafts give equal bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.interface import Interface, Shape
from storage.errors import DraftError
from storage.workspace import read_json, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SOURCE = ("target", "cache")


def save_draft(
    folder: Path,
    draft: Draft,
    *,
    config: Mapping[str, Any],
    meta: Mapping[str, Any],
    shape: Shape,
) -> None:
    """Write a draft's trainable tensors and its `config.json`.

    config: the draft's section of `params.yaml`, with its kind. meta: `target` and `cache` are
    fingerprints and go under `source`; everything else (draft, objective, seed) stands beside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in draft.trainable().items()}
    save_file(tensors, folder / WEIGHTS)
    described = {
        **{k: v for k, v in meta.items() if k not in SOURCE},
        "kind": config["kind"],
        "config": dict(config),
        "shape": {"vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size},
        "source": {k: meta[k] for k in SOURCE if k in meta},
    }
    write_json(folder / CONFIG, described)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a saved draft; `DraftError` where the folder holds none."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise DraftError(
            found=f"no draft in {folder}",
            expected=f"{CONFIG} and {WEIGHTS}",
            todo="run dvc repro, so that warmup or train writes it",
        )
    return read_json(folder / CONFIG)


def load_draft(
    folder: Path,
    interface: Interface | None,
    shape: Shape,
    *,
    expect: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Draft:
    """Build the draft that a folder describes and fill it; on the CPU, in float32.

    shape: of the target at hand. expect: fingerprints that `source` must hold, e.g. of the target.
    config: the section that the caller would build from. `DraftError` names what differs: kind,
    shape, fingerprint or the first tensor that is missing, extra or of another shape.
    """
    found = read_config(folder)
    here = {"vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size}
    _same(folder, "the target's shape", found.get("shape"), here)
    for name, value in (expect or {}).items():
        _same(folder, f"the {name} fingerprint", found.get("source", {}).get(name), value)
    if config is not None:
        _same(folder, "the draft's section", found.get("config"), dict(config))
    tensors = _read_tensors(folder)
    kind = find(found["kind"])
    section = parse(f"{folder / CONFIG}: config", found["config"], kind.Config)
    draft: Draft = kind.Model.build(section, shape, interface, 0, d2t=tensors.get("d2t"))
    _fill(folder, draft.trainable(), tensors)
    return draft


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise DraftError(
            found=f"{folder / WEIGHTS} is not a safetensors file ({error})",
            expected="the weights that train wrote",
            todo="remove the folder and run dvc repro",
        ) from None


def _same(folder: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise DraftError(
            found=f"{folder} was trained with {what} {found}",
            expected=f"{expected}",
            todo="run dvc repro, so that the draft is trained anew, or correct params.yaml",
        )


def _fill(folder: Path, into: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors in place; `DraftError` names the first that does not fit."""
    for name in sorted({*into, *tensors}):
        mine, theirs = (tuple(x[name].shape) if name in x else None for x in (into, tensors))
        if mine != theirs:
            raise DraftError(
                found=f"{folder}: tensor {name} is {theirs or 'absent'}",
                expected=f"{mine or 'none of that name'} for this draft",
                todo="run dvc repro, so that the draft is trained anew",
            )
        into[name].detach().copy_(tensors[name])
