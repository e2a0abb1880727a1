"""Which copy of the stages' code runs: that of the project at hand, or the one lkcache carries

    activate()        # first thing in `lkcache.main`; then `storage` and `pipeline` are importable

A project holds its own `stages/`, `pipeline/` and `storage/`, because DVC decides by their contents
what to run again; inside one, the command runs that copy, and says so where another version of
lkcache laid it out. Anywhere else it runs the copy that it carries: `_project/` of a wheel, or the
repository that an editable install points to. The standard library only: `setup.py` imports this.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CODE = ("stages", "pipeline", "storage")
SHIPPED = (
    *CODE,
    "presets",
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/.gitignore",
)
"""What a wheel carries in `lkcache/_project` and `init` copies; a preset gives `params.yaml`."""
STAMP = ".lkcache-version"
"""In a project: the version of lkcache that laid it out. A repository has none."""

CARRIED = Path(__file__).parent / "_project"


def source() -> Path:
    """The folder with the copy that this lkcache carries."""
    return CARRIED if CARRIED.is_dir() else Path(__file__).resolve().parents[1]


def installed() -> str:
    """The version of this lkcache, `unknown` where it was not installed."""
    try:
        return version("lkcache")
    except PackageNotFoundError:
        return "unknown"


def find(here: Path) -> Path | None:
    """The nearest project at or above a folder."""
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and all((folder / name).is_dir() for name in CODE):
            return folder
    return None


def stamped(project: Path) -> str | None:
    """The version that laid a project out, None where nothing says."""
    try:
        return (project / STAMP).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def activate() -> None:
    """Make the code of this folder's project importable, or else the carried copy."""
    project = find(Path.cwd())
    sys.path.insert(0, str(project or source()))
    there = stamped(project) if project else None
    if there is not None and there != installed():
        print(
            f"lkcache: {project} was laid out by lkcache {there}, and {installed()} is installed; "
            "the project's own stages, pipeline and storage run",
            file=sys.stderr,
        )
