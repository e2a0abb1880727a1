"""Forward + backward time and peak memory of the LK hybrid loss: ours, plain torch, the peers.

`python benchmarks/terms.py` on a CPU, `make gpu-bench` on a GPU; writes `terms.md` or
`terms-gpu.md` beside this file. Every case runs in a fresh process, the cases in turn, and the
least time counts: of a GPU the wall clock's, of a CPU that of the one thread, which other work on
the machine disturbs least. The loss is λ·KL + (1 − λ)·TV with λ = exp(−3 sg α) per token, on which
all agree where the law's whole mass lies on its entries; its mean is compared.

Ours takes a ragged sparse law of about 40 entries a row, as the cache stores it; the others take a
dense row of target logits and return the gradient of the draft's logits all the same. The peers
(`speculators`, `liger-kernel`) are imported where they are installed, else their rows say absent.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 2
ETA, ENTRIES = 3.0, (8, 72)
CPU = {"tokens": 1024, "vocab": 128_256, "dtype": "float32"}
GPU = {"tokens": 8192, "vocab": 128_256, "dtype": "bfloat16"}
HEAD = {"cpu": 256, "cuda": 4096}
"""Width of the hidden state in the cases with an LM head."""


def inputs(tokens: int, vocab: int, dtype: str, device: str) -> tuple[Any, Any]:
    """Draft logits and a sparse law whose entries hold all of its mass."""
    import torch

    from pipeline.law import SparseLaw

    g = torch.Generator().manual_seed(0)
    counts = torch.randint(*ENTRIES, (tokens,), generator=g)
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    row = torch.repeat_interleave(torch.arange(tokens), counts)
    # distinct within a row: a random offset, then steps of a prime
    place = torch.arange(len(row)) - start[row]
    ids = (torch.randint(vocab, (tokens,), generator=g)[row] + place * 7919) % vocab
    p = torch.rand(len(row), generator=g).pow(6)
    p /= torch.zeros(tokens).index_add_(0, row, p)[row]
    wide = torch.Generator(device).manual_seed(1)
    z = torch.empty(tokens, vocab, dtype=getattr(torch, dtype), device=device)
    z.normal_(generator=wide).mul_(2)
    # a draft that has learnt something: half of the target's mass overlaps
    index = (row * vocab + ids).to(device)
    z.view(-1)[index] = (p.clamp(min=1e-6).log() + 13).to(z.dtype).to(device)
    law = SparseLaw(
        start.to(device),
        ids.to(device),
        p.to(device),
        torch.ones(len(row), device=device),
        torch.zeros(tokens, device=device),
    )
    return z.requires_grad_(), law


def dense(law: Any, vocab: int, dtype: Any) -> Any:
    """The target's logits that a dense loss reads: log p, and nothing elsewhere."""
    import torch

    out = torch.full((law.num_rows, vocab), -1e4, dtype=dtype, device=law.p.device)
    out.view(-1)[law.rows() * vocab + law.ids] = law.p.clamp(min=1e-30).log().to(dtype)
    return out


def ours(z: Any, law: Any, *, in_place: bool) -> Any:
    """The terms of a sparse law."""
    from pipeline.terms import terms

    kl, alpha = terms(z, law, in_place=in_place)
    weight = (-ETA * alpha.detach()).exp()
    return (weight * kl + (1 - weight) * (1 - alpha)).mean()


def plain(z: Any, target: Any) -> Any:
    """What one writes in plain torch, in float32."""
    logq, logp = (x.float().log_softmax(-1) for x in (z, target))
    p = logp.exp()
    kl = (p * (logp - logq)).sum(-1)
    alpha = p.minimum(logq.exp()).sum(-1)
    weight = (-ETA * alpha.detach()).exp()
    return (weight * kl + (1 - weight) * (1 - alpha)).mean()


def speculators(z: Any, target: Any, *, fused: bool) -> Any:
    """The peer's hybrid loss."""
    if fused:
        from speculators.losses.fused import fused_lk_hybrid_loss as loss
    else:
        from speculators.losses.eager import lk_hybrid_loss as loss
    return loss(z[None], target[None], eta=ETA).mean()


def liger(z: Any, target: Any) -> Any:
    """KL and TV of the peer's kernels, mixed by hand; they take probabilities."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction
    from liger_kernel.ops.tvd import LigerTVDLossFunction

    logq, p = z.float().log_softmax(-1), target.float().softmax(-1)
    kl = LigerKLDivLossFunction.apply(logq, p, "none").sum(-1)
    tv = LigerTVDLossFunction.apply(logq.exp(), p, None, "none").sum(-1)
    weight = (-ETA * (1 - tv.detach())).exp()
    return (weight * kl + (1 - weight) * tv).mean()


def head(hidden: Any, weight: Any, law: Any, *, fused: bool) -> Any:
    """From the last hidden state: logits in one piece, or never whole."""
    from pipeline.head import head_terms
    from pipeline.terms import terms

    if fused:
        kl, alpha = head_terms(hidden, weight, law)
    else:
        kl, alpha = terms(hidden @ weight.T, law, in_place=True)
    mix = (-ETA * alpha.detach()).exp()
    return (mix * kl + (1 - mix) * (1 - alpha)).mean()


CASES: dict[str, tuple[str, ...]] = {
    "ours": ("cpu", "cuda"),
    "ours, gradient in place": ("cpu", "cuda"),
    "plain torch": ("cpu", "cuda"),
    "speculators eager": ("cpu", "cuda"),
    "speculators fused": ("cuda",),
    "liger-kernel": ("cuda",),
    "LM head and ours": ("cpu", "cuda"),
    "LM head fused": ("cpu", "cuda"),
}
PEERS = {"speculators": "speculators", "liger": "liger-kernel"}


def build(name: str, shape: dict[str, Any], device: str) -> tuple[Callable[[], Any], list[Any]]:
    """The loss of a case as a function of nothing, and what it is differentiated by."""
    import torch

    z, law = inputs(**shape, device=device)
    if name.startswith("LM head"):
        rows, vocab, width = shape["tokens"], shape["vocab"], HEAD[device]
        dtype, g = z.dtype, torch.Generator(device).manual_seed(2)
        hidden = torch.empty(rows, width, dtype=dtype, device=device).normal_(generator=g)
        weight = torch.empty(vocab, width, dtype=dtype, device=device).normal_(generator=g)
        weight.mul_(2 / width**0.5)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        del z
        return lambda: head(*leaves, law, fused=name == "LM head fused"), leaves
    if name.startswith("ours"):
        return lambda: ours(z.view_as(z), law, in_place="in place" in name), [z]
    target = dense(law, shape["vocab"], z.dtype)
    call = {
        "plain torch": plain,
        "speculators eager": lambda z, t: speculators(z, t, fused=False),
        "speculators fused": lambda z, t: speculators(z, t, fused=True),
        "liger-kernel": liger,
    }[name]
    return lambda: call(z, target), [z]


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(field)


def run(name: str, shape: dict[str, Any], device: str) -> dict[str, float]:
    """One case in this process: the least time, the peak with and above its inputs, the value."""
    import torch

    cuda = device == "cuda"
    torch.set_num_threads(1)
    if not cuda:
        torch.zeros(8).exp().sum().item()  # the library's own pages
    base = 0 if cuda else resident("VmRSS")
    function, leaves = build(name, shape, device)
    if not cuda:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak, from here on
    held = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter if cuda else time.process_time
    seconds, value = [], 0.0
    for _ in range(REPEATS + 5 * cuda):  # the first on a GPU compiles
        began = clock()
        loss = function()
        gradients = torch.autograd.grad(loss, leaves)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - began)
        value = value or loss.item()  # in place, later rounds start from a gradient: time alone
        del gradients, loss
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    above = peak - held
    # of a head the weight's own gradient is what it is for
    beyond = above - (leaves[1].nbytes if len(leaves) > 1 else 0)
    spent = {"peak": peak - base, "above": above, "beyond": beyond}
    return {"seconds": min(seconds), **spent, "value": value}


def bandwidth() -> float:
    """Bytes a second that a copy on this GPU reads and writes together."""
    import torch

    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y, best = torch.empty_like(x), float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        y.copy_(x)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * len(x) / best


def measure(name: str, shape: dict[str, Any], device: str) -> dict[str, float] | None:
    """One case in a fresh process; None where a peer fails, which its row then says."""
    command = [sys.executable, __file__, "--case", name, "--shape", json.dumps(shape)]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*command, "--device", device],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


Runs = dict[str, list[dict[str, float]]]
"""By case."""


def table(
    shape: dict[str, Any], device: str, names: list[str], rounds: int
) -> tuple[list[str], Runs]:
    """Measure the cases in turn; the rows of the table, the first row's ratios beside."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            one = measure(name, shape, device)
            print(name, one, file=sys.stderr)
            found[name] += [one] if one else []
    rows = [
        "| case | ms | × ours | peak MiB | above inputs MiB | value |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    first = min(x["seconds"] for x in found[names[0]])
    for name, runs in found.items():
        if not runs:
            rows.append(f"| {name} | failed | | | | |")
            continue
        seconds = min(x["seconds"] for x in runs)
        peak, above = (min(x[k] for x in runs) / 2**20 for k in ("peak", "above"))
        rows.append(
            f"| {name} | {seconds * 1e3:.1f} | {seconds / first:.2f} | {peak:.0f} | {above:.0f} "
            f"| {runs[0]['value']:.6f} |"
        )
    return rows, found


def least(found: Runs, name: str, what: str) -> float:
    """Of a case; NaN where it failed or was not run."""
    return min((x[what] for x in found.get(name, [])), default=float("nan"))


def verdicts(shape: dict[str, Any], device: str, loss: Runs, head: Runs) -> list[str]:
    """What was asked of these figures, each beside its bar."""
    fused, whole = (
        least(head, name, "beyond") / 2**20 for name in ("LM head fused", "LM head and ours")
    )
    spared = (
        "Beyond weights, the weight's gradient and hidden inputs: fused "
        f"{fused:.0f} MiB, whole logits {whole:.0f} MiB, {fused / whole:.2f} of it (bar: 0.25)."
    )
    sentences = [spared]
    if device == "cuda":
        rate, own = bandwidth(), least(loss, "ours, gradient in place", "seconds")
        copied = 3 * shape["vocab"] * 2 * shape["tokens"] / rate
        peer = least(loss, "speculators fused", "seconds") / own
        sentences.append(
            f"Copy bandwidth {rate / 1e12:.2f} TB/s: moving 3·V·2 bytes a token takes "
            f"{copied * 1e3:.2f} ms; ours, in place, takes {own / copied:.2f} of that (bar: 1.43)."
        )
        sentences.append(f"speculators fused takes {peer:.2f} times as long (bar: 2).")
    return [line for sentence in sentences for line in ("", sentence)]


def machine(device: str) -> str:
    """The machine in words."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [x.split(":")[1].strip() for x in info.splitlines() if x.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, one thread"


def version(package: str) -> str:
    """Of an installed package; absent if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def report(shape: dict[str, Any], device: str, rounds: int) -> str:
    """All cases that this machine can run, as a page."""
    installed = {name: version(package) for name, package in PEERS.items()}
    lacks = [name for name, found in installed.items() if found == "absent"]
    names = [n for n, where in CASES.items() if device in where]
    own = [n for n in names if not any(n.startswith(peer) for peer in lacks)]
    loss = [n for n in own if not n.startswith("LM head")]
    packages = [f"torch {version('torch')}", f"triton {version('triton')}"]
    packages += [f"{PEERS[name]} {found}" for name, found in installed.items()]
    size = f"T = {shape['tokens']:,}, V = {shape['vocab']:,}, {shape['dtype']}"
    clock = "Wall time" if device == "cuda" else "CPU time of the one thread"
    kind = f"{ENTRIES[0]}-{ENTRIES[1]} entries a row"
    load = f"{os.getloadavg()[0]:.0f} on {os.cpu_count()} cores at the start"
    of_loss, loss_runs = table(shape, device, loss, rounds)
    of_head, head_runs = table(shape, device, ["LM head fused", "LM head and ours"], rounds)
    lines = [
        f"LK hybrid loss, forward + backward: {size}, {kind}.",
        f"{machine(device)}; {', '.join(packages)}.",
        f"{clock}, least of {rounds} x {REPEATS} runs, fresh processes in turn; load {load}.",
        "",
        *of_loss,
        *(f"| {n} | absent | | | | |" for n in names if n not in own),
        "",
        f"From a hidden state of width {HEAD[device]}, gradients of it and of the head's weight:",
        "",
        *of_head,
        *verdicts(shape, device, loss_runs, head_runs),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure one case (`--case`), or all of them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--case", choices=list(CASES))
    parser.add_argument("--shape", type=json.loads)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    shape = given.shape or (GPU if given.device == "cuda" else CPU)
    if given.case:
        print(json.dumps(run(given.case, shape, given.device)))
        return
    text = report(shape, given.device, given.rounds)
    name = "terms-gpu.md" if given.device == "cuda" else "terms.md"
    Path(__file__).with_name(name).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
