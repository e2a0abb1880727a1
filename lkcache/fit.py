"""A preset made to fit a model whose folder is here: layers, heads and widths from its config.json.

A preset names the layers of one model and gives its drafts that model's heads and widths. The rule
for another model is always the same, so nobody has to apply it by hand.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from lkcache.presets import blank_line
from storage.errors import ConfigError
from storage.workspace import read_json

DTYPES = ("float32", "bfloat16", "float16")
HEAD_CHANNELS = 64  # of a standalone draft's heads


def fit(params: CommentedMap, home: Path) -> None:
    """Name the folder `home` as the target and fit layers, drafts and vocabularies to it in place.

    An `lm` draft keeps the share of the target's width that it has in the preset; layers that are
    not three are left as they are. `ConfigError` where there is no config.json, or it has no sizes.
    """
    model = _model(home)
    preset = params["target"]
    width = (preset.get("shape") or preset).get("hidden_size")
    dtype = model.get("dtype", model.get("torch_dtype"))
    params["target"] = CommentedMap(
        kind="pretrained",
        model=str(home),
        revision=None,
        dtype=dtype if dtype in DTYPES else preset.get("dtype", "float32"),
        trust_remote_code=False,
        threads=preset.get("threads", 2),
    )
    if preset["kind"] == "embedded":
        blank_line(params, "generate")
    layers = params["capture"]["hidden_layers"]
    if len(layers) == len(fused(7)):
        params["capture"]["hidden_layers"] = _flow_list(fused(model["num_hidden_layers"]))
    for draft in params["drafts"].values():
        _fit_draft(draft, model, width)


def fused(num_layers: int) -> list[int]:
    """The three layers that EAGLE-3 fuses, 2, n/2 and n − 3; of a short model the last three."""
    n = num_layers
    return [2, n // 2, n - 3] if n >= 7 else list(range(max(0, n - 3), n))


def _fit_draft(draft: CommentedMap, model: Mapping[str, Any], width: int | None) -> None:
    """Widths of the target's own layer for a draft that names them; a vocabulary that fits."""
    vocab = draft.get("draft_vocab_size")
    if vocab is not None and vocab >= model["vocab_size"]:
        draft["draft_vocab_size"] = None
    if draft["kind"] == "lm":
        if width is not None:
            _fit_lm(draft, model["hidden_size"] / width)
        return
    heads = model["num_attention_heads"]
    rope = model.get("rope_parameters") or {}
    own = {
        "num_heads": heads,
        "num_kv_heads": model.get("num_key_value_heads", heads),
        "head_size": model.get("head_dim") or model["hidden_size"] // heads,
        "intermediate_size": model.get("intermediate_size"),
        "rope_theta": rope.get("rope_theta", model.get("rope_theta")),
        "norm_eps": model.get("rms_norm_eps"),
    }
    if draft["kind"] in ("eagle3", "mtp") and draft.get("latent") is None:
        for key, value in own.items():
            if key in draft and value is not None:
                draft[key] = value


def _fit_lm(draft: CommentedMap, share: float) -> None:
    """Whole heads of 64 channels; below one, a multiple of 16."""
    size = draft["hidden_size"] * share
    step = HEAD_CHANNELS if size >= HEAD_CHANNELS else 16
    size = max(16, step * round(size / step))
    draft["intermediate_size"] = round(draft["intermediate_size"] / draft["hidden_size"] * size)
    draft["hidden_size"], draft["num_heads"] = size, max(1, size // HEAD_CHANNELS)


def _model(home: Path) -> dict[str, Any]:
    """The text model's own config."""
    path = home / "config.json"
    if not path.is_file():
        raise ConfigError(
            found=f"no {path}",
            expected="a folder of transformers, which --target names",
            todo="correct the folder; a model of the hub is brought by `hf download ORG/NAME "
            "--local-dir FOLDER`, or named in target.model by hand",
        )
    model: dict[str, Any] = read_json(path)
    model = model.get("text_config", model)
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for name in needed:
        if not isinstance(model.get(name), int):
            raise ConfigError(
                found=f"{path} has no {name}",
                expected=f"the config of a causal LM, with {', '.join(needed)}",
                todo="correct the folder, or write target, hidden_layers and drafts by hand",
            )
    return model


def _flow_list(items: list[int]) -> CommentedSeq:
    sequence = CommentedSeq(items)
    sequence.fa.set_flow_style()
    return sequence
