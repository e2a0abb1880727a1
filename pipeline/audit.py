"""Does a cache say what its target says? Some of its sequences, replayed.

Structure is `storage.verify`'s; here a wrong offset, a wrong template or a wrong target shows. The
replay is written apart from capture's: one sequence at a time, float64 softmax, no truncation. Its
full laws are where the truncation is certified: `pipeline.certificate`.

Dims: T tokens, R supervised rows of a sequence, V vocabulary, E kept entries, M tail samples,
L layers, D width.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from pipeline.certificate import (
    Certificate,
    certify,
    covered,
    joined,
    reference_drafts,
    unigram,
)
from pipeline.cluster import Cluster
from pipeline.config import Strict, Threads
from pipeline.dataset import collate, supervised_counts
from pipeline.law import DenseLaw, Law
from pipeline.provenance import Progress
from pipeline.sampled import Surprise, require_samples, sum_up, surprise
from pipeline.seeds import rng
from pipeline.sharded import resident_target
from pipeline.target import DeviceMap, Target
from storage.codecs import (
    BFLOAT_STEP,
    HALF_STEP,
    decode_int8,
    decode_p,
    from_bf16_bits,
    int8_error,
    p_error,
)
from storage.errors import CacheError
from storage.layout import Layout
from storage.reader import Cache
from storage.record import Record, supervised
from storage.sequences import Sequences

# Rows of logits looked at together: 32 MB in float64.
CHUNK_ELEMENTS = 1 << 22
# Rows of a sequence, evenly spread, at which truncation is certified: bounds cost several passes
# over the vocabulary, and more rows of one text add less than another text.
CERTIFIED_ROWS = 256
# A unit of a few hundred sequences outweighs the start of a worker process and its target.
UNIT_SEQUENCES = 256


class VerifyConfig(Strict):
    """Section `verify`."""

    sequences: Annotated[int, Field(ge=1)]
    max_logp_error: Annotated[float, Field(gt=0)]
    max_tv: Annotated[float, Field(gt=0, le=1)]
    """½ Σ |p̂ − p| beyond what the stored codes round; what they round is reported as `tv`."""
    max_hidden_error: Annotated[float, Field(gt=0)]
    seed: Annotated[int, Field(ge=0)]
    threads: Threads


@dataclass(frozen=True)
class Job:
    """What all units of a replay share."""

    folder: Path
    """Of the target."""
    fingerprint: str
    device: str
    config: VerifyConfig
    unigrams: Mapping[str, NDArray[np.float32]]
    """[V] logits of each split's unigram, a reference draft."""
    identity: str
    """Of caches and sequences: a worker that outlives a run must not answer from an older one."""
    device_map: DeviceMap | None = None


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


@dataclass(frozen=True)
class Found:
    """What the replay of a sequence, or of a split's, found."""

    errors: Errors
    certificate: Certificate
    """Of no draft where nothing is supervised."""
    law: str = ""
    """Of the responses; empty where none is stated."""
    surprise: Surprise = field(default_factory=Surprise)
    """Of its tokens, beyond what their law expects."""


@dataclass(frozen=True)
class Replayed:
    """A sequence's record beside its replay."""

    errors: Positions
    certificate: Certificate
    certified: list[int] = field(default_factory=list)
    """The positions of the certificate's rows."""
    surprise: Surprise = field(default_factory=Surprise)


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


def unigrams(caches: Mapping[str, Path]) -> dict[str, NDArray[np.float32]]:
    """Logits of the unigram of each cache's own supervised tokens."""
    return {split: unigram(supervised_counts(Cache.open(path))) for split, path in caches.items()}


def replay_all(units: Sequence[Sequence[Sample]], job: Job, cluster: Cluster) -> dict[str, Found]:
    """By split the largest error of each kind, and the certificate of its rows.

    `CacheError` names the first error too large, the first interval that fails and the first split
    whose tokens are no samples of its law.
    """
    worst: dict[str, Errors] = defaultdict(dict)
    parts: dict[str, list[Certificate]] = defaultdict(list)
    said: dict[str, list[Surprise]] = defaultdict(list)
    laws: dict[str, str] = {}
    results = cluster.map(partial(replay_unit, job), units)
    with Progress(sum(map(len, units)), "verify", unit="sequence") as line:
        for unit, found in zip(units, results, strict=True):
            for sample, one in zip(unit, found, strict=True):
                known = worst[sample.split]
                known.update({kind: max(x, known.get(kind, 0.0)) for kind, x in one.errors.items()})
                parts[sample.split].append(one.certificate)
                said[sample.split].append(one.surprise)
                laws[sample.split] = one.law
            line.add(len(unit))
    whole = {
        split: Found(worst[split], joined(parts[split]), laws[split], sum_up(said[split]))
        for split in worst
    }
    for split, of_split in whole.items():
        require_samples(of_split.surprise, of_split.law, f"{split} cache")
    return whole


def replay_unit(job: Job, unit: Sequence[Sample]) -> list[Found]:
    """Replay some sequences through the target and compare each with its record."""
    target = resident_target(
        job.folder,
        device=job.device,
        fingerprint=job.fingerprint,
        device_map=job.device_map,
    )
    return [_replay_one(target, job, sample) for sample in unit]


def _replay_one(target: Target, job: Job, sample: Sample) -> Found:
    cache = _opened(sample.cache, job.identity)
    (row,) = _sequences(sample.sequences, job.identity).take([sample.index])
    record = cache.records([sample.index])[0]
    where = f"{sample.split} cache, sequence {record.id!r}"
    same = [np.array_equal(getattr(record, key), row[key]) for key in ("id", "tokens", "turn")]
    if not all(same):
        raise _mismatch(
            f"{where} has another id, tokens or turns than row {sample.index} of "
            f"{sample.sequences.name}"
        )
    bar = Bar.of(cache.manifest.params, job.config.max_logp_error)
    law = cache.source.get("law", "")
    found = replay(
        target,
        record,
        layout=cache.layout,
        bar=bar,
        unigram_V=job.unigrams[sample.split],
        law=law,
    )
    target.settle()
    _refuse_errors(found.errors, job.config, where)
    _refuse_intervals(found, where)
    largest = {kind: float(error_T.max()) for kind, error_T in found.errors.items()}
    return Found(largest, found.certificate, law, found.surprise)


def _refuse_errors(errors: Positions, config: VerifyConfig, where: str) -> None:
    limits = {
        **dict.fromkeys(("hidden", "last_hidden"), config.max_hidden_error),
        **dict.fromkeys(("token_logp", "tail_logp_mass", "tail_logp"), config.max_logp_error),
        "tv_beyond_rounding": config.max_tv,
        "kept_set": 0.0,
    }
    for kind, error_T in errors.items():
        position = int(error_T.argmax())  # of NaN where there is one, which is not within any limit
        if kind in limits and not error_T[position] <= limits[kind]:
            raise _mismatch(
                f"{where}, position {position} has {WORDS[kind]} of {error_T[position]:.3g}",
                limit=f"at most {limits[kind]:.3g}, as the section verify says",
            )


def _refuse_intervals(found: Replayed, where: str) -> None:
    for draft, columns in found.certificate.items():
        for name, symbol in (("alpha", "α"), ("kl", "KL")):
            missed = (~covered(columns, name)).nonzero()[0]
            if not len(missed):
                continue
            n = int(missed[0])
            lo, exact, hi = (float(columns[key][n]) for key in (f"{name}_lo", name, f"{name}_hi"))
            raise CacheError(
                found=f"{where}, position {found.certified[n]}: {symbol} of the reference draft "
                f"{draft!r} is {exact:.9g}, outside its certified [{lo:.9g}, {hi:.9g}]",
                expected="every interval to hold the exact value",
                todo="remove the cache and run dvc repro capture; where a cache of this version "
                "fails again, its bounds (pipeline/bounds.py) are wrong: please report it",
            )


@torch.no_grad()
def replay(
    target: Target,
    record: Record,
    *,
    layout: Layout,
    bar: Bar,
    unigram_V: NDArray[np.float32],
    law: str = "T=1",
) -> Replayed:
    """How far a record is from what the target says, by kind, at every token.

    `law` is what its responses are samples of: `token_logp` is that of a served law, and of T = 1
    for any other text.

    What 8-bit codes may round is no error of a hidden state. In mode `rebuild` the laws are those
    that the LM head makes of the stored `last_hidden`.
    """
    tokens = torch.from_numpy(record.tokens.astype(np.int64)).to(target.device)
    features = target.forward(tokens[None], layers=layout.hidden_layers)
    errors: Positions = {}
    for kind, x in (("hidden", features.hidden), ("last_hidden", features.last_hidden[:, :, None])):
        stored = _stored(record, kind)
        if stored is not None and x is not None:
            errors[kind] = _relative(*stored, x[0].double().cpu().numpy())
    stored_law, row_C = _stored_law(record, layout, str(target.device)), _spread_rows(record)
    position_R = supervised(record.turn).nonzero()[0]
    parts: list[Certificate] = []
    said: list[Surprise] = []
    first, rebuild = 0, layout.mode == "rebuild"
    last_hidden_TD = features.last_hidden[0]
    blocks = _law_errors(target, record, last_hidden_TD, bar, rebuild=rebuild, law=law)
    for at_C, logp_CV, found in blocks:
        said.append(surprise(logp_CV.cpu().numpy(), record.tokens[at_C + 1], law))
        for kind, error_C in found.items():
            errors.setdefault(kind, np.zeros(len(record.tokens)))[at_C] = error_C
        own = torch.from_numpy(row_C[(row_C >= first) & (row_C < first + len(at_C))])
        if len(own):
            logp_NV = logp_CV[(own - first).to(logp_CV.device)]
            drafts = reference_drafts(logp_NV, torch.from_numpy(unigram_V))
            if stored_law is None:
                own_law: Law = _rebuilt_law(target, record, position_R[own], last_hidden_TD)
            else:
                own_law = stored_law.take(own.to(logp_CV.device))
            parts.append(certify(logp_NV, own_law, drafts))
        first += len(at_C)
    return Replayed(errors, joined(parts), position_R[row_C].tolist(), sum_up(said))


def _stored_law(record: Record, layout: Layout, device: str) -> Law | None:
    """The law of the supervised rows as training reads it; None where it is made of states."""
    if layout.mode == "rebuild":
        return None
    return collate([replace(record, hidden=None, last_hidden=None)], layout, device=device).law


def _rebuilt_law(
    target: Target, record: Record, at_N: NDArray[np.int64], last_hidden_TD: Tensor
) -> DenseLaw:
    """The laws that training makes of stored states (mode `rebuild`), at some positions.

    By the target's own head, which capture found to be the one of `target/interface`.
    """
    assert record.last_hidden is not None, "mode rebuild stores last_hidden"
    states_ND = torch.from_numpy(from_bf16_bits(record.last_hidden[at_N])).to(last_hidden_TD)
    return DenseLaw(target.logits(states_ND).float().log_softmax(-1))


def _spread_rows(record: Record) -> NDArray[np.int64]:
    """Supervised rows to certify: all, or as many as are asked for, evenly spread."""
    num_rows = int(supervised(record.turn).sum())
    chosen = np.arange(min(num_rows, CERTIFIED_ROWS), dtype=np.int64)
    return chosen * num_rows // max(1, len(chosen))


def _law_errors(
    target: Target,
    record: Record,
    last_hidden_TD: Tensor,
    bar: Bar,
    *,
    rebuild: bool,
    law: str,
) -> Iterator[tuple[NDArray[np.int64], Tensor, Positions]]:
    """Some supervised positions after others: their exact laws, and the stored ones' errors."""
    position_R = supervised(record.turn).nonzero()[0]
    entry = np.concatenate([[0], record.kept.cumsum(dtype=np.int64)])
    draw = np.concatenate([[0], record.tail_kept.cumsum(dtype=np.int64)])
    size = max(1, CHUNK_ELEMENTS // target.spec.vocab_size)
    for first in range(0, len(position_R), size):
        at_C = position_R[first : first + size]
        logits_CV = target.logits(last_hidden_TD[torch.from_numpy(at_C)])
        exact_CV = torch.log_softmax(logits_CV.double(), -1)
        logp_CV = exact_CV.cpu().numpy()
        found = {"token_logp": _next_errors(logp_CV, record, at_C, law, bar.slack)}
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
        yield at_C, exact_CV, found


def _next_errors(
    logp_CV: NDArray[np.float64], record: Record, at_C: NDArray[np.int64], law: str, slack: float
) -> NDArray[np.float64]:
    """Errors of log p of the tokens that follow, under the law that they were sampled from.

    Of a served law the slow way, a row at a time; where rounding may move the end of a nucleus, the
    nearer of its ends counts.
    """
    token_C, stored_C = record.tokens[at_C + 1], record.token_logp[at_C]
    error_C: NDArray[np.float64] = np.abs(logp_CV[np.arange(len(at_C)), token_C] - stored_C)
    cuts = dict(piece.split("=") for piece in law.split(",")) if law.startswith("T=") else {}
    temperature, top_p = float(cuts.get("T", 1)), float(cuts.get("top_p", 1))
    if temperature == 0 or law == "T=1":
        return error_C
    for c, token in enumerate(token_C.tolist()):
        weight_V = np.exp((logp_CV[c] - logp_CV[c].max()) / temperature)
        falling = np.argsort(-logp_CV[c], kind="stable")[: int(cuts.get("top_k", len(weight_V)))]
        share = weight_V[falling].cumsum() / weight_V[falling].sum()
        wanted = []
        for goal in {top_p, *([top_p - slack, top_p + slack] if top_p < 1 else [])}:
            size = 1 + int((share < goal).sum()) if top_p < 1 else len(falling)
            # a token that another pass put just outside counts as the last that is inside
            kept = sorted({*falling[:size].tolist(), token})
            wanted.append(float(np.log(weight_V[token] / weight_V[kept].sum())))
        error_C[c] = min(abs(w - stored_C[c]) for w in wanted)
    return error_C


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
def _opened(path: Path, _identity: str) -> Cache:
    return Cache.open(path)


@lru_cache(maxsize=1)
def _sequences(path: Path, _identity: str) -> Sequences:
    return Sequences.open(path)


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
