"""A trained draft as the folder that an engine loads: what the formats share.

A format is one file, `pipeline/exports/<name>.py`, found by name, so that a new one exports nothing
else again. It says which kinds it takes (`KINDS`), refuses what its engine cannot serve
(`require`), writes a folder (`write`), and opens it again (`read`) with a loader of ours that names
a missing, extra or misnamed tensor or flag, because the engines' own fill what they miss at random
and say nothing (draft_training.md §2). Every export is opened again before it is published, and
must give the draft's logits bit for bit. Safetensors only. Knows no stage, no cache and no file of
a draft; bytes are a function of draft, target, results and parameters.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.batch import Batch
from pipeline.config import Gamma, Strict
from pipeline.draft import Draft
from pipeline.interface import Interface
from pipeline.keys import WEIGHTS
from pipeline.seeds import generator
from pipeline.target import TOKENIZER_FILES, TargetSpec
from storage.errors import ConfigError, DraftError

FOLDER = Path(__file__).parent / "exports"
PROBE_ROWS, PROBE_TOKENS = 4, 32


class ExportConfig(Strict):
    """Section `export`."""

    dtype: Literal["float32", "bfloat16", "float16"]
    num_assistant_tokens: Gamma
    """γ that the folder asks its engine for; an engine's own setting goes before it."""


@dataclass(frozen=True)
class Source:
    """Where an export comes from."""

    arm: str
    spec: TargetSpec
    home: Path
    """The target's files, its tokenizer among them."""
    draft: Mapping[str, Any]
    """`config.json` of the checkpoint."""
    interface: Interface | None = None
    measured: Sequence[str] = ()
    """Rows of the model card's table of results: what was measured of this arm."""

    @property
    def target(self) -> str:
        """What a folder calls its target: a hub id or folder; `target` for the embedded one."""
        return "target" if self.spec.model == "." else self.spec.model

    @property
    def layers(self) -> list[int]:
        """Layers that the draft reads, `hidden_states` indices; `DraftError` where not recorded."""
        layers = self.draft.get("hidden_layers")
        if not layers:
            raise DraftError(
                found=f"the checkpoint of {self.arm} without the layers that it reads",
                expected="hidden_layers in its config.json",
                todo=f"run dvc repro train@{self.arm}, which writes them",
            )
        return list(layers)


def special_tokens(spec: TargetSpec) -> dict[str, Any]:
    """The target's: an engine compares them, and the default of Llama would be id 2."""
    eos = spec.eos_ids[0] if len(spec.eos_ids) == 1 else list(spec.eos_ids) or None
    return {"bos_token_id": spec.bos_id, "eos_token_id": eos, "pad_token_id": None}


def ascending(layers: Sequence[int], engine: str) -> list[int]:
    """Layers as engines take them, sorted; `DraftError` where the draft's have another order."""
    if list(layers) != sorted(set(layers)):
        raise DraftError(
            found=f"a draft that fuses the layers {list(layers)}",
            expected=f"ascending and distinct ones, as {engine} hands them to the draft",
            todo="sort capture.hidden_layers, then capture and train again",
        )
    return list(layers)


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Write `model.safetensors`; what is not floating point keeps its type."""
    to = getattr(torch, dtype)
    cast = {
        name: (x.to(to) if x.is_floating_point() else x).detach().cpu().clone().contiguous()
        for name, x in tensors.items()
    }
    save_file(cast, folder / WEIGHTS, metadata={"format": "pt"})


def own_tensors(draft: Draft) -> dict[str, Tensor]:
    """All parameters and buffers but `d2t`, whose form differs between formats."""
    return {name: x for name, x in draft.state_dict().items() if name != "d2t"}


def model_card(source: Source, config: ExportConfig, usage: str) -> str:
    """README.md: what the draft is, how it is used, what was measured, where it comes from.

    usage: a paragraph or code block of the format's own.
    """
    spec, draft = source.spec, source.draft
    rows = {
        "target": f"{spec.model} ({spec.kind})" if spec.model != "." else spec.kind,
        "target revision": spec.revision or "none",
        "target fingerprint": f"`{spec.fingerprint}`",
        **{f"{name} fingerprint": f"`{v}`" for name, v in draft["source"].items()},
        **{name: v for name, v in draft.items() if name not in ("config", "shape", "source")},
        **{f"config.{name}": v for name, v in draft["config"].items()},
        "dtype": config.dtype,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    measured = "\n".join(source.measured) or "Nothing was measured of this arm."
    return f"""---
library_name: transformers
tags: [speculative-decoding, draft-model]
---
# {source.arm}

A draft for speculative decoding, trained by lkcache from a cache of its target's laws. It is of
use only with this target.

{usage.strip()}

## Measured

{measured}

## Provenance

| provenance | |
| --- | --- |
{table}
"""


def write_card(folder: Path, source: Source, config: ExportConfig, usage: str) -> None:
    """Put the model card into a folder."""
    (folder / "README.md").write_text(model_card(source, config, usage), encoding="utf-8")


def copy_tokenizer(home: Path, folder: Path) -> None:
    """The target's tokenizer, for a folder that is a model of its own."""
    names = [name for name in TOKENIZER_FILES if (home / name).is_file()]
    if not names:
        raise DraftError(
            found=f"no tokenizer in {home}",
            expected=f"at least one of {', '.join(TOKENIZER_FILES)}",
            todo="bring the target's files back, or run dvc repro --force target",
        )
    for name in names:
        shutil.copyfile(home / name, folder / name)


def rounded(draft: Draft, dtype: str, *, kept: Sequence[str] = ()) -> Draft:
    """The draft with the values that the export's dtype keeps; kept: tensors it does not hold."""
    to = getattr(torch, dtype)
    copied = copy.deepcopy(draft).float()
    with torch.no_grad():
        for name, tensor in copied.state_dict().items():
            if tensor.is_floating_point() and name not in kept:
                tensor.copy_(tensor.to(to).to(tensor.dtype))
    return copied


def probe(draft: Draft, source: Source) -> Batch:
    """A few rows of random tokens and features, supervised throughout."""
    shape, stream = (PROBE_ROWS, PROBE_TOKENS), generator(0, "export", "probe")
    needs = type(draft).needs(draft.config)
    size = source.spec.hidden_size
    return Batch(
        ids=("",) * PROBE_ROWS,
        domains=("",) * PROBE_ROWS,
        tokens=torch.randint(source.spec.vocab_size, shape, generator=stream),
        length=torch.full((PROBE_ROWS,), PROBE_TOKENS),
        turn=torch.zeros(shape, dtype=torch.int64),
        token_logp=torch.zeros(shape),
        law_row=torch.zeros(shape, dtype=torch.int64),
        law=None,
        hidden=torch.randn(*shape, needs.num_layers, size, generator=stream)
        if needs.num_layers
        else None,
        last_hidden=torch.randn(*shape, size, generator=stream) if needs.last_hidden else None,
    )


@torch.no_grad()
def same_logits(
    folder: Path,
    draft: Draft,
    opened: Draft,
    *,
    source: Source,
    dtype: str,
    kept: Sequence[str] = (),
) -> None:
    """`DraftError` unless the opened draft gives the written one's logits bit for bit."""
    batch = probe(draft, source)
    depth = type(draft).loss_depth(draft.config)
    ours = rounded(draft, dtype, kept=kept).training_logits(batch, depth)
    for k, (mine, theirs) in enumerate(
        zip(ours, opened.float().training_logits(batch, depth), strict=True)
    ):
        if not torch.equal(mine, theirs):
            off = float((mine - theirs).abs().max()) if mine.shape == theirs.shape else torch.inf
            raise broken(
                folder, f"logits of depth {k} off by {off:.2g}", "the draft's own, exactly"
            )
    if (draft.d2t is None) != (opened.d2t is None) or (
        draft.d2t is not None and opened.d2t is not None and not torch.equal(draft.d2t, opened.d2t)
    ):
        raise broken(folder, "another draft vocabulary", "the draft's own")


def broken(folder: Path, found: str, expected: str) -> DraftError:
    """A folder that is not the draft: a fault of the format's file, never of the user."""
    return DraftError(
        found=f"{folder.name} opened again with {found}",
        expected=expected,
        todo="correct the format in pipeline/exports",
    )


def formats() -> list[str]:
    """The formats that exist: the files of `pipeline/exports/`."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")


def find_format(kind: str, name: str) -> Any:
    """The module of a format; `ConfigError` lists those that take the kind."""
    modules = {known: import_module(f"pipeline.exports.{known}") for known in formats()}
    taken = [known for known, module in modules.items() if kind in module.KINDS]
    if name not in taken:
        raise ConfigError(
            found=f"export format {name!r} for a draft of kind {kind}",
            expected=f"one of {', '.join(taken)}" if taken else "a kind that some format takes",
            todo="correct `format` under exports in params.yaml",
        )
    return modules[name]


def export_draft(
    folder: Path, draft: Draft, *, form: Any, source: Source, config: ExportConfig
) -> None:
    """Write the folder anew, then open it again; `DraftError` where it is not the draft."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    form.require(draft.config)
    form.write(folder, draft, source, config)
    form.check(folder, draft, source, config)
