"""`eagle`: an `eagle3` draft in the original repository's layout (`midlayer.*`, flat Llama config).

What converters start from, the speculators package's among them. The layout names no layers: its
readers take (2, n//2, n−3) of the target's n, so a draft of others is refused, as are the options
of EAGLE-3.1, which it cannot say (draft_training.md §2.2).
"""

from pathlib import Path
from typing import Any

from pipeline.draft import Draft
from pipeline.export import (
    ExportConfig,
    Source,
    own_tensors,
    same_logits,
    save_tensors,
    write_card,
)
from pipeline.interface import Interface
from pipeline.keys import rename
from pipeline.published import (
    EAGLE_FLAGS,
    default_layers,
    eagle3_keys,
    flat_config,
    pieces_of,
    read_flat,
    vocabulary_maps,
)
from storage.errors import ConfigError, DraftError
from storage.workspace import write_json

KINDS = ("eagle3",)
LAYER = "midlayer"
USAGE = """
A folder in the layout of the original EAGLE repository, for its own decoder and for converters.
"""


def require(config: Any) -> None:
    """`ConfigError` for an option that the layout cannot say."""
    for name in ("norm_before_residual", "norm_before_fc", "norm_output", "fc_norm"):
        if getattr(config, name):
            raise ConfigError(
                found=f"an eagle3 draft with {name} for the format eagle",
                expected=f"{name}: false, because the original layout has no flag for it",
                todo=f"set {name}: false and train again, or export the format speculators",
            )


def write(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """`config.json`, `model.safetensors` and a card."""
    default = default_layers(source.spec.num_layers)
    if source.layers != default:
        raise DraftError(
            found=f"a draft that fuses the layers {source.layers}",
            expected=f"{default}, which readers of the original layout take without being told",
            todo="set capture.hidden_layers to these, or export the format speculators",
        )
    tensors = rename(own_tensors(draft), eagle3_keys(LAYER), pieces=pieces_of(draft))
    maps = vocabulary_maps(draft.d2t, source.spec.vocab_size)
    save_tensors(folder, {**tensors, **maps}, config.dtype)
    write_json(folder / "config.json", flat_config(draft, source.spec, config.dtype))
    write_card(folder, source, config, USAGE)


def read(folder: Path, _: Interface | None) -> Draft:
    """The draft that the folder holds."""
    return read_flat(folder, flags=EAGLE_FLAGS, layer=LAYER, complete=True).draft


def check(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """Open the folder again: the same logits bit for bit."""
    same_logits(folder, draft, read(folder, None), source=source, dtype=config.dtype)
