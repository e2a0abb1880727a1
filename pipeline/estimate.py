"""What a capture will cost in bytes and hours, before anything runs; torch-free.

Every figure carries its label: *assumed* from shapes and limits in the parameters alone, *counted*
from real lengths once `sequences/` exists, *measured* from a finished cache of this project. The
model of the cost is stated in each function; nothing here is calibrated to a machine but the
throughput that the caller passes.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import ConfigError, DataError
from storage.tables import SEQUENCES, read_table
from storage.workspace import read_json

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
# bf16 hidden states shrink to 0.73 under byte shuffle and zstd (same study)
HIDDEN_RATIO = 0.73
# an 8-bit code does not shrink; a scale of two bytes serves 128 of them
INT8_BYTES = 1.016


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

    @property
    def num_parameters(self) -> float:
        """Weights of a dense decoder: 4 D² attention + 3 D·F feed-forward a layer + embedding."""
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
            raise ConfigError(
                found=f"no {path}",
                expected="a local target folder, whose config.json tells its shape",
                todo="download the target first, or estimate with a local copy of its config",
            )
        config = read_json(path)
        config = config.get("text_config", config)
        values = {**config, "num_layers": config["num_hidden_layers"]}
    return TargetShape(**{key: int(values[key]) for key in TargetShape.__dataclass_fields__})


def token_counts(params: Mapping[str, Any], root: Path) -> tuple[dict[str, int], str]:
    """Tokens of each split: counted from `sequences/`, else the limits of the parameters."""
    try:
        counted = {
            split: sum(len(row["tokens"]) for row in read_table(path, SEQUENCES))
            for split in ("train", "heldout", "greedy")
            for path in [root / "sequences" / f"{split}.parquet"]
        }
        return counted, "counted"
    except DataError:
        longest = params["generate"]["max_prompt_tokens"] + params["generate"]["max_new_tokens"]
        train, heldout = params["prepare"]["train_prompts"], params["prepare"]["heldout_prompts"]
        assumed = {"train": train, "heldout": heldout, "greedy": heldout}
        return {split: count * longest for split, count in assumed.items()}, "assumed"


def bytes_per_token(params: Mapping[str, Any], shape: TargetShape) -> dict[str, float]:
    """Expected bytes a token by group of arrays, on disk, under the default codecs."""
    capture = params["capture"]
    wide = 2 * shape.hidden_size * HIDDEN_RATIO
    eight = shape.hidden_size * INT8_BYTES
    rebuild, codes = capture["mode"] == "rebuild", capture["hidden_dtype"] == "int8"
    width = eight if codes else wide
    sizes = {"tokens, masks and tail mass": FIXED_BYTES}
    if capture["mode"] == "full":
        sizes["full logits (bf16)"] = 2.0 * shape.vocab_size
    elif not rebuild:
        sizes["kept ids and probabilities"] = _entries(capture) * ENTRY_BYTES
        sizes["tail samples"] = capture["tail_samples"] * SAMPLE_SHARE * SAMPLE_BYTES
    if capture["hidden_layers"]:
        sizes[f"{len(capture['hidden_layers'])} hidden layers"] = (
            len(capture["hidden_layers"]) * width
        )
    if capture["last_hidden"]:
        sizes["last hidden"] = wide if rebuild else width
    return sizes


def _entries(capture: Mapping[str, Any]) -> float:
    """Kept ids a token: of the threshold, of fixed K, or the nucleus's cap at most."""
    most = float(capture["max_kept"])
    if capture["keep"] == "threshold":
        return min(ENTRIES, most)
    return most if capture["keep"] == "fixed" else min(NUCLEUS_ENTRIES, most)


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
    lines += [Line(name, size, "B/token", "assumed") for name, size in sizes.items()]
    lines.append(Line("cache", total, "B", label))
    lines.append(Line("with DVC's own copy, if the disk cannot reflink", 2 * total, "B", label))
    free = shutil.disk_usage(root.resolve()).free
    lines.append(Line("free disk here", free, "B", "measured"))
    seconds = 2 * shape.num_parameters * tokens / (tflops * 1e12)
    lines.append(Line(f"forward pass at {tflops:g} TFLOP/s", seconds / 3600, "h", label))
    cache = root / "cache"
    if cache.is_dir():
        real = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        lines.append(Line("cache on disk", real, "B", "measured"))
        lines.append(Line("cache on disk", real / max(tokens, 1), "B/token", "measured"))
    return lines
