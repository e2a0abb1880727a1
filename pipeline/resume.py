"""Where a killed training run goes on: weights, moments, generators and the loop's counts.

`resume.json` names a safetensors file beside it with its digest and is replaced last: a kill at any
moment leaves the older pair or the newer one. The folder lies in a stage's scratch, keyed by the
fingerprint of parameters and inputs; `Workspace.publish` removes it. Tensors are whole whatever the
sharding. Knows neither drafts nor losses.

When is a matter of time alone, and no result depends on it: never in the first `EVERY_S`, then so
rarely that writing takes at most one second in `SHARE`.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.ranks import Ranks, whole
from storage.errors import DataError
from storage.workspace import file_digest, read_json, remove, sync, write_json

STATE = "resume.json"
EVERY_S = 120.0
"""Work that a kill may cost; a default cell ends before the first one."""
SHARE = 50


@dataclass(frozen=True)
class Saved:
    """What the first rank read; `tensors` is empty on the others."""

    loop: dict[str, Any]
    tensors: dict[str, Tensor]

    @torch.no_grad()
    def restore(self, into: Mapping[str, Tensor], ranks: Ranks) -> None:
        """Fill tensors (shards too) and the generators in place."""
        for name, tensor in into.items():
            ranks.spread(tensor, self.tensors.get(name))
        for name, state in generators().items():
            here = state.to(ranks.device)
            ranks.spread(here, self.tensors.get(name, here))
            set_generator(name, here.cpu())


class Keeper:
    """Saves a run to a folder now and then, and reads it back."""

    def __init__(self, folder: Path | None, ranks: Ranks) -> None:
        """`folder`: of the first rank; None keeps nothing."""
        self._folder, self._ranks = folder, ranks
        self._next = time.monotonic() + EVERY_S

    def due(self) -> bool:
        """Whether it is time to save; the same answer on all ranks."""
        return self._ranks.agree(self._folder is not None and time.monotonic() >= self._next)

    def save(self, tensors: Mapping[str, Tensor], loop: Mapping[str, Any]) -> None:
        """Gather and write everything; called by all ranks, written by the first."""
        began = time.monotonic()
        gathered = generators()
        for name, tensor in tensors.items():
            value = whole(tensor)  # one at a time: a rank's memory need not hold them all
            if self._ranks.first:
                gathered[name] = value.cpu()
        if self._ranks.first and self._folder is not None:
            _write(self._folder, gathered, loop)
        self._next = time.monotonic() + max(EVERY_S, SHARE * (time.monotonic() - began))

    def read(self) -> Saved | None:
        """What an earlier run left; a damaged one is named and not used."""
        saved = _read(self._folder) if self._ranks.first and self._folder else None
        # as text: every rank goes on from the first one's, whatever its filesystem holds
        loop = json.loads(self._ranks.texts([json.dumps(saved.loop if saved else None)])[0])
        return None if loop is None else Saved(loop, saved.tensors if saved else {})


def generators() -> dict[str, Tensor]:
    """The states of torch's global generators, for drafts that draw while training."""
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["generator.cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator(name: str, state: Tensor) -> None:
    """Put one of them back."""
    if name == "generator.cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)


def _write(folder: Path, tensors: Mapping[str, Tensor], loop: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{loop['step']}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    sync(file)
    write_json(
        folder / STATE,
        {"loop": dict(loop), "file": file.name, "sha256": file_digest(file)},
    )
    sync(folder / STATE)
    for other in folder.glob("step-*.safetensors"):
        if other != file:
            remove(other)


def _read(folder: Path) -> Saved | None:
    if not (folder / STATE).exists():
        return None
    try:
        state = read_json(folder / STATE)
        file = folder / state["file"]
        if file_digest(file) == state["sha256"]:
            return Saved(state["loop"], load_file(file))
    except (DataError, KeyError, FileNotFoundError):
        pass
    print(
        f"{folder} is damaged and not used: training starts from its first step.",
        file=sys.stderr,
    )
    return None
