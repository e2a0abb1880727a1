"""What a byte of cache buys: committed measurements as charts, and what this cache takes and loses.

    exhibit = rate_exhibit(cache_report)     # .charts, .legend, .words

The measurements are benchmarks/rate.py's, which writes them to templates/rate.json: lost mass by
rule of truncation on made-up laws, and the α of drafts trained from caches of every mode. They are
of the project, not of the run that a report is about; its own cache is one more point. Draws and
words, measures nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.charts import Series, lines, swatch
from pipeline.page import TEMPLATES

DATA = TEMPLATES / "rate.json"
REGIME = "c14"
LAW = ("kept", "topk_ids", "topk_p", "tail_logp_mass", "tail_kept", "tail_ids", "tail_logp")
"""Arrays that say the law in mode `topk`."""
WHOLE_LAW = ("logits", "last_hidden")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Exhibit:
    """What the report shows of it."""

    charts: list[str]
    legend: list[tuple[str, str]]
    """Name and swatch of each line."""
    words: str
    """Of this cache; empty where its report says nothing of bytes."""


def lost_series(rows: Sequence[Row]) -> list[Series]:
    """Lost mass against bytes a token, one line a family of rules."""
    families = {"threshold": "p >=", "nucleus": "nucleus", "fixed K": "fixed"}
    found = [row for row in rows if row["regime"] == REGIME]
    return [
        Series(
            name,
            style,
            sorted((r["bytes"], r["lost"]) for r in found if r["rule"].startswith(start)),
        )
        for style, (name, start) in enumerate(families.items())
    ]


def alpha_series(rows: Sequence[Row]) -> list[Series]:
    """Held-out α under LK-λ against bytes a token, seeds averaged, one line a family of caches."""
    groups = {
        "threshold, tail samples": [r for r in rows if "samples" in r["cache"]],
        "threshold, no samples": [r for r in rows if r["cache"].startswith("p") and _bare(r)],
        "fixed K, no samples": [r for r in rows if r["cache"].startswith("K") and _bare(r)],
        "fixed K, renormalised": [r for r in rows if "renormalised" in r["cache"]],
    }
    return [
        Series(name, style, sorted((r["bytes"], fmean(r["lk_lambda"])) for r in some))
        for style, (name, some) in enumerate(groups.items(), start=3)
    ]


def _bare(row: Row) -> bool:
    return "none" in row["cache"]


def rate_exhibit(cache: Mapping[str, Any]) -> Exhibit:
    """The committed curves, and the sentence that sets this cache beside them."""
    data = json.loads(DATA.read_bytes())
    lost, alpha = lost_series(data["lost"]), alpha_series(data["alpha"])
    charts = [
        lines("lost mass, synthetic laws", lost, x="bytes a token of the law", y="lost mass"),
        lines("α of LK-λ drafts, embedded target", alpha, x="bytes a token of the law", y="α"),
    ]
    legend = [(s.name, swatch(s.style)) for s in [*lost, *alpha]]
    return Exhibit(charts, legend, _words(cache.get("splits", {})))


def _words(splits: Mapping[str, Any]) -> str:
    """Bytes of the law by array and the mass that it loses, of the first split that says both."""
    for name, split in splits.items():
        sizes, lost = split.get("bytes_per_token", {}), split.get("mean_tail_mass")
        whole = "logits" in sizes or not sizes.get("topk_ids")
        arrays = WHOLE_LAW if whole else LAW
        parts = {a: float(sizes[a]) for a in arrays if sizes.get(a)}
        if not parts or lost is None:
            continue
        largest = sorted(parts.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{array} {size:.1f}" for array, size in largest)
        keeps = "keeps the whole law" if whole else f"leaves {float(lost):.2%} of the mass out"
        return (
            f"The law of a token takes {sum(parts.values()):.1f} bytes in this run's {name} cache "
            f"({listed}) and {keeps}."
        )
    return ""
