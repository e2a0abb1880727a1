"""Prompt source -> documents and prompts of two splits, free of repeats."""

import json
import platform
import sys
from pathlib import Path

from pipeline.config import load
from pipeline.prompts import PrepareConfig, prepare
from pipeline.provenance import run
from pipeline.sources import HELDOUT, TRAIN
from storage.tables import CONVERSATIONS, DOCUMENTS, PROMPTS, write_table
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
        talks = [
            {
                "split": prompt.split,
                "id": prompt.id,
                "messages": json.dumps(prompt.messages, ensure_ascii=False),
                "tools": json.dumps(prompt.tools, ensure_ascii=False),
            }
            for prompt in prepared.prompts
            if prompt.messages
        ]
        if talks:
            write_table(folder / "conversations.parquet", CONVERSATIONS, talks)
        # the embedded text is that of this Python's library
        metrics = {**prepared.metrics, "python": platform.python_version()}
        write_json(workspace.path(METRICS), metrics)
        workspace.publish()
    dropped = {why: count for why, count in prepared.metrics.get("dropped", {}).items() if count}
    if dropped:
        told = ", ".join(f"{count} with {why}" for why, count in dropped.items())
        print(f"prepare: left out {_rows(sum(dropped.values()))}: {told}.", file=sys.stderr)
    for split, asked in ((TRAIN, config.train_prompts), (HELDOUT, config.heldout_prompts)):
        count = sum(prompt.split == split for prompt in prepared.prompts)
        if count < asked:
            prompts = "1 prompt" if count == 1 else f"{count} prompts"
            print(
                f"prepare: {split} has {prompts}, fewer than the {asked} of "
                f"prepare.{split}_prompts: the source holds no more.",
                file=sys.stderr,
            )


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


if __name__ == "__main__":
    run("prepare", main)
