"""`lkcache diff A B`: what two caches differ in: identity, coverage, values."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from lkcache.words import counted
from storage.diff import Diff, Gap, Row
from storage.diff import diff as diff_of
from storage.errors import ConfigError
from storage.reader import Cache

EXIT_DIFFERENT = 1
SAMPLE = 64
SHOWN_IDS = 5
UNITS = {"token_logp": "nats", "law": "total variation", "hidden": "", "last_hidden": ""}


def diff(
    a: Annotated[str, Argument(help="A cache's folder, or a URL: s3://bucket/key/train.zarr.")],
    b: Annotated[str, Argument(help="The cache to compare it with.")],
    sequences: Annotated[
        int, Option(help="How many shared sequences to compare by value, evenly spread.")
    ] = SAMPLE,
    every: Annotated[bool, Option("--all", help="Compare every shared sequence.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON for machines.")] = False,
) -> int:
    """Compare two caches; exits with 0 where they are equal, 1 where they differ, 2 on an error.

    Values are compared sequence by sequence, by id, wherever each cache keeps them. Two truncated
    laws are compared on the ids that both keep, which bounds their total variation from below.
    """
    if sequences < 1:
        raise ConfigError(
            found=f"--sequences {sequences}",
            expected="at least 1 (or --all)",
            todo="correct the number",
        )
    with Console(stderr=True).status("comparing"):
        found = diff_of(Cache.open(a), Cache.open(b), sequences=None if every else sequences)
    if as_json:
        print(json.dumps(_plain(found), indent=1, sort_keys=True, ensure_ascii=False))
    else:
        _show(found, a, b)
    return 0 if found.equal else EXIT_DIFFERENT


def _plain(found: Diff) -> dict[str, Any]:
    """What differs, and everything about values."""
    return {
        "equal": found.equal,
        "same_bytes": found.same_bytes,
        "identity": {row.what: [row.a, row.b] for row in found.identity if not row.equal},
        "coverage": {row.what: [row.a, row.b] for row in found.coverage if not row.equal},
        "values": asdict(found.values),
    }


def _show(found: Diff, a: str, b: str) -> None:
    console = Console()
    if found.same_bytes:
        equal = f"{a} and {b} are equal byte for byte, as their manifests say."
        console.print(Text(equal), soft_wrap=True)
        return
    for letter, path in (("A", a), ("B", b)):
        console.print(Text(f"{letter}  {path}"), soft_wrap=True)
    console.print()
    for title, rows in (("identity", found.identity), ("coverage and bytes", found.coverage)):
        console.print(_table(title, rows))
    values = found.values
    of = f"{values.compared:,} of {values.shared:,} shared sequences"
    console.print(Text(f"\nvalues of {of}", style="bold"))
    for count, where in ((values.only_a, "A"), (values.only_b, "B")):
        if count:
            console.print(f"in {where} alone: {counted(count, 'sequence')}")
    for names, what in (
        (values.other_tokens, "have other tokens, turns or domains under the same id"),
        (values.unequal, "have the same tokens and other stored numbers"),
    ):
        if names:
            shown = ", ".join(names[:SHOWN_IDS]) + (", …" if len(names) > SHOWN_IDS else "")
            console.print(Text(f"{len(names):,} {what}: {shown}"))
    if values.gaps:
        console.print(_gap_table(values.gaps))
    word = "equal in all that was compared" if found.equal else "they differ"
    console.print(Text(word, style="bold"))


def _table(title: str, rows: Sequence[Row]) -> Table | Text:
    different = [row for row in rows if not row.equal]
    if not different:
        return Text(f"{title}: equal in {len(rows)} properties")
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("what")
    for letter in "AB":
        table.add_column(letter, justify="right", overflow="fold")
    for row in different:
        table.add_row(Text(row.what), Text(_told(row.a)), Text(_told(row.b)))
    if len(different) < len(rows):
        table.caption = f"{len(rows) - len(different)} more are equal"
        table.caption_justify = "left"
    return table


def _told(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    text = str(value)
    return f"{text[:16]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _gap_table(gaps: dict[str, Gap]) -> Table:
    table = Table(box=None, pad_edge=False)
    for n, column in enumerate(("what", "largest difference", "mean", "numbers", "unit")):
        table.add_column(column, justify="right" if 0 < n < 4 else "left")
    for name, gap in gaps.items():
        table.add_row(name, f"{gap.largest:.3g}", f"{gap.mean:.3g}", f"{gap.count:,}", UNITS[name])
    return table
