"""Prompt source -> documents and prompts of two splits, free of repeats."""

import platform
from pathlib import Path

from pipeline.config import load
from pipeline.prompts import PrepareConfig, prepare
from pipeline.provenance import run
from storage.tables import DOCUMENTS, PROMPTS, write_table
from storage.workspace import Workspace, digest, write_json

OUT = Path("data")
METRICS = Path("metrics/prepare.json")


def main() -> None:
    """Read the source, drop duplicates, split, cut prompts, write both tables and the counts."""
    config: PrepareConfig = load("prepare", PrepareConfig)
    fingerprint = digest({"params": config.model_dump(), "python": platform.python_version()})
    with Workspace("prepare", fingerprint, outs=[OUT, METRICS]) as workspace:
        prepared = prepare(config)
        folder = workspace.path(OUT)
        for name, schema, pieces in (
            ("documents.parquet", DOCUMENTS, prepared.documents),
            ("prompts.parquet", PROMPTS, prepared.prompts),
        ):
            rows = ({key: getattr(piece, key) for key in schema.names} for piece in pieces)
            write_table(folder / name, schema, rows)
        # the embedded text is that of this Python's library
        metrics = {**prepared.metrics, "python": platform.python_version()}
        write_json(workspace.path(METRICS), metrics)
        workspace.publish()


if __name__ == "__main__":
    run("prepare", main)
