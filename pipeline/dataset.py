"""Records of the cache -> batches of tensors: padding, laws, the order of training.

Decodes the stored numbers (DESIGN §5) into what MATHS (5)-(6) sums over: a kept id has weight 1, a
tail sample r / (M p), a row without samples a bucket of mass r. The order of batches depends on the
seed and the cache alone, so that every loss of a draft and seed sees the same ones.

Dims: B rows of a sequence each, or packed with several; T tokens (padded), R law rows, E entries,
L captured layers, D target width. Knows no draft: what one needs arrives as `Needs`.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch
from pipeline.draft import Needs
from pipeline.features import decode_int8
from pipeline.interface import Head
from pipeline.law import DenseLaw, Law, SparseLaw
from pipeline.seeds import rng
from pipeline.target import read_head
from storage.codecs import BFLOAT_STEP, LEVELS, decode_p
from storage.errors import DraftError
from storage.layout import Layout
from storage.manifest import check_source
from storage.order import epoch_order, pack
from storage.reader import Cache
from storage.record import Record, supervised

TOKEN_ARRAYS = ("tokens", "turn", "token_logp")
SPARSE_ARRAYS = ("kept", "topk_ids", "topk_p", "tail_logp_mass")
SAMPLE_ARRAYS = ("tail_kept", "tail_ids", "tail_logp")
RUN_SEQUENCES = 64
"""Sequences taken from the reader at a time: what is held of wide arrays beside a batch."""
REBUILD_ELEMENTS = 1 << 24
"""Logits made at once from hidden states: what is held beside the law itself, 64 MB a copy."""


def require(layout: Layout, needs: Needs) -> None:
    """`DraftError` where a cache lacks what a draft reads; asked before anything is loaded."""
    stored = len(layout.hidden_layers)
    if needs.num_layers and stored != needs.num_layers:
        raise DraftError(
            found=f"a cache with {stored} captured layers",
            expected=f"the {needs.num_layers} that this draft reads",
            todo=f"give capture.hidden_layers {needs.num_layers} layer ids in params.yaml and run "
            "dvc repro, which reruns capture",
        )
    if needs.last_hidden and not layout.last_hidden:
        raise DraftError(
            found="a cache without last_hidden",
            expected="the target's last hidden state, which this draft reads",
            todo="set capture.last_hidden: true in params.yaml and run dvc repro, which reruns "
            "capture",
        )


def arrays(layout: Layout, needs: Needs) -> set[str]:
    """The arrays of a cache that a draft's training reads; the others stay on disk."""
    laws = {
        "topk": (*SPARSE_ARRAYS, *SAMPLE_ARRAYS),
        "full": ("logits",),
        "rebuild": ("last_hidden",),
    }
    hidden = _stored_as("hidden", layout.hidden_dtype) if needs.num_layers else ()
    last = _stored_as("last_hidden", layout.last_hidden_dtype) if needs.last_hidden else ()
    return {*TOKEN_ARRAYS, *laws[layout.mode], *hidden, *last}


def _stored_as(name: str, dtype: str) -> tuple[str, ...]:
    """The arrays that hold a feature."""
    return (f"{name}_int8", f"{name}_scale") if dtype == "int8" else (name,)


def head_for(cache: Cache, target: Path) -> Head | None:
    """The LM head that makes the laws of a cache of mode `rebuild` again; None for other modes.

    `FingerprintMismatch` unless the head of `target/interface` is the one that the cache names.
    """
    if cache.layout.mode != "rebuild":
        return None
    head = read_head(target)
    check_source(cache.path, cache.source, {"head": head.digest})
    return head


def training_batches(
    cache: Cache,
    *,
    seed: int,
    batch_sequences: int,
    steps: int,
    needs: Needs,
    stage: str = "train",
    device: str = "cpu",
    micro_batch_sequences: int | None = None,
    pack_tokens: int | None = None,
    first_step: int = 0,
    rank: tuple[int, int] = (0, 1),
    head: Head | None = None,
) -> Generator[Batch, None, None]:
    """The passes of steps `first_step` … `steps` − 1, epoch after epoch, each in its own order.

    A step reads the next `batch_sequences` sequences in passes of `micro_batch_sequences` (None:
    all at once; it divides them), of which rank r of R takes the r-th share, packed as `collate`
    does. What is left of an epoch opens the first batch of the next one: nothing is dropped. The
    order comes from `seed` and `stage`, so that training does not repeat the warm-up's;
    `DraftError` where the cache lacks what the draft needs or holds nothing.
    """
    require(cache.layout, needs)
    if not cache.num_sequences:
        raise DraftError(
            found="a cache without sequences",
            expected="at least one to train from",
            todo="check prepare and generate, then run dvc repro",
        )
    head = None if head is None else head.to(device)
    micro = micro_batch_sequences or batch_sequences
    assert batch_sequences % micro == 0, (batch_sequences, micro)
    own = range(micro * rank[0] // rank[1], micro * (rank[0] + 1) // rank[1])
    records = _endless(
        cache,
        (seed, stage),
        arrays(cache.layout, needs),
        first=first_step * batch_sequences,
        wanted=lambda place: place % micro in own,
    )
    for _ in range((steps - first_step) * (batch_sequences // micro)):
        yield collate(
            list(islice(records, len(own))),
            cache.layout,
            device=device,
            head=head,
            pack_tokens=pack_tokens,
        )


def _endless(
    cache: Cache,
    key: tuple[int, str],
    names: set[str],
    *,
    first: int,
    wanted: Callable[[int], bool],
) -> Iterator[Record]:
    """Sequences of epoch after epoch, from place `first` of that stream on, those `wanted` alone.

    What stands before `first`, and what other ranks read, is never decoded for its own sake.
    """
    (seed, stage), num = key, cache.num_sequences
    for number in count(first // num):
        epoch_seed = int(rng(seed, stage, "epoch", number).integers(2**31))
        place = count(number * num)
        for run in epoch_runs(cache, epoch_seed):
            own = [i for i, p in zip(run.tolist(), place, strict=False) if p >= first and wanted(p)]
            for at in range(0, len(own), RUN_SEQUENCES):
                some = own[at : at + RUN_SEQUENCES]
                yield from cache.records(some, arrays=names, more=len(some) < len(own))


def epoch_runs(cache: Cache, seed: int) -> Iterator[NDArray[np.int64]]:
    """The order of `Cache.epoch(seed)`: the indices of one part after another, shuffled within."""
    counts = [part.counts["sequence"] for part in cache.manifest.parts]
    start = np.cumsum([0, *counts], dtype=np.int64)
    for part, sequences in epoch_order(counts, seed):
        yield start[part] + sequences


def heldout_batches(
    cache: Cache,
    *,
    batch_sequences: int,
    sequences: int,
    needs: Needs,
    device: str = "cpu",
    rank: tuple[int, int] = (0, 1),
    head: Head | None = None,
) -> list[Batch]:
    """Fixed batches of `sequences` records spread evenly over a cache, for early evaluation.

    Rank r of R takes every R-th of them; `DraftError` where there are fewer than ranks.
    """
    require(cache.layout, needs)
    num = min(sequences, cache.num_sequences)
    if num < rank[1]:
        raise DraftError(
            found=f"{num} held-out sequences for {rank[1]} training ranks",
            expected="at least one a rank",
            todo="raise heldout_sequences, hold more prompts out, or lower ranks in params.yaml",
        )
    chosen = [i * cache.num_sequences // num for i in range(num)]
    records = cache.records(chosen[rank[0] :: rank[1]], arrays=arrays(cache.layout, needs))
    size = -(-batch_sequences // rank[1])
    head = None if head is None else head.to(device)
    groups = [records[a : a + size] for a in range(0, len(records), size)]
    return [collate(group, cache.layout, device=device, head=head) for group in groups]


def supervised_counts(cache: Cache) -> Tensor:
    """[V] int64: how often each token is one that a draft is to predict."""
    vocab_size = cache.layout.vocab_size
    counts, first = np.zeros(vocab_size, dtype=np.int64), 0
    for size in cache.part_counts:  # a part's tokens are held at a time
        some = cache.records(range(first, first + size), arrays={"tokens", "turn"}, more=True)
        following = [r.tokens[1:][supervised(r.turn)[:-1]] for r in some]
        counts += np.bincount(np.concatenate(following), minlength=vocab_size)
        first += size
    return torch.from_numpy(counts)


@dataclass(frozen=True)
class _Places:
    """Where the sequences of a batch lie in it."""

    shape: tuple[int, int]
    """B, T."""
    lengths: list[int]
    """Of the sequences."""
    slots: list[tuple[int, int]]
    """Row and first index of each."""

    def fill(self, out: NDArray[Any], values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Put every sequence's values into its place of `out` [B, T, …]."""
        for (b, first), value in zip(self.slots, values, strict=True):
            out[b, first : first + len(value)] = value
        return out

    def row_lengths(self) -> NDArray[np.int64]:
        """[B] tokens of each row."""
        total = np.zeros(self.shape[0], dtype=np.int64)
        np.add.at(total, [b for b, _ in self.slots], self.lengths)
        return total

    def firsts(self) -> NDArray[np.int64]:
        """[B, T]: `Batch.first`."""
        out = np.broadcast_to(np.arange(self.shape[1]), self.shape).copy()
        return self.fill(
            out, [np.full(n, at) for (_, at), n in zip(self.slots, self.lengths, strict=True)]
        )

    def turns(self, turns: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
        """The turns of each sequence, numbered on from those before it in its row."""
        own, following, row = [], 0, -1
        for (b, _), turn in zip(self.slots, turns, strict=True):
            following, row = (0 if b != row else following), b
            own.append(np.where(turn >= 0, turn + np.int32(following), turn))
            following += int(turn.max(initial=-1)) + 1
        return own


def _packed(
    records: Sequence[Record], pack_tokens: int | None
) -> tuple[list[Record], list[tuple[int, int]]]:
    """Records row after row, and the row and first index of each.

    Long ones first: first-fit then leaves the least room empty (Johnson 1973).
    """
    sizes = [len(r.tokens) for r in records]
    if pack_tokens is None:
        return list(records), [(b, 0) for b in range(len(records))]
    longest_first = sorted(range(len(records)), key=lambda i: -sizes[i])
    items = ((i, sizes[i]) for i in longest_first)
    rows = pack(items, max(pack_tokens, *sizes), open_packs=len(records))
    order, slots = list[int](), list[tuple[int, int]]()
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            order.append(i)
            slots.append((b, at))
            at += sizes[i]
    return [records[i] for i in order], slots


def collate(
    records: Sequence[Record],
    layout: Layout,
    *,
    device: str = "cpu",
    head: Head | None = None,
    pack_tokens: int | None = None,
) -> Batch:
    """Records to one padded batch; features that the records do not hold are None.

    pack_tokens: what a row holds of several sequences, or of one that is longer; None: a row is a
    sequence. Laws of mode `rebuild` are made with `head`, which lies on `device`; without it there
    are none.
    """
    records, slots = _packed(records, pack_tokens)
    lengths = [len(r.tokens) for r in records]
    longest = max(first + n for (_, first), n in zip(slots, lengths, strict=True))
    places = _Places((1 + max(b for b, _ in slots), longest), lengths, slots)
    own_rows = [supervised(r.turn) for r in records]
    rows = places.fill(np.zeros(places.shape, dtype=np.bool_), own_rows)
    law_row = np.where(rows, rows.cumsum().reshape(places.shape) - 1, -1)
    law = _law(records, layout, own_rows, device=device, head=head)
    assert law is None or law.num_rows == rows.sum(), "records do not match their turns"
    turns = (
        [r.turn for r in records]
        if pack_tokens is None
        else places.turns([r.turn for r in records])
    )

    def padded(fill: float, dtype: type[np.generic], values: Sequence[NDArray]) -> Tensor:
        out = np.full(places.shape, fill, dtype=dtype)
        return torch.from_numpy(places.fill(out, values)).to(device)

    return Batch(
        ids=tuple(r.id for r in records),
        domains=tuple(r.domain for r in records),
        tokens=padded(0, np.int64, [r.tokens for r in records]),
        length=torch.from_numpy(places.row_lengths()).to(device),
        turn=padded(-1, np.int64, turns),
        token_logp=padded(0, np.float32, [r.token_logp for r in records]),
        law_row=torch.from_numpy(law_row).to(device),
        law=law,
        hidden=_features(records, "hidden", places, device),
        last_hidden=_features(records, "last_hidden", places, device),
        first=None if pack_tokens is None else torch.from_numpy(places.firsts()).to(device),
    )


def _features(records: Sequence[Record], name: str, places: _Places, device: str) -> Tensor | None:
    """A stored feature -> padded float32 [B, T, …]; it travels to the device as it is stored."""
    if getattr(records[0], f"{name}_int8") is not None:
        code, scale = (_gathered(records, f"{name}_{part}", places) for part in ("int8", "scale"))
        return decode_int8(code.to(device), scale.to(device))
    if getattr(records[0], name) is None:
        return None
    return _gathered(records, name, places).view(torch.bfloat16).to(device).float()


def _gathered(records: Sequence[Record], name: str, places: _Places) -> Tensor:
    """One array of all records, padded with zeros."""
    values = [getattr(r, name) for r in records]
    assert all(value is not None for value in values), "records of a batch store the same arrays"
    out = np.zeros((*places.shape, *values[0].shape[1:]), dtype=values[0].dtype)
    return torch.from_numpy(places.fill(out, values))


Rows = Sequence[NDArray[np.bool_]]
"""Of each record, the tokens that have a law (`storage.record.supervised`)."""


def _law(
    records: Sequence[Record], layout: Layout, rows: Rows, *, device: str, head: Head | None
) -> Law | None:
    """The laws of all supervised rows, in the order of sequences and tokens."""
    if layout.mode == "rebuild":
        if head is None or any(r.last_hidden is None for r in records):
            return None  # not asked for
        return _rebuilt_law(records, rows, device, head)
    if layout.mode == "full":
        if any(r.logits is None for r in records):
            return None  # not asked for
        bits = np.concatenate([r.logits for r in records if r.logits is not None])
        logits = torch.from_numpy(bits).view(torch.bfloat16).to(device).float()
        # stored is log p: what its rounding added to the sum of p is taken off, and remembered
        return DenseLaw(
            logits.log_softmax(-1), log_mass=logits.logsumexp(-1), logp_step=BFLOAT_STEP
        )
    if any(len(r.kept) != len(r.turn) or len(r.tail_kept) != len(r.turn) for r in records):
        return None  # not asked for
    return _sparse_law(records, rows, device)


def _rebuilt_law(records: Sequence[Record], rows: Rows, device: str, head: Head) -> DenseLaw:
    """Full laws from the states after the final norm, by the target's own arithmetic."""
    both = zip(records, rows, strict=True)
    states = [r.last_hidden[own] for r, own in both if r.last_hidden is not None]
    last_hidden_RD = torch.from_numpy(np.concatenate(states)).view(torch.bfloat16).to(device)
    logp_RV = torch.empty(len(last_hidden_RD), len(head.weight), device=device)
    step = max(1, REBUILD_ELEMENTS // len(head.weight))
    with torch.no_grad():
        for logp_CV, last_hidden_CD in zip(
            logp_RV.split(step), last_hidden_RD.split(step), strict=True
        ):
            logp_CV.copy_(head.logits(last_hidden_CD).float().log_softmax(-1))
    return DenseLaw(logp_RV)


def _sparse_law(records: Sequence[Record], own_rows: Rows, device: str) -> SparseLaw:
    """Entries row by row: the kept ids of a row, then its tail samples (MATHS (5))."""
    rows = np.concatenate(own_rows)
    kept, drawn = (
        np.concatenate([getattr(r, name) for r in records])[rows].astype(np.int64)
        for name in ("kept", "tail_kept")
    )
    tail = np.exp(np.concatenate([r.tail_logp_mass for r in records])[rows])
    start = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum(kept + drawn, out=start[1:])
    # entries that are kept ids, and those that are samples: runs of a row's counts, in turn
    runs = np.stack([kept, drawn], axis=1).ravel()
    of_kept = np.repeat(np.arange(len(runs)) % 2 == 0, runs)
    of_drawn = ~of_kept
    p_drawn = np.exp(np.concatenate([r.tail_logp for r in records]).astype(np.float32))
    ids = np.empty(start[-1], dtype=np.int64)
    p, weight = np.empty(len(ids), dtype=np.float32), np.ones(len(ids), dtype=np.float32)
    ids[of_kept] = np.concatenate([r.topk_ids for r in records])
    ids[of_drawn] = np.concatenate([r.tail_ids for r in records])
    p[of_kept] = decode_p(np.concatenate([r.topk_p for r in records]))
    p[of_drawn] = p_drawn
    weight[of_drawn] = np.repeat(tail / np.maximum(drawn, 1), drawn) / p_drawn
    bucket = np.where(drawn == 0, tail, np.float32(0))
    return SparseLaw(
        entry_start=torch.from_numpy(start).to(device),
        ids=torch.from_numpy(ids).to(device),
        p=torch.from_numpy(p).to(device),
        weight=torch.from_numpy(weight).to(device),
        bucket=torch.from_numpy(bucket).to(device),
        kept=torch.from_numpy(kept).to(device),
        tail=torch.from_numpy(tail).to(device),
        p_step=1 / LEVELS,
    )
