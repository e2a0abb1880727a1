"""One table, three forms (HTML, Markdown, CSV), and the page that holds them all.

The page is one file: its style sheet and pictures are inside it, it asks no network and runs no
script, and its bytes depend on its content alone. Knows cells, not what they mean.

HTML and Markdown round for reading; CSV carries six significant digits, and an interval as three
columns (`tau`, `tau_lo`, `tau_hi`).
"""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pipeline.statistics import Interval

Cell = str | int | float | Interval | None
TEMPLATES = Path(__file__).parent / "templates"
NOTHING = "–"
SIGNIFICANT = -1


@dataclass(frozen=True)
class Column:
    """A column: its key in rows and CSV, its title, how a number is printed."""

    name: str
    title: str
    digits: int = 2
    """After the point; `SIGNIFICANT` for four significant digits."""
    group: str = ""
    """Columns of one group stand together under it."""
    merge: bool = False
    """Equal values in consecutive rows are one cell in HTML: the row's heading."""
    signed: bool = False
    ends_only: bool = False
    """An interval's estimate stands in another column: print the ends."""


@dataclass(frozen=True)
class Table:
    """Rows under columns; `strong` cells (row, column name) stand out."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    strong: frozenset[tuple[int, str]] = frozenset()


def to_csv(table: Table) -> str:
    """Comma-separated, one header row, six significant digits, no rounding for reading."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    wide = {
        column.name
        for column in table.columns
        if any(isinstance(row.get(column.name), Interval) for row in table.rows)
    }
    header: list[str] = []
    for column in table.columns:
        header.append(column.name)
        if column.name in wide:
            header += [f"{column.name}_lo", f"{column.name}_hi"]
    writer.writerow(header)
    for row in table.rows:
        cells: list[str] = []
        for column in table.columns:
            cells += _raw(row.get(column.name), wide=column.name in wide)
        writer.writerow(cells)
    return out.getvalue()


def _raw(cell: Cell, *, wide: bool) -> list[str]:
    if isinstance(cell, Interval):
        return [_six(cell.estimate), _six(cell.lo), _six(cell.hi)]
    text = _six(cell) if isinstance(cell, float) else "" if cell is None else str(cell)
    if wide and isinstance(cell, str):
        text = ""  # "withheld" is for readers; a number's column stays a number's
    return [text, "", ""] if wide else [text]


def _six(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def to_markdown(table: Table) -> str:
    """A GitHub table under its caption."""
    titles = [f"{c.group} {c.title}".strip() for c in table.columns]
    rule = ["---" if _is_text(table, c) else "---:" for c in table.columns]
    lines = [f"{table.caption}\n", _row(titles), _row(rule)]
    for k, row in enumerate(table.rows):
        cells = [_plain(row.get(c.name), c) for c in table.columns]
        strong = [(k, c.name) in table.strong for c in table.columns]
        lines.append(
            _row([f"**{t}**" if bold else t for t, bold in zip(cells, strong, strict=True)])
        )
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _is_text(table: Table, column: Column) -> bool:
    return all(isinstance(row.get(column.name), str) for row in table.rows)


def _plain(cell: Cell, column: Column) -> str:
    if isinstance(cell, Interval):
        ends = _bracket(cell, column)
        return ends if column.ends_only else f"{number(cell.estimate, column)} {ends}".strip()
    if isinstance(cell, float):
        return number(cell, column)
    if isinstance(cell, int):
        return f"{cell:,}"
    return cell if cell else NOTHING


def _bracket(cell: Interval, column: Column) -> str:
    if math.isnan(cell.lo) or math.isnan(cell.hi):
        return ""
    return f"[{number(cell.lo, column)}, {number(cell.hi, column)}]"


def number(value: float, column: Column) -> str:
    """A rounded number with a true minus sign."""
    if math.isnan(value):
        return NOTHING
    if column.digits == SIGNIFICANT:
        return f"{value:.4g}".replace("-", "−")
    text = f"{value:+,.{column.digits}f}" if column.signed else f"{value:,.{column.digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def to_html(table: Table) -> str:
    """A table with heading cells, in a box of its own that scrolls where the page is narrow."""
    label = escape(table.caption, quote=True)
    body = "".join(_html_row(table, k) for k in range(len(table.rows)))
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<caption><span>{with_intervals(table.caption)}</span></caption>"
        f"<thead>{_html_head(table)}</thead><tbody>{body}</tbody></table></div>"
    )


def _html_head(table: Table) -> str:
    def heading(column: Column, extra: str = "") -> str:
        return f'<th scope="col"{extra}{_kinds(table, column)}>{escape(column.title)}</th>'

    if not any(column.group for column in table.columns):
        return "<tr>" + "".join(heading(column) for column in table.columns) + "</tr>"
    upper, lower = [], []
    groups = [column.group for column in table.columns]
    for k, column in enumerate(table.columns):
        if not column.group:
            upper.append(heading(column, ' rowspan="2"'))
            continue
        lower.append(heading(column))
        if k == groups.index(column.group):
            span = groups.count(column.group)
            name = escape(column.group)
            upper.append(f'<th scope="colgroup" class="group" colspan="{span}">{name}</th>')
    return f"<tr>{''.join(upper)}</tr><tr>{''.join(lower)}</tr>"


def _html_row(table: Table, k: int) -> str:
    row = table.rows[k]
    cells, first = [], False
    merged = [column.name for column in table.columns if column.merge]
    for column in table.columns:
        value = row.get(column.name)
        if column.merge:
            if k and _same(table, k - 1, k, column):
                continue
            span = _run(table, k, column)
            first = first or column.name == merged[0]
            cells.append(f'<th scope="rowgroup" rowspan="{span}">{_html(value, column)}</th>')
            continue
        strong = (k, column.name) in table.strong
        attribute = _kinds(table, column, strong=strong)
        cells.append(f"<td{attribute}>{_html(value, column)}</td>")
    opening = '<tr class="first">' if first else "<tr>"
    return f"{opening}{''.join(cells)}</tr>"


def _kinds(table: Table, column: Column, *, strong: bool = False) -> str:
    """The class attribute of a cell: text, the left edge of a group of columns, strong."""
    groups = [c.group for c in table.columns]
    edge = column.group and column is table.columns[groups.index(column.group)]
    kinds = {"text": _is_text(table, column), "edge": bool(edge), "strong": strong}
    names = " ".join(kind for kind, holds in kinds.items() if holds)
    return f' class="{names}"' if names else ""


def _same(table: Table, a: int, b: int, column: Column) -> bool:
    """Two rows agree in this merged column and in those left of it."""
    names = [c.name for c in table.columns if c.merge]
    upto = names[: names.index(column.name) + 1]
    return all(table.rows[a].get(name) == table.rows[b].get(name) for name in upto)


def _run(table: Table, k: int, column: Column) -> int:
    """How many consecutive rows from k share a merged column's value."""
    end = k + 1
    while end < len(table.rows) and _same(table, k, end, column):
        end += 1
    return end - k


def _html(cell: Cell, column: Column) -> str:
    if not isinstance(cell, Interval):
        return with_intervals(_plain(cell, column))
    ends = _bracket(cell, column)
    span = f'<span class="interval">{ends}</span>' if ends else ""
    if column.ends_only:
        return span or NOTHING
    return f"{number(cell.estimate, column)} {span}".strip()


def with_intervals(text: str) -> str:
    """Escaped text with every `[lo, hi]` in an element of class `interval`."""
    return re.sub(
        r"\[[+−\d][^\[\]]*, [^\[\]]*\]",
        lambda match: f'<span class="interval">{match[0]}</span>',
        re.sub(
            r" (?=%)|(?<=\b[Tγτ]) (?==)|(?<=\b[Tγτ] =) ",
            "\N{NO-BREAK SPACE}",
            escape(text, quote=False),
        ),
    )


def render(content: Mapping[str, Any]) -> str:
    """The page: `templates/report.html` filled with `content`, the style sheet inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = lambda table: Markup(to_html(table))  # noqa: S704  escaped there
    environment.filters["svg"] = Markup  # drawn by pipeline.charts, which escapes its words
    environment.filters["intervals"] = lambda text: Markup(with_intervals(text))  # noqa: S704
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(style=Markup(style), **content)  # noqa: S704
