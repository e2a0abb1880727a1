"""Does a cache say what its target says? Some of its sequences, replayed.

Structure is `storage.verify`'s; here a wrong offset, a wrong template or a wrong target shows. The
replay is written apart from capture's: one sequence at a time, float64 softmax, no truncation.

Dims: T tokens, R supervised rows of a sequence, V vocabulary, E kept entries, M tail samples,
L layers, D width.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from pipeline.cluster import Cluster
from pipeline.config import Strict
from pipeline.seeds import rng
from pipeline.target import Target, resident_target
from storage.codecs import decode_int8, decode_p, from_bf16_bits, int8_error, p_error
from storage.errors import CacheError
from storage.reader import Cache
from storage.record import Record, supervised
from storage.tables import SEQUENCES, read_table

# Rows of logits looked at together: 32 MB in float64.
CHUNK_ELEMENTS = 1 << 22
# A unit of a few hundred sequences outweighs the start of a worker process and its target.
UNIT_SEQUENCES = 256
# float16 keeps 11 bits, so a tail sample's log p errs by up to this share of itself
HALF_STEP = 2.0**-11
# bfloat16 keeps 8: the same of a log-probability of mode `full`
BFLOAT_STEP = 2.0**-8


class VerifyConfig(Strict):
    """Section `verify`."""

    sequences: Annotated[int, Field(ge=1)]
    max_logp_error: Annotated[float, Field(gt=0)]
    max_tv: Annotated[float, Field(gt=0, le=1)]
    """½ Σ |p̂ − p| beyond what the stored codes round; what they round is reported as `tv`."""
    max_hidden_error: Annotated[float, Field(gt=0)]
    seed: Annotated[int, Field(ge=0)]
    threads: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Job:
    """What all units of a replay share."""

    folder: Path
    """Of the target."""
    fingerprint: str
    device: str
    config: VerifyConfig


@dataclass(frozen=True)
class Sample:
    """A sequence to replay."""

    cache: Path
    sequences: Path
    split: str
    index: int


Errors = dict[str, float]
"""The largest error of each kind."""
Positions = dict[str, NDArray[np.float64]]
"""Errors of each kind at every token of a sequence, [T]."""

WORDS = {
    "hidden": "a relative error of hidden",
    "last_hidden": "a relative error of last_hidden",
    "token_logp": "an error of token_logp",
    "tail_logp_mass": "an error of tail_logp_mass",
    "tail_logp": "an error of tail_logp",
    "tv_beyond_rounding": "a distance to the stored law, rounding apart,",
    "kept_set": "a number of ids wrongly kept, left out or sampled",
}


@dataclass(frozen=True)
class Bar:
    """What was to be kept, and how far an id's log p may lie beyond it, in nats of rounding."""

    min_prob: float
    max_kept: int
    slack: float
    top_p: float | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any], slack: float) -> "Bar":
        """Of the section `capture` that a cache was made by; a mode or rule leaves some null."""
        return cls(
            min_prob=params["min_prob"] or 0.0,
            max_kept=params["max_kept"] or 0,
            slack=slack,
            top_p=params.get("top_p"),
        )


@dataclass(frozen=True)
class _Row:
    """The stored law of one token."""

    ids: NDArray[np.uint32]
    code: NDArray[np.uint16]
    tail_logp_mass: float
    tail_ids: NDArray[np.uint32]
    tail_logp: NDArray[np.float64]


def choose(
    caches: Mapping[str, Path], sequences: Mapping[str, Path], config: VerifyConfig
) -> list[list[Sample]]:
    """`verify.sequences` of each split, drawn without repeats, as units of work."""
    samples = []
    for split, path in caches.items():
        order = rng(config.seed, "verify", split).permutation(Cache.open(path).num_sequences)
        samples += [
            Sample(path.absolute(), sequences[split].absolute(), split, int(index))
            for index in sorted(order[: config.sequences])
        ]
    starts = range(0, len(samples), UNIT_SEQUENCES)
    return [samples[a : a + UNIT_SEQUENCES] for a in starts]


def replay_all(units: Sequence[Sequence[Sample]], job: Job, cluster: Cluster) -> dict[str, Errors]:
    """The largest error of each kind by split; `CacheError` names the first one too large."""
    worst: dict[str, Errors] = defaultdict(dict)
    results = cluster.map(partial(replay_unit, job), units)
    for unit, errors in zip(units, results, strict=True):
        for sample, found in zip(unit, errors, strict=True):
            known = worst[sample.split]
            known.update({kind: max(x, known.get(kind, 0.0)) for kind, x in found.items()})
    return dict(worst)


def replay_unit(job: Job, unit: Sequence[Sample]) -> list[Errors]:
    """Replay some sequences through the target and compare each with its record."""
    target = resident_target(job.folder, device=job.device, fingerprint=job.fingerprint)
    return [_replay_one(target, job.config, sample) for sample in unit]


def _replay_one(target: Target, config: VerifyConfig, sample: Sample) -> Errors:
    cache, row = _opened(sample.cache), _table(sample.sequences)[sample.index]
    record = cache.records([sample.index])[0]
    where = f"{sample.split} cache, sequence {record.id!r}"
    if [record.id, record.tokens.tolist(), record.turn.tolist()] != [
        row[key] for key in ("id", "tokens", "turn")
    ]:
        raise _mismatch(
            f"{where} has another id, tokens or turns than row {sample.index} of "
            f"{sample.sequences.name}"
        )
    limits = {
        **dict.fromkeys(("hidden", "last_hidden"), config.max_hidden_error),
        **dict.fromkeys(("token_logp", "tail_logp_mass", "tail_logp"), config.max_logp_error),
        "tv_beyond_rounding": config.max_tv,
        "kept_set": 0.0,
    }
    errors = replay(
        target,
        record,
        hidden_layers=cache.layout.hidden_layers,
        bar=Bar.of(cache.manifest.params, config.max_logp_error),
        rebuild=cache.layout.mode == "rebuild",
    )
    for kind, error_T in errors.items():
        position = int(error_T.argmax())  # of NaN where there is one, which is not within any limit
        if kind in limits and not error_T[position] <= limits[kind]:
            raise _mismatch(
                f"{where}, position {position} has {WORDS[kind]} of {error_T[position]:.3g}",
                limit=f"at most {limits[kind]:.3g}, as the section verify says",
            )
    return {kind: float(error_T.max()) for kind, error_T in errors.items()}


@torch.no_grad()
def replay(
    target: Target,
    record: Record,
    *,
    hidden_layers: Sequence[int],
    bar: Bar,
    rebuild: bool = False,
) -> Positions:
    """How far a record is from what the target says, by kind, at every token.

    What 8-bit codes may round is no error of a hidden state. With `rebuild` the laws are those that
    the LM head makes of the stored `last_hidden`.
    """
    tokens = torch.from_numpy(record.tokens.astype(np.int64)).to(target.device)
    features = target.forward(tokens[None], layers=hidden_layers)
    errors: Positions = {}
    for kind, x in (("hidden", features.hidden), ("last_hidden", features.last_hidden[:, :, None])):
        stored = _stored(record, kind)
        if stored is not None and x is not None:
            errors[kind] = _relative(*stored, x[0].double().cpu().numpy())
    last_hidden_TD = features.last_hidden[0]
    for at_C, found in _law_errors(target, record, last_hidden_TD, bar, rebuild=rebuild):
        for kind, error_C in found.items():
            errors.setdefault(kind, np.zeros(len(record.tokens)))[at_C] = error_C
    return errors


def _law_errors(
    target: Target, record: Record, last_hidden_TD: Tensor, bar: Bar, *, rebuild: bool
) -> Iterator[tuple[NDArray[np.int64], Positions]]:
    """Errors of the stored laws at some supervised positions after others."""
    position_R = supervised(record.turn).nonzero()[0]
    entry = np.concatenate([[0], record.kept.cumsum(dtype=np.int64)])
    draw = np.concatenate([[0], record.tail_kept.cumsum(dtype=np.int64)])
    size = max(1, CHUNK_ELEMENTS // target.spec.vocab_size)
    for first in range(0, len(position_R), size):
        at_C = position_R[first : first + size]
        logits_CV = target.logits(last_hidden_TD[torch.from_numpy(at_C)])
        logp_CV = torch.log_softmax(logits_CV.double(), -1).cpu().numpy()
        next_logp_C = logp_CV[np.arange(len(at_C)), record.tokens[at_C + 1]]
        found = {"token_logp": np.abs(next_logp_C - record.token_logp[at_C])}
        if record.logits is not None:
            found |= _full_errors(logp_CV, from_bf16_bits(record.logits[first : first + size]))
        elif rebuild:
            found |= _rebuilt_errors(target, record, last_hidden_TD, at_C, np.exp(logp_CV))
        else:
            rows = [
                _row_errors(
                    logp_V,
                    _Row(
                        ids=record.topk_ids[entry[t] : entry[t + 1]],
                        code=record.topk_p[entry[t] : entry[t + 1]],
                        tail_logp_mass=float(record.tail_logp_mass[t]),
                        tail_ids=record.tail_ids[draw[t] : draw[t + 1]],
                        tail_logp=record.tail_logp[draw[t] : draw[t + 1]].astype(np.float64),
                    ),
                    bar,
                )
                for logp_V, t in zip(logp_CV, at_C, strict=True)
            ]
            found |= {kind: np.array([row[kind] for row in rows]) for kind in rows[0]}
        yield at_C, found


def _full_errors(
    logp_CV: NDArray[np.float64], stored_CV: NDArray[np.float32]
) -> dict[str, NDArray[np.float64]]:
    """Errors of rows of full logits against the exact law."""
    p_CV, off_CV = np.exp(logp_CV), np.abs(np.exp(stored_CV) - np.exp(logp_CV))
    rounding_CV = p_CV * np.expm1(BFLOAT_STEP * np.abs(logp_CV))
    return {
        "tv": 0.5 * off_CV.sum(-1),
        "tv_beyond_rounding": 0.5 * np.maximum(off_CV - rounding_CV, 0.0).sum(-1),
    }


def _rebuilt_errors(
    target: Target,
    record: Record,
    last_hidden_TD: Tensor,
    at_C: NDArray[np.int64],
    p_CV: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """Errors of the laws that the head makes of stored states against the exact laws.

    Beyond rounding: against the laws that it makes of the exact states, rounded as stored ones are.
    """
    assert record.last_hidden is not None, "mode rebuild stores last_hidden"
    stored_CD = torch.from_numpy(from_bf16_bits(record.last_hidden[at_C])).to(last_hidden_TD)
    rounded_CD = last_hidden_TD[torch.from_numpy(at_C)].bfloat16().to(last_hidden_TD)
    laws = [target.logits(x).double().softmax(-1).cpu().numpy() for x in (stored_CD, rounded_CD)]
    return {
        "tv": 0.5 * np.abs(laws[0] - p_CV).sum(-1),
        "tv_beyond_rounding": 0.5 * np.abs(laws[0] - laws[1]).sum(-1),
    }


def _row_errors(logp_V: NDArray[np.float64], row: _Row, bar: Bar) -> dict[str, float]:
    """Errors of one stored row against the exact law."""
    tail_V = logp_V.copy()
    tail_V[row.ids] = -np.inf
    with np.errstate(divide="ignore"):
        tail_logp_mass = float(np.log(np.exp(tail_V).sum()))
    wrong = _wrong_ids(logp_V, tail_V, row.ids, bar)
    wrong += int(np.isneginf(tail_V[row.tail_ids]).sum())
    exact_M = logp_V[row.tail_ids]
    off_M = np.abs(row.tail_logp - exact_M) - HALF_STEP * np.abs(exact_M)
    off_E = np.abs(decode_p(row.code) - np.exp(logp_V[row.ids]))
    both_empty = np.isneginf(tail_logp_mass) and np.isneginf(row.tail_logp_mass)
    return {
        "tv": 0.5 * float(off_E.sum()),
        "tv_beyond_rounding": 0.5 * float(np.maximum(off_E - p_error(row.code), 0.0).sum()),
        "tail_logp_mass": 0.0 if both_empty else abs(tail_logp_mass - row.tail_logp_mass),
        "tail_logp": float(off_M.max(initial=0.0)),
        "kept_set": float(wrong),
    }


def _wrong_ids(
    logp_V: NDArray[np.float64], tail_V: NDArray[np.float64], ids: NDArray[np.uint32], bar: Bar
) -> int:
    """Ids kept against the rule, and ids left out against it; `tail_V` is −inf at the kept ones."""
    with np.errstate(divide="ignore"):
        threshold = float(np.log(bar.min_prob))
    wrong = int((logp_V[ids] < threshold - bar.slack).sum()) + max(0, len(ids) - bar.max_kept)
    # where the cap or the nucleus ends a row, what was left out is no likelier than what is kept
    ended = len(ids) >= bar.max_kept
    if bar.top_p is not None:
        mass_E = np.exp(np.sort(logp_V[ids])[::-1]).cumsum()
        mass = float(mass_E[-1]) if len(ids) else 0.0
        before = float(mass_E[-2]) if len(ids) > 1 else 0.0
        wrong += int(before > bar.top_p + bar.slack)
        ended = ended or mass >= bar.top_p - bar.slack
    if ended:
        threshold = max(threshold, float(logp_V[ids].min(initial=0.0)))
    return wrong + int((tail_V > threshold + bar.slack).sum())


def _stored(record: Record, kind: str) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """A stored feature and how far rounding to 8 bits may have moved it; None where there is none.

    Rounding to bfloat16 is not taken off: the limit is above it.
    """
    code, scale = getattr(record, f"{kind}_int8"), getattr(record, f"{kind}_scale")
    if code is not None and scale is not None:
        return decode_int8(code, scale), int8_error(scale, code.shape[-1])
    bits = getattr(record, kind)
    if bits is None:
        return None
    value = from_bf16_bits(bits)
    return value, np.zeros_like(value)


def _relative(
    stored: NDArray[np.float32], rounding: NDArray[np.float32], exact: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[T] the largest error of a row and layer, rounding apart, over that row's largest value."""
    off_TLD = np.abs(stored.reshape(exact.shape) - exact) - rounding.reshape(exact.shape)
    scale_TL = np.maximum(np.abs(exact).max(-1), np.finfo(np.float32).tiny)
    error_T: NDArray[np.float64] = (np.maximum(off_TLD, 0.0).max(-1) / scale_TL).max(-1)
    return error_T


@lru_cache(maxsize=8)
def _opened(path: Path) -> Cache:
    return Cache.open(path)


@lru_cache(maxsize=8)
def _table(path: Path) -> list[dict[str, Any]]:
    return read_table(path, SEQUENCES)


def _mismatch(
    found: str, *, limit: str = "the sequence that the cache was made from"
) -> CacheError:
    return CacheError(
        found=found,
        expected=limit,
        todo="check that target, tokenizer and sequences are those of the capture, then remove the "
        "cache and run dvc repro capture; where only rounding differs (another device or package "
        "version), raise the limit in the section verify",
    )
