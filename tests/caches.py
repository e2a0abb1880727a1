"""A tiny project to train in: a cache whose target is a Markov chain, and its target folder.

The law of the next token depends on the last one alone, so that a draft of any kind can learn it
within seconds and the exact law of every row is at hand.
"""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from storage.codecs import bf16_bits, encode_p
from storage.layout import Layout
from storage.record import Record, supervised
from storage.workspace import write_json
from storage.writer import plan_parts, seal, write_part

V, D, LAYERS = 40, 16, (1, 2, 3)
TARGET = "t" * 64
LAYOUT = Layout("topk", V, D, LAYERS, True)
FULL = Layout("full", V, D, LAYERS, True)


def chain(vocab_size: int = V, seed: int = 0) -> NDArray[np.float64]:
    """[V, V] p(next | last)."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(vocab_size, 0.15), vocab_size)


def record(
    name: str,
    *,
    layout: Layout = LAYOUT,
    num_tokens: int = 24,
    num_prompt: int = 5,
    samples: int = 3,
    seed: int = 0,
) -> Record:
    """One sequence of the chain: a prompt, then one assistant turn; top 6 kept, then samples.

    Rows at even positions have tail samples, rows at odd ones a bucket.
    """
    rng, law = np.random.default_rng([seed, *name.encode()]), chain()
    tokens = [int(rng.integers(V))]
    while len(tokens) < num_tokens:
        tokens.append(int(rng.choice(V, p=law[tokens[-1]])))
    turn = np.where(np.arange(num_tokens) < num_prompt, -1, 0).astype(np.int32)
    rows = np.flatnonzero(supervised(turn))
    kept, drawn, mass = (np.zeros(num_tokens, dtype=d) for d in (np.uint16, np.uint8, np.float32))
    logp = np.zeros(num_tokens, dtype=np.float32)
    ids, p, tail_ids, tail_p = [], [], [], []
    for t in rows:
        p_V = law[tokens[t]]
        order = np.argsort(-p_V)
        logp[t] = np.log(p_V[tokens[t + 1]])
        if layout.mode == "full":
            continue
        tail = order[6:]
        kept[t], mass[t] = 6, np.log(p_V[tail].sum())
        ids += [*order[:6]]
        p += [*p_V[order[:6]]]
        if t % 2 == 0:
            drawn[t] = samples
            draws = rng.choice(tail, samples, p=p_V[tail] / p_V[tail].sum())
            tail_ids += [*draws]
            tail_p += [*p_V[draws]]
    return Record(
        id=name,
        domain="chain",
        tokens=np.array(tokens, dtype=np.uint32),
        turn=turn,
        token_logp=logp,
        kept=kept,
        topk_ids=np.array(ids, dtype=np.uint32),
        topk_p=encode_p(np.array(p)),
        tail_logp_mass=mass,
        tail_kept=drawn,
        tail_ids=np.array(tail_ids, dtype=np.uint32),
        tail_logp=np.log(np.array(tail_p)).astype(np.float16),
        logits=bf16_bits(np.log(law[tokens][rows] + 1e-9)) if layout.mode == "full" else None,
        hidden=bf16_bits(_features(tokens, len(layout.hidden_layers), layout.hidden_size))
        if layout.hidden_layers
        else None,
        last_hidden=bf16_bits(_features(tokens, 1, layout.hidden_size)[:, 0])
        if layout.last_hidden
        else None,
    )


def _features(tokens: list[int], num_layers: int, size: int) -> NDArray[np.float32]:
    """[T, L, D] features that tell the last token."""
    table = np.random.default_rng(1).normal(size=(V, num_layers, size))
    return table[tokens].astype(np.float32)


def write_cache(
    path: Path,
    *,
    layout: Layout = LAYOUT,
    num_sequences: int = 20,
    part_tokens: int = 150,
    target: str = TARGET,
    split: str = "train",
) -> list[Record]:
    """A sealed cache of records of 18 to 26 tokens; returns the records."""
    path.mkdir(parents=True, exist_ok=True)
    lengths = [18 + i % 9 for i in range(num_sequences)]
    records = [
        record(f"{split}-{i}", layout=layout, num_tokens=n, num_prompt=3 + i % 4)
        for i, n in enumerate(lengths)
    ]
    parts = [
        write_part(path, number, records[a:b], layout)
        for number, (a, b) in enumerate(plan_parts(lengths, part_tokens=part_tokens))
    ]
    seal(path, layout=layout, parts=parts, source={"target": target}, params={})
    return records


def write_target(folder: Path, *, vocab_size: int = V, hidden_size: int = D) -> None:
    """`target.json` and the interface of a target of that shape; no body."""
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(vocab_size, hidden_size, generator=g) for name in ("embed", "lm_head")
    }
    (folder / "interface").mkdir(parents=True)
    save_file(
        {**tensors, "norm": torch.ones(hidden_size)},
        folder / "interface" / "interface.safetensors",
        metadata={"norm": json.dumps({"eps": 1e-6, "offset": 0.0})},
    )
    spec = {
        "kind": "embedded",
        "model": ".",
        "revision": None,
        "fingerprint": TARGET,
        "weights_sha256": "w",
        "tokenizer_sha256": "t",
        "template_sha256": "",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": 4,
        "eos_ids": [0],
        "bos_id": None,
        "context_tokens": 64,
        "dtype": "float32",
        "sharpen": 1.0,
    }
    write_json(folder / "target.json", spec)
