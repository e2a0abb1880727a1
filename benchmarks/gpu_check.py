"""Every stage on one device with a random target of a real one's shape; rates to `gpu-check.md`.

    python -m benchmarks.gpu_check                  # an 8 B-shaped target on CUDA: make gpu-check
    python -m benchmarks.gpu_check --shape tiny --device cpu

Lays out a project, writes a random Llama of the shape into it, runs `dvc repro` (generate, capture,
verify, all five drafts under all losses of a truncated cache, replay and decode) and gathers what
the stages timed. A random target's laws are nearly uniform, so that nothing would be kept of them:
its final norm is scaled until the mean entropy on the project's own kind of text is 1.5 nats. Its
acceptance says nothing; its rates are a real target's of that shape.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lkcache.init import init
from lkcache.presets import dump, write_cells, yaml
from pipeline.corpus import stdlib_documents
from pipeline.embedded import END, encode, train_tokenizer

NATS = 1.5
PROBE_TOKENS = 512
BPE_TOKENS = 8192
RESULT = Path(__file__).with_name("gpu-check.md")


@dataclass(frozen=True)
class Shape:
    """Of a Llama, and of the work that it is given."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    dtype: str
    prompts: int
    new_tokens: int
    steps: int


SHAPES = {
    "8b": Shape(128_256, 4096, 14_336, 32, 32, 8, "bfloat16", 512, 512, 20),
    "1b": Shape(128_256, 2048, 8192, 16, 32, 8, "bfloat16", 512, 512, 20),
    "tiny": Shape(512, 64, 160, 4, 4, 2, "float32", 48, 24, 4),
}
LOSSES = ["kl", "tv", "lk_alpha", "lk_lambda", "lk_fixed", "jsd", "e2e_tv"]


def padded_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A BPE learnt from the texts, with ids up to `vocab_size` that no text encodes to.

    A random target draws any id; every one must decode to something.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    learnt = train_tokenizer(texts, min(vocab_size, BPE_TOKENS), context_tokens=8192)
    state = json.loads(learnt.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab.update({f"<{i}>": i for i in range(len(vocab), vocab_size)})
    made = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, clean_up_tokenization_spaces=False
    )


def random_target(shape: Shape, tokens_T: Tensor, device: str) -> Any:
    """A random Llama whose laws on these tokens have NATS of entropy in the mean."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=8192,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        hidden_1TD = model.model(input_ids=tokens_T[None].to(device), use_cache=False)
        logits_TV = model.lm_head(hidden_1TD.last_hidden_state[0]).float()
        model.model.norm.weight.mul_(scale_to(logits_TV, NATS))
    return model


def scale_to(logits_TV: Tensor, nats: float) -> float:
    """The factor of the logits at which their laws' mean entropy is `nats`; by bisection."""
    low, high = 1e-3, 1e5
    for _ in range(60):
        middle = (low * high) ** 0.5
        logp_TV = (logits_TV * middle).log_softmax(-1)
        entropy = -(logp_TV.exp() * logp_TV).sum(-1).mean().item()
        low, high = (middle, high) if entropy > nats else (low, middle)
    return (low * high) ** 0.5


def write_params(folder: Path, shape: Shape, device: str) -> None:
    """The embedded default's parameters with this target, five drafts and all losses."""
    path = folder / "params.yaml"
    params = yaml().load(path)
    depth = min(7, shape.new_tokens // 2)
    n = shape.num_layers
    layers = [2, n // 2, n - 3] if n > 6 else [1, 2, 3]
    params["prepare"] |= {
        "source": {"kind": "stdlib", "max_chars": 400_000},
        "train_prompts": shape.prompts,
        "heldout_prompts": shape.prompts // 4,
    }
    params["target"] = {
        "kind": "pretrained",
        "model": "random",
        "revision": None,
        "dtype": shape.dtype,
        "trust_remote_code": False,
        "threads": os.cpu_count() or 1,
    }
    big = shape.hidden_size >= 1024
    params["generate"] |= {"max_new_tokens": shape.new_tokens, "batch_sequences": 128}
    params["capture"] |= {
        "hidden_layers": layers,
        "batch_tokens": 16_384 if big else 2048,
        "part_tokens": 65_536 if big else 4096,
    }
    if shape.dtype == "bfloat16":  # its replay in other batches rounds otherwise
        params["verify"] |= {"max_logp_error": 0.5, "max_tv": 0.2, "max_hidden_error": 0.1}
    for section in ("warmup", "train"):
        params[section] |= {"steps": shape.steps, "dtype": shape.dtype, "log_every": shape.steps}
    params["evaluate"] |= {
        "depth": depth,
        "decode_prompts": min(64, shape.prompts // 4),
        "decode_new_tokens": min(128, shape.new_tokens),
    }
    params["report"]["gammas"] = [4, depth] if depth > 4 else [depth]
    params["report"]["resamples"] = 1000
    params["cluster"] |= {"workers": 1, "device": device}
    heads, inner = shape.num_heads, shape.intermediate_size
    _set_drafts(params["drafts"], heads, inner, small=shape.hidden_size // 4)
    matrix = {
        draft: {"seeds": [0], "objectives": LOSSES if draft in ("eagle3", "mtp") else LOSSES[:-1]}
        for draft in ("lm", "medusa", "mlp", "eagle3", "mtp")
    }
    write_cells(params, matrix, {"eagle3-lk_lambda-0": "speculators"})
    dump(params, path)


def _set_drafts(drafts: Any, heads: int, inner: int, *, small: int) -> None:
    scales = {"lr_scale": 1.0, "steps_scale": 1.0}
    attention = {"num_heads": heads, "num_kv_heads": None, "head_size": None}
    drafts.pop("lm_wide")
    drafts["lm"] |= {"hidden_size": small, "num_heads": 4, "intermediate_size": 2 * small} | scales
    drafts["medusa"] |= scales
    drafts["eagle3"] |= {"intermediate_size": inner, "num_heads": heads, "depth": 4} | scales
    drafts["mlp"] = {
        "kind": "mlp",
        "num_heads": 4,
        "inner_size": small,
        "tie_weights": False,
        "scale_input": True,
        "draft_vocab_size": None,
        **scales,
    }
    drafts["mtp"] = {
        "kind": "mtp",
        "depth": 4,
        "init": "fresh",
        "attention": "step0",
        **attention,
        "intermediate_size": inner,
        "qk_norm": True,
        "qkv_bias": False,
        "rope_theta": 1e4,
        "norm_eps": 1e-6,
        "draft_vocab_size": None,
        **scales,
    }


def lay_out(folder: Path, shape: Shape, device: str) -> None:
    """A project with its random target; one that is there already goes on where it stopped."""
    if (folder / "random" / "config.json").is_file():
        return
    init(folder)
    texts = [document.text for document in stdlib_documents(2_000_000, seed=0)]
    tokenizer = padded_tokenizer(texts, shape.vocab_size)
    model = random_target(shape, encode(tokenizer, texts[:20])[:PROBE_TOKENS], device)
    model.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    write_params(folder, shape, device)


def rates(folder: Path) -> list[tuple[str, str]]:
    """What was timed, a line each."""

    def timing(name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((folder / "timings" / f"{name}.json").read_text())
        return value

    generate, capture = timing("generate"), timing("capture")
    rows = [
        ("generate, tokens/s", f"{generate['tokens_per_s']:,.0f}"),
        ("capture, tokens/s", f"{capture['tokens_per_s']:,.0f}"),
        (
            "capture over its forward pass",
            f"{capture['worker_seconds'] / capture['target_seconds'] - 1:+.1%}",
        ),
    ]
    trained: dict[str, list[float]] = {}
    decoded: dict[str, list[float]] = {}
    for path in sorted((folder / "timings").glob("train-*.json")):
        draft = path.stem.split("-")[1]
        trained.setdefault(draft, []).append(json.loads(path.read_text())["tokens_per_s"])
    for path in sorted((folder / "timings").glob("evaluate-*.json")):
        for name, value in json.loads(path.read_text()).items():
            if name.endswith("tokens_per_s"):
                objective, law, _ = name.split(" ")
                who = "plain" if objective == "plain" else path.stem.split("-")[1]
                decoded.setdefault(f"{who}, {law}", []).append(value)
    for kind, found in (("train", trained), ("decode", decoded)):
        for name, values in sorted(found.items()):
            spread = f"{mean(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
            rows.append((f"{kind} {name}, tokens/s over {len(values)} runs", spread))
    return rows


def machine(device: str) -> str:
    """'N cores, GPU model'."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    packages = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {gpu}; {packages}"


def report(folder: Path, name: str, device: str) -> str:
    """The Markdown that is kept."""
    shape = SHAPES[name]
    size = f"V = {shape.vocab_size:,}, D = {shape.hidden_size}, {shape.num_layers} layers"
    metrics = json.loads((folder / "metrics" / "capture.json").read_text())
    lines = [
        "# One device, every stage",
        "",
        f"`python -m benchmarks.gpu_check --shape {name} --device {device}` on {machine(device)}.",
        f"A random target ({size}, {shape.dtype}), its logits scaled to {NATS} nats on text.",
        "Acceptance of such a target says nothing and is not shown.",
        "",
        "Captured: " + ", ".join(_numbers(metrics)) + ".",
        "",
        "| what | rate |",
        "| --- | ---: |",
    ]
    lines += [f"| {what} | {rate} |" for what, rate in rates(folder)]
    return "\n".join(lines) + "\n"


def _numbers(metrics: dict[str, Any]) -> list[str]:
    train = metrics["train"]
    return [
        f"{train['tokens']:,} tokens",
        f"{train['mean_entropy']:.2f} nats",
        f"mean K {train['mean_kept']:.1f}",
        f"tail mass {train['mean_tail_mass']:.4f}",
        f"{train['bytes'] / train['tokens']:,.0f} B/token with hidden states",
    ]


def main() -> None:
    """Lay out, run, gather."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("gpu-check"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device here; --device cpu --shape tiny shows what it does.")
    lay_out(options.folder, SHAPES[options.shape], options.device)
    subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=options.folder, check=True)
    text = report(options.folder, options.shape, options.device)
    if options.device == "cuda":
        RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
