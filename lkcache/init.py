"""`lkcache init FOLDER`: lay out a project that `dvc repro` runs in."""

import shutil
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lkcache.presets import BASE, compose, dump
from lkcache.project import SHIPPED, STAMP, installed, source
from storage.errors import WorkspaceError

DVC_CONFIG = Path(".dvc", "config")


def init(
    folder: Annotated[Path, Argument(help="A new or an empty folder.")],
    preset: Annotated[str, Option(help="One of presets/.")] = BASE,
) -> None:
    """Copy the stages and their code into FOLDER and write its params.yaml from a preset.

    FOLDER must not exist or be empty. The new project keeps DVC's records without git
    (`core.no_scm`); `git init` and `dvc config core.no_scm false` put it under git.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WorkspaceError(
            found=f"{folder} is not empty" if folder.is_dir() else f"{folder} is a file",
            expected="a new or an empty folder",
            todo="name another one or remove it; nothing was overwritten",
        )
    home = source()
    params = compose(home / "presets", preset)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (home / name).is_dir():
            shutil.copytree(
                home / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy2(home / name, folder / name)
    config = (folder / DVC_CONFIG).read_text(encoding="utf-8")
    (folder / DVC_CONFIG).write_text(
        config.replace("[core]", "[core]\n    no_scm = true"), encoding="utf-8"
    )
    (folder / STAMP).write_text(f"{installed()}\n", encoding="utf-8")
    dump(params, folder / "params.yaml")
    print(f"{folder}: a project on the preset {preset!r}; run `dvc repro` in it")
