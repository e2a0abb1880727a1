"""The embedded corpus: text that every machine with Python has, as documents of three domains.

| domain | a document is |
| --- | --- |
| `code` | one source file of the standard library, docstrings taken out |
| `prose` | the docstrings of one such file, or one topic of the language reference |
| `maths` | a set of arithmetic problems with worked solutions, generated from the seed |

Docstrings leave the code so that no two domains share text. The text depends on the Python version
(recorded in the metrics), and on nothing else: files are taken in the seeded shuffle of their
sorted names. Dims: none; sizes are characters.
"""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

import numpy as np

from pipeline.problems import problem_set
from pipeline.seeds import rng

# most of the text is code, as in the library; maths is capped because its templates repeat
SHARES = {"code": 0.55, "prose": 0.25, "maths": 0.20}
# tests repeat themselves, encodings and generated tables are data rather than text, lib2to3's
# grammar tables likewise; pydoc_data's topics are the prose of the language reference
LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
    | {"encodings", "pydoc_data", "turtledemo", "lib2to3"}
)
MIN_CHARS = 400  # a document below this is an import shim, not text


@dataclass(frozen=True)
class Document:
    """One document; `text` ends without a newline."""

    id: str
    domain: str
    text: str


def stdlib_documents(max_chars: int, seed: int) -> list[Document]:
    """Documents of about `max_chars` characters in all, domains in the proportion of `SHARES`.

    A domain that has no more text stays below its share; none is filled up by another.
    """
    quota = {domain: share * max_chars for domain, share in SHARES.items()}
    taken: list[Document] = []
    room = dict(quota)
    for document in _library(seed):
        if room[document.domain] > 0:
            taken.append(document)
            room[document.domain] -= len(document.text)
        if room["code"] <= 0 and room["prose"] <= 0:
            break
    for number in range(int(quota["maths"])):
        if room["maths"] <= 0:
            break
        text = problem_set(rng(seed, "maths", number))
        taken.append(Document(f"maths/{number:05d}", "maths", text))
        room["maths"] -= len(text)
    return taken


def _library(seed: int) -> Iterator[Document]:
    """Code and prose of the standard library, file by file and topic by topic, shuffled."""
    root = Path(sysconfig.get_paths()["stdlib"])
    topics = _topics()
    units: list[Path | str] = [*sorted(_sources(root)), *sorted(topics)]
    order: np.ndarray = rng(seed, "library").permutation(len(units))
    for index in order:
        unit = units[index]
        if isinstance(unit, str):
            found = [Document(f"topic/{unit}", "prose", topics[unit])]
        else:
            code, prose = split_docstrings((root / unit).read_bytes())
            name = unit.as_posix()
            found = [
                Document(f"code/{name}", "code", code),
                Document(f"doc/{name}", "prose", prose),
            ]
        yield from (document for document in found if len(document.text) >= MIN_CHARS)


def _sources(root: Path) -> Iterator[Path]:
    """Relative paths of the library's source files; folders that are left out are not entered."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]
        for name in names:
            # _sysconfigdata holds the paths and flags of the machine that built Python
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root)


def _topics() -> dict[str, str]:
    """The language reference as pydoc carries it."""
    from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]

    return {str(name): str(text).strip() for name, text in topics.items()}


def split_docstrings(source: bytes) -> tuple[str, str]:
    """A Python file's code without its docstrings, and the docstrings without their code.

    Code keeps its lines' order and its comments; a body that was a docstring only becomes `pass`.
    Both are empty where the file is not UTF-8 or does not parse.
    """
    try:
        source.decode("utf-8")
        with warnings.catch_warnings():  # the library's own invalid escapes
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", ""
    lines = source.splitlines(keepends=True)
    prose: list[str] = []
    for name, node, alone in _docstrings(tree, ""):
        assert isinstance(node.value, ast.Constant)
        prose.append(
            f"{name}\n{cleandoc(str(node.value.value))}"
            if name
            else cleandoc(str(node.value.value))
        )
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        head = lines[first][: node.col_offset]
        tail = lines[last][node.end_col_offset :]
        kept = head + (b"pass" if alone else b"") + tail
        lines[first : last + 1] = [kept if kept.strip() else b""] + [b""] * (last - first)
    code = b"".join(lines).decode("utf-8").replace("\r\n", "\n")
    return code.strip(), "\n\n".join(prose).strip()


def _docstrings(node: ast.AST, path: str) -> Iterator[tuple[str, ast.Expr, bool]]:
    """(dotted name, docstring statement, whether it is the whole body), in file order."""
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return
    owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if owner and body and _is_text(body[0]):
        yield path, body[0], len(body) == 1 and not isinstance(node, ast.Module)
    for child in body:
        name = getattr(child, "name", "")
        yield from _docstrings(child, f"{path}.{name}".strip(".") if name else path)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
