"""Is a cache intact and sound? Digests of every file, then the structure of every part; no model.

    findings = check_cache(Path("cache/train.zarr"))   # or a URL; empty: nothing found

What the numbers should have been is beyond this file: `stages/verify` replays sequences through
the target (pipeline/audit). Dims: T tokens of a part, E entries, M samples.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.codecs import LEVELS, decode_p, p_cell, p_error
from storage.errors import CorruptPart, MissingManifest, NewerFormat
from storage.layout import Layout
from storage.manifest import MANIFEST, MANIFEST_DIGEST, Manifest, read_manifest
from storage.reader import Cache
from storage.record import supervised
from storage.remote import is_url
from storage.workspace import file_names

# Σ kept p + tail mass is 1 up to the rounding of codes (summed exactly below) and of the float32
# softmax they came from: a sum over 200k ids errs by some 1e-5.
MASS_TOLERANCE = 1e-4
SERVED = "token_law"
"""In `source`: the law of `token_logp`, where that is not the law that is stored (FORMAT.md)."""
# token_logp and topk_p of the same id come from one pass; this is the float32 slack around a cell.
P_TOLERANCE = 1e-4
# float16 log-probabilities near 0 round to at most this much above the exact value
LOGP_TOLERANCE = 1e-3
# … and keep 11 bits
HALF_STEP = 2.0**-11

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Finding:
    """One thing wrong: where, and what."""

    part: str
    """Name of the part, or empty for the cache as a whole."""
    array: str
    message: str

    def __str__(self) -> str:
        """`part-00000/topk_ids: …`."""
        where = "/".join(piece for piece in (self.part, self.array) if piece)
        return f"{where}: {self.message}" if where else self.message


def check_cache(
    path: Path | str, *, progress: Callable[[str], None] | None = None
) -> list[Finding]:
    """Re-hash every file and check the structure of every part; damage is found, never raised.

    Of a store (a URL) every file is fetched; `CacheError` where that cannot be reached. `progress`
    is called with each part's name before it is read.
    """
    try:
        findings = [] if is_url(path) else list(_file_findings(Path(path)))
        if findings:
            return findings  # structure of files that are not the cache's own says nothing
        cache = Cache.open(path)  # of a store: sizes here, digests as arrays come
        findings += _strange(cache.manifest, cache.file_names())
    except (CorruptPart, MissingManifest, NewerFormat) as error:
        return [Finding("", "", str(error))]
    if findings:
        return findings
    manifest = cache.manifest
    seen: Counter[str] = Counter()
    for number, part in enumerate(manifest.parts):
        if progress:
            progress(part.name)
        arrays, damaged = _arrays(cache, number)
        findings += damaged
        if damaged:
            continue
        served = SERVED in manifest.source
        unsound = _part_findings(arrays, manifest.layout, part.counts["row"], served=served)
        findings += [Finding(part.name, name, said) for name, said in unsound]
        if findings:
            continue  # the index cannot be cut from unsound offsets
        seen.update(cache.part_ids(number))
    twice = sorted(name for name, count in seen.items() if count > 1)
    if twice:
        findings.append(Finding("", "id", f"{len(twice)} ids occur twice, among them {twice[0]!r}"))
    return findings


def _arrays(cache: Cache, part: int) -> tuple[dict[str, NDArray[Any]], list[Finding]]:
    """All arrays of a part that can be read, and what is wrong with the others."""
    arrays, damaged = {}, []
    for array in cache.layout.arrays():
        try:
            arrays[array.name] = cache.array(part, array.name)
        except CorruptPart as error:
            damaged.append(Finding(cache.manifest.parts[part].name, "", str(error)))
    return arrays, damaged


def _strange(manifest: Manifest, names: Collection[str]) -> Iterator[Finding]:
    """Files that the manifest does not list."""
    listed = {MANIFEST, MANIFEST_DIGEST, *manifest.files}
    listed |= {f"{part.name}/{name}" for part in manifest.parts for name in part.files}
    for name in sorted(set(names) - listed):
        yield Finding("", name, "is not in the manifest")


def _file_findings(path: Path) -> Iterator[Finding]:
    """Files missing, changed or strange."""
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        if problem := entry.problem(path / name, digest=True):
            yield Finding("", "", f"{name} {problem}")
    for part in manifest.parts:
        for name, entry in part.files.items():
            if problem := entry.problem(path / part.name / name, digest=True):
                yield Finding(part.name, name, problem)
    yield from _strange(manifest, file_names(path))


def _part_findings(
    arrays: Arrays, layout: Layout, num_rows: int, *, served: bool
) -> Iterator[tuple[str, str]]:
    """(array, what is wrong) of one decoded part; later checks rely on earlier ones.

    `served`: the tokens are of another law than the one that is stored.
    """
    found = list(_offset_findings(arrays))
    yield from found
    if found:
        return
    found = list(_value_findings(arrays, layout.vocab_size))
    yield from found
    if found:
        return
    rows = _supervised_rows(arrays)
    yield from _unsupervised_findings(arrays, rows)
    if rows.sum() != num_rows:
        yield "turn", f"makes {int(rows.sum())} supervised tokens, the manifest counts {num_rows}"
    if layout.dense:
        for name in ("kept", "tail_kept"):
            if arrays[name].any():
                yield name, f"counts entries in a cache of whole laws (mode {layout.mode})"
    else:
        yield from _law_findings(arrays, rows, served=served)


def _offset_findings(arrays: Arrays) -> Iterator[tuple[str, str]]:
    """Sequences must tile the tokens, counts the entries, string ends the bytes."""
    num_tokens, length = len(arrays["tokens"]), arrays["length"]
    ends = length.cumsum()
    if (length < 1).any() or not len(length) or ends[-1] != num_tokens:
        yield "length", f"does not add up to {num_tokens} tokens, each at least 1"
    elif (arrays["row_start"] != ends - length).any():
        yield "row_start", "does not ascend by the sequences' lengths"
    for counts, entries in (("kept", ("topk_ids", "topk_p")), ("tail_kept", _SAMPLES)):
        total = int(arrays[counts].sum(dtype=np.int64))
        for name in entries:
            if len(arrays[name]) != total:
                yield name, f"holds {len(arrays[name])} values, {counts} counts {total}"
    for name in ("id", "domain"):
        ends = arrays[f"{name}_end"]
        if (np.diff(ends, prepend=0) < 0).any() or ends[-1:].tolist() != [len(arrays[name])]:
            yield f"{name}_end", f"does not ascend to the {len(arrays[name])} bytes of {name}"
        else:
            try:
                arrays[name].tobytes().decode("utf-8")
            except UnicodeDecodeError as error:
                yield name, f"is not UTF-8 ({error.reason})"


_SAMPLES = ("tail_ids", "tail_logp")


def _value_findings(arrays: Arrays, vocab_size: int) -> Iterator[tuple[str, str]]:
    """Ids inside the vocabulary, codes inside the scale, numbers finite, no positive log p."""
    for name in ("tokens", "topk_ids", "tail_ids"):
        if arrays[name].size and int(arrays[name].max()) >= vocab_size:
            yield name, f"holds the id {int(arrays[name].max())}, vocabulary {vocab_size}"
    if arrays["topk_p"].size and int(arrays["topk_p"].max()) > LEVELS:
        yield "topk_p", f"holds the code {int(arrays['topk_p'].max())}, largest {LEVELS}"
    for name in ("token_logp", "tail_logp_mass", "tail_logp"):
        value = arrays[name]
        # no tail at all is log 0; every other logarithm is finite
        if name == "tail_logp_mass":
            value = value[value != -np.inf]
        if not np.isfinite(value.astype(np.float32)).all():
            yield name, "holds NaN or an infinity"
        elif value.size and value.max() > LOGP_TOLERANCE:
            yield name, f"holds {float(value.max())}, a log-probability is at most 0"
    for name in ("logits", "hidden", "last_hidden"):
        if name in arrays and ((arrays[name] & 0x7F80) == 0x7F80).any():
            yield name, "holds NaN or an infinity"
    for name in ("hidden_scale", "last_hidden_scale"):
        if name in arrays and not ((arrays[name] > 0) & (arrays[name] < np.inf)).all():
            yield name, "holds a scale that is not positive and finite"


def _supervised_rows(arrays: Arrays) -> NDArray[np.bool_]:
    """[T] supervised tokens; the last one of a sequence never is, whatever follows in the part."""
    rows = supervised(arrays["turn"])
    rows[arrays["row_start"] + arrays["length"] - 1] = False
    return rows


def _unsupervised_findings(arrays: Arrays, rows: NDArray[np.bool_]) -> Iterator[tuple[str, str]]:
    for name in ("kept", "token_logp", "tail_logp_mass", "tail_kept"):
        surplus = int(np.count_nonzero(arrays[name][~rows]))
        if surplus:
            yield name, f"is not 0 at {surplus} unsupervised tokens"


def _law_findings(
    arrays: Arrays, rows: NDArray[np.bool_], *, served: bool
) -> Iterator[tuple[str, str]]:
    """Each stored law must be one: distinct ids, mass 1, the emitted token's p consistent.

    Of `served` tokens p is not that of the stored law, and says nothing of it.
    """
    laws = _Laws(arrays["kept"])
    token = np.arange(len(rows), dtype=np.uint64) << np.uint64(32)
    ordered = np.sort(np.repeat(token, arrays["kept"]) | arrays["topk_ids"])
    if (ordered[1:] == ordered[:-1]).any():
        yield "topk_ids", "holds an id twice in one token"
    sampled = np.repeat(token, arrays["tail_kept"]) | arrays["tail_ids"]
    if _any_in(sampled, ordered):
        yield "tail_ids", "holds an id that its token keeps: a sample must come from the tail"
    p, error = decode_p(arrays["topk_p"]), p_error(arrays["topk_p"])
    mass = laws.total(p) + np.exp(arrays["tail_logp_mass"].astype(np.float64))
    off = rows & (np.abs(mass - 1) > laws.total(error) + MASS_TOLERANCE)
    if off.any():
        at = int(off.argmax())
        yield "topk_p", f"{int(off.sum())} laws do not sum to 1, token {at} to {mass[at]:.6f}"
    empty = rows & (arrays["kept"] == 0) & (arrays["tail_kept"] == 0) & (arrays["token_logp"] == 0)
    if empty.any():
        yield "kept", f"{int(empty.sum())} supervised tokens hold no data"
    if not served:
        yield from _emitted_findings(arrays, p, error)
    yield from _order_findings(arrays, laws)


class _Laws:
    """Where each token's entries lie; a pass of numpy over entries is what verifying costs."""

    def __init__(self, kept_T: NDArray[np.uint16]) -> None:
        ends = kept_T.cumsum(dtype=np.int64)
        self.some = kept_T > 0
        """[T] tokens that keep any."""
        self.first = (ends - kept_T)[self.some]
        """Of each of these, its first entry."""

    def total(self, value_E: NDArray[np.floating]) -> NDArray[np.float64]:
        """[T] sums over a token's entries, in float64."""
        sums = np.zeros(len(self.some))
        if len(self.first):
            sums[self.some] = np.add.reduceat(value_E, self.first, dtype=np.float64)
        return sums

    def least(self, value_E: NDArray[Any], *, default: Any) -> NDArray[Any]:
        """[T] the least of a token's entries."""
        found = np.full(len(self.some), default, dtype=value_E.dtype)
        if len(self.first):
            found[self.some] = np.minimum.reduceat(value_E, self.first)
        return found


def _any_in(keys: NDArray[Any], ordered: NDArray[Any]) -> bool:
    """Whether any key is among sorted ones."""
    if not len(ordered):
        return False
    at = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return bool((ordered[at] == keys).any())


def _emitted_findings(
    arrays: Arrays, p: NDArray[np.float32], error: NDArray[np.float64]
) -> Iterator[tuple[str, str]]:
    """Where x_{t+1} is among the kept ids, exp(token_logp) must lie in its code's cell."""
    following = np.append(arrays["tokens"][1:], 0)  # an unsupervised last token owns no entry
    hit = np.flatnonzero(arrays["topk_ids"] == np.repeat(following, arrays["kept"]))
    owner = np.searchsorted(arrays["kept"].cumsum(dtype=np.int64), hit, side="right")
    exact = np.exp(arrays["token_logp"].astype(np.float64))[owner]
    wrong = int((np.abs(exact - p[hit]) > error[hit] + P_TOLERANCE).sum())
    if wrong:
        yield "token_logp", f"contradicts topk_p at {wrong} of {len(hit)} tokens"


def _order_findings(arrays: Arrays, laws: _Laws) -> Iterator[tuple[str, str]]:
    """A token keeps its most probable ids, likeliest first; its samples are no likelier."""
    code = arrays["topk_p"]
    rises = code[1:] > code[:-1]
    rises[laws.first[1:] - 1] = False  # from one token to the next
    if rising := int(rises.sum()):
        yield "topk_p", f"rises within a token {rising} times: ids must come likeliest first"
    least = p_cell(laws.least(code, default=LEVELS))[1]  # the cell of no entry ends at 1
    logp = arrays["tail_logp"].astype(np.float64)
    sampled = np.repeat(least, arrays["tail_kept"])
    likelier = int((np.exp(logp * (1 + HALF_STEP)) > sampled + P_TOLERANCE).sum())
    if likelier:
        yield "tail_logp", f"holds {likelier} samples that are likelier than an id that is kept"
