"""Sequences -> records: one teacher-forced pass of the target, reduced to what the cache stores.

`pipeline.capture` writes the records; `pipeline.audit` compares a second pass with them. Knows no
file and no draft.

Dims: B sequences of a batch, T tokens (padded), R supervised rows of a batch, V vocabulary,
L captured layers, D width. Sources: DESIGN §5; storage/record.py for what a row holds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.seeds import uniforms
from pipeline.target import Target
from pipeline.topk import Kept, Rule, first_bad_row, truncate
from storage.codecs import bf16_bits, encode_p
from storage.errors import TargetError
from storage.layout import Layout
from storage.record import Record, supervised

# Logits are computed for this many (row, id) pairs at a time: 64 MB in float32.
LOGITS_ELEMENTS = 1 << 24

Columns = dict[str, NDArray[Any]]
"""Arrays by the names of storage/record.py."""


@dataclass(frozen=True)
class Stats:
    """What a part knows that its arrays do not; sums over supervised rows, seconds of a worker."""

    tokens: int
    rows: int
    entropy: float
    seconds: float
    target_seconds: float


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Sequences of similar length, longest first, at most `batch_tokens` padded tokens a batch.

    A sequence longer than that is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    found: list[list[int]] = []
    for index in order:
        # the first of a batch is its longest
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= batch_tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def encode_kept(kept: Kept) -> Columns:
    """The cache's codes of R rows (storage/codecs), and their entropy."""
    return {
        "token_logp": _numpy(kept.token_logp, np.float32),
        "kept": _numpy(kept.kept, np.uint16),
        "topk_ids": _numpy(kept.ids, np.uint32),
        "topk_p": encode_p(_numpy(kept.p, np.float32)),
        "tail_logp_mass": _numpy(kept.tail_logp_mass, np.float32),
        "tail_kept": _numpy(kept.tail_kept, np.uint8),
        "tail_ids": _numpy(kept.tail_ids, np.uint32),
        "tail_logp": _numpy(kept.tail_logp, np.float16),
        "entropy": _numpy(kept.entropy, np.float64),
    }


def encode_full(logits_NV: Tensor, token_N: Tensor) -> Columns:
    """Log-probabilities of all ids in bfloat16; no entries, no tail.

    Normalised before they are rounded: that errs six times less than rounded logits
    (reference/prototype.md §4).
    """
    logp_NV = torch.log_softmax(logits_NV.float(), -1)
    none, num_rows = torch.zeros(0), len(token_N)
    return {
        "token_logp": _numpy(logp_NV.gather(1, token_N[:, None])[:, 0], np.float32),
        "kept": np.zeros(num_rows, np.uint16),
        "topk_ids": _numpy(none, np.uint32),
        "topk_p": _numpy(none, np.uint16),
        "tail_logp_mass": np.zeros(num_rows, np.float32),
        "tail_kept": np.zeros(num_rows, np.uint8),
        "tail_ids": _numpy(none, np.uint32),
        "tail_logp": _numpy(none, np.float16),
        "logits": bf16_bits(_numpy(logp_NV, np.float32)),
        "entropy": _numpy(-(logp_NV.exp() * logp_NV).sum(-1), np.float64),
    }


def _numpy(x: Tensor, dtype: Any) -> NDArray[Any]:
    return x.cpu().numpy().astype(dtype)


def _bits(x_BT: Tensor | None, b: int, length: int) -> NDArray[np.uint16] | None:
    """Bfloat16 bits of one sequence of a batch."""
    if x_BT is None:
        return None
    # torch rounds to nearest even too, and need not copy what is bfloat16 already
    bits: NDArray[np.uint16] = x_BT[b, :length].bfloat16().view(torch.int16).cpu().numpy()
    return bits.view(np.uint16)


def _cut(law: Columns, start: int, stop: int, supervised_T: NDArray[np.bool_]) -> Columns:
    """A record's arrays from rows start … stop−1 of a batch's columns."""
    cut = {}
    for name in ("token_logp", "kept", "tail_logp_mass", "tail_kept"):
        cut[name] = np.zeros(len(supervised_T), law[name].dtype)
        cut[name][supervised_T] = law[name][start:stop]
    for counts, names in (
        ("kept", ("topk_ids", "topk_p")),
        ("tail_kept", ("tail_ids", "tail_logp")),
    ):
        end = law[counts].cumsum(dtype=np.int64)
        first, last = (int(end[row - 1]) if row else 0 for row in (start, stop))
        cut.update({name: law[name][first:last] for name in names})
    if "logits" in law:
        cut["logits"] = law["logits"][start:stop]
    return cut


class Pass:
    """The teacher-forced pass over some sequences."""

    def __init__(
        self, target: Target, layout: Layout, *, rule: Rule, batch_tokens: int, seed: int
    ) -> None:
        self._target, self._layout, self._rule = target, layout, rule
        self._batch_tokens, self._seed = batch_tokens, seed
        self._started = time.perf_counter()
        self._tokens, self._rows, self._entropy, self._target_s = 0, 0, 0.0, 0.0

    def records(self, rows: Sequence[dict[str, Any]]) -> list[Record]:
        """One record a row, in their order; `TargetError` names a position without a law."""
        lengths = [len(row["tokens"]) for row in rows]
        placed: dict[int, Record] = {}
        for batch in batches(lengths, self._batch_tokens):
            captured = self._batch([rows[index] for index in batch])
            placed.update(zip(batch, captured, strict=True))
        return [placed[index] for index in range(len(rows))]

    def stats(self) -> Stats:
        """Counts and seconds so far."""
        return Stats(
            tokens=self._tokens,
            rows=self._rows,
            entropy=self._entropy,
            seconds=time.perf_counter() - self._started,
            target_seconds=self._target_s,
        )

    @torch.inference_mode()
    def _batch(self, rows: Sequence[dict[str, Any]]) -> list[Record]:
        """Records of one batch."""
        lengths = [len(row["tokens"]) for row in rows]
        tokens_BT = np.zeros((len(rows), max(lengths)), dtype=np.int64)
        supervised_BT = np.zeros(tokens_BT.shape, dtype=np.bool_)
        for b, row in enumerate(rows):
            tokens_BT[b, : lengths[b]] = row["tokens"]
            supervised_BT[b, : lengths[b]] = supervised(np.asarray(row["turn"], dtype=np.int32))
        with self._timed():
            # padding lies to the right, where causal attention does not look: no mask is needed
            features = self._target.forward(
                torch.from_numpy(tokens_BT).to(self._target.device),
                layers=self._layout.hidden_layers,
            )
        b_R, t_R = supervised_BT.nonzero()
        law = self._law(
            features.last_hidden[b_R, t_R],
            torch.from_numpy(tokens_BT[b_R, t_R + 1]),
            self._draws(rows, supervised_BT),
            name=lambda r: f"sequence {rows[b_R[r]]['id']!r}, position {t_R[r]}",
        )
        self._tokens += sum(lengths)
        self._rows += len(b_R)
        starts = np.searchsorted(b_R, np.arange(len(rows) + 1))
        last_hidden = features.last_hidden if self._layout.last_hidden else None
        return [
            Record(
                id=row["id"],
                domain=row["domain"],
                tokens=tokens_BT[b, : lengths[b]].astype(np.uint32),
                turn=np.asarray(row["turn"], dtype=np.int32),
                hidden=_bits(features.hidden, b, lengths[b]),
                last_hidden=_bits(last_hidden, b, lengths[b]),
                **_cut(law, starts[b], starts[b + 1], supervised_BT[b, : lengths[b]]),
            )
            for b, row in enumerate(rows)
        ]

    def _law(
        self,
        last_hidden_RD: Tensor,
        token_R: Tensor,
        uniform_RM: Tensor,
        *,
        name: Callable[[int], str],
    ) -> Columns:
        """Stored numbers of R rows, reduced a chunk at a time; `TargetError` for no finite law."""
        parts = []
        size = max(1, LOGITS_ELEMENTS // self._layout.vocab_size)
        for first in range(0, max(1, len(token_R)), size):
            chunk = slice(first, first + size)
            with self._timed():
                logits = self._target.logits(last_hidden_RD[chunk])
                bad = first_bad_row(logits)
            if bad is not None:
                raise TargetError(
                    found=f"the target's logits at {name(first + bad)} are NaN or infinite",
                    expected="finite logits",
                    todo="check the target's weights, or load it in a wider dtype (target.dtype)",
                )
            token, draw = token_R[chunk].to(logits.device), uniform_RM[chunk].to(logits.device)
            if self._layout.mode == "full":
                parts.append(encode_full(logits, token))
            else:
                kept = truncate(logits, token, rule=self._rule, uniform_NM=draw)
                parts.append(encode_kept(kept))
        law = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self._entropy += float(law.pop("entropy").sum(dtype=np.float64))
        return law

    def _draws(self, rows: Sequence[dict[str, Any]], supervised_BT: NDArray[np.bool_]) -> Tensor:
        """[R, M] uniforms of each supervised row, by its sequence and position."""
        num_samples = self._rule.tail_samples
        draws = [torch.zeros(0, num_samples, dtype=torch.float64)]
        for row, rows_T in zip(rows, supervised_BT, strict=True):
            length = len(row["tokens"])
            name = (row["law"], row["id"])
            draw = uniforms(self._seed, "tail", *name, n=length * num_samples)
            draws.append(draw.view(length, num_samples)[torch.from_numpy(rows_T[:length])])
        return torch.cat(draws)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the time of the target itself."""
        started = time.perf_counter()
        yield
        self._target_s += time.perf_counter() - started
