"""`lkcache inspect CACHE`: provenance, coverage, text with the target's alternatives, arrays.

Needs storage, rich and tokenizers: no torch, no transformers, no network.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from lkcache.cache_page import MAX_SEQUENCES, SEQUENCES, build
from lkcache.words import counted, num_bytes
from storage.codecs import decode_p, from_bf16_bits
from storage.errors import ConfigError, DataError
from storage.layout import VERSION
from storage.reader import Cache
from storage.record import Record, supervised
from storage.survey import survey

TOKENIZER = "tokenizer.json"
SHOWN_TOKENS = 24
SHOWN_ALTERNATIVES = 6
SHOWN_CHARACTERS = 2000
SHOWN_DIGITS = 12
MOST_LOGITS_BYTES = 1 << 28
DIGEST = re.compile(r"[0-9a-f]{64}")
# quantiles need the counts of every token: of so many parts, evenly spaced, where there are more
SAMPLED_PARTS = 64
QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)


def inspect(
    cache: Annotated[str, Argument(help="Its folder, or a URL: s3://bucket/key/train.zarr.")],
    file: Annotated[
        Path | None, Argument(help="With --html: where to write the page; CACHE.html if left out.")
    ] = None,
    sequence: Annotated[int, Option(help="Which sequence to show, from 0.")] = 0,
    tokens: Annotated[str, Option(help="Which of its positions, as A:B.")] = "",
    html: Annotated[
        bool, Option("--html", help="Write one self-contained page in place of all this.")
    ] = False,
    params: Annotated[
        bool, Option("--params", help="Digests whole, and every parameter of the capture.")
    ] = False,
    sequences: Annotated[
        int, Option(help="Of the page: how many sequences it holds, spread over the domains.")
    ] = SEQUENCES,
) -> None:
    """Show what CACHE is, holds and covers, and positions A:B of one sequence.

    Without --tokens, the first supervised positions of the sequence. Arrays and domains come last,
    with --params the parameters that the cache was made by behind them.
    """
    if file is not None and not html:
        raise ConfigError(
            found=f"the file {file} without --html",
            expected="a cache alone, or a file to write the page to",
            todo=f"run lkcache inspect {cache} --html {file}",
        )
    opened = Cache.open(cache)
    if html:
        _write_page(
            opened, file or Path(f"{Path(cache).name.removesuffix('.zarr')}.html"), sequences
        )
        return
    if not 0 <= sequence < opened.num_sequences:
        raise DataError(
            found=f"sequence {sequence}",
            expected=f"0 to {opened.num_sequences - 1}, the sequences of {cache}",
            todo="name one of them with --sequence",
        )
    record = opened.records([sequence])[0]
    span = _span(tokens, record)
    console = Console()
    for table in (_provenance(opened), _coverage(opened)):
        console.print(table)
    word = _vocabulary(opened.path / TOKENIZER)
    console.print(_text(record, sequence, word))
    for table in (_alternatives(record, span, word), _arrays(opened), _domains(opened)):
        console.print(table)
    if params:
        console.print(_params(opened))


def _write_page(cache: Cache, file: Path, sequences: int) -> None:
    """Build the page and write it whole or not at all."""
    if not 1 <= sequences <= MAX_SEQUENCES:
        raise ConfigError(
            found=f"--sequences {sequences}",
            expected=f"1 to {MAX_SEQUENCES}, so that a browser opens the page at once",
            todo="correct the number",
        )
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(
            found=f"{file} {'is a folder' if file.is_dir() else 'lies in no folder'}",
            expected="a file in a folder that exists",
            todo="name another file",
        )
    with Console(stderr=True).status("reading"):
        text = build(cache, word=_vocabulary(cache.path / TOKENIZER), sequences=sequences)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
    size = len(text.encode("utf-8"))
    print(f"{file}: {min(sequences, cache.num_sequences)} sequences, {size / 1e6:.1f} MB, one file")


def _span(tokens: str, record: Record) -> range:
    """Positions to show: `A:B` of the command line, or the first supervised ones."""
    length = len(record.tokens)
    if not tokens:
        rows = np.flatnonzero(supervised(record.turn))
        start = int(rows[0]) if len(rows) else 0
        return range(start, min(start + SHOWN_TOKENS, length))
    try:
        first, last = (int(bound) for bound in tokens.split(":"))
    except ValueError:
        first, last = -1, -1
    if not 0 <= first < last <= length:
        raise DataError(
            found=f"--tokens {tokens}",
            expected=f"A:B with 0 <= A < B <= {length}, the sequence's length",
            todo="correct the range",
        )
    return range(first, last)


def _vocabulary(path: Path) -> Callable[[int], str]:
    """Id to text through the cache's own tokenizer; `#id` where it has none."""
    if not path.is_file():
        return lambda number: f"#{number}"
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(
            found=f"{path} cannot be read ({error})",
            expected="a tokenizer of the tokenizers library",
            todo="run dvc repro capture, which copies the target's",
        ) from None

    def word(number: int) -> str:
        text: str = tokenizer.decode([number], skip_special_tokens=False)
        # a token may hold a part of a character, which alone decodes to nothing readable
        return text if text and "\ufffd" not in text else tokenizer.id_to_token(number) or "?"

    return word


def _grid(title: str, *columns: str) -> Table:
    """A left column of names, the rest aligned right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _provenance(cache: Cache) -> Table:
    layout = cache.layout
    stored = sum(cache.manifest.array_bytes.values())
    facts = {
        "format": f"lkcache {VERSION}, mode {layout.mode}",
        "holds": f"{counted(cache.num_sequences, 'sequence')}, "
        f"{counted(cache.num_tokens, 'token')}, "
        f"{counted(cache.num_parts, 'part')}",
        "size": f"{num_bytes(stored)}, {stored / max(1, cache.num_tokens):.4g} B/token",
        "vocabulary": f"{layout.vocab_size:,}",
        "hidden layers": ", ".join(map(str, layout.hidden_layers)) or "none",
        "last hidden": "stored" if layout.last_hidden else "not stored",
        **{f"source {key}": _short(value) for key, value in sorted(cache.source.items())},
    }
    return _facts(cache.name, facts)


def _params(cache: Cache) -> Table:
    """What a person seldom asks: the section `capture` that made it, and its origin in full."""
    facts = {
        **{f"source {key}": value for key, value in sorted(cache.source.items())},
        **{f"param {key}": str(value) for key, value in sorted(cache.manifest.params.items())},
    }
    return _facts("made from and by", facts)


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for what, value in facts.items():
        table.add_row(what, Text(value))
    return table


def _short(value: str) -> str:
    """A digest's first digits; any other value as it is."""
    return f"{value[:SHOWN_DIGITS]}…" if DIGEST.fullmatch(value) else value


def _arrays(cache: Cache) -> Table:
    table = _grid("arrays", "name", "dims", "dtype", "bytes", "bytes/token")
    num_tokens = max(1, cache.num_tokens)
    stored = cache.manifest.array_bytes
    for array in cache.layout.arrays():
        size = stored[array.name]
        dtype = "bfloat16" if array.encoding.startswith("bfloat16") else array.dtype
        row = (array.name, ", ".join(array.dims), dtype, f"{size:,}", f"{size / num_tokens:.2f}")
        table.add_row(*row)
    total = sum(stored.values())
    table.add_row("all", "", "", f"{total:,}", f"{total / num_tokens:.2f}", style="bold")
    return table


def _coverage(cache: Cache) -> Table:
    """Quantiles over supervised tokens, and means over the whole cache from the manifest."""
    parts = np.unique(np.linspace(0, cache.num_parts - 1, SAMPLED_PARTS).astype(int))
    of = "" if len(parts) == cache.num_parts else f" (quantiles of {len(parts)} parts)"
    rows = cache.manifest.counts["row"]
    table = _grid(
        f"coverage of {counted(rows, 'supervised token')}{of}",
        "what",
        "mean",
        *(f"p{100 * q:.0f}" if q < 1 else "max" for q in QUANTILES),
    )
    stated = cache.manifest.coverage
    if cache.layout.dense:
        table.add_row("K, kept ids", f"{stated['mean_kept']:,.0f}", *["all"] * len(QUANTILES))
        # a part of full logits may be gigabytes, and is read whole
        widest = max(part.counts["row"] for part in cache.manifest.parts)
        if 2 * widest * cache.layout.vocab_size <= MOST_LOGITS_BYTES:
            _add_entropy(table, cache, max_parts=1)
        return table
    picked = [_supervised_arrays(cache, int(part)) for part in parts]
    names = ("K, kept ids", "tail mass", "tail samples")
    means = (stated["mean_kept"], stated["mean_tail_mass"], stated["mean_tail_samples"])
    for column, (name, mean) in enumerate(zip(names, means, strict=True)):
        values = np.concatenate([arrays[column] for arrays in picked])
        shape = "{:.2e}" if name == "tail mass" else "{:.1f}"
        marks = np.quantile(values, QUANTILES) if len(values) else [0.0] * len(QUANTILES)
        table.add_row(name, shape.format(mean), *(shape.format(mark) for mark in marks))
    unsampled = stated["mean_unsampled_tail_mass"]
    table.add_row("tail mass without a sample", f"{unsampled:.2e}")
    _add_entropy(table, cache, max_parts=SAMPLED_PARTS)
    return table


def _add_entropy(table: Table, cache: Cache, *, max_parts: int) -> None:
    """How sure the target is, and how likely it finds what was said: equal for samples at T = 1."""
    found = survey(cache, max_parts=max_parts)
    of = "" if found.parts == cache.num_parts else f" ({counted(found.parts, 'part')})"
    if "entropy" in found.measures:
        table.add_row(f"entropy, nats{of}", f"{found.whole.mean('entropy'):.3f}")
    table.add_row(f"-log p of what was said, nats{of}", f"{-found.whole.mean_logp:.3f}")


def _supervised_arrays(cache: Cache, part: int) -> list[NDArray[np.float64]]:
    """K, tail mass and number of samples of a part's supervised tokens."""
    rows = supervised(cache.array(part, "turn"))
    ends = cache.array(part, "row_start") + cache.array(part, "length") - 1
    rows[ends] = False
    kept, logp, samples = (
        cache.array(part, name)[rows].astype(np.float64)
        for name in ("kept", "tail_logp_mass", "tail_kept")
    )
    return [kept, np.exp(logp), samples]


def _domains(cache: Cache) -> Table:
    table = _grid("domains", "domain", "sequences", "tokens", "supervised")
    for name, counts in sorted(cache.manifest.coverage["domains"].items()):
        numbers = (counts[key] for key in ("sequences", "tokens", "rows"))
        table.add_row(Text(name), *(f"{number:,}" for number in numbers))
    return table


def _text(record: Record, sequence: int, word: Callable[[int], str]) -> Text:
    """The sequence's text, what the assistant wrote in bold."""
    text = Text(f"\nsequence {sequence}, id {record.id}, {record.domain}, ", style="bold")
    text.append(f"{counted(len(record.tokens), 'token')}\n")
    for token, turn in zip(record.tokens.tolist(), record.turn.tolist(), strict=True):
        text.append(word(token), style="bold" if turn >= 0 else "dim")
        if len(text) > SHOWN_CHARACTERS:
            text.append(" …")
            break
    text.append("\n")
    return text


def _alternatives(record: Record, span: Iterable[int], word: Callable[[int], str]) -> Table:
    """Position by position: what came next, its p, and what the target might have said."""
    table = Table(title="position by position", title_justify="left", title_style="bold", box=None)
    for name in ("t", "next", "p(next)", "K", "tail", "the target's alternatives"):
        table.add_column(name, justify="left" if name[0] in "nth" else "right", no_wrap=name == "t")
    rows = supervised(record.turn)
    ends = np.concatenate([[0], record.kept.cumsum(dtype=np.int64)])
    rebuilt = record.last_hidden is not None and not (record.kept.any() or record.tail_kept.any())
    for t in span:
        if not rows[t]:
            table.add_row(str(t), Text(repr(word(int(record.tokens[t])))), "", "", "", "no law")
            continue
        if record.logits is not None:
            ids, p = _largest(record.logits[int(rows[:t].sum())])
            kept, tail = record.logits.shape[1], 0.0
        elif rebuilt:
            table.add_row(
                str(t),
                Text(repr(word(int(record.tokens[t + 1])))),
                f"{np.exp(record.token_logp[t]):.3f}",
                *("all", "", "made from last_hidden when read"),
            )
            continue
        else:
            entries = slice(ends[t], ends[t + 1])
            ids, p = record.topk_ids[entries], decode_p(record.topk_p[entries])
            kept, tail = int(record.kept[t]), float(np.exp(record.tail_logp_mass[t]))
        order = np.argsort(-p, kind="stable")[:SHOWN_ALTERNATIVES]
        told = "  ".join(f"{word(int(ids[i]))!r} {p[i]:.3f}" for i in order)
        following = repr(word(int(record.tokens[t + 1])))
        chance = f"{np.exp(record.token_logp[t]):.3f}"
        table.add_row(str(t), Text(following), chance, str(kept), f"{tail:.3f}", Text(told))
    return table


def _largest(bits_V: NDArray[np.uint16]) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Ids and probabilities of a row of stored logits, largest only."""
    logits = from_bf16_bits(bits_V)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    ids = np.argsort(-p, kind="stable")[:SHOWN_ALTERNATIVES].astype(np.uint32)
    return ids, p[ids]
