"""`lkcache init FOLDER`: lay out a project that `dvc repro` runs in."""

import shutil
from pathlib import Path

from lkcache.presets import compose, dump
from storage.errors import WorkspaceError

SOURCE = Path(__file__).resolve().parents[1]
COPIED = ("stages", "pipeline", "storage", "presets", "dvc.yaml", ".dvcignore", ".gitignore")


def init(folder: Path, preset: str = "embedded") -> None:
    """Copy the stages and their code into FOLDER and write its params.yaml from a preset.

    FOLDER must not exist or be empty. The new project keeps DVC's records without git
    (`core.no_scm`); `git init` and `dvc config core.no_scm false` put it under git.
    """
    if folder.exists() and any(folder.iterdir()):
        raise WorkspaceError(
            found=f"{folder} is not empty",
            expected="a new or an empty folder",
            todo="name another one or remove it; nothing was overwritten",
        )
    params = compose(SOURCE / "presets", preset)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = SOURCE / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True
            )
        else:
            shutil.copy2(source, folder / name)
    (folder / ".dvc").mkdir()
    config = (SOURCE / ".dvc" / "config").read_text(encoding="utf-8")
    (folder / ".dvc" / "config").write_text(
        config.replace("[core]", "[core]\n    no_scm = true"), encoding="utf-8"
    )
    dump(params, folder / "params.yaml")
    print(f"{folder}: a project on the preset {preset!r}; run `dvc repro` in it")
