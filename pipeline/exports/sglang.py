"""`sglang`: an `eagle3` draft as the flat folder of SGLang's `LlamaForCausalLMEagle3`.

Layer ids are counted after layers there: id i is our `hidden_states` index i + 1, so index 0 has
none. SGLang knows no `norm_before_residual`; its readings of `norm_before_fc` and of `norm_output`
(elsewhere a norm before the head) differ between versions, so drafts with these are refused rather
than served wrongly (draft_training.md §2.2).
"""

from pathlib import Path
from typing import Any

from pipeline.draft import Draft
from pipeline.export import (
    ExportConfig,
    Source,
    ascending,
    own_tensors,
    same_logits,
    save_tensors,
    write_card,
)
from pipeline.interface import Interface
from pipeline.keys import rename
from pipeline.published import (
    SGLANG_FLAGS,
    eagle3_keys,
    flat_config,
    output_index,
    pieces_of,
    read_flat,
    vocabulary_maps,
)
from storage.errors import ConfigError, DraftError
from storage.workspace import write_json

KINDS = ("eagle3",)
LAYER = "midlayer"
USAGE = """
A folder for SGLang:

```shell
python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 \\
  --speculative-draft-model-path FOLDER --speculative-num-steps GAMMA --speculative-eagle-topk 1
```
"""


def require(config: Any) -> None:
    """`ConfigError` for an option that SGLang does not serve."""
    for name in ("norm_before_residual", "norm_before_fc", "norm_output"):
        if getattr(config, name):
            raise ConfigError(
                found=f"an eagle3 draft with {name} for the format sglang",
                expected=f"{name}: false, because SGLang does not serve it",
                todo=f"set {name}: false and train again, or export the format speculators",
            )


def _ids(source: Source) -> list[int]:
    """The draft's layers as SGLang counts them."""
    layers = ascending(source.layers, "SGLang")
    if layers[0] == 0:
        raise DraftError(
            found="a draft that reads layer 0, the embedding's output",
            expected="layers from 1, because SGLang captures after layers",
            todo="leave 0 out of capture.hidden_layers, or export the format speculators",
        )
    return output_index(layers)


def write(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """`config.json`, `model.safetensors` and a card."""
    described = {
        **flat_config(draft, source.spec, config.dtype),
        "fc_norm": draft.config.fc_norm,
        "num_aux_hidden_states": draft.config.fused_layers,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": _ids(source),
            "use_aux_hidden_state": True,
        },
    }
    tensors = rename(own_tensors(draft), eagle3_keys(LAYER), pieces=pieces_of(draft))
    maps = vocabulary_maps(draft.d2t, source.spec.vocab_size)
    save_tensors(folder, {**tensors, **maps}, config.dtype)
    write_json(folder / "config.json", described)
    write_card(folder, source, config, USAGE)


def read(folder: Path, _: Interface | None) -> Draft:
    """The draft that the folder holds."""
    return read_flat(folder, flags=SGLANG_FLAGS, layer=LAYER, complete=True).draft


def check(folder: Path, draft: Draft, source: Source, config: ExportConfig) -> None:
    """Open the folder again: the same logits bit for bit."""
    same_logits(folder, draft, read(folder, None), source=source, dtype=config.dtype)
