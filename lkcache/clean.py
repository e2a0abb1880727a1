"""`lkcache clean`: partial work of stages that were killed, and what of it may go."""

import time
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Option

from lkcache.words import age, counted, num_bytes
from storage.errors import WorkspaceError
from storage.scratch import (
    ASIDE,
    EMPTY,
    IN_USE,
    REMOVABLE,
    RESUMABLE,
    STALE,
    UNPUBLISHED,
    Work,
    find_work,
    remove_work,
)

MEANING = {
    STALE: "of other parameters or inputs: no run uses it",
    EMPTY: "nothing in it",
    RESUMABLE: "of the latest run: the next one goes on from it (--all removes it too)",
    ASIDE: "whole outs of other parameters, this copy alone: a run of theirs takes them back "
    "(--all removes them too)",
    IN_USE: "a process is at work on this stage: left alone",
    UNPUBLISHED: "its publication was cut off: run the stage, which finishes it; left alone",
}


def clean(
    yes: Annotated[bool, Option("--yes", help="Remove what is listed to go.")] = False,
    every: Annotated[
        bool,
        Option(
            "--all", help="Also what a next run would resume from, and finished outs set aside."
        ),
    ] = False,
) -> None:
    """List the partial work that killed stages left under .scratch, and remove it with --yes.

    Run from the project's root. Outputs in place are never touched, nor a stage that is running.
    """
    root = Path()
    if not (root / "dvc.yaml").is_file():
        raise WorkspaceError(
            found=f"no dvc.yaml in {Path.cwd()}",
            expected="the project's root, beside whose dvc.yaml .scratch lies",
            todo="change to it and run lkcache clean again",
        )
    works = find_work(root)
    if not works:
        print("no partial work under .scratch, and nothing set aside")
        return
    console = Console()
    removable = (*REMOVABLE, RESUMABLE, ASIDE) if every else REMOVABLE
    going = [work for work in works if work.state in removable]
    console.print(_table(works, going))
    freed = sum(work.num_bytes for work in going)
    if not going:
        console.print("nothing to remove")
    elif not yes:
        console.print(f"--yes removes {counted(len(going), 'folder')}, {num_bytes(freed)}")
    else:
        left = [work for work in going if not remove_work(root, work)]
        freed -= sum(work.num_bytes for work in left)
        console.print(f"removed {counted(len(going) - len(left), 'folder')}, {num_bytes(freed)}")
        for work in left:
            console.print(Text(f"{work.stage}: a process has begun work on it; left alone"))


def _table(works: list[Work], going: list[Work]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "fingerprint", "size", "last changed", "", "state"):
        right = column in ("size", "last changed")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    now = time.time()
    for work in works:
        table.add_row(
            Text(work.stage),
            work.fingerprint,
            num_bytes(work.num_bytes),
            age(now - work.modified_s),
            "goes" if work in going else "stays",
            Text(f"{work.state}: {MEANING[work.state]}"),
        )
    return table
