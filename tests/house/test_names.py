"""A test has one name in every process: pytest-xdist stops where two workers collect others.

Bytes are named by their argument (`tests/conftest.py`). What is left to a list of values is looked
for in the source, because collecting twice takes longer than this whole folder: values of a clock,
of a random number or of an address, and a set gone through in the order of its hashes.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import pytest_make_parametrize_id

FLEETING = ("time", "datetime", "random", "secrets", "uuid", "tempfile", "hash", "id", "object")
"""Modules and functions whose values differ between two processes."""
FIXED = ("sorted", "len", "min", "max", "sum")
"""Functions for which the order of a set is nothing."""


def unstable(source: str) -> list[str]:
    """What the lists of `parametrize` and `fixture(params=)` of a module hold that may differ."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if _name(call.func).endswith("parametrize"):
            values = [*call.args[1:], *(k.value for k in call.keywords)]
        elif _name(call.func).endswith("fixture"):
            values = [k.value for k in call.keywords if k.arg == "params"]
        else:
            continue
        for value in values:
            known = constants.get(value.id, value) if isinstance(value, ast.Name) else value
            found += [f"line {node.lineno}: {ast.unparse(node)}" for node in _fleeting(known)]
            if _is_set(known):
                found.append(f"line {value.lineno}: the order of {ast.unparse(known)}")
    return found


def _fleeting(node: ast.AST) -> Iterator[ast.expr]:
    """Calls whose value differs between processes, and sets that are gone through."""
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name in FIXED:
            node = ast.Tuple([part for part in node.args if not _is_set(part)], ast.Load())
        elif name.split(".")[0] in FLEETING or _is_dated(node):
            yield node
        elif name in ("list", "tuple", "enumerate", "map", "zip"):
            yield from (part for part in node.args if _is_set(part))
    elif isinstance(node, ast.comprehension) and _is_set(node.iter):
        yield node.iter
    elif isinstance(node, ast.Starred) and _is_set(node.value):
        yield node.value
    for part in ast.iter_child_nodes(node):
        yield from _fleeting(part)


def _is_dated(node: ast.Call) -> bool:
    """A gzip header holds the time unless it is told another."""
    return _name(node.func) == "gzip.compress" and "mtime" not in [k.arg for k in node.keywords]


def _is_set(node: ast.AST) -> bool:
    called = isinstance(node, ast.Call) and _name(node.func) in ("set", "frozenset")
    return called or isinstance(node, ast.Set | ast.SetComp)


def _name(node: ast.expr) -> str:
    """The dotted name of what is called; empty where it has none."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def test_no_name_depends_on_the_process() -> None:
    found = {str(path): unstable(path.read_text("utf-8")) for path in Path("tests").rglob("*.py")}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ("[1, 'a', b'b']", 0),
        ("sorted({1, 2})", 0),
        ("[len({1, 2})]", 0),
        ("[gzip.compress(b'a', mtime=0)]", 0),
        ("[gzip.compress(b'a')]", 1),
        ("[str(time.time()), f'{uuid.uuid4()}']", 2),
        ("{'a', 'b'}", 1),
        ("[x for x in {'a', 'b'}]", 1),
        ("[*set('ab')]", 1),
        ("list(frozenset('ab'))", 1),
        ("VALUES", 1),
    ],
)
def test_what_may_differ_is_found(values: str, count: int) -> None:
    source = f"VALUES = {{'a', 'b'}}\n@pytest.mark.parametrize('x', {values})\ndef f(x): ..."
    assert len(unstable(source)) == count


def test_bytes_are_named_by_their_argument() -> None:
    assert pytest_make_parametrize_id(b"\x1f\x8b", "file") == "file"
    assert pytest_make_parametrize_id("text", "file") is None
