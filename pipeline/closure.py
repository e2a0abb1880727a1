"""Which of our own files each stage imports, directly or not, and a digest of each.

`check` writes `checked/code/<stage>.json`, on which that stage depends: an edit that can change
what a stage writes makes DVC run it again, and no other. Listed in dvc.yaml instead, the same files
cost seconds a stage, because DVC parses and rewrites its whole lock file at every one.

Drafts and losses are found by name and escape the static graph: a cell lists its own two files, and
what a stage's drafts or losses import is added here (`BY_NAME`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage.workspace import file_digest

PACKAGES = ("stages", "pipeline", "storage")
# cannot change an output: reading parameters, fanning out, recording a run. Argued in review.
PLUMBING = {"pipeline.config", "pipeline.cluster", "pipeline.hosts", "pipeline.provenance"}
# folders whose modules a stage finds by name: DVC sees a cell's own file, this adds their imports
BY_NAME = {
    "warmup": ("drafts", "losses"),
    "train": ("drafts", "losses"),
    "evaluate": ("drafts",),
    "export": ("drafts", "exports"),
}


def stage_names(root: Path = Path()) -> list[str]:
    """The stages: one file each."""
    return sorted(path.stem for path in (root / "stages").glob("[a-z]*.py"))


def named_files(folder: str, root: Path = Path()) -> set[str]:
    """The modules of `pipeline/<folder>`, which cells name and no closure holds."""
    return {f"pipeline.{folder}.{p.stem}" for p in (root / "pipeline" / folder).glob("[a-z]*.py")}


def closures(root: Path = Path()) -> dict[str, list[str]]:
    """Each stage's own files, sorted: its module and all that it imports, plumbing apart."""
    import grimp

    graph: Any = grimp.build_graph(*PACKAGES, cache_dir=None)
    found = {}
    for stage in stage_names(root):
        module = f"stages.{stage}"
        modules = {module} | graph.find_upstream_modules(module)
        for folder in BY_NAME.get(stage, ()):
            named = named_files(folder, root)
            modules |= {m for one in named for m in graph.find_upstream_modules(one)} - named
        found[stage] = _files(modules)
    return found


def digests(files: Iterable[str], root: Path = Path()) -> dict[str, str]:
    """The sha256 of each file."""
    return {file: file_digest(root / file) for file in files}


def _files(modules: Iterable[str]) -> list[str]:
    """The files of modules; packages hold a docstring only and are left out."""
    own = {m for m in modules if m.count(".") and m not in PLUMBING}
    paths = (Path(*module.split(".")).with_suffix(".py") for module in own)
    return sorted(str(path) for path in paths if path.is_file())
