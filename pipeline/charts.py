"""Small SVG charts for a page that is light or dark, wide or narrow, on screen or on paper.

Hand-made, because a chart here is a few lines and the page must follow the reader's colours: every
colour is a CSS class (`s0` … `s7`, `axis`, `grid`), so that the style sheet alone decides it, and
text inherits the page's font. A series is told by colour, by marker and by dash (Okabe-Ito, safe
for the colour-blind). A chart is 280 units wide, so that four stand beside each other and one
fills a phone; its points carry a `<title>` each, its root a `role` and a label. Same input, same
bytes.

Knows numbers and labels, nothing of arms or τ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 280, 204
FOREST_WIDTH = 380
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 26, 38
NUM_STYLES = 8  # colours of Okabe-Ito that stand out on white and on near-black, and a grey


@dataclass(frozen=True)
class Series:
    """One line: points in order, with optional ends of an interval."""

    name: str
    style: int
    """Index of colour, marker and dash: one per objective on the whole page."""
    points: Sequence[tuple[float, float]]
    ends: Sequence[tuple[float, float]] | None = None
    """[lo, hi] of each point, drawn as a whisker."""
    faint: bool = False
    """A thin line without markers."""


@dataclass(frozen=True)
class Bar:
    """One row of a forest plot: a point, a thick and a thin interval, in units of the axis."""

    label: str
    style: int
    value: float
    thick: tuple[float, float] | None
    thin: tuple[float, float] | None


def ticks(lo: float, hi: float, *, most: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) inside [lo, hi], at most `most`."""
    if not hi > lo:
        return [lo]
    power = 10 ** math.floor(math.log10((hi - lo) / most))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if (hi - lo) / (m * power) <= most - 1)
    first = math.ceil(lo / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(hi / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks in words, all with as many decimals as the longest needs."""
    digits = max((len(f"{v:.10g}".partition(".")[2]) for v in values), default=0)
    return [f"{v:,.{digits}f}".replace("-", "−") for v in values]


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    whole_x: bool = False,
    x_names: Sequence[str] = (),
    diagonal: bool = False,
) -> str:
    """A line chart; `diagonal` draws y = x on equal axes instead (predicted against measured).

    `x_names` label x = 0, 1, …: bins whose edges no scale would show.
    """
    xs = [px for s in series for px, _ in s.points]
    ys = [v for s in series for k, p in enumerate(s.points) for v in (p[1], *_ends(s, k))]
    if not xs:
        return ""
    if diagonal:
        xs = ys = [*xs, *ys]
    x_lo, x_hi = _padded(xs, 0.04 if not diagonal else 0.06)
    y_lo, y_hi = _padded(ys, 0.06)
    across = _scale(x_lo, x_hi, LEFT, WIDTH - RIGHT)
    up = _scale(y_lo, y_hi, HEIGHT - BOTTOM, TOP)
    parts = [_grid_y(ticks(y_lo, y_hi), up), _title(title, WIDTH)]
    whole = whole_x or bool(x_names)
    marks = [float(v) for v in sorted(set(xs))] if whole else ticks(x_lo, x_hi)
    words = [x_names[round(v)] for v in marks] if x_names else labels(marks)
    parts += [
        _text(across(v), HEIGHT - BOTTOM + 15, mark, "tick", "middle")
        for v, mark in zip(marks, words, strict=True)
    ]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x, "label", "middle"))
    parts.append(_text(4, 12, y, "label", "start"))
    if diagonal:
        parts.append(_line(across(x_lo), up(x_lo), across(x_hi), up(x_hi), "axis dashed"))
    parts += [_series(s, across, up, joined=not diagonal) for s in series]
    names = ", ".join(dict.fromkeys(s.name for s in series))
    return _svg(f"{title}: {y} against {x} for {names}", WIDTH, HEIGHT, parts)


def forest(title: str, bars: Sequence[Bar], *, x: str) -> str:
    """Points with two intervals in rows, a line at zero."""
    values = [v for b in bars for v in (b.value, *(b.thick or ()), *(b.thin or ()))]
    if not values:
        return ""
    # 6.3 units a character of the row labels, in the widest of the usual sans faces
    row, left = 26, min(180.0, 14 + 6.3 * max(len(bar.label) for bar in bars))
    height = TOP + row * len(bars) + BOTTOM
    lo, hi = _padded([0.0, *values], 0.05)
    across = _scale(lo, hi, left, FOREST_WIDTH - RIGHT)
    bottom = TOP + row * len(bars) + 4
    parts = [_title(title, FOREST_WIDTH)]
    marks = ticks(lo, hi, most=5)
    for v, mark in zip(marks, labels(marks), strict=True):
        parts.append(_line(across(v), TOP, across(v), bottom, "axis" if v == 0 else "grid"))
        parts.append(_text(across(v), bottom + 15, mark, "tick", "middle"))
    for k, bar in enumerate(bars):
        y = TOP + row * (k + 0.5)
        parts.append(_text(left - 8, y + 4, bar.label, "row", "end"))
        parts.append(f'<g class="{_style(bar.style)}"><title>{escape(_bar_words(bar))}</title>')
        if bar.thin:
            parts.append(_line(across(bar.thin[0]), y, across(bar.thin[1]), y, "thin"))
        if bar.thick:
            parts.append(_line(across(bar.thick[0]), y, across(bar.thick[1]), y, "thick"))
        parts.append(_marker(bar.style, across(bar.value), y) + "</g>")
    parts.append(_text((left + FOREST_WIDTH - RIGHT) / 2, height - 4, x, "label", "middle"))
    return _svg(f"{title}: {x}, " + "; ".join(map(_bar_words, bars)), FOREST_WIDTH, height, parts)


def swatch(style: int) -> str:
    """The line and marker of a series, for a legend; decorative, the name stands beside it."""
    body = _line(1, 7, 27, 7, "line") + _marker(style, 14, 7)
    return (
        f'<svg class="swatch" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true">'
        f'<g class="{_style(style)}">{body}</g></svg>'
    )


def _bar_words(bar: Bar) -> str:
    ends = bar.thin or bar.thick
    words = f", from {ends[0]:+.2f} to {ends[1]:+.2f}" if ends else ""
    return f"{bar.label} {bar.value:+.2f}{words}".replace("-", "−")


def _series(series: Series, across: "_Scale", up: "_Scale", *, joined: bool) -> str:
    parts = [f'<g class="{_style(series.style)}{" faint" if series.faint else ""}">']
    if joined:
        path = " ".join(f"{_n(across(px))},{_n(up(py))}" for px, py in series.points)
        parts.append(f'<polyline class="line" points="{path}"/>')
    for k, (px, py) in enumerate(series.points):
        for_title = f"<title>{escape(f'{series.name}: {_short(px)}, {py:.3f}')}</title>"
        if ends := _ends(series, k):
            x = across(px)
            parts.append(_line(x, up(ends[0]), x, up(ends[1]), "thin"))
        if not series.faint:
            parts.append(f"<g>{for_title}{_marker(series.style, across(px), up(py))}</g>")
    return "".join([*parts, "</g>"])


def _ends(series: Series, k: int) -> tuple[float, ...]:
    if series.ends is None or any(math.isnan(v) for v in series.ends[k]):
        return ()
    return tuple(series.ends[k])


def _marker(style: int, x: float, y: float) -> str:
    """Circle, square, diamond, triangle, triangle down, cross, plus, bow tie."""
    a, b = _n(x), _n(y)
    if style % NUM_STYLES == 0:
        return f'<circle class="mark" cx="{a}" cy="{b}" r="3.4"/>'
    shapes = [
        "M-3.2-3.2h6.4v6.4h-6.4z",
        "M0-4.4L4.4 0 0 4.4-4.4 0z",
        "M0-4.2L4 3.1h-8z",
        "M0 4.2L4-3.1h-8z",
        "M-4-2.2L-2.2-4 0-1.8 2.2-4 4-2.2 1.8 0 4 2.2 2.2 4 0 1.8-2.2 4-4 2.2-1.8 0z",
        "M-1.3-4.3h2.6v3h3v2.6h-3v3h-2.6v-3h-3v-2.6h3z",
        "M-4.2-3.6L4.2 3.6V-3.6L-4.2 3.6z",
    ]
    path = shapes[(style % NUM_STYLES) - 1]
    return f'<path class="mark" d="{path}" transform="translate({a} {b})"/>'


def _style(style: int) -> str:
    """The class of a series; a ninth looks like the first."""
    return f"s{style % NUM_STYLES}"


class _Scale:
    """A linear map from data to drawing units."""

    def __init__(self, lo: float, hi: float, start: float, end: float) -> None:
        self._lo, self._start = lo, start
        self._slope = (end - start) / (hi - lo)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._lo) * self._slope


def _scale(lo: float, hi: float, start: float, end: float) -> _Scale:
    return _Scale(lo, hi, start, end)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    lo, hi = min(values), max(values)
    pad = (hi - lo) * share or max(abs(hi) * 0.05, 0.05)
    return lo - pad, hi + pad


def _grid_y(values: Sequence[float], up: _Scale) -> str:
    return "".join(
        _line(LEFT, up(v), WIDTH - RIGHT, up(v), "grid")
        + _text(LEFT - 6, up(v) + 4, mark, "tick", "end")
        for v, mark in zip(values, labels(values), strict=True)
    )


def _title(text: str, width: float) -> str:
    return _text(width - RIGHT, 12, text, "title", "end")


def _svg(label: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_n(width)} {_n(height)}" role="img" '
        f'aria-label="{escape(label)}">' + "".join(parts) + "</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<path class="{style}" d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return (
        f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">'
        f"{escape(text, quote=False)}</text>"
    )


def _n(value: float) -> str:
    """A coordinate at a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0").replace("-0", "0" if abs(value) < 0.05 else "-0")


def _short(value: float) -> str:
    text = f"{value:.10g}" if abs(value) < 10000 else f"{value:,.0f}"
    return text.replace("-", "−")
