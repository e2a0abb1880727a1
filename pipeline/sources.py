"""Sources of text: the standard library, data files, data sets of the hub, and mixes of them.

    found = read_source(config.source, seed=config.seed)     # pieces, and rows that nobody can use

A piece is a document, a prompt or a conversation; `split` is "" where it is still to be drawn. A
part of a mix has a name: it stands before its rows' ids, and is the domain of rows that have none.
Hub data sets come through the datasets library (extra `data`), by id and commit, or from a folder.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config import Strict
from pipeline.corpus import stdlib_documents
from pipeline.jsonl import Line
from pipeline.layouts import Layout, Message, Row, parse_rows, read_rows
from storage.errors import ConfigError, DataError

TRAIN, HELDOUT = "train", "heldout"
COMMIT = re.compile(r"[0-9a-f]{40}")
Text = Annotated[str, Field(min_length=1)]


class StdlibSource(Strict):
    """The standard library's sources, docstrings and reference, and generated arithmetic."""

    kind: Literal["stdlib"]
    max_chars: Annotated[int, Field(ge=10_000)]


class JsonlSource(Strict):
    """Files of rows in one of `pipeline.layouts`: JSON lines, a JSON array, gzip, parquet."""

    kind: Literal["jsonl"]
    train: Text
    heldout: str | None
    """A file of its own, or null: held-out rows are then drawn from `train`."""
    layout: Layout = "auto"


class HubSource(Strict):
    """A data set of the hub, or of a folder that the datasets library reads."""

    kind: Literal["hub"]
    id: Text
    revision: str | None
    """Commit of a hub repository, 40 hex digits; null for a folder."""
    subset: str | None
    """Which of several that the data set has (`load_dataset(id, subset)`)."""
    train: Text
    """Split, or a slice of one: `train_sft[:20000]`."""
    heldout: str | None
    """A split of its own, or null: held-out rows are then drawn from `train`."""
    layout: Layout = "auto"


Single = Annotated[StdlibSource | JsonlSource | HubSource, Field(discriminator="kind")]


class Part(Strict):
    """One source of a mix."""

    weight: Annotated[float, Field(gt=0)]
    """Its prompts among all, of either split; what it lacks the others fill up."""
    source: Single


class MixSource(Strict):
    """Several sources by name."""

    kind: Literal["mix"]
    parts: Annotated[dict[Text, Part], Field(min_length=1)]


Source = Annotated[StdlibSource | JsonlSource | HubSource | MixSource, Field(discriminator="kind")]


@dataclass(frozen=True)
class Piece:
    """A document or a prompt, one row of either table."""

    id: str
    domain: str
    split: str
    text: str
    whole: bool = False
    """True for a document that is one prompt already."""
    response: str | None = None
    source: str = ""
    """The part of a mix."""
    messages: tuple[Message, ...] = ()
    """Of a conversation, whose `text` is its user turns."""
    tools: tuple[dict[str, Any], ...] = ()
    language: str | None = None


@dataclass(frozen=True)
class Found:
    """What a source holds, and its rows that nobody can use: reason -> rows."""

    pieces: list[Piece]
    unfit: Counter[str] = field(default_factory=Counter)


def parts_of(source: Source) -> dict[str, Part]:
    """The parts of a mix; any other source is one part without a name."""
    if isinstance(source, MixSource):
        return source.parts
    return {"": Part(weight=1.0, source=source)}


def read_source(source: Source, *, seed: int) -> Found:
    """All pieces of a source, part by part."""
    pieces: list[Piece] = []
    unfit: Counter[str] = Counter()
    for name, part in parts_of(source).items():
        found = _read(part.source, seed)
        pieces += [_named(piece, name) for piece in found.pieces]
        unfit += found.unfit
    return Found(pieces, unfit)


def check_source(source: Source) -> None:
    """`ConfigError` for a file or folder that is not there, or a hub id without a commit."""
    for part in parts_of(source).values():
        if isinstance(part.source, JsonlSource):
            for path in (part.source.train, part.source.heldout):
                require_file(path, "prepare.source")
        if isinstance(part.source, HubSource):
            _check_hub(part.source)


def require_file(path: str | None, parameter: str) -> None:
    """`ConfigError` unless the file that a parameter names is there."""
    if path is not None and not Path(path).is_file():
        raise ConfigError(
            found=f"params.yaml: {parameter} names {path}, which is no file",
            expected="a file of JSON lines, a JSON array or parquet",
            todo="correct the path, which is relative to the project's root",
        )


def _check_hub(source: HubSource) -> None:
    if find_spec("datasets") is None:
        raise ConfigError(
            found="prepare.source is of kind hub, and the package datasets is not installed",
            expected="the datasets library, which reads data sets of the hub",
            todo='pip install "lkcache[data]", or name files with kind jsonl',
        )
    folder = Path(source.id).is_dir()
    if folder and source.revision is not None:
        raise ConfigError(
            found=f"prepare.source.revision {source.revision!r} for the local folder {source.id}",
            expected="null: a folder has no commits",
            todo="set prepare.source.revision to null",
        )
    if not folder and (source.id.count("/") > 1 or source.id.startswith((".", "/", "~"))):
        raise ConfigError(
            found=f"params.yaml: prepare.source names {source.id}, which is no folder",
            expected="a folder with data files, or a hub id such as org/name",
            todo="correct the path, which is relative to the project's root",
        )
    if not folder and (source.revision is None or not COMMIT.fullmatch(source.revision)):
        raise ConfigError(
            found=f"prepare.source.revision {source.revision!r} for the hub's {source.id}",
            expected="a commit of 40 hex digits, since a branch or a tag of the hub can move",
            todo="copy the commit from the data set's page on the hub, or name a local folder",
        )


def _named(piece: Piece, name: str) -> Piece:
    if not name:
        return piece
    domain = name if piece.domain == "all" else piece.domain
    return replace(piece, id=f"{name}/{piece.id}", domain=domain, source=name)


def _read(source: Single, seed: int) -> Found:
    if isinstance(source, StdlibSource):
        found = stdlib_documents(source.max_chars, seed)
        return Found([Piece(d.id, d.domain, "", d.text) for d in found])
    unfit: Counter[str] = Counter()
    pieces: list[Piece] = []
    train = TRAIN if source.heldout is not None else ""
    for split, place in ((train, source.train), (HELDOUT, source.heldout)):
        if place is None:
            continue
        if isinstance(source, JsonlSource):
            rows = read_rows(Path(place), source.layout)
        else:
            rows = parse_rows(_hub_lines(source, place), source.layout)
        pieces += _pieces(rows.rows, split)
        unfit += rows.unfit
    return Found(pieces, unfit)


def _pieces(rows: Iterable[Row], split: str) -> list[Piece]:
    return [
        Piece(
            row.id,
            row.domain,
            split,
            row.text,
            whole=row.is_prompt,
            response=row.response,
            messages=row.messages,
            tools=row.tools,
            language=row.language,
        )
        for row in rows
    ]


def _hub_lines(source: HubSource, split: str) -> Iterator[Line]:
    """The rows of one split as objects; a null is an absent field."""
    _check_hub(source)
    datasets = import_module("datasets")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    known = (datasets.exceptions.DatasetsError, ValueError, OSError, KeyError)
    try:
        rows = datasets.load_dataset(
            source.id, source.subset, revision=source.revision, split=split
        )
    except known as error:
        at = "" if source.revision is None else f" at {source.revision}"
        raise DataError(
            found=f"the datasets library cannot read the split {split!r} of {source.id}{at}: "
            f"{' '.join(str(error).split())[:200]}",
            expected="a data set, a revision, a subset and a split that exist, or are in the local "
            "cache where the hub is out of reach",
            todo="correct prepare.source, connect, or log in (`hf auth login`) where it is gated",
        ) from None
    if len(rows) == 0:
        raise DataError(
            found=f"the split {split!r} of {source.id} is empty",
            expected="at least one row",
            todo="correct prepare.source",
        )
    for number, row in enumerate(rows, start=1):
        value = {name: cell for name, cell in row.items() if cell is not None}
        yield Line(Path(source.id), number, value, unit="row")
