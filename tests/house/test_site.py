"""The site builds without a warning, its reference is current, and its commands are real.

A block of shell commands in `docs/` or the README is run as it stands, one script a page, in a
small project with made-up caches. A comment on the line before says otherwise:

    <!-- empty folder -->       run, in a folder of its own
    <!-- parsed: why -->        not run: each command is held against its program's own parser
    <!-- not run: why -->       a foreign program's, or a network's: only bash reads it
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lkcache.main import VERBS, _load
from lkcache.presets import compose
from pipeline.config import read_params
from tests.house.reference import pages
from tests.projects import BIN, lay_out
from tests.storage.samples import TOPK, make_records, write_cache

ROOT = Path(__file__).parents[2]
PAGES = [Path("README.md"), *sorted(Path("docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```sh\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
EMPTY = "empty folder"
BLOCK_OF = {"warmup": "starts", "train": "arms", "evaluate": "starts", "export": "exports"}


class Block(NamedTuple):
    page: Path
    mark: str
    body: str

    @property
    def name(self) -> str:
        return f"{self.page.stem}: {self.body.strip().splitlines()[0][:40]}"


BLOCKS = [
    Block(page, match["mark"] or "", match["body"])
    for page in PAGES
    for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("path", sorted(pages()), ids=lambda path: path.stem)
def test_the_reference_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages()[path], "run `make deps`"


def test_every_parameter_and_argument_says_what_it_is() -> None:
    for path, text in pages().items():
        mute = [line for line in text.splitlines() if line.endswith("|  |")]
        assert not mute, f"{path}: a string below the field, or a comment in the preset: {mute}"


@pytest.mark.skipif(find_spec("material") is None, reason="the extra docs is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in ("index", "MATHS", "storage/FORMAT", "reference/parameters", "benchmarks/rate"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
    tutorial = (tmp_path / "site" / "how-to" / "share-a-cache.html").read_text(encoding="utf-8")
    assert 'href="../benchmarks/remotes.html"' in tutorial
    assert not re.search(r'(?:src|href)="https?://(?!squidfunk|www\.mkdocs)', tutorial)


def test_every_block_says_how_it_is_tested() -> None:
    for block in BLOCKS:
        assert block.mark in ("", EMPTY) or re.match(r"(parsed|not run): \w", block.mark), (
            block.name
        )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay_out(tmp_path_factory.mktemp("docs") / "project", workers=1)
    for name in ("cache/train", "cache/heldout", "other/train"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_cache(folder / f"{name}.zarr", TOPK, make_records(TOPK, [20, 15]))
    return folder


def scripts() -> Iterator[tuple[Path, str, str]]:
    for page in PAGES:
        for mark in ("", EMPTY):
            bodies = [b.body for b in BLOCKS if (b.page, b.mark) == (page, mark)]
            if bodies:
                yield page, mark, "".join(bodies)


@pytest.mark.parametrize(
    ("mark", "script"),
    [
        pytest.param(mark, text, id=f"{page.stem}{mark and '-alone'}")
        for page, mark, text in scripts()
    ],
)
def test_commands_run(mark: str, script: str, project: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    if mark == EMPTY:
        here.mkdir()
    else:
        shutil.copytree(project, here)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=here,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.mark.startswith("parsed")], ids=lambda block: block.name
)
def test_commands_that_do_not_run_here_are_parsed(block: Block) -> None:
    for line in block.body.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            parse(words)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_bash_reads_every_block(block: Block) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=block.body, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def parse(words: list[str]) -> None:
    """Fail unless a program of ours, or of DVC and torch, would take these words."""
    program, *rest = words
    if program == "lkcache":
        parse_verb(*rest)
    elif program == "dvc":
        from dvc.cli.parser import get_main_parser

        get_main_parser().parse_args(rest)
        known_cells([word for word in rest if word.partition("@")[0] in BLOCK_OF])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), rest
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        assert options.module
        parse_stage(options.training_script, *options.training_script_args)
    elif words[:2] == ["python", "-m"]:
        parse_stage(*rest[1:])
    else:
        pytest.fail(f"{program}: mark the block `not run`, or teach this test its parser")


def parse_verb(verb: str, *rest: str) -> None:
    import typer

    assert verb in VERBS, verb
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command(verb)(_load(verb))
    group = typer.main.get_command(app)
    group.commands[verb].make_context(verb, list(rest))  # type: ignore[attr-defined]


def parse_stage(module: str, *cell: str) -> None:
    assert find_spec(module), module
    assert hasattr(import_module(module), "main")
    known_cells([f"{module.rpartition('.')[2]}@{key}" for key in cell])


def known_cells(cells: list[str]) -> None:
    """Cells that the default has, or the preset for one GPU."""
    for cell in cells:
        stage, _, key = cell.partition("@")
        assert any(key in params[BLOCK_OF[stage]] for params in parameters()), cell


@cache
def parameters() -> list[Any]:
    return [read_params(), compose(Path("presets"), "one-gpu-8b")]
