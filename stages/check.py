"""Check every section of `params.yaml` before any stage runs, and digest each stage's code.

DVC removes a stage's outs before the stage itself can refuse its parameters, so a typo would cost
the cache. Every stage depends on this one's outs: on `params.json`, whose bytes never change, so
that a bad parameter stops the run here and a good change invalidates nothing through it; and on
`code/<stage>.json`, which changes when a file that the stage imports does.
"""

from pathlib import Path

from pipeline.check import check_params
from pipeline.closure import closures, digests
from pipeline.config import read_params
from pipeline.provenance import run
from storage.workspace import Workspace, digest, write_json

OUT = Path("checked")


def main() -> None:
    """Validate all sections and their joint needs; no model is loaded."""
    params = read_params()
    check_params(params)
    code = {stage: digests(files) for stage, files in closures().items()}
    with Workspace("check", digest(code), outs=[OUT]) as workspace:
        folder = workspace.path(OUT)
        write_json(folder / "params.json", {"parameters": "good"})
        for stage, files in code.items():
            write_json(folder / "code" / f"{stage}.json", files)
        workspace.publish()


if __name__ == "__main__":
    run("check", main)
