"""What a capture costs beside the bare forward pass of the same model, and how fast it is written.

    python -m benchmarks.capture                   # some six minutes; writes capture.md beside this
    python -m benchmarks.capture --device cuda     # an 8 B shape; writes capture-cuda.md

The target is a Llama with random weights: 0.32 B parameters at V = 128,256 on a CPU, Llama-3.1-8B's
shape on a GPU. Its logits are scaled (in the final norm) to a mean entropy of 1.5 nats: without
that its law is flat, nothing reaches the threshold, and the figure means nothing.

Bare is the body's pass and the LM head at the same rows (all but the last of every sequence), the
logits thrown away: made all at once, or in the chunks that capture makes them in, whichever is
faster in this run. Capture is `pipeline.teacher.Pass` as the stage runs it, from tokens to records,
hidden layers tapped and converted, and the writing of a part: what `storage.writer` takes a token,
measured on a part of PART_TOKENS tokens (the default is eight times that), records repeated under
other ids. Its parameters are those of `params.yaml`.

On a CPU all is CPU time, tasks in turn in one process of one thread; `over bare` is the median over
rounds of capture / bare − 1. Matrix products take 5-10 % more or less from one call to the next
where neighbours share the core, which is more than is looked for, so `own time` stands beside it:
what the same capture spent outside the body and the head, over what it spent in them. On a GPU it
is the clock, parts written while the next one is computed, and there is no own time.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.capture import CaptureConfig, layout_of
from pipeline.cluster import Cluster, Later
from pipeline.config import load
from pipeline.target import Features, Target, TargetSpec
from pipeline.teacher import Pass, logits_elements
from pipeline.topk import normaliser
from storage.layout import Layout
from storage.record import Record
from storage.writer import write_part

ENTROPY = 1.5
ROUNDS = 3
PART_TOKENS = 16_384
# bf16 on one H100: 989 TFLOP/s of its data sheet, half of them used, 16 GFLOP a token
PREFILL_TOKENS_S = 31_000


@dataclass(frozen=True)
class Shape:
    """A target, and how much of it is run at a time."""

    name: str
    model: dict[str, Any]
    sequence_tokens: int
    batch_tokens: int
    batches: int
    """Of a measurement, each a part where writing overlaps."""


CPU = Shape(
    "0.32 B",
    {
        "vocab_size": 128_256,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    sequence_tokens=256,
    batch_tokens=512,
    batches=1,
)
CUDA = Shape(
    "8 B (Llama-3.1-8B)",
    {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    sequence_tokens=2048,
    batch_tokens=16_384,
    batches=8,
)


@dataclass
class Timed(Target):
    """A target that counts the CPU seconds of its body and its head."""

    seconds: float = 0.0

    def forward(self, *arguments: Any, **options: Any) -> Features:
        """As `Target`."""
        started = time.process_time()
        features = super().forward(*arguments, **options)
        self.seconds += time.process_time() - started
        return features

    def logits(self, last_hidden_ND: torch.Tensor) -> torch.Tensor:
        """As `Target`."""
        started = time.process_time()
        logits = super().logits(last_hidden_ND)
        self.seconds += time.process_time() - started
        return logits


TASKS = [(hidden, samples) for hidden in (False, True) for samples in (False, True)]


def target_of(shape: Shape, device: str, dtype: str) -> Timed:
    """The random model on its device, its entropy near ENTROPY."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape.model, max_position_embeddings=4096)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    spec = TargetSpec(
        kind="embedded",
        model=".",
        revision=None,
        fingerprint="random",
        weights_sha256="",
        tokenizer_sha256="",
        template_sha256="",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        eos_ids=[0],
        bos_id=None,
        context_tokens=4096,
        dtype=dtype,
        sharpen=1.0,
    )
    target = Timed(model=model, tokenizer=None, spec=spec)
    states = target.forward(tokens_of(shape, 9, 1).to(device)).last_hidden[0, :128]
    logits, low, high = target.logits(states).float(), 1e-2, 1e4
    for _ in range(20):
        middle = (low * high) ** 0.5
        _, entropy = normaliser(logits * middle)
        low, high = (middle, high) if entropy.mean() > ENTROPY else (low, middle)
    model.get_decoder().norm.weight.mul_(middle)
    return target


def tokens_of(shape: Shape, seed: int, num_sequences: int) -> torch.Tensor:
    """[B, T] random ids."""
    rng = np.random.default_rng(seed)
    size = (num_sequences, shape.sequence_tokens)
    return torch.from_numpy(rng.integers(0, shape.model["vocab_size"], size))


def rows_of(tokens_BT: torch.Tensor) -> list[dict[str, Any]]:
    """The sequences as capture reads them, every token the assistant's."""
    return [
        {"id": f"s{b}", "domain": "random", "tokens": row, "turn": [0] * len(row), "law": "T=1"}
        for b, row in enumerate(tokens_BT.tolist())
    ]


@torch.inference_mode()
def bare(target: Target, batches: Sequence[torch.Tensor], *, chunks: bool) -> None:
    """The pass and the logits at the supervised rows, in capture's chunks or at once."""
    for tokens_BT in batches:
        last = target.forward(tokens_BT.to(target.device)).last_hidden
        states = last[:, :-1].reshape(-1, last.shape[-1])
        rows = logits_elements(target.device) // target.spec.vocab_size if chunks else len(states)
        for some in states.split(rows):
            target.logits(some)


def config_of(shape: Shape, target: Target, *, hidden: bool, samples: bool) -> CaptureConfig:
    """The section of `params.yaml`, for this shape."""
    config: CaptureConfig = load("capture", CaptureConfig)
    n = target.spec.num_layers
    changes: dict[str, Any] = {
        "hidden_layers": [2, n // 2, n - 3] if hidden else [],
        "last_hidden": hidden,
        "batch_tokens": shape.batch_tokens,
    }
    changes |= {} if samples else {"tail_samples": 0}
    return CaptureConfig(**{**config.model_dump(), **changes})


def capture(
    target: Target,
    batches: Sequence[torch.Tensor],
    config: CaptureConfig,
    folder: Path | None,
) -> list[Record]:
    """Every batch a part; written beside the next one's pass where there is a folder."""
    layout, kept = layout_of(target.spec, config), []

    def begin(number: int) -> Later[None]:
        teacher = Pass(
            target,
            layout,
            rule=config.rule(),
            batch_tokens=config.batch_tokens,
            seed=config.seed,
        )
        records = teacher.records(rows_of(batches[number]))
        if folder is None:
            kept.extend(records)
            return Later(lambda _: None)
        return Later(lambda n: (write_part(folder, number, records, layout, n), None)[1])

    list(Cluster(None, threads=torch.get_num_threads()).map(begin, range(len(batches))))
    return kept


def repeated(records: Sequence[Record], vocab_size: int) -> list[Record]:
    """A part of at least PART_TOKENS tokens; every copy has other ids, so that none is one's own.

    Hidden states stay: a chunk of them is shorter than what is repeated.
    """
    rng, found = np.random.default_rng(0), []
    while sum(len(r.tokens) for r in found) < PART_TOKENS:
        new = rng.permutation(vocab_size).astype(np.uint32)
        found += [
            replace(r, tokens=new[r.tokens], topk_ids=new[r.topk_ids], tail_ids=new[r.tail_ids])
            for r in records
        ]
    return found


def write_seconds(records: Sequence[Record], layout: Layout) -> float:
    """CPU seconds a token of writing one part: checks, codecs, digests, fsync."""
    num_tokens = sum(len(r.tokens) for r in records)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        write_part(Path(folder), 0, records, layout)
        return (time.process_time() - started) / num_tokens


def seconds_of(task: Callable[[], Any], device: str) -> float:
    """CPU seconds, or on a GPU seconds of the clock until it is done."""
    if device == "cpu":
        started = time.process_time()
        task()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    task()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def about(records: Sequence[Record]) -> dict[str, float]:
    """Means over supervised rows."""
    rows = sum(len(r.tokens) - 1 for r in records)
    tail = sum(float(np.exp(r.tail_logp_mass[:-1].astype(np.float64)).sum()) for r in records)
    return {
        "kept": sum(int(r.kept.sum()) for r in records) / rows,
        "tail": tail / rows,
        "samples": sum(int(r.tail_kept.sum()) for r in records) / rows,
    }


def mean_entropy(target: Target, tokens_BT: torch.Tensor) -> float:
    """Nats, over all rows of a batch."""
    last = target.forward(tokens_BT.to(target.device)).last_hidden[:, :-1]
    found = [normaliser(target.logits(some))[1] for some in last.flatten(0, 1).split(64)]
    return float(torch.cat(found).mean())


def measure(shape: Shape, device: str, dtype: str) -> list[str]:
    """The table of one model."""
    target = target_of(shape, device, dtype)
    num = shape.batch_tokens // shape.sequence_tokens
    configs = [config_of(shape, target, hidden=h, samples=s) for h, s in TASKS]
    writes, facts = [], []
    warm = [tokens_of(shape, 0, num)]
    for config in configs:
        records = capture(target, warm, config, None)
        facts.append(about(records))
        part = repeated(records, target.spec.vocab_size)
        writes.append(write_seconds(part, layout_of(target.spec, config)))
    entropy = mean_entropy(target, warm[0])
    bares: list[list[float]] = [[], []]
    taken: list[list[float]] = [[] for _ in TASKS]
    owns: list[list[float]] = [[] for _ in TASKS]
    for round_number in range(ROUNDS):
        first = 1 + round_number * shape.batches
        batches = [tokens_of(shape, first + i, num) for i in range(shape.batches)]
        for way, seconds in enumerate(bares):
            run = partial(bare, target, batches, chunks=bool(way))
            seconds.append(seconds_of(run, device))
        for config, seconds, own in zip(configs, taken, owns, strict=True):
            target.seconds = 0.0
            with ExitStack() as stack:
                folder = None
                if device != "cpu":
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                seconds.append(
                    seconds_of(partial(capture, target, batches, config, folder), device)
                )
            own.append(seconds[-1] / target.seconds - 1)
    tokens = shape.batches * shape.batch_tokens
    least = min(bares, key=statistics.median)
    each = 1e3 * statistics.median(least) / tokens
    load = f", load {os.getloadavg()[0]:.1f}" if device == "cpu" else ""
    said = f"{shape.name} parameters, {dtype}, mean entropy {entropy:.2f} nats{load}"
    columns = "hidden | tail samples | mean K | tail mass | samples a token | over bare | own time"
    lines = [
        f"{said}; bare {each:.2f} ms a token.",
        "",
        f"| {columns} | + writing | written, tokens/s of a core |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (hidden, samples), fact, write, seconds, own in zip(
        TASKS, facts, writes, taken, owns, strict=True
    ):
        over = statistics.median(s / b - 1 for s, b in zip(seconds, least, strict=True))
        outside = statistics.median(own)
        written = outside + write * tokens / statistics.median(least)
        shown = [f"{outside:.1%}", f"{written:.1%}"] if device == "cpu" else ["", "in it"]
        lines.append(
            f"| {'3 and the last' if hidden else 'none'} | {'with' if samples else 'without'} | "
            f"{fact['kept']:.1f} | {fact['tail']:.4f} | {fact['samples']:.1f} | {over:.1%} | "
            f"{' | '.join(shown)} | {1 / write:,.0f} |"
        )
    return [*lines, ""]


def machine(device: str) -> str:
    """What it ran on."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else 'unknown'}; one used"


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    shape = CPU if device == "cpu" else CUDA
    dtypes = arguments.dtype or (["float32", "bfloat16"] if device == "cpu" else ["bfloat16"])
    text = [f"Machine: {machine(device)}; medians of {ROUNDS} rounds in turn.", ""]
    for dtype in dtypes:
        text += measure(shape, device, dtype)
        print("\n".join(text), flush=True)
    name = "capture.md" if device == "cpu" else f"capture-{device}.md"
    note = (
        "`+ writing` adds to the own time the CPU time of writing a part, which runs in the "
        "background of the next one's pass. An 8 B target on one H100 is taken to prefill "
        f"{PREFILL_TOKENS_S:,} tokens/s (989 TFLOP/s of bf16, half of them used, 16 GFLOP a token)."
    )
    Path(__file__).with_name(name).write_text("\n".join([*text, note]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
