"""What a capture will cost in bytes and hours, before anything runs; torch-free.

Every figure carries its label: *assumed* from shapes and limits in the parameters alone, *counted*
from real lengths once `sequences/` exists, *measured* from a finished cache of this project. The
model of the cost is stated in each function; nothing here is calibrated to a machine but the
throughput that the caller passes.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import asks_of
from storage.errors import ConfigError, DataError
from storage.sequences import Sequences
from storage.tables import CONVERSATIONS, PROMPTS, read_table
from storage.workspace import read_json, scratch_root

# bytes of a kept entry on disk: 103 B at 39.7 entries a token, tail mass included (the reference
# study of offline caches, p >= 5e-4 on web-like text, V = 128,256); ids are 80 % of it
ENTRY_BYTES = 2.6
# kept entries a token at p >= 5e-4: 15.6 on chat-like text, 39.7 on web text; the larger is assumed
ENTRIES = 40.0
# … and under a nucleus of 0.99 to 0.999 on web text, 46 to 79 (same study)
NUCLEUS_ENTRIES = 79.0
# a tail sample is an id and a float16, hardly compressible
SAMPLE_BYTES = 5.0
# of the samples asked for, the share that adaptive counts draw: 4.2 of 16 on the embedded target
SAMPLE_SHARE = 0.26
# tokens, turn, token_logp, counts and tail mass after zstd
FIXED_BYTES = 16.0
# bf16 hidden states shrink to 0.73 under byte shuffle and zstd in the same study, at the writer's
# level to 0.78 on the embedded target and 0.81 for Gaussian channels of lognormal scale; room is
# promised by the largest
HIDDEN_RATIO = 0.81
# an 8-bit code does not shrink; a scale of two bytes serves 128 of them
INT8_BYTES = 1.016

# kinds of drafts that read hidden layers, and the last hidden state; the others need neither
LAYERS_READ_BY = {"eagle3"}
LAST_READ_BY = {"medusa", "mlp", "mtp"}


@dataclass(frozen=True)
class Line:
    """One figure of an estimate."""

    what: str
    value: float
    unit: str
    label: str
    """assumed, counted or measured."""


@dataclass(frozen=True)
class TargetShape:
    """The target's shape, from `params.yaml` or a local config.json."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    whole_parameters: float | None = None
    """Of all experts; None: the dense formula."""
    active_parameters: float | None = None

    @property
    def num_parameters(self) -> float:
        """Weights that a token meets: as stated, else those of a dense decoder.

        4 D² attention + 3 D·F feed-forward a layer + embedding.
        """
        if self.active_parameters is not None:
            return self.active_parameters
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return float(self.num_layers * layer + self.vocab_size * self.hidden_size)


def target_shape(params: Mapping[str, Any]) -> TargetShape:
    """The shape of the configured target; `ConfigError` where it cannot be known without it."""
    section = params["target"]
    if section["kind"] == "embedded":
        values = section
    else:
        path = Path(section["model"]) / "config.json"
        if not path.is_file():
            return _stated_shape(section.get("shape"), path)
        config = read_json(path)
        config = config.get("text_config", config)
        values = {**config, "num_layers": config["num_hidden_layers"]}
    return TargetShape(**{key: int(values[key]) for key in _SIZES})


_SIZES = ("vocab_size", "hidden_size", "num_layers", "intermediate_size")


def _stated_shape(shape: Mapping[str, Any] | None, path: Path) -> TargetShape:
    """`target.shape`, for a target that is not here."""
    if shape is None:
        raise ConfigError(
            found=f"no {path}",
            expected="a local target folder, whose config.json tells its shape, or target.shape",
            todo="download the target first, or state target.shape as the presets do",
        )
    return TargetShape(
        **{key: int(shape[key]) for key in _SIZES},
        whole_parameters=float(shape["num_parameters"]),
        active_parameters=float(shape["active_parameters"]),
    )


def token_counts(params: Mapping[str, Any], root: Path) -> tuple[dict[str, int], str]:
    """Tokens of each split: counted from `sequences/`, else the limits of the parameters.

    With `generate.turns: every` each user turn is taken for a sequence of the limits' length, which
    is the most that can be: training turns may stand in one sequence.
    """
    try:
        counted = {
            split: Sequences.open(path).num_tokens
            for split in ("train", "heldout", "greedy")
            for path in [root / "sequences" / f"{split}.parquet"]
        }
        return counted, "counted"
    except DataError:
        longest = params["generate"]["max_prompt_tokens"] + params["generate"]["max_new_tokens"]
        train, heldout = params["prepare"]["train_prompts"], params["prepare"]["heldout_prompts"]
        turns = user_turns(params, root)
        assumed = {
            "train": train * turns["train"].value,
            "heldout": heldout * turns["heldout"].value,
            "greedy": heldout * turns["heldout"].value,
        }
        return {split: round(n * longest) for split, n in assumed.items()}, "assumed"


def user_turns(params: Mapping[str, Any], root: Path) -> dict[str, Line]:
    """User turns of a conversation that are answered, the mean of each split.

    Counted from `data/` where it is prepared; else as many as `prepare.filters.max_turns` lets
    through, and where nothing limits them, one, which the line says.
    """
    splits = ("train", "heldout")
    unit = "a conversation"
    if params["generate"].get("turns") != "every":
        return {s: Line(f"user turns answered, {s}", 1.0, unit, "counted") for s in splits}
    try:
        rows = read_table(root / "data" / "prompts.parquet", PROMPTS)
    except DataError:
        return _assumed_turns(params, splits, unit)
    path = root / "data" / "conversations.parquet"
    talks = read_table(path, CONVERSATIONS) if path.is_file() else []
    asked = {
        (talk["split"], talk["id"]): len(asks_of({"messages": json.loads(talk["messages"])})[0])
        for talk in talks
    }
    found = {}
    for split in splits:
        counts = [asked.get((split, row["id"]), 1) for row in rows if row["split"] == split]
        mean = sum(counts) / max(1, len(counts))
        found[split] = Line(f"user turns answered, {split}", mean, unit, "counted")
    return found


def _assumed_turns(
    params: Mapping[str, Any], splits: tuple[str, ...], unit: str
) -> dict[str, Line]:
    prepare = params["prepare"]
    most = (prepare.get("filters") or {}).get("max_turns")
    how = "the most that prepare.filters.max_turns lets through"
    if prepare["source"]["kind"] == "stdlib":
        most, how = 1, "the source has no conversations"
    elif most is None:
        most, how = 1, "more once prepare has run and they are counted"
    return {
        split: Line(f"user turns answered, {split} ({how})", float(most), unit, "assumed")
        for split in splits
    }


Sizes = dict[str, float]
"""Bytes a token by group of arrays."""


def _topk(capture: Mapping[str, Any], _shape: TargetShape) -> Sizes:
    samples = _or(capture["tail_samples"], 16)
    return {
        "kept ids and probabilities": _entries(capture) * ENTRY_BYTES,
        "tail samples": samples * SAMPLE_SHARE * SAMPLE_BYTES,
    }


def _entries(capture: Mapping[str, Any]) -> float:
    """Kept ids a token: of the threshold, of fixed K, or the nucleus's cap at most."""
    most = float(_or(capture["max_kept"], ENTRIES))
    if capture["keep"] == "fixed":
        return most
    return min(NUCLEUS_ENTRIES if capture["keep"] == "nucleus" else ENTRIES, most)


def _or(value: float | None, default: float) -> float:
    """A parameter, or the default's where the configured mode leaves it null."""
    return default if value is None else value


def _full(_capture: Mapping[str, Any], shape: TargetShape) -> Sizes:
    return {"full logits (bf16)": 2.0 * shape.vocab_size}


def _rebuild(_capture: Mapping[str, Any], _shape: TargetShape) -> Sizes:
    return {}  # laws come of last_hidden, which is counted with the features


# what a mode stores of the law; a new mode is a row here, and is estimated beside the others
MODES: Mapping[str, Callable[[Mapping[str, Any], TargetShape], Sizes]] = {
    "topk": _topk,
    "full": _full,
    "rebuild": _rebuild,
}


def bytes_per_token(
    params: Mapping[str, Any], shape: TargetShape, *, mode: str | None = None
) -> Sizes:
    """Expected bytes a token by group of arrays, on disk; of the configured mode or another."""
    capture = params["capture"]
    mode = mode or capture["mode"]
    if mode not in MODES:
        raise ConfigError(
            found=f"capture.mode {mode!r}",
            expected=f"one of {', '.join(MODES)}",
            todo="correct it in params.yaml",
        )
    sizes = {"tokens, masks and tail mass": FIXED_BYTES, **MODES[mode](capture, shape)}
    width = _width(capture, shape)
    if layers := len(capture["hidden_layers"]):
        sizes[f"{layers} hidden layers"] = layers * width
    if mode == "rebuild":
        sizes["last hidden"] = 2 * shape.hidden_size * HIDDEN_RATIO
    elif capture["last_hidden"]:
        sizes["last hidden"] = width
    return sizes


def _width(capture: Mapping[str, Any], shape: TargetShape) -> float:
    """Bytes of one hidden state."""
    eight = capture["hidden_dtype"] == "int8"
    return shape.hidden_size * (INT8_BYTES if eight else 2 * HIDDEN_RATIO)


def reductions(params: Mapping[str, Any], *, root: Path = Path()) -> list[Line]:
    """What would make the cache smaller, and by how much, most first."""
    shape = target_shape(params)
    counts, label = token_counts(params, root)
    tokens = sum(counts.values())
    capture = params["capture"]
    sizes = bytes_per_token(params, shape)
    total = sum(sizes.values())
    found = []
    for mode in MODES:
        saved = total - sum(bytes_per_token(params, shape, mode=mode).values())
        found.append((f"capture.mode: {mode}", saved))
    width = _width(capture, shape)
    if capture["hidden_layers"] and capture["hidden_dtype"] == "bfloat16":
        saved = len(capture["hidden_layers"]) * (width - shape.hidden_size * INT8_BYTES)
        found.append(("capture.hidden_dtype: int8, of the layers", saved))
    kinds = {start["kind"] for start in params.get("starts", {}).values()}
    if capture["hidden_layers"] and kinds and not kinds & LAYERS_READ_BY:
        saved = len(capture["hidden_layers"]) * width
        found.append(("capture.hidden_layers: [], since no draft of starts reads them", saved))
    elif capture["hidden_layers"]:
        found.append(("each layer less in capture.hidden_layers", width))
    if capture["last_hidden"] and capture["mode"] != "rebuild":
        unread = "" if kinds & LAST_READ_BY or not kinds else ", since no draft of starts reads it"
        found.append((f"capture.last_hidden: false{unread}", width))
    if capture["mode"] == "topk":
        half = sizes["kept ids and probabilities"] / 2
        found.append(("a larger capture.min_prob that keeps half as many ids", half))
        found.append(("capture.tail_samples: 0 (biases acceptance losses)", sizes["tail samples"]))
    found.append(("half of the prompts", total / 2))
    lines = [Line(what, saved * tokens, "B", label) for what, saved in found if saved > 0]
    return sorted(lines, key=lambda line: -line.value)


def estimate(params: Mapping[str, Any], *, tflops: float, root: Path = Path()) -> list[Line]:
    """Bytes, hours and free disk for `capture`, and what a finished cache really takes.

    Hours are 2 · parameters · tokens floating-point operations over `tflops` · 10¹², for one
    forward pass; generation costs about as much again with a good engine.
    """
    shape = target_shape(params)
    counts, label = token_counts(params, root)
    tokens = sum(counts.values())
    sizes = bytes_per_token(params, shape)
    total = sum(sizes.values()) * tokens
    lines = [Line(f"tokens, {split}", n, "tokens", label) for split, n in counts.items()]
    if label == "assumed" and params["generate"].get("turns") == "every":
        lines += user_turns(params, root).values()
    lines += [Line(name, size, "B/token", "assumed") for name, size in sizes.items()]
    lines.append(Line("cache", total, "B", label))
    for mode in MODES:
        if mode != params["capture"]["mode"]:
            other = sum(bytes_per_token(params, shape, mode=mode).values()) * tokens
            lines.append(Line(f"cache in mode {mode}", other, "B", label))
    lines.append(Line("with DVC's own copy, if the disk cannot reflink", 2 * total, "B", label))
    free = shutil.disk_usage(root.resolve()).free
    lines.append(Line("free disk here", free, "B", "measured"))
    if elsewhere := _scratch_elsewhere(root):
        free = shutil.disk_usage(elsewhere).free
        lines.append(
            Line("free disk of LKCACHE_SCRATCH, which holds the work", free, "B", "measured")
        )
    if shape.whole_parameters is not None:
        weights = 2 * shape.whole_parameters
        lines.append(Line("the target's weights in bfloat16, beside it", weights, "B", "assumed"))
    shards = params["target"].get("tensor_parallel", 1)
    if shards > 1:
        own = 2 * (shape.whole_parameters or shape.num_parameters) / shards
        what = f"the target's weights in bfloat16 on each of {shards} devices, if all were cut"
        lines.append(Line(what, own, "B", "assumed"))
    seconds = 2 * shape.num_parameters * tokens / (tflops * 1e12)
    lines.append(Line(f"forward pass at {tflops:g} TFLOP/s", seconds / 3600, "h", label))
    cache = root / "cache"
    if cache.is_dir():
        real = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        lines.append(Line("cache on disk", real, "B", "measured"))
        lines.append(Line("cache on disk", real / max(tokens, 1), "B/token", "measured"))
    return lines


def _scratch_elsewhere(root: Path) -> Path | None:
    """A folder of the scratch root that exists, where it is on another filesystem than `root`."""
    place = scratch_root(root).absolute()
    here = next(p for p in (place, *place.parents) if p.exists())
    return here if here.stat().st_dev != root.resolve().stat().st_dev else None
