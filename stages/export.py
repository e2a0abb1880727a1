"""Write one arm's draft as the folder that an engine loads: `python -m stages.export <arm>`."""

import sys
from pathlib import Path

from pipeline.checkpoint import load_draft, read_config
from pipeline.config import load
from pipeline.export import ExportConfig, Source, export_draft, find_format
from pipeline.interface import Shape
from pipeline.matrix import Export, cell
from pipeline.provenance import run
from pipeline.target import check_files, home_of, read_interface, read_spec
from storage.workspace import Workspace, digest, tree_digest

TARGET = Path("target")


def main() -> None:
    """Check, rename, write, open again and compare; then publish `export/<arm>/<format>`."""
    arm, item = cell("exports", sys.argv, Export)
    config: ExportConfig = load("export", ExportConfig)
    form = find_format(item.kind, item.format)
    spec = read_spec(TARGET)
    home = home_of(spec, TARGET)
    check_files(spec, home)
    checkpoint = Path("drafts") / item.start / item.objective / "model"
    described = read_config(checkpoint)
    shape = Shape(spec.vocab_size, spec.hidden_size)
    expect = {"target": spec.fingerprint}
    draft = load_draft(checkpoint, read_interface(TARGET), shape, expect=expect)
    out = Path("export") / arm / item.format
    fingerprint = digest(
        [item.model_dump(), config.model_dump(), spec.fingerprint, tree_digest(checkpoint)]
    )
    with Workspace("export", fingerprint, outs=[out], cell=arm) as workspace:
        if workspace.complete():
            return
        source = Source(arm=arm, spec=spec, home=home, draft=described)
        export_draft(workspace.path(out), draft, form=form, source=source, config=config)
        workspace.publish()
    print(f"{arm}: {out}, opened again with equal logits")


if __name__ == "__main__":
    run("export", main)
