"""Small sound caches: laws that sum to 1, samples from the tail, consistent log-probabilities."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.codecs import bf16_bits, encode_int8, encode_p
from storage.layout import Layout
from storage.record import Record, supervised
from storage.writer import done_part, plan_parts, seal, write_part

TOPK = Layout("topk", 64, 8, (1, 2), True)
FULL = Layout("full", 64, 8, (), False)
SOURCE = {"target": "t" * 64, "sequences": "s" * 64}
DOMAINS = ("code", "prose", "maths")

REBUILD = Layout("rebuild", 64, 8, (1,), True)
EIGHT = Layout("topk", 64, 200, (1, 2), True, "int8")


def stored(name: str, value: NDArray[Any], dtype: str) -> dict[str, Any]:
    """A feature as the arrays that hold it."""
    if dtype == "int8":
        code, scale = encode_int8(value.astype(np.float32))
        return {f"{name}_int8": code, f"{name}_scale": scale}
    return {name: bf16_bits(value.astype(np.float32))}


def make_record(rng: np.random.Generator, *, layout: Layout, length: int, index: int) -> Record:
    """One sequence whose last tokens are one assistant turn."""
    vocab = layout.vocab_size
    tokens = rng.integers(0, vocab, length).astype(np.uint32)
    turn = np.full(length, -1, dtype=np.int32)
    turn[int(rng.integers(0, length)) :] = 0
    kept, tail_kept = np.zeros(length, dtype=np.uint16), np.zeros(length, dtype=np.uint8)
    token_logp, tail_mass = (np.zeros(length, dtype=np.float32) for _ in range(2))
    ids, p, tail_ids, tail_logp = [[np.zeros(0)] for _ in range(4)]
    full = layout.dense
    for t in np.flatnonzero(supervised(turn)):
        support = rng.choice(min(vocab, 10_000), size=min(vocab, 12), replace=False)
        law = -np.sort(-rng.dirichlet(np.full(len(support), 0.4)).clip(1e-6))
        law /= law.sum()
        emitted = int(rng.integers(len(support)))
        tokens[t + 1], token_logp[t] = support[emitted], np.log(law[emitted])
        if full:
            continue
        count = int(rng.integers(0, len(support)))  # nothing kept is a law too
        kept[t], tail_mass[t] = count, np.log(law[count:].sum())
        ids.append(support[:count])
        p.append(law[:count])
        drawn = rng.integers(count, len(support), size=int(rng.integers(0, 4)))
        tail_kept[t] = len(drawn)
        tail_ids.append(support[drawn])
        tail_logp.append(np.log(law[drawn]))
    features: dict[str, Any] = {}
    if layout.mode == "full":
        shape = (int(supervised(turn).sum()), vocab)
        features["logits"] = bf16_bits(rng.normal(size=shape).astype(np.float32))
    if layout.hidden_layers:
        hidden = rng.normal(size=(length, len(layout.hidden_layers), layout.hidden_size))
        features |= stored("hidden", hidden, layout.hidden_dtype)
    if layout.last_hidden:
        last = rng.normal(size=(length, layout.hidden_size))
        features |= stored("last_hidden", last, layout.last_hidden_dtype)
    return Record(
        id=f"sequence-{index}-é",
        domain=DOMAINS[index % 3],
        tokens=tokens,
        turn=turn,
        token_logp=token_logp,
        kept=kept,
        topk_ids=np.concatenate(ids).astype(np.uint32),
        topk_p=encode_p(np.concatenate(p)),
        tail_logp_mass=tail_mass,
        tail_kept=tail_kept,
        tail_ids=np.concatenate(tail_ids).astype(np.uint32),
        tail_logp=np.concatenate(tail_logp).astype(np.float16),
        **features,
    )


def make_records(layout: Layout, lengths: Sequence[int], *, seed: int = 0) -> list[Record]:
    """Sequences of the given lengths."""
    rng = np.random.default_rng(seed)
    return [
        make_record(rng, layout=layout, length=length, index=index)
        for index, length in enumerate(lengths)
    ]


def write_cache(
    path: Path,
    layout: Layout,
    records: Sequence[Record],
    *,
    part_tokens: int = 200,
    source: Mapping[str, str] = SOURCE,
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write, or resume writing, a whole cache."""
    lengths = [len(record.tokens) for record in records]
    parts = [
        done_part(path, number, layout) or write_part(path, number, records[start:stop], layout)
        for number, (start, stop) in enumerate(plan_parts(lengths, part_tokens=part_tokens))
    ]
    params = {"min_prob": 5e-4, "seed": 0}
    seal(path, layout=layout, parts=parts, source=source, params=params, extra_files=extra_files)
    return path
