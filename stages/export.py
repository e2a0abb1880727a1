"""Write one arm's draft as the folder that an engine loads: `python -m stages.export <cell>`."""

import sys
from pathlib import Path
from typing import Any

from pipeline.checkpoint import load_draft, read_config
from pipeline.config import load
from pipeline.export import ExportConfig, Source, export_draft, find_format
from pipeline.interface import Shape
from pipeline.matrix import Arm, Export, cell
from pipeline.measured import rows
from pipeline.provenance import run
from pipeline.target import check_files, home_of, read_interface, read_spec
from storage.workspace import Workspace, digest, tree_digest

TARGET, RESULTS = Path("target"), Path("results")


def main() -> None:
    """Check, rename, write, open again and compare; then publish `export/<cell>/<format>`."""
    key, item = cell("exports", sys.argv, Export)
    config: ExportConfig = load("export", ExportConfig)
    form = find_format(item.kind, item.format)
    spec = read_spec(TARGET)
    home = home_of(spec, TARGET)
    check_files(spec, home)
    checkpoint = Path("drafts") / item.start / item.objective / "model"
    described, interface = read_config(checkpoint), read_interface(TARGET)
    shape = Shape(spec.vocab_size, spec.hidden_size)
    draft = load_draft(checkpoint, interface, shape, expect={"target": spec.fingerprint})
    measured = _measured(item, described)
    out = Path("export") / key / item.format
    fingerprint = digest(
        [
            item.model_dump(),
            config.model_dump(),
            spec.fingerprint,
            measured,
            tree_digest(checkpoint),
        ]
    )
    with Workspace("export", fingerprint, outs=[out], cell=key) as workspace:
        if workspace.complete():
            return
        source = Source(
            item.arm(key), spec, home, described, interface=interface, measured=measured
        )
        export_draft(workspace.path(out), draft, form=form, source=source, config=config)
        workspace.publish()
    print(f"{key}: {out}, opened again with equal logits")


def _measured(item: Export, described: dict[str, Any]) -> list[str]:
    """What `evaluate` found of the arm; nothing where it has not run (dvc.yaml makes it run)."""
    if not (RESULTS / item.start / "arms" / f"{item.objective}.rounds.parquet").is_file():
        return []
    named = {name: described[name] for name in ("draft", "kind", "objective", "loss", "seed")}
    return rows(RESULTS, Arm(**named, start=item.start))


if __name__ == "__main__":
    run("export", main)
