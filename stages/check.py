"""Check every section of `params.yaml` before any stage runs.

DVC removes a stage's outs before the stage itself can refuse its parameters, so a typo would cost
the cache. Every stage depends on this one's out, whose bytes never change: a bad parameter stops
the run here, and a good change invalidates nothing through it.
"""

from pathlib import Path

from pipeline.check import check_params
from pipeline.config import read_params
from pipeline.provenance import run
from storage.workspace import Workspace, digest, write_json

OUT = Path("checked")


def main() -> None:
    """Validate all sections and their joint needs; no model is loaded."""
    check_params(read_params())
    with Workspace("check", digest("parameters are good"), outs=[OUT]) as workspace:
        write_json(workspace.path(OUT) / "params.json", {"parameters": "good"})
        workspace.publish()


if __name__ == "__main__":
    run("check", main)
