"""Sequences -> records: one teacher-forced pass of the target, reduced to what the cache stores.

`pipeline.capture` writes the records; `pipeline.audit` compares a second pass with them. Knows no
file and no draft.

The device is kept busy: what a batch leaves behind travels to pinned memory while the next batch
is already queued, and becomes records then. Memory is bounded whatever the batch and V are: logits
exist for `logits_elements` numbers at a time, in the model's dtype, and in float32 only for
`topk.chunk_elements` of them. A batch that finds no memory is cut in two and tried again.

Dims: B sequences of a batch, T tokens (padded), R supervised rows of a batch, V vocabulary,
L captured layers, D width. Sources: DESIGN §5; storage/record.py for what a row holds.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.features import encode_bf16, encode_int8
from pipeline.interface import Head
from pipeline.seeds import uniforms
from pipeline.serve import Serving, serving_of, token_logp
from pipeline.setting import Setting
from pipeline.target import Target
from pipeline.topk import Kept, Rule, chunk_elements, normaliser, tile_elements, truncate
from storage.codecs import encode_p
from storage.errors import TargetError
from storage.layout import Layout
from storage.record import Record, supervised

# Logits are computed for this many (row, id) pairs at a time: 256 MB in float32 on a CPU, 512 rows
# of V = 131,072. A product of 128 rows reads all of the head for them: 0.65 ms a row more, measured
# at D = 1,024. A device gets as many as `topk` then works on at once.
LOGITS_ELEMENTS = 1 << 26

Columns = dict[str, NDArray[Any]]
"""Arrays by the names of storage/record.py."""
Tensors = dict[str, Tensor]
"""The same before they are numpy's."""
# The head of `target/interface` and the model's own multiply the same numbers, perhaps in another
# kernel: apart by at most this share of the row's largest logit, by dtype.
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Stats:
    """What a part knows that its arrays do not; sums over supervised rows, seconds of a worker."""

    tokens: int
    rows: int
    entropy: float
    seconds: float
    target_seconds: float
    halvings: int = 0
    """How often a batch found no memory and the batch size was halved."""


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


def logits_elements(device: torch.device) -> int:
    """(row, id) pairs whose logits exist at once on a device."""
    return max(LOGITS_ELEMENTS, chunk_elements(device))


def dense_law(logits_NV: Tensor, token_N: Tensor, *, logits: bool) -> Tensors:
    """What a cache of whole laws keeps of N rows: log p of what follows, and all of it in bfloat16.

    Normalised before they are rounded: that errs six times less than rounded logits
    (reference/prototype.md §4). A tile at a time, as `topk.truncate`.
    """
    rows = max(1, tile_elements(logits_NV.device) // logits_NV.shape[1])
    chunks = [
        _dense_chunk(logits_CV, token_C, logits=logits)
        for logits_CV, token_C in zip(logits_NV.split(rows), token_N.split(rows), strict=True)
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _dense_chunk(logits_CV: Tensor, token_C: Tensor, *, logits: bool) -> Tensors:
    lse_C, entropy_C = normaliser(logits_CV)
    token_logp_C = logits_CV.gather(1, token_C[:, None])[:, 0] - lse_C
    found = {"token_logp": token_logp_C.float(), "entropy": entropy_C.float()}
    if logits:
        found["logits"] = encode_bf16(torch.log_softmax(logits_CV.float(), -1))
    return found


def encode(law: Columns) -> Columns:
    """The cache's codes of R rows (storage/codecs) from their numbers, and their entropy."""
    found: Columns = {
        "token_logp": law["token_logp"].astype(np.float32),
        "entropy": law["entropy"].astype(np.float64),
    }
    if "kept" not in law:
        zeros = np.zeros(len(law["token_logp"]), np.uint8)
        none = np.zeros(0, np.float32)
        law = {**law, "kept": zeros, "tail_kept": zeros, "tail_logp_mass": zeros}
        law |= {"ids": none, "p": none, "tail_ids": none, "tail_logp": none}
    found |= {
        "kept": law["kept"].astype(np.uint16),
        "topk_ids": law["ids"].astype(np.uint32),
        "topk_p": encode_p(law["p"]),
        "tail_logp_mass": law["tail_logp_mass"].astype(np.float32),
        "tail_kept": law["tail_kept"].astype(np.uint8),
        "tail_ids": law["tail_ids"].astype(np.uint32),
        "tail_logp": law["tail_logp"].astype(np.float16),
    }
    if "logits" in law:
        found["logits"] = law["logits"].view(np.uint16)
    return found


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


def _recorded(device: torch.device) -> Any:
    """An event behind all that is queued on a device."""
    with torch.cuda.device(device):
        event = torch.cuda.Event()
        event.record()
    return event


def _to_host(x: Tensor) -> Tensor:
    """A copy in pinned memory that a device fills when it gets there; a CPU's tensor itself."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device; from memory that is not pinned, a copy would await the queue."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class _Flight:
    """A batch whose numbers are on their way to the host."""

    rows: Sequence[dict[str, Any]]
    tokens: NDArray[np.int64]
    """[B, T]"""
    supervised: NDArray[np.bool_]
    """[B, T]"""
    law: list[Tensors]
    """Chunk after chunk of the batch's supervised rows."""
    features: Tensors
    """Padded [B, T, …] by the names of the record's arrays."""
    arrived: Sequence[Any]
    """A CUDA event of each device that something travels from."""


class Pass:
    """The teacher-forced pass over some sequences."""

    def __init__(
        self,
        target: Target,
        layout: Layout,
        *,
        rule: Rule | None,
        batch_tokens: int,
        seed: int,
        head: Head | None = None,
    ) -> None:
        """`rule` of mode `topk`; `head` is what mode `rebuild` will make the laws with again."""
        assert layout.dense or rule is not None, "laws that are not kept whole are cut by a rule"
        self._target, self._layout, self._head = target, layout, head
        self._rule = None if layout.dense else rule
        self._batch_tokens, self._seed = batch_tokens, seed
        self._started = time.perf_counter()
        self._tokens, self._rows, self._entropy, self._target_s = 0, 0, 0.0, 0.0
        self._halvings = 0

    def records(self, rows: Sequence[dict[str, Any]]) -> list[Record]:
        """One record a row, in their order; `TargetError` names a position without a law."""
        lengths = [len(row["tokens"]) for row in rows]
        todo = batches(lengths, self._batch_tokens)
        placed: dict[int, Record] = {}
        flying: tuple[list[int], _Flight] | None = None
        while todo:
            batch = todo[0]
            flight = self._try([rows[index] for index in batch])
            if flight is None:
                left = [index for some in todo for index in some]
                self._halve(batch, lengths, rows)
                again = batches([lengths[index] for index in left], self._batch_tokens)
                todo = [[left[place] for place in some] for some in again]
                continue
            del todo[0]
            if flying is not None:
                placed.update(zip(flying[0], self._land(flying[1]), strict=True))
            flying = batch, flight
        if flying is not None:
            placed.update(zip(flying[0], self._land(flying[1]), strict=True))
        return [placed[index] for index in range(len(rows))]

    def stats(self) -> Stats:
        """Counts and seconds so far."""
        return Stats(
            tokens=self._tokens,
            rows=self._rows,
            entropy=self._entropy,
            seconds=time.perf_counter() - self._started,
            target_seconds=self._target_s,
            halvings=self._halvings,
        )

    def _try(self, rows: Sequence[dict[str, Any]]) -> _Flight | None:
        """A batch on its way, or None where the device has not the memory for it."""
        try:
            return self._launch(rows)
        except torch.OutOfMemoryError:
            pass
        # only now are the failed batch's tensors free: the error's traceback held them
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        return None

    def _halve(
        self, batch: Sequence[int], lengths: Sequence[int], rows: Sequence[dict[str, Any]]
    ) -> None:
        """Allow half the padded tokens of a batch that was too large."""
        if len(batch) == 1:
            row = rows[batch[0]]
            raise TargetError(
                found=f"no memory on {self._target.device} for sequence {row['id']!r} of "
                f"{lengths[batch[0]]} tokens alone",
                expected="memory for the target and its longest sequence",
                todo="free the device, take a larger one, or lower generate.max_prompt_tokens and "
                "max_new_tokens",
            )
        self._batch_tokens = len(batch) * lengths[batch[0]] // 2
        self._halvings += 1

    @torch.inference_mode()
    def _launch(self, rows: Sequence[dict[str, Any]]) -> _Flight:
        """Queue one batch on the device."""
        lengths = [len(row["tokens"]) for row in rows]
        tokens_BT = np.zeros((len(rows), max(lengths)), dtype=np.int64)
        supervised_BT = np.zeros(tokens_BT.shape, dtype=np.bool_)
        for b, row in enumerate(rows):
            tokens_BT[b, : lengths[b]] = row["tokens"]
            supervised_BT[b, : lengths[b]] = supervised(np.asarray(row["turn"], dtype=np.int32))
        with self._timed():
            # padding lies to the right, where causal attention does not look: no mask is needed
            features = self._target.forward(
                _to_device(torch.from_numpy(tokens_BT), self._target.device),
                layers=self._layout.hidden_layers,
            )
        b_R, t_R = supervised_BT.nonzero()
        last_hidden = features.last_hidden
        at_b, at_t = (_to_device(torch.from_numpy(x), last_hidden.device) for x in (b_R, t_R))
        law = self._law(
            last_hidden[at_b, at_t],
            torch.from_numpy(tokens_BT[b_R, t_R + 1]),
            self._draws(rows, supervised_BT),
            serving=served_law(rows[0]["law"]),
        )
        kept = self._features("hidden", features.hidden)
        kept |= self._features("last_hidden", last_hidden)
        # the head may lie on another device than the last layer
        devices = {x.device for x in (last_hidden, self._target.head_weight)}
        arrived = [_recorded(device) for device in devices if device.type == "cuda"]
        return _Flight(rows, tokens_BT, supervised_BT, law, kept, arrived)

    def _features(self, name: str, x: Tensor | None) -> Tensors:
        """The arrays that the layout stores of one feature, on their way."""
        stored = {array.name for array in self._layout.arrays()}
        if x is not None and name in stored:
            return {name: _to_host(encode_bf16(x))}
        if x is not None and f"{name}_int8" in stored:
            code, scale = encode_int8(x)
            return {f"{name}_int8": _to_host(code), f"{name}_scale": _to_host(scale)}
        return {}

    def _land(self, flight: _Flight) -> list[Record]:
        """The records of a batch whose numbers have arrived."""
        for event in flight.arrived:
            event.synchronize()
        self._target.settle()
        chunks = [{name: x.numpy() for name, x in chunk.items()} for chunk in flight.law]
        joined = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
        _require_finite(joined["entropy"], flight)
        law = encode(joined)
        self._entropy += float(law.pop("entropy").sum(dtype=np.float64))
        lengths = [len(row["tokens"]) for row in flight.rows]
        b_R = flight.supervised.nonzero()[0]
        self._tokens += sum(lengths)
        self._rows += len(b_R)
        starts = np.searchsorted(b_R, np.arange(len(lengths) + 1))
        return [
            Record(
                id=row["id"],
                domain=row["domain"],
                tokens=flight.tokens[b, :length].astype(np.uint32),
                turn=np.asarray(row["turn"], dtype=np.int32),
                **{name: _own(x, b, length) for name, x in flight.features.items()},
                **_cut(law, starts[b], starts[b + 1], flight.supervised[b, :length]),
            )
            for b, (row, length) in enumerate(zip(flight.rows, lengths, strict=True))
        ]

    def _law(
        self,
        last_hidden_RD: Tensor,
        token_R: Tensor,
        uniform_RM: Tensor,
        *,
        serving: Serving | None,
    ) -> list[Tensors]:
        """Numbers of R rows, reduced a chunk at a time.

        Laws are kept as at T = 1; `token_logp` alone is that of the law that was sampled.
        """
        found = []
        where = self._target.head_weight.device
        token_R, uniform_RM = _to_device(token_R, where), _to_device(uniform_RM, where)
        size = max(1, logits_elements(last_hidden_RD.device) // self._layout.vocab_size)
        for first in range(0, max(1, len(token_R)), size):
            chunk = slice(first, first + size)
            with self._timed():
                logits = self._target.logits(last_hidden_RD[chunk])
            # logits that are not finite are `_land`'s to name
            if self._head is not None and len(logits) and bool(logits.isfinite().all()):
                check_head(self._head, last_hidden_RD[chunk], logits)
                self._head = None  # once a pass: a head is right or wrong for all rows
            token, draw = token_R[chunk].to(logits.device), uniform_RM[chunk].to(logits.device)
            if self._rule is None:
                law = dense_law(logits, token, logits=self._layout.mode == "full")
            else:
                law = _tensors(truncate(logits, token, rule=self._rule, uniform_NM=draw))
            if serving is not None:
                law["token_logp"] = token_logp(logits, token, serving).float()
            found.append({key: _to_host(x) for key, x in law.items()})
        return found

    def _draws(self, rows: Sequence[dict[str, Any]], supervised_BT: NDArray[np.bool_]) -> Tensor:
        """[R, M] uniforms of each supervised row, by its sequence and position."""
        num_samples = 0 if self._rule is None else self._rule.tail_samples
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


def served_law(law: str) -> Serving | None:
    """How the law of a file of sequences changes the target's; None for T = 1, T = 0 and data."""
    try:
        setting = Setting.parse(law)
    except ValueError:
        return None
    return serving_of(setting) if setting.temperature > 0 else None


def _require_finite(entropy_R: NDArray[np.floating], flight: _Flight) -> None:
    """`TargetError` names the first position whose logits are not all finite.

    Asked of the entropy when it has arrived: the device need not wait, nor pass over them again.
    """
    bad_R = ~np.isfinite(entropy_R)
    if bad_R.any():
        b_R, t_R = flight.supervised.nonzero()
        first = int(bad_R.argmax())
        raise TargetError(
            found=f"the target's logits at sequence {flight.rows[b_R[first]]['id']!r}, position "
            f"{t_R[first]} are NaN or infinite",
            expected="finite logits",
            todo="check the target's weights, or load it in a wider dtype (target.dtype)",
        )


def check_head(head: Head, last_hidden_ND: Tensor, logits_NV: Tensor) -> None:
    """`TargetError` unless the head of `target/interface` gives the target's own logits."""
    ours = head.to(last_hidden_ND.device).logits(last_hidden_ND)
    fits = ours.shape == logits_NV.shape
    if fits and ours.numel():
        scale = logits_NV.abs().amax().float().clamp(min=1e-6)
        off = (ours - logits_NV).abs().amax().float()
        fits = bool(off <= HEAD_TOLERANCE.get(logits_NV.dtype, 1e-4) * scale)
    if not fits:
        raise TargetError(
            found="an LM head in target/interface that does not give the target's own logits",
            expected="the lm_head, scaling and soft caps of the pinned target, from which mode "
            "rebuild makes its laws again",
            todo="run dvc repro --force target, which writes the interface anew",
        )


def _tensors(kept: Kept) -> Tensors:
    return {field.name: getattr(kept, field.name) for field in fields(kept)}


def _own(x_BT: Tensor, b: int, length: int) -> NDArray[Any]:
    """One sequence of a batch; bfloat16 bits as the unsigned numbers that they are stored as.

    A copy: a view would hold the batch's padding, and on a device's host pinned memory.
    """
    value: NDArray[Any] = x_BT[b, :length].numpy().copy()
    return value.view(np.uint16) if value.dtype == np.int16 else value
