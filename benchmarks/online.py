"""Training from a cache against training online, the target in the loop, beside the best there is.

One target, and drafts of several sizes. Measured in one process, in turn, over some rounds: the
target's forward pass alone (c_t), a draft's steps on batches in memory (c_d), capturing the cache
(the pass, truncation, codes, files), training from it in a process's first epoch and in later ones,
and an online epoch: the same draft, the same batches, the same loop, with the target's forward pass
making each batch's features and laws, whole laws, as online trainers do. Of A arms over E epochs

    measured = A · E · online / (capture + A · (first epoch + (E − 1) · later epoch))
    bound    = A · E · (c_t + c_d) / (c_t + A · E · c_d)

so the bound pays for no file, no truncation and no reader. All times are CPU time of the process on
one thread. The target's weights are random and its logits scaled to laws of a real one's entropy;
what a step costs depends on neither. Writes `online.md` and `online.svg`.

    python -m benchmarks.online
"""

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rate import picture
from pipeline.batch import Batch
from pipeline.charts import Series
from pipeline.dataset import training_batches
from pipeline.draft import Draft, find
from pipeline.interface import Interface, Shape
from pipeline.law import DenseLaw
from pipeline.losses import lk_lambda
from pipeline.target import Target, TargetSpec
from pipeline.teacher import Pass
from pipeline.topk import Rule
from pipeline.train import FitConfig, fit
from storage.layout import Layout
from storage.reader import Cache
from storage.writer import plan_parts, seal, write_part

HERE = Path(__file__).parent
PLANS = ((1, 1), (1, 10), (12, 10))
"""Arms and epochs."""
RULE = Rule(
    min_prob=5e-4,
    top_p=None,
    max_kept=1024,
    tail_samples=16,
    tail_full_mass=0.05,
    tail_min_mass=1e-4,
)
LM = {"kind": "lm", "num_layers": 1, "num_heads": 4, "lr_scale": 1.0, "steps_scale": 1.0}
DRAFTS: dict[str, dict[str, Any]] = {
    "lm, d = 32": {**LM, "hidden_size": 32, "intermediate_size": 96},
    "lm, d = 256": {**LM, "hidden_size": 256, "intermediate_size": 768},
    "medusa, 4 heads": {
        "kind": "medusa",
        "num_heads": 4,
        "num_layers": 1,
        "lr_scale": 1.0,
        "steps_scale": 1.0,
    },
    "eagle3, 4 depths": {
        "kind": "eagle3",
        "depth": 4,
        "num_heads": 8,
        "intermediate_size": 1408,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "lr_scale": 1.0,
        "steps_scale": 1.0,
    },
}


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    vocab_size: int = 1024
    hidden_size: int = 512
    num_layers: int = 8
    intermediate_size: int = 1408
    num_heads: int = 8
    sequences: int = 32
    tokens: int = 128
    batch_sequences: int = 8
    rounds: int = 3
    drafts: tuple[str, ...] = tuple(DRAFTS)

    @property
    def layout(self) -> Layout:
        """Of a cache that serves every architecture."""
        layers = (1, self.num_layers // 2, self.num_layers - 1)
        return Layout("topk", self.vocab_size, self.hidden_size, layers, last_hidden=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Sequences as capture reads them: a prompt of eight tokens, one turn."""
        g = torch.Generator().manual_seed(1)
        turn = [-1] * 8 + [0] * (self.tokens - 8)
        return [
            {
                "id": f"s{i}",
                "domain": "made up",
                "law": "t1",
                "tokens": torch.randint(self.vocab_size, (self.tokens,), generator=g).tolist(),
                "turn": turn,
            }
            for i in range(self.sequences)
        ]

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.sequences // self.batch_sequences

    @property
    def config(self) -> FitConfig:
        """The loop's."""
        return FitConfig(
            steps=self.steps,
            lr=1e-3,
            lr_warmup_steps=2,
            lr_final=0.1,
            batch_sequences=self.batch_sequences,
            micro_batch_sequences=None,
            pack_tokens=None,
            checkpoint_depths=False,
            target_law=None,
            betas=[0.9, 0.95],
            weight_decay=0.01,
            clip=1.0,
            depth_weights="decay",
            depth_decay=0.8,
            heldout_sequences=1,
            log_every=1000,
            dtype="float32",
            ranks=1,
            sharding="ddp",
            threads=1,
        )


def make_target(setting: Setting) -> Target:
    """A random Llama whose laws have the entropy of a real one's, one to two nats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=setting.vocab_size,
            hidden_size=setting.hidden_size,
            intermediate_size=setting.intermediate_size,
            num_hidden_layers=setting.num_layers,
            num_attention_heads=setting.num_heads,
            num_key_value_heads=setting.num_heads,
            max_position_embeddings=setting.tokens,
        )
    )
    model.eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 3.4 * setting.hidden_size**-0.5)
    spec = TargetSpec(
        kind="embedded",
        model=".",
        revision=None,
        fingerprint="online",
        weights_sha256="",
        tokenizer_sha256="",
        template_sha256="",
        vocab_size=setting.vocab_size,
        hidden_size=setting.hidden_size,
        num_layers=setting.num_layers,
        eos_ids=[0],
        bos_id=None,
        context_tokens=setting.tokens,
        dtype="float32",
        sharpen=1.0,
    )
    return Target(model=model, tokenizer=None, spec=spec)


def make_draft(name: str, target: Target) -> tuple[Draft, Any, Any]:
    """A fresh draft, its section and its module."""
    module, spec = find(DRAFTS[name]["kind"]), target.spec
    section = module.Config(**DRAFTS[name])
    embed = target.model.get_input_embeddings().weight.detach()
    head = target.model.get_output_embeddings().weight.detach()
    interface = Interface(embed, head, torch.ones(spec.hidden_size), 1e-6)
    shape = Shape(spec.vocab_size, spec.hidden_size)
    draft: Draft = module.Model.build(section, shape, interface, 0)
    return draft, section, module


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """CPU seconds of this process."""
    began = time.process_time()
    yield
    into.append(time.process_time() - began)


def forwards(setting: Setting, target: Target, frames: Sequence[Batch]) -> None:
    """An epoch of the target's forward pass: features, and logits of supervised rows."""
    for frame in frames:
        for _ in _online(setting, target, [frame], laws=False):
            pass


def _online(
    setting: Setting, target: Target, frames: Iterable[Batch], *, laws: bool = True
) -> Iterator[Batch]:
    """Batches whose features and laws the target makes now."""
    for frame in frames:
        made = target.forward(frame.tokens, layers=setting.layout.hidden_layers)
        logits = target.logits(made.last_hidden[frame.law_row >= 0])
        if laws:
            yield Batch(
                **{
                    **frame.__dict__,
                    "law": DenseLaw(logits.float().log_softmax(-1)),
                    "hidden": made.hidden,
                    "last_hidden": made.last_hidden,
                }
            )


def capture(setting: Setting, target: Target, folder: Path) -> None:
    """A sealed cache of all sequences."""
    folder.mkdir()
    rows, layout = setting.rows, setting.layout
    parts = []
    cut = plan_parts([len(row["tokens"]) for row in rows], part_tokens=setting.tokens * 16)
    for number, (start, stop) in enumerate(cut):
        teacher = Pass(target, layout, rule=RULE, batch_tokens=setting.tokens * 8, seed=0)
        records = teacher.records(rows[start:stop])
        parts.append(write_part(folder, number, records, layout))
    seal(folder, layout=layout, parts=parts, source={"target": "online"}, params={})


def train(setting: Setting, name: str, target: Target, batches: Iterable[Batch]) -> Tensor:
    """An epoch of a fresh draft; one of its trained weights, by which the ways are compared."""
    draft, section, module = make_draft(name, target)
    fit(
        draft,
        batches,
        heldout=[],
        loss=partial(lk_lambda.loss, config=lk_lambda.Config(kind="lk_lambda", eta=3.0)),
        config=setting.config,
        depth=module.Model.loss_depth(section),
        steps=setting.steps,
    )
    return next(p for p in draft.parameters() if p.requires_grad).detach()


@dataclass
class Times:
    """CPU seconds of an epoch, by round."""

    c_d: list[float] = field(default_factory=list)
    online: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)


@dataclass
class Found:
    """All that was measured."""

    c_t: list[float] = field(default_factory=list)
    capture: list[float] = field(default_factory=list)
    drafts: dict[str, Times] = field(default_factory=dict)
    entries: float = 0.0
    """Kept ids a row."""
    bytes: float = 0.0
    """Of the cache, a token."""

    def ratio(self, name: str, arms: int, epochs: int) -> tuple[float, float]:
        """(measured, bound)."""
        t = {k: statistics.median(v) for k, v in self.drafts[name].__dict__.items()}
        c_t, n = statistics.median(self.c_t), arms * epochs
        ours = statistics.median(self.capture) + arms * (t["first"] + (epochs - 1) * t["later"])
        return n * t["online"] / ours, n * (c_t + t["c_d"]) / (c_t + n * t["c_d"])


def measure(setting: Setting) -> Found:
    """All times, each kind once a round, in turn."""
    target, found = make_target(setting), Found()
    found.drafts = {name: Times() for name in setting.drafts}
    with tempfile.TemporaryDirectory() as root:
        for number in range(setting.rounds + 1):
            measured = number > 0  # the first round warms up
            folder = Path(root, f"{number}.zarr")
            one = found if measured else Found()
            with timed(one.capture):
                capture(setting, target, folder)
            stored = Cache.open(folder)
            found.entries = stored.manifest.counts["entry"] / stored.manifest.counts["row"]
            found.bytes = sum(stored.manifest.array_bytes.values()) / stored.num_tokens
            frames = [_frame(b) for b in read(setting, stored, "lm, d = 32")]
            with timed(one.c_t):
                forwards(setting, target, frames)
            for name in setting.drafts:
                times = found.drafts[name] if measured else Times()
                _draft_round(setting, name, target, folder, frames=frames, times=times)
    return found


def _draft_round(
    setting: Setting,
    name: str,
    target: Target,
    folder: Path,
    *,
    frames: Sequence[Batch],
    times: Times,
) -> None:
    """A draft's epochs: from memory, online, from the cache."""
    cache = Cache.open(folder)
    go: Callable[[Iterable[Batch]], Tensor] = partial(train, setting, name, target)
    memory = list(read(setting, cache, name))
    with timed(times.c_d):
        expected = go(memory)
    with timed(times.online):
        go(_online(setting, target, frames))
    opened = Cache.open(folder)  # nothing is decoded, no digest is checked yet
    for into in (times.first, times.later):
        with timed(into):
            weights = go(read(setting, opened, name))
        assert torch.equal(weights, expected), "the cache's batches are those in memory"


def read(setting: Setting, cache: Cache, name: str) -> Iterator[Batch]:
    """An epoch from the cache."""
    module = find(DRAFTS[name]["kind"])
    return training_batches(
        cache,
        seed=0,
        batch_sequences=setting.batch_sequences,
        steps=setting.steps,
        needs=module.Model.needs(module.Config(**DRAFTS[name])),
    )


def _frame(batch: Batch) -> Batch:
    """Tokens and turns alone."""
    return Batch(**{**batch.__dict__, "law": None})


def page(setting: Setting, found: Found) -> str:
    """The table as Markdown."""
    c_t, made = statistics.median(found.c_t), statistics.median(found.capture)
    lines = [
        f"Target: {setting.num_layers} layers of width {setting.hidden_size},",
        f"V = {setting.vocab_size:,}; {setting.sequences} sequences of {setting.tokens} tokens,",
        f"{found.entries:.0f} kept ids a row, {found.bytes:,.0f} bytes a token",
        f"with {len(setting.layout.hidden_layers) + 1} hidden states; loss lk_lambda.",
        f"{os.cpu_count()} cores ({platform.machine()}, no GPU), one thread; CPU time, medians",
        f"of {setting.rounds} rounds in which all took turns.",
        f"c_t = {1e3 * c_t:,.0f} ms an epoch; capture {1e3 * made:,.0f} ms, {made / c_t:.2f} c_t.",
        "",
        "| draft | c_d / c_t | online epoch | cached, first | later | "
        + " | ".join(f"{a} × {e}: measured / bound" for a, e in PLANS)
        + " |",
        "| --- | ---: | ---: | ---: | ---: |" + " ---: |" * len(PLANS),
    ]
    for name, times in found.drafts.items():
        c_d = statistics.median(times.c_d)
        cells = []
        for plan in PLANS:
            measured, bound = found.ratio(name, *plan)
            cells.append(f"{measured:.2f} / {bound:.2f} = {measured / bound:.0%}")
        shown = (statistics.median(x) / c_t for x in (times.online, times.first, times.later))
        lines.append(
            f"| {name} | {c_d / c_t:.2f} | "
            + " | ".join(f"{x:.2f} c_t" for x in shown)
            + f" | {' | '.join(cells)} |"
        )
    return "\n".join([*lines, "", "![speed against the size of the draft](online.svg)", ""])


def chart(found: Found) -> str:
    """How often faster, over c_d / c_t: the bound as a faint line, what was measured as points."""
    c_t = statistics.median(found.c_t)
    shares = {name: statistics.median(t.c_d) / c_t for name, t in found.drafts.items()}
    low, high = (f(shares.values()) for f in (min, max))
    series = []
    for style, (arms, epochs) in enumerate(PLANS):
        n, grid = arms * epochs, [low * (high / low) ** (i / 24) for i in range(25)]
        bound = [(_log(x), _log(n * (1 + x) / (1 + n * x))) for x in grid]
        points = sorted((_log(shares[k]), _log(found.ratio(k, arms, epochs)[0])) for k in shares)
        series.append(Series(f"{arms} × {epochs}, bound", style, bound, faint=True))
        series.append(Series(f"{arms} × {epochs}, measured", style, points))
    return picture(
        "cache against online", series, x="log10 of c_d / c_t", y="log10 of how often faster"
    )


def _log(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log10())


def main() -> None:
    """Measure, write the page and the picture."""
    torch.set_num_threads(1)
    setting = Setting()
    found = measure(setting)
    text = page(setting, found)
    (HERE / "online.md").write_text(text, encoding="utf-8")
    (HERE / "online.svg").write_text(chart(found), encoding="utf-8")
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
