"""Other people's names for our tensors and flags: key tables both ways, and what does not fit.

Loaders of engines fill what they miss at random and skip what they do not know, silently
(draft_training.md §2). Here a missing, extra or misnamed tensor or flag is a `DraftError` with its
name. Knows no draft and no format: tables and flags stand beside their formats.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from storage.errors import DraftError

# our tensor -> theirs; several names share it along its rows, in that order
KeyTable = Mapping[str, tuple[str, ...]]
# our tensor -> rows of each share, where they are not equal
Pieces = Mapping[str, Sequence[int]]
WEIGHTS = "model.safetensors"
LAYER = re.compile(r"\.\d+\.")
NEEDED = object()
"""Default of a flag that has none."""
# keys of transformers' own that say nothing about the numbers; met in published folders
HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "pretraining_tp",
        "speculators_version",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True)
class Flag:
    """What a config may say under one dotted key."""

    kind: type | tuple[type, ...]
    only: tuple[Any, ...] = ()
    """The values that we can read; empty for any."""
    default: Any = NEEDED
    """What its engine takes where a published folder leaves it out."""


def _theirs(name: str, table: KeyTable) -> tuple[str, ...]:
    """Their names of one of our tensors, layer number filled in."""
    number = LAYER.search(name)
    names = table.get(LAYER.sub(".{i}.", name, count=1)) or table.get(name)
    if names is None:
        raise DraftError(
            found=f"a tensor {name} in the draft",
            expected="only those of the format's key table",
            todo="add it to the table",
        )
    return tuple(n.replace("{i}", number.group(0)[1:-1] if number else "") for n in names)


def rename(
    state: Mapping[str, Tensor], table: KeyTable, *, pieces: Pieces | None = None
) -> dict[str, Tensor]:
    """Our tensors under the engine's names; `DraftError` for one that the table does not hold."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = _theirs(name, table)
        sizes = list((pieces or {}).get(name) or [len(tensor) // len(names)] * len(names))
        for key, piece in zip(names, tensor.split(sizes, dim=0), strict=True):
            renamed[key] = piece.contiguous()
    return renamed


def unname(
    tensors: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    table: KeyTable,
    *,
    pieces: Pieces | None = None,
    place: Path,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Their tensors under our names, each of the shape in `like`; `DraftError` where one is not."""
    expected = rename(like, table, pieces=pieces)
    same_shapes(place, tensors, {f"{prefix}{key}": x for key, x in expected.items()})
    return {
        name: torch.cat([tensors[f"{prefix}{key}"] for key in _theirs(name, table)])
        for name in like
    }


def same_shapes(
    place: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor | Sequence[int]]
) -> None:
    """`DraftError` names the first tensor that is missing, extra or of another shape."""
    for name in sorted({*found, *expected}):
        mine = _shape(expected[name]) if name in expected else None
        theirs = _shape(found[name]) if name in found else None
        if mine != theirs:
            raise DraftError(
                found=f"{place}: tensor {name} is {theirs or 'missing'}",
                expected=f"{mine}" if mine else "no tensor of that name",
                todo="correct the file, or the format's key table where we wrote it",
            )


def _shape(x: Tensor | Sequence[int]) -> list[int]:
    return list(x.shape) if isinstance(x, Tensor) else list(x)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """`model.safetensors` of a folder; `DraftError` where it is absent, torn or a pickle."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
        raise DraftError(
            found=f"{folder} has its weights as {pickles[0]}, a pickle, which can run code"
            if pickles
            else f"no {path}",
            expected=f"weights in {WEIGHTS}",
            todo="convert them where you trust them" if pickles else "complete the folder",
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DraftError(
            found=f"{path} is not a safetensors file ({error})",
            expected="a whole one",
            todo="bring the file back",
        ) from None


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings; a list is a leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_flags(
    config: Mapping[str, Any], flags: Mapping[str, Flag], *, place: Path, complete: bool
) -> dict[str, Any]:
    """The config's values by dotted key; `DraftError` names a missing, unknown or foreign one.

    complete: every flag must be there, as in a folder that we wrote. Otherwise what its engine has
    a default for may be left out, and keys that say nothing about the numbers may stand.
    """
    found = dict(_flat(config))
    for key, value in found.items():
        flag = flags.get(key)
        if flag is None:
            if not complete and not HARMLESS.isdisjoint(key.split(".")):
                continue
            raise _wrong(place, key, "is unknown", "only flags whose meaning we know")
        if not isinstance(value, flag.kind) or isinstance(value, bool) != _is_bool(flag, value):
            raise _wrong(place, key, f"is {value!r}", f"a value of type {_kinds(flag)}")
        if flag.only and value not in flag.only:
            choices = " or ".join(map(repr, flag.only))
            raise _wrong(place, key, f"is {value!r}", f"{choices}, which is all that we can read")
    for key, flag in flags.items():
        if key not in found:
            if complete or flag.default is NEEDED:
                raise _wrong(place, key, "is missing", "every flag, since engines differ in theirs")
            found[key] = flag.default
    return {key: found[key] for key in flags}


def _is_bool(flag: Flag, value: Any) -> bool:
    """Whether a bool is asked for: to Python it is an int too."""
    kinds = flag.kind if isinstance(flag.kind, tuple) else (flag.kind,)
    return bool in kinds and isinstance(value, bool)


def _kinds(flag: Flag) -> str:
    kinds = flag.kind if isinstance(flag.kind, tuple) else (flag.kind,)
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)


def _wrong(place: Path, key: str, found: str, expected: str) -> DraftError:
    return DraftError(
        found=f"{place}: {key} {found}",
        expected=expected,
        todo="correct the file, or choose a folder of a format that pipeline/exports writes",
    )
