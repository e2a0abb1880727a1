"""Pin a target, or train the embedded one and pin that."""

import csv
from pathlib import Path
from typing import Any

import torch

from pipeline.config import load
from pipeline.embedded import EmbeddedConfig, train_embedded
from pipeline.pin import Origin, TargetConfig, find_pretrained, pin
from pipeline.provenance import run
from storage.tables import DOCUMENTS, read_table
from storage.workspace import Workspace, digest, file_digest, write_json

OUT = Path("target")
METRICS = Path("metrics/target.json")
PLOT = Path("plots/target.csv")
SOURCE = Path("data/documents.parquet")
COLUMNS = ("step", "loss", "heldout_loss")


def main() -> None:
    """Find or train the model; write `target.json`, the interface, metrics and the curve."""
    config: Any = load("target", TargetConfig)
    documents, home, source = [], None, ""
    if isinstance(config, EmbeddedConfig):
        documents = read_table(SOURCE, DOCUMENTS)
        source = file_digest(SOURCE)
    else:
        home = find_pretrained(config)
    torch.set_num_threads(config.threads)
    fingerprint = digest({"params": config.model_dump(), "source": source})
    with Workspace("target", fingerprint, outs=[OUT, METRICS, PLOT]) as workspace:
        out = workspace.path(OUT)
        metrics: dict[str, Any] = {}
        curve: list[dict[str, float]] = []
        if home is None:
            model, tokenizer, metrics, curve = train_embedded(documents, config)
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            origin = Origin("embedded", ".", sharpen=config.sharpen)
        else:
            origin = Origin(
                "pretrained",
                config.model,
                revision=config.revision,
                dtype=config.dtype,
                trust_remote_code=config.trust_remote_code,
                tensor_parallel=config.tensor_parallel,
            )
        spec = pin(home or out, out, origin=origin)
        shape = spec.model_dump(include={"vocab_size", "hidden_size", "num_layers", "sharpen"})
        write_json(workspace.path(METRICS), {**metrics, **shape})
        with workspace.path(PLOT).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(curve)
        workspace.publish()


if __name__ == "__main__":
    run("target", main)
