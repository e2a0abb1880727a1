"""Exact and near-duplicate texts: Jaccard similarity of word 8-gram shingles, exactly.

Candidates come from prefix filtering (Bayardo, Ma, Srikant 2007): order all shingles by rarity;
two sets with similarity ≥ t must share one of their |A| − ⌈t|A|⌉ + 1 rarest. So boilerplate that
stands in every document makes no candidates, and no pair above the threshold is missed.
"""

from collections.abc import Sequence

import numpy as np

SHINGLE_WORDS = 8
MIX = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's bits: an odd multiplier that spreads ids


def _shingles(texts: Sequence[str]) -> list[np.ndarray]:
    """[n] uint64, sorted and unique, for each text; a text below 8 words is one shingle."""
    ids: dict[str, int] = {}
    sets = []
    for text in texts:
        words = text.split()
        word = np.fromiter((ids.setdefault(w, len(ids) + 1) for w in words), np.uint64, len(words))
        word = np.pad(word, (0, max(0, SHINGLE_WORDS - len(word))))
        mixed = np.zeros(len(word) - SHINGLE_WORDS + 1, np.uint64)
        for offset in range(SHINGLE_WORDS):
            mixed = (mixed ^ (mixed >> np.uint64(29))) * MIX + word[offset:][: len(mixed)]
        sets.append(np.unique(mixed * MIX))
    return sets


def _candidates(sets: list[np.ndarray], threshold: float) -> np.ndarray:
    """[n, 2] pairs (earlier, later) that may reach the threshold."""
    every, inverse, counts = np.unique(
        np.concatenate(sets), return_inverse=True, return_counts=True
    )
    rank = np.empty(len(every), np.int64)
    rank[np.lexsort((every, counts))] = np.arange(len(every))
    ends = np.cumsum([len(s) for s in sets])
    keys, owners = [], []
    for document, ranks in enumerate(np.split(rank[inverse], ends[:-1])):
        length = len(ranks) - int(np.ceil(threshold * len(ranks) - 1e-9)) + 1
        prefix = np.sort(ranks)[:length]
        keys.append(prefix)
        owners.append(np.full(len(prefix), document))
    key, owner = np.concatenate(keys), np.concatenate(owners)
    order = np.lexsort((owner, key))
    key, owner = key[order], owner[order]
    # most shingles stand in one text alone: an array for each of them would outweigh the texts
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    sizes = np.diff(starts, append=len(key))
    several = sizes > 1
    pairs = [
        np.stack([owner[start + i], owner[start + j]], axis=1)
        for start, size in zip(starts[several], sizes[several], strict=True)
        for i, j in [np.triu_indices(size, 1)]
    ]
    return np.unique(np.concatenate(pairs), axis=0) if pairs else np.zeros((0, 2), np.int64)


def near_duplicates(texts: Sequence[str], threshold: float) -> dict[int, int]:
    """Later text -> the first earlier, kept text that it repeats with similarity ≥ threshold."""
    if len(texts) < 2:
        return {}
    sets = _shingles(texts)
    repeats: dict[int, int] = {}
    pairs = _candidates(sets, threshold)
    for earlier, later in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if later in repeats or earlier in repeats:
            continue
        a, b = sets[earlier], sets[later]
        shared = len(np.intersect1d(a, b, assume_unique=True))
        if shared >= threshold * (len(a) + len(b) - shared):
            repeats[later] = earlier
    return repeats


def exact_duplicates(texts: Sequence[str]) -> dict[int, int]:
    """Later text -> the first text that is equal but for white space."""
    first: dict[str, int] = {}
    seen = [first.setdefault(" ".join(text.split()), index) for index, text in enumerate(texts)]
    return {index: earlier for index, earlier in enumerate(seen) if earlier != index}


def overlaps(rows: Sequence[Sequence[str]], reference: Sequence[str], threshold: float) -> set[int]:
    """Rows (each of one or several texts) that hold a reference text, exactly or nearly.

    Nearly: at least `threshold` of the reference's shingles; so a short text within a long row is
    found, which the Jaccard similarity of the two would miss.
    """
    if not reference:
        return set()
    sets = _shingles([*reference, *(text for row in rows for text in row)])
    sizes = np.array([len(s) for s in sets[: len(reference)]])
    key = np.concatenate(sets[: len(reference)])
    owner = np.repeat(np.arange(len(reference)), sizes)
    every = np.unique(key)
    found, at = set(), len(reference)
    for index, row in enumerate(rows):
        mine = np.unique(np.concatenate(sets[at : at + len(row)]))
        at += len(row)
        place = np.minimum(np.searchsorted(every, mine), len(every) - 1)
        mine = mine[every[place] == mine]
        if len(mine):
            shared = np.bincount(owner[np.isin(key, mine)], minlength=len(reference))
            if np.any(shared >= threshold * sizes):
                found.add(index)
    return found
