"""An EAGLE-3 step of an 8 B-shaped target: from cached features and laws, or with it in the loop.

Both ways run the same draft, the same loop of forward, `lk_lambda`, backward, clip and AdamW in
bfloat16 autocast, on the same tokens. From the cache, a batch's bfloat16 hidden states and sparse
laws lie in pinned host memory, as the reader hands them over, and travel within the step; online,
the target's forward pass makes hidden states and whole laws on the device first. Weights and laws
are random: a step's time does not depend on them. Writes `eagle-gpu.md`; needs torch, transformers
and this folder, no cache and nothing of a project.

    python -m benchmarks.eagle --device cuda       # part of `make gpu-bench`
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.batch import Batch
from pipeline.depths import depth_terms
from pipeline.drafts import eagle3
from pipeline.interface import Interface, Shape
from pipeline.law import DenseLaw, SparseLaw
from pipeline.loss import reduce
from pipeline.losses import lk_lambda
from pipeline.optimizer import AdamW

REPEATS = 5


@dataclass(frozen=True)
class Size:
    """Of target, draft and batch; by default Llama 3.1 8 B's."""

    vocab: int = 128_256
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    inner: int = 14_336
    depth: int = 4
    sequences: int = 4
    tokens: int = 2048
    entries: int = 40
    """Kept ids and samples of a row."""


TINY = Size(
    vocab=96,
    width=16,
    layers=4,
    heads=4,
    kv_heads=2,
    inner=24,
    depth=2,
    sequences=2,
    tokens=12,
    entries=5,
)
"""To see that all of it runs."""


def target_of(size: Size, device: str) -> Any:
    """A Llama of that shape, random, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.tokens,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def draft_of(size: Size, target: Any, device: str) -> Any:
    """The draft, its own weights in float32."""
    section = eagle3.Config(
        kind="eagle3",
        lr_scale=1.0,
        steps_scale=1.0,
        depth=size.depth,
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        intermediate_size=size.inner,
        norm_before_residual=True,
        norm_before_fc=False,
        norm_output=False,
    )
    head = target.get_output_embeddings().weight
    interface = Interface(target.get_input_embeddings().weight, head, torch.ones(size.width), 1e-5)
    draft = eagle3.Model.build(section, Shape(size.vocab, size.width), interface, 0)
    draft.recompute = True
    return draft.to(device).train()


@dataclass(frozen=True)
class Stored:
    """A batch as the reader leaves it on the host."""

    tokens: Tensor
    """[B, T] int64"""
    hidden: Tensor
    """[B, T, 3, D] bfloat16"""
    law: SparseLaw


def stored(size: Size, *, pinned: bool) -> Stored:
    """Random tokens, states and laws; every row but a sequence's last has a law."""
    g = torch.Generator().manual_seed(0)
    shape = (size.sequences, size.tokens)
    tokens = torch.randint(size.vocab, shape, generator=g)
    hidden = torch.randn(*shape, 3, size.width, generator=g, dtype=torch.bfloat16)
    rows, entries = size.sequences * (size.tokens - 1), size.entries
    first = torch.randint(size.vocab, (rows, 1), generator=g)
    ids = (first + torch.arange(entries) * 7) % size.vocab
    p = torch.rand(rows, entries, generator=g).pow(4)
    p = 0.98 * p / p.sum(-1, keepdim=True)
    law = SparseLaw(
        entry_start=torch.arange(rows + 1) * entries,
        ids=ids.flatten(),
        p=p.flatten(),
        weight=torch.ones(rows * entries),
        bucket=torch.full((rows,), 0.02),
    )
    made = Stored(tokens, hidden, law)
    if not pinned:
        return made
    return Stored(tokens.pin_memory(), hidden.pin_memory(), _each(law, Tensor.pin_memory))


def _each(law: SparseLaw, change: Callable[[Tensor], Tensor]) -> SparseLaw:
    """A law with all its tensors changed."""
    return SparseLaw(
        entry_start=change(law.entry_start),
        ids=change(law.ids),
        p=change(law.p),
        weight=change(law.weight),
        bucket=change(law.bucket),
    )


def batch_of(tokens: Tensor, hidden: Tensor, law: Any) -> Batch:
    """Whole sequences, all of one turn."""
    num_rows, num_tokens = tokens.shape
    index = torch.arange(num_tokens, device=tokens.device).expand(num_rows, -1)
    row = torch.arange(num_rows, device=tokens.device)[:, None] * (num_tokens - 1) + index
    return Batch(
        ids=tuple(map(str, range(num_rows))),
        domains=("",) * num_rows,
        tokens=tokens,
        length=torch.full((num_rows,), num_tokens, device=tokens.device),
        turn=torch.zeros_like(tokens),
        token_logp=torch.zeros(tokens.shape, device=tokens.device),
        law_row=torch.where(index < num_tokens - 1, row, -1),
        law=law,
        hidden=hidden,
        last_hidden=None,
    )


def cached(held: Stored, device: str) -> Batch:
    """The batch as it travels from the host."""
    move = partial(Tensor.to, device=device, non_blocking=True)
    return batch_of(move(held.tokens), move(held.hidden), _each(held.law, move))


def online(held: Stored, target: Any, size: Size, device: str) -> Batch:
    """The batch as the target's forward pass makes it."""
    tokens = held.tokens.to(device, non_blocking=True)
    layers = (2, size.layers // 2, size.layers - 1)
    with torch.no_grad():
        out = target(tokens, output_hidden_states=True, use_cache=False)
        hidden = torch.stack([out.hidden_states[k] for k in layers], dim=2)
        logp = out.logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
    return batch_of(tokens, hidden, DenseLaw(logp))


def step(batch: Batch, draft: Any, optimizer: AdamW, size: Size) -> float:
    """Forward, loss, backward, update."""
    optimizer.zero_grad()
    kl_SN, alpha_SN, mask_SN = depth_terms(draft, batch, size.depth, dtype=torch.bfloat16)
    config = lk_lambda.Config(kind="lk_lambda", eta=3.0)
    loss_SN = lk_lambda.loss(kl_SN, alpha_SN, mask_SN, config)
    total = reduce(loss_SN, mask_SN, depth_decay=0.8)
    total.backward()
    optimizer.clip(1.0)
    optimizer.step(1e-5)
    return total.item()


def measure(way: str, size: Size, device: str, *, repeats: int = REPEATS) -> dict[str, float]:
    """The least time of a step this way, and the peak of memory; seconds, bytes."""
    cuda = device == "cuda"
    target = target_of(size, device)
    draft, held = draft_of(size, target, device), stored(size, pinned=cuda)
    trained = [p for p in draft.parameters() if p.requires_grad]
    optimizer = AdamW(trained, (0.9, 0.95), weight_decay=0.01)
    from_target = partial(online, held, target, size, device)
    make = partial(cached, held, device) if way == "cache" else from_target
    best, value = float("inf"), 0.0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 2):  # the first compile kernels
        _wait(cuda)
        began = time.perf_counter()
        batch = make()
        if way != "target alone":
            value = step(batch, draft, optimizer, size)
        _wait(cuda)
        best = min(best, time.perf_counter() - began)
        del batch
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {"seconds": best, "peak": float(peak), "loss": value}


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


WAYS = ("cache", "online", "target alone")


def report(size: Size, device: str, *, repeats: int = REPEATS) -> str:
    """The table as Markdown."""
    found = {way: measure(way, size, device, repeats=repeats) for way in WAYS}
    place = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    tokens = size.sequences * size.tokens
    shape = ", ".join(f"{name} {value:,}" for name, value in asdict(size).items())
    lines = [
        f"An EAGLE-3 step: {shape}; bfloat16, activations of a step made again.",
        f"{place}, torch {torch.__version__}; wall time, least of {repeats}.",
        "",
        "| batches from | ms a step | tokens/s | peak GiB | loss |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, row in found.items():
        lines.append(
            f"| {way} | {1e3 * row['seconds']:.1f} | {tokens / row['seconds']:,.0f} "
            f"| {row['peak'] / 2**30:.1f} | {row['loss']:.3f} |"
        )
    ratio = found["online"]["seconds"] / found["cache"]["seconds"]
    return "\n".join([*lines, "", f"From the cache a step is {ratio:.2f} times as fast.", ""])


def main() -> None:
    """Measure; write the page beside this file where a GPU did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=json.loads, default={})
    given = parser.parse_args()
    text = report(Size(**given.size), given.device)
    if given.device == "cuda":
        Path(__file__).with_name("eagle-gpu.md").write_text(text, encoding="utf-8")
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
