"""A cache -> one HTML page: where it comes from, bytes, coverage by domain, and a token view.

    text = build(Cache.open(path), word=word, sequences=20)

The page is one file: style and script are inside it, its content security policy forbids every
request, and its bytes depend on the cache alone. Texts of the cache are escaped where they stand in
HTML; those of the token view travel as JSON and reach the page as text, never as markup. Needs
storage and the standard library.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lkcache.words import counted, num_bytes
from storage.codecs import decode_p, from_bf16_bits
from storage.layout import VERSION
from storage.reader import Cache
from storage.record import Record, supervised
from storage.survey import BINS, Survey, Tally, measures_of, survey

TEMPLATES = Path(__file__).parent / "templates"

SEQUENCES = 20
MAX_SEQUENCES = 200
# 24,000 tokens of the embedded target make a page of 2.8 MB; a phone opens several times that
PAGE_TOKENS = 24_000
SEQUENCE_TOKENS = 1_200
CONTEXT_TOKENS = 48  # kept of a prompt that does not fit
ALTERNATIVES = 8
CHARTED_DOMAINS = 7
# p of what was said, from which a token is drawn one step stronger
BOUNDS = (0.9, 0.5, 0.2, 0.05, 0.01)
LEGEND = ("0.9 or more", "0.5 to 0.9", "0.2 to 0.5", "0.05 to 0.2", "0.01 to 0.05", "under 0.01")

Word = Callable[[int], str]


def build(cache: Cache, *, word: Word, sequences: int = SEQUENCES) -> str:
    """The whole page; `word` gives a token's text."""
    found = survey(cache)
    script = _read("cache.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    rows = cache.manifest.counts["row"]
    name = escape(cache.path.resolve().name)
    return Template(_read("cache.html")).substitute(
        title=f"{name}, an lkcache cache",
        name=name,
        script_hash=f"sha256-{digest}",
        style=_read("cache.css"),
        lead=f"{counted(cache.num_sequences, 'sequence')}, {counted(cache.num_tokens, 'token')}, "
        f"of which {rows:,} carry the target’s law. "
        f"Format {VERSION}, mode {escape(cache.layout.mode)}, "
        f"{num_bytes(_total(cache))}, {_total(cache) / max(1, cache.num_tokens):,.1f} bytes "
        "a token.",
        tokens_note=_tokens_note(cache, sequences),
        legend="<li>p of what was said:</li>\n"
        + "\n".join(
            f'<li><span class="key b{k}" aria-hidden="true"></span>{escape(text)}</li>'
            for k, text in enumerate(LEGEND)
        )
        + '\n<li><span class="key none" aria-hidden="true"></span>no law: prompt or context</li>',
        coverage_note=_coverage_note(cache, found),
        domains=_domains(cache, found),
        charts="\n".join(_charts(found)),
        arrays=_arrays(cache),
        provenance_note=_provenance_note(cache),
        provenance=_provenance(cache),
        data=_json(_data(cache, word, sequences)),
        script=script,
    )


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that ends no script element and starts no comment, whatever its texts hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


# -- the token view --------------------------------------------------------------------------------


def choose(domains: Sequence[str], count: int) -> list[int]:
    """`count` sequences, as many of each domain as there are and even among them, in order."""
    places: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        places.setdefault(domain, []).append(index)
    quota = dict.fromkeys(sorted(places), 0)
    left = min(count, len(domains))
    while left:
        for name in quota:
            if left and quota[name] < len(places[name]):
                quota[name] += 1
                left -= 1
    chosen: list[int] = []
    for name, number in quota.items():
        # the middles of `number` equal stretches
        steps = (np.arange(number) + 0.5) * len(places[name]) / max(1, number)
        chosen += [places[name][int(step)] for step in steps]
    return sorted(chosen)


def _data(cache: Cache, word: Word, count: int) -> dict[str, Any]:
    """What the script draws: sequences with their laws, and the text of every id among them."""
    chosen = choose(cache.domains, count)
    wanted = {array.name for array in cache.layout.arrays()} & _SHOWN
    records = cache.records(chosen, arrays=wanted)
    limit = min(SEQUENCE_TOKENS, PAGE_TOKENS // max(1, len(chosen)))
    stored = bool(measures_of(cache.layout.mode))
    shown = [
        _sequence(record, index, limit, stored=stored)
        for record, index in zip(records, chosen, strict=True)
    ]
    ids: set[int] = set()
    for sequence in shown:
        ids.update(sequence["tokens"])
        for row in filter(None, sequence["rows"]):
            ids.update(row[3], row[5])
    words = {str(number): word(number) for number in sorted(ids)}
    return {"bounds": BOUNDS, "sequences": shown, "words": words}


_SHOWN = {
    "tokens",
    "turn",
    "token_logp",
    "kept",
    "topk_ids",
    "topk_p",
    "tail_logp_mass",
    "tail_kept",
    "tail_ids",
    "tail_logp",
    "logits",
}


def _sequence(record: Record, index: int, limit: int, *, stored: bool) -> dict[str, Any]:
    """Tokens first ... first + limit of a sequence, and what is stored of the law of each."""
    rows = supervised(record.turn)
    length = len(rows)
    first = 0
    if length > limit and rows.any():
        first = max(0, min(int(rows.argmax()) - CONTEXT_TOKENS, length - limit))
    stop = min(length, first + limit)
    law = _law if stored else _no_law
    laws = [law(record, rows, t) if rows[t] else None for t in range(first, stop - 1)]
    return {
        "index": index,
        "id": record.id,
        "domain": record.domain or "(no domain)",
        "first": first,
        "cut": length - stop,
        "tokens": record.tokens[first:stop].tolist(),
        "rows": laws,
    }


def _law(record: Record, rows: NDArray[np.bool_], t: int) -> list[Any]:
    """[log p of x_{t+1}, K, tail mass, ids, p, sample ids, sample p, rank of x_{t+1} or 0]."""
    said, logp = int(record.tokens[t + 1]), round(float(record.token_logp[t]), 4)
    if record.logits is not None:
        value = from_bf16_bits(record.logits[int(rows[:t].sum())])
        p = np.exp(value - value.max())
        p /= p.sum()
        rank = 1 + int((p > p[said]).sum())
        ids = np.argpartition(-p, min(ALTERNATIVES, len(p) - 1))[:ALTERNATIVES]
        ids = ids[np.argsort(-p[ids], kind="stable")]
        return [logp, None, 0, *_pairs(ids, p[ids], said, rank, p[said]), [], [], rank]
    start, stop = (int(record.kept[:k].sum(dtype=np.int64)) for k in (t, t + 1))
    first, last = (int(record.tail_kept[:k].sum(dtype=np.int64)) for k in (t, t + 1))
    kept, p = record.topk_ids[start:stop], decode_p(record.topk_p[start:stop])
    at = np.flatnonzero(kept == said)
    rank = 1 + int(at[0]) if len(at) else 0
    tail = float(np.exp(record.tail_logp_mass[t]))
    samples = np.exp(record.tail_logp[first:last].astype(np.float64))
    return [
        logp,
        len(kept),
        _short(tail),
        *_pairs(kept[:ALTERNATIVES], p[:ALTERNATIVES], said, rank, p[rank - 1] if rank else 0.0),
        record.tail_ids[first:last].tolist(),
        [_short(float(value)) for value in samples],
        rank,
    ]


def _no_law(record: Record, _rows: NDArray[np.bool_], t: int) -> list[Any]:
    """A mode that stores no law of its own knows log p of what was said."""
    return [round(float(record.token_logp[t]), 4), None, 0, [], [], [], [], None]


def _pairs(
    ids: NDArray[Any], p: NDArray[Any], said: int, rank: int, said_p: float
) -> tuple[list[int], list[float]]:
    """Ids and probabilities to list; what was said comes last where it ranks below them."""
    names, values = ids.tolist(), [_short(float(value)) for value in p]
    if rank > len(names):
        names, values = [*names, said], [*values, _short(float(said_p))]
    return names, values


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _tokens_note(cache: Cache, count: int) -> str:
    shown = min(count, cache.num_sequences)
    which = (
        "Every sequence" if shown == cache.num_sequences else f"{shown:,} sequences, spread evenly"
    )
    stored = (
        ""
        if measures_of(cache.layout.mode)
        else " This mode stores no law of its own: only log p of what was said can be shown."
    )
    return (
        f"{which} over the domains. Each token is drawn by the probability that the target gave it "
        f"before it was said; the panel lists what else the target might have said there.{stored}"
    )


# -- coverage --------------------------------------------------------------------------------------


def _coverage_note(cache: Cache, found: Survey) -> str:
    read = (
        "all parts"
        if found.parts == cache.num_parts
        else f"{found.parts} of {cache.num_parts:,} parts, evenly spread"
    )
    kinds = {
        "topk": "The entropy of a law is that of its kept ids and, by the tail samples, of its "
        "tail; where a tail has no sample it counts as one id, which is a lower bound.",
        "full": "Every logit is stored: nothing is cut off, and the entropy is exact but for the "
        "rounding of the logits.",
    }
    return f"Counted over {read}. {kinds.get(cache.layout.mode, '')}"


def _domains(cache: Cache, found: Survey) -> str:
    stated = cache.manifest.coverage["domains"]
    head = [
        "domain",
        "sequences",
        "tokens",
        "with a law",
        "mean log p",
        *map(_mean_title, found.measures),
    ]
    body = []
    for name, counts in sorted(stated.items()):
        own = found.domains.get(name, Tally())
        numbers = [f"{counts[key]:,}" for key in ("sequences", "tokens", "rows")]
        body.append([name, *numbers, *_means(own, found)])
    total = cache.manifest.counts
    numbers = [f"{total[key]:,}" for key in ("sequence", "token", "row")]
    foot = ["all", *numbers, *_means(found.whole, found)]
    return _table("By domain, means over supervised tokens", head, body, foot)


def _mean_title(measure: str) -> str:
    return {"kept": "mean K", "tail": "mean tail mass", "entropy": "mean entropy"}[measure]


def _means(tally: Tally, found: Survey) -> list[str]:
    if not tally.rows:
        return ["–"] * (1 + len(found.measures))
    values = [f"{tally.mean_logp:.3f}".replace("-", "−")]
    return values + [_mean(name, tally) for name in found.measures]


def _mean(measure: str, tally: Tally) -> str:
    value = tally.mean(measure)
    if measure == "tail" and 0 < value < 1e-3:
        return f"{value:.2e}".replace("-", "−")
    return f"{value:,.3g}"


def _charts(found: Survey) -> Iterator[str]:
    """Each measure: a chart of all domains and one of each of the largest, then its numbers."""
    largest = sorted(found.domains, key=lambda name: -found.domains[name].rows)[:CHARTED_DOMAINS]
    several = [("all domains", found.whole)]
    if len(found.domains) > 1:
        several += [(name, found.domains[name]) for name in sorted(largest)]
    for measure in found.measures:
        bins = BINS[measure]
        used = np.flatnonzero(found.whole.counts[measure])
        if not len(used):
            continue
        span = range(int(used[0]), int(used[-1]) + 1)
        shares = {name: _shares(tally, measure, span) for name, tally in several}
        top = max(max(values) for values in shares.values())
        figures = "".join(
            _figure(name, tally, measure, shares[name], span, top) for name, tally in several
        )
        head = [bins.title, *shares]
        body = [
            [bins.labels[k], *(f"{100 * values[n]:.1f} %" for values in shares.values())]
            for n, k in enumerate(span)
        ]
        numbers = _table(f"Share of supervised tokens by {bins.title}", head, body)
        yield (
            f"<h3>{escape(bins.title)}</h3>\n"
            f'<div class="charts">{figures}</div>\n'
            f"<details><summary>The numbers of these charts</summary>{numbers}</details>"
        )


def _shares(tally: Tally, measure: str, span: range) -> list[float]:
    return [float(tally.counts[measure][k]) / max(1, tally.rows) for k in span]


WIDTH, HEIGHT, BASE = 240, 112, 90  # of a chart; bars stand on BASE
TICKS = 4


def _figure(
    name: str, tally: Tally, measure: str, shares: Sequence[float], span: range, top: float
) -> str:
    """One histogram; all of a measure share both axes."""
    bins, step = BINS[measure], WIDTH / len(span)
    bars, ticks = [], []
    every = -(-len(span) // TICKS)
    for n, share in enumerate(shares):
        height = (BASE - 18) * share / top
        tell = f"<title>{escape(bins.labels[span[n]])}: {100 * share:.1f} %</title>"
        bars.append(
            f'<rect x="{n * step + 0.75:.1f}" y="{BASE - height:.1f}" width="{step - 1.5:.1f}" '
            f'height="{height:.1f}">{tell}</rect>'
        )
        if n % every == 0:
            ticks.append(
                f'<text x="{max((n + 0.5) * step, 14):.1f}" y="{BASE + 16}" text-anchor="middle">'
                f"{escape(bins.ticks[span[n]])}</text>"
            )
    at = int(np.argmax(shares))
    median = span[min(len(span) - 1, int(np.searchsorted(np.cumsum(shares), 0.5)))]
    label = (
        f"{bins.title}, {name}: mean {_mean(measure, tally)}, median in {bins.labels[median]}, "
        f"most often {bins.labels[span[at]]} ({100 * shares[at]:.0f} %)"
    )
    peak = BASE - (BASE - 18) * shares[at] / top - 5
    middle = min(max((at + 0.5) * step, 18), WIDTH - 18)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'<line x1="0" x2="{WIDTH}" y1="{BASE}" y2="{BASE}"/>{"".join(bars)}{"".join(ticks)}'
        f'<text x="{middle:.1f}" y="{peak:.1f}" text-anchor="middle">'
        f"{100 * shares[at]:.0f} %</text></svg>"
        f"<figcaption><strong>{escape(name)}</strong>, {tally.rows:,} tokens, mean "
        f"{_mean(measure, tally)}</figcaption></figure>"
    )


# -- bytes and provenance --------------------------------------------------------------------------


def _total(cache: Cache) -> int:
    return sum(cache.manifest.array_bytes.values())


def _arrays(cache: Cache) -> str:
    """Every array with what it takes; the bars show shares."""
    tokens, total = max(1, cache.num_tokens), max(1, _total(cache))
    stored = cache.manifest.array_bytes
    rows = []
    for array in cache.layout.arrays():
        size = stored[array.name]
        percent = 100 * size / total
        bar = f'<span class="share" aria-hidden="true"><i style="width:{percent:.1f}%"></i></span>'
        meaning = array.meaning + (f" ({array.encoding})" if array.encoding else "")
        cells = (
            f'<th scope="row"><code>{escape(array.name)}</code></th>'
            f"<td>{size:,}</td><td>{size / tokens:,.2f}</td><td>{bar} {percent:.1f} %</td>"
            f'<td class="words">{escape(", ".join(array.dims))}</td>'
            f'<td class="words">{escape(array.dtype)}</td><td class="words">{escape(meaning)}</td>'
        )
        rows.append(f"<tr>{cells}</tr>")
    head = "".join(
        f'<th scope="col"{attribute}>{escape(title)}</th>'
        for title, attribute in (
            ("array", ' class="words"'),
            ("bytes", ""),
            ("bytes/token", ""),
            ("share", ""),
            ("dims", ' class="words"'),
            ("dtype", ' class="words"'),
            ("meaning", ' class="words"'),
        )
    )
    foot = (
        f'<tr><th scope="row">all</th><td>{total:,}</td><td>{total / tokens:,.2f}</td>'
        f'<td>100 %</td><td colspan="3"></td></tr>'
    )
    return (
        '<div class="scroll" role="region" aria-label="Bytes by array" tabindex="0"><table>'
        f"<caption>Bytes by array, compressed, over {cache.num_tokens:,} tokens</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot></table></div>"
    )


def _provenance_note(cache: Cache) -> str:
    return (
        f"As the manifest of this cache says; its own digest and the size of every file of "
        f"{cache.num_parts:,} parts were checked when this page was made, and the digests of the "
        "arrays that it shows. <code>lkcache verify</code> checks all."
    )


def _provenance(cache: Cache) -> str:
    layout = cache.layout
    facts: dict[str, str] = {
        "format": f"lkcache {VERSION}, mode {layout.mode}",
        "parts": f"{cache.num_parts:,}",
        "vocabulary": f"{layout.vocab_size:,}",
        "hidden size": f"{layout.hidden_size:,}",
        "hidden layers": ", ".join(map(str, layout.hidden_layers)) or "none",
        "last hidden": "stored" if layout.last_hidden else "not stored",
        **{f"source: {key}": value for key, value in sorted(cache.source.items())},
        **{f"parameter: {key}": _plain(v) for key, v in sorted(cache.manifest.params.items())},
    }
    rows = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(
    caption: str,
    head: Sequence[str],
    body: Sequence[Sequence[str]],
    foot: Sequence[str] | None = None,
) -> str:
    """Cells are escaped; the first column is the row's heading."""

    def row(cells: Sequence[str]) -> str:
        first, *rest = map(escape, cells)
        return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in rest)}</tr>'

    titles = "".join(
        f'<th scope="col"{" class=words" if not n else ""}>{escape(title)}</th>'
        for n, title in enumerate(head)
    )
    end = f"<tfoot>{row(foot)}</tfoot>" if foot else ""
    label = escape(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>'
        f"<caption>{label}</caption><thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(map(row, body))}</tbody>{end}</table></div>"
    )
