"""`fit`: a draft, batches and a loss -> a trained draft, its curve and its metrics.

The loop knows neither a draft's architecture nor a loss's equation: depth after depth of logits
goes through `pipeline.terms`, the loss mixes the terms, `pipeline.loss.reduce` weighs the depths.
Two runs of equal arguments give equal bits on one machine, whether or not one of them was killed
and went on; so do the data order, the number of steps and the rate of all losses of a draft and
seed (DESIGN §6).

A step averages the losses of its passes, micro-batches of `micro_batch_sequences`; several ranks
share each pass, and its loss is that of all their anchors together (`pipeline.ranks`).

Dims: S depths, N supervised anchors (padded over depths), V vocabulary.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config import BatchSize, BatchTokens, Processes, Strict, Threads, load
from pipeline.dataset import (
    head_for,
    heldout_batches,
    require,
    supervised_counts,
    training_batches,
)
from pipeline.depths import depth_terms
from pipeline.draft import Draft, DraftConfig, Needs, find
from pipeline.interface import Head, Interface, Shape
from pipeline.loss import DepthWeights, reduce
from pipeline.optimizer import AdamW, learning_rate
from pipeline.provenance import Progress as ProgressLine
from pipeline.ranks import Ranks, Sharding
from pipeline.resume import Keeper, Saved
from pipeline.serve import Serving
from pipeline.target import read_interface, read_spec
from pipeline.target_law import is_sampled, require_tail, serve_all, served
from pipeline.vocab import draft_vocabulary
from storage.errors import DraftError
from storage.manifest import MANIFEST
from storage.prefetch import prefetched
from storage.reader import Cache
from storage.workspace import file_digest

EXPLODED = 1e3
"""Nats. KL to a uniform draft is log V < 13 at V = 262,144, five depths of it < 65."""

AHEAD = 2
"""Batches made in advance: one hides the reader, the second evens out a slow one."""

HELDOUT_POINTS = 4
"""Early evaluations a run, the end included: a few rows of the curve, under 3 % of the time."""

Loss = Callable[..., Tensor]
"""(kl_SN, alpha_SN, mask_SN, *extra_SN) -> loss_SN: one of `pipeline.losses`, its config bound."""

Positive = Annotated[int, Field(gt=0)]
Terms = tuple[Tensor, Tensor, Tensor, int]
"""kl_SN, alpha_SN, mask_SN, and the tokens read."""
ALONE = Ranks()


class FitConfig(Strict):
    """Section `train`, and the part of `warmup` that is the same."""

    steps: Annotated[int, Field(ge=0)]
    """Times the draft's `steps_scale`."""
    lr: Annotated[float, Field(gt=0)]
    """Peak rate, times the draft's `lr_scale`."""
    lr_warmup_steps: Annotated[int, Field(ge=0)]
    lr_final: Annotated[float, Field(ge=0, le=1)]
    """Rate of the last step, as a share of the peak."""
    batch_sequences: BatchSize
    """Of a step, whatever the number of passes and ranks."""
    micro_batch_sequences: BatchSize | None
    """Of a pass; bounds memory. The losses of a step's passes are averaged. null: one pass."""
    pack_tokens: BatchTokens | None
    """A row of a pass holds sequences of this many tokens together; null: a row a sequence. The
    same steps either way, up to the order of additions."""
    checkpoint_depths: bool
    """Whether drafts that unroll make a step's activations again in backward: memory for time."""
    target_law: Serving | None
    """The law that will be served, which p of every term is; null: the cache's, T = 1."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[float, Field(ge=0)]
    clip: Annotated[float, Field(gt=0)]
    """Largest norm of all gradients together."""
    depth_weights: DepthWeights
    """Of depth k: depth_decay^k, 1, or the detached probability of reaching it, MATHS (55)."""
    depth_decay: Annotated[float, Field(gt=0, le=1)]
    """Read by `depth_weights: decay`; 1 with the others."""
    heldout_sequences: Positive
    """Of the held-out cache, for early evaluation; the score is `evaluate`'s."""
    log_every: Positive
    dtype: Literal["float32", "bfloat16"]
    """Of products and activations (autocast); weights, moments and terms stay float32 or wider."""
    ranks: Processes
    """Processes that share a pass, a GPU each; they order the additions, so results know them."""
    sharding: Sharding
    """What a rank holds: ddp, all weights; fsdp, a slice of weights, gradients and moments."""
    threads: Threads

    @model_validator(mode="after")
    def _decay_is_read(self) -> Self:
        if self.depth_weights != "decay" and self.depth_decay != 1:
            raise ValueError(
                f"depth_decay 1.0 with depth_weights {self.depth_weights}, which does not read it"
            )
        return self

    @model_validator(mode="after")
    def _passes_fit(self) -> Self:
        if self.batch_sequences % self.pass_sequences:
            raise ValueError("micro_batch_sequences divides batch_sequences")
        if self.ranks > min(self.pass_sequences, self.heldout_sequences):
            raise ValueError("a pass and the held-out look have a sequence for each of the ranks")
        return self

    @property
    def pass_sequences(self) -> int:
        """Sequences of one pass, all ranks together."""
        return self.micro_batch_sequences or self.batch_sequences


class WarmupConfig(FitConfig):
    """Section `warmup`."""

    loss: Literal["kl"]
    """The start that all losses share is KL's (DESIGN §3)."""


@dataclass(frozen=True)
class Inputs:
    """What training reads, opened and checked against each other before anything is loaded."""

    section: DraftConfig
    model: type[Draft]
    shape: Shape
    interface: Interface | None
    train: Cache
    heldout: Cache
    head: Head | None
    """What makes the laws of caches of mode `rebuild`; None for other modes."""
    source: dict[str, str]
    """Fingerprint of the target, digest of the training cache's manifest."""

    @property
    def needs(self) -> Needs:
        """What the draft reads of a cache."""
        return self.model.needs(self.section)

    @property
    def reads(self) -> dict[str, Any]:
        """The captured layers that the draft reads, for its checkpoint: an export names them."""
        layers = list(self.train.layout.hidden_layers)
        return {"hidden_layers": layers} if self.needs.num_layers else {}

    @property
    def depth(self) -> int:
        """S: depths of the loss."""
        return self.model.loss_depth(self.section)

    def fresh(self, seed: int) -> Draft:
        """A new draft, its pruned vocabulary counted from the training cache if it asks for one."""
        size = getattr(self.section, "draft_vocab_size", None) or self.shape.vocab_size
        pruned = size < self.shape.vocab_size
        d2t = draft_vocabulary(supervised_counts(self.train), size) if pruned else None
        return self.model.build(self.section, self.shape, self.interface, seed, d2t=d2t)


def open_inputs(name: str, kind: str, *, cache: Path, target: Path) -> Inputs:
    """Open `drafts.<name>`, both caches and the target's interface; refuse what does not fit.

    cache: the folder of train.zarr and heldout.zarr. `ConfigError`, `CacheError`, `TargetError`, or
    `DraftError` where the cache lacks what the draft needs.
    """
    module = find(kind)
    section, spec = load(f"drafts.{name}", module.Config), read_spec(target)
    expect = {"target": spec.fingerprint}
    train, heldout = (Cache.open(cache / f"{s}.zarr", expect=expect) for s in ("train", "heldout"))
    needs = module.Model.needs(section)
    for split in (train, heldout):
        require(split.layout, needs)
    heads = [head_for(split, target) for split in (train, heldout)]
    return Inputs(
        section=section,
        model=module.Model,
        shape=Shape(spec.vocab_size, spec.hidden_size),
        interface=read_interface(target) if needs.interface else None,
        train=train,
        heldout=heldout,
        head=heads[0] or heads[1],
        source={**expect, "cache": file_digest(train.path / MANIFEST)},
    )


@dataclass
class Means:
    """Running sums of what a row of the curve shows."""

    loss: float = 0.0
    steps: int = 0
    kl: float = 0.0
    alpha: float = 0.0
    pairs: int = 0
    uncovered: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, terms: "Terms", loss: Tensor | float = 0.0) -> "Means":
        """One pass: kl and alpha are summed over its supervised pairs of all depths."""
        kl_SN, alpha_SN, mask_SN, tokens = terms
        sums = torch.stack(
            [
                torch.as_tensor(loss, dtype=kl_SN.dtype, device=kl_SN.device),
                torch.where(mask_SN, kl_SN, 0.0).sum(),
                torch.where(mask_SN, alpha_SN, 0.0).sum(),
                mask_SN.sum(),
                (mask_SN & (alpha_SN == 0)).sum(),
            ]
        ).tolist()  # one wait for the device
        pairs, uncovered = (round(x) for x in sums[3:])
        return cls(sums[0], 0, sums[1], sums[2], pairs, uncovered, tokens)

    def add(self, other: "Means") -> None:
        """Sum field by field."""
        for name in (f.name for f in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def row(self) -> dict[str, float]:
        """Mean loss of a step, mean KL and α of a pair."""
        steps, pairs = max(1, self.steps), max(1, self.pairs)
        return {"loss": self.loss / steps, "kl": self.kl / pairs, "alpha": self.alpha / pairs}


@dataclass
class Progress:
    """Where the loop stands: all of its state but tensors, as plain values."""

    step: int = 0
    skipped: int = 0
    """Steps without a supervised pair, which change nothing."""
    seconds: float = 0.0
    """Of earlier runs, which were killed."""
    window: Means = field(default_factory=Means)
    whole: Means = field(default_factory=Means)
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(cls, saved: Saved | None) -> "Progress":
        """The beginning, or where a killed run stood."""
        if saved is None:
            return cls()
        loop = saved.loop
        means = {name: Means(**loop[name]) for name in ("window", "whole")}
        return cls(**{**loop, **means})


@dataclass
class Fitted:
    """What `fit` saw."""

    curve: list[dict[str, float]] = field(default_factory=list)
    """step, loss, kl, alpha, lr and, a few times, heldout_kl and heldout_alpha."""
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def timing(self) -> dict[str, float]:
        """What the report shows of speed."""
        seconds = max(self.seconds, 1e-9)
        return {
            "seconds": round(self.seconds, 3),
            "steps_per_s": round(self.metrics["steps"] / seconds, 3),
            "tokens_per_s": round(self.metrics["tokens"] / seconds, 1),
        }


def write_curve(path: Path, curve: Sequence[dict[str, float]]) -> None:
    """Rows as CSV in six digits; a column that a row lacks is empty."""
    columns = ["step", "loss", "kl", "alpha", "lr", "heldout_kl", "heldout_alpha"]
    lines = [",".join(f"{row[c]:.6g}" if c in row else "" for c in columns) for row in curve]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([",".join(columns), *lines]) + "\n", encoding="utf-8")


def fit(
    draft: Draft,
    batches: Iterable[Batch],
    *,
    heldout: Sequence[Batch],
    loss: Loss,
    config: FitConfig,
    depth: int,
    steps: int,
    lr_scale: float = 1.0,
    label: str = "train",
    extra: Sequence[str] = (),
    ranks: Ranks = ALONE,
    keeper: Keeper | None = None,
    saved: Saved | None = None,
) -> Fitted:
    """Train `draft` in place up to step `steps`; depth: S, `Draft.loss_depth`.

    batches: this rank's share of the passes of all steps that `saved` lacks; extra: the terms that
    `loss` takes after the mask (`pipeline.loss.extra_terms`). `DraftError` names the step and the
    sequences of a batch whose loss is not finite or explodes.
    """
    began = time.perf_counter()
    progress = Progress.of(saved)
    model = ranks.wrap(_Pass(draft, getattr(torch, config.dtype)))
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    optimizer = AdamW(
        list(trained.values()),
        (config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        total=ranks.total if ranks.shards else None,
    )
    state = _tensors(trained, optimizer)
    if saved is not None:
        saved.restore(state, ranks)
        optimizer.step_count = progress.step - progress.skipped
    update = _Update(
        model, optimizer, loss=loss, depth=depth, config=config, extra=extra, ranks=ranks
    )
    draft.recompute = config.checkpoint_depths
    looks = {math.ceil(steps * i / HELDOUT_POINTS) for i in range(1, HELDOUT_POINTS + 1)}
    stream, passes, last = iter(batches), config.batch_sequences // config.pass_sequences, Means()
    draft.train()
    for step in _shown(progress.step, steps, label, quiet=not ranks.first):
        lr = lr_scale * learning_rate(
            step - 1,
            steps=steps,
            peak=config.lr,
            warmup=config.lr_warmup_steps,
            final=config.lr_final,
        )
        seen, ids = update(islice(stream, passes), lr)
        if not _sound(seen.loss):
            told = _exploded(label, step, seen.loss, ranks.texts(ids))
            raise told if ranks.first else SystemExit(1)  # all ranks are here: one says so
        progress.step, progress.skipped = step, progress.skipped + (seen.pairs == 0)
        progress.window.add(seen)
        progress.whole.add(seen)
        if step % config.log_every == 0 or step in looks or step == steps:
            look = (
                evaluate(draft, heldout, depth, model=model, ranks=ranks) if step in looks else {}
            )
            progress.curve.append({"step": step, **progress.window.row(), "lr": lr, **look})
            last, progress.window = progress.window, Means()
        if keeper is not None and step < steps and keeper.due():
            now = progress.seconds + time.perf_counter() - began
            keeper.save(state, {**asdict(progress), "seconds": now})
    draft.eval()
    if not steps:
        look = evaluate(draft, heldout, depth, model=model, ranks=ranks)
        progress.curve.append({"step": 0, **look})
    ranks.unwrap(model)
    counts = {
        "steps": steps,
        "tokens": progress.whole.tokens,
        "parameters": sum(p.numel() for p in draft.parameters() if p.requires_grad),
        "skipped": progress.skipped,
    }
    metrics = _metrics(progress.curve[-1], last, progress.whole) | counts
    return Fitted(progress.curve, metrics, progress.seconds + time.perf_counter() - began)


class _Pass(nn.Module):
    """A draft as what DDP and FSDP2 wrap: one forward pass, batch to terms."""

    def __init__(self, draft: Draft, dtype: torch.dtype) -> None:
        super().__init__()
        self.draft, self.dtype = draft, dtype

    def forward(self, batch: Batch, depth: int, extra: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """`depth_terms` of this rank's sequences."""
        return depth_terms(self.draft, batch, depth, extra, dtype=self.dtype)


@torch.no_grad()
def evaluate(
    draft: Draft,
    batches: Sequence[Batch],
    depth: int,
    *,
    model: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Mean KL and α̂ over the supervised pairs of fixed batches: heldout_kl, heldout_alpha.

    model: the draft as `fit` wrapped it. Ranks take turns in step, each on batches of its own.
    """
    training = draft.training
    draft.eval()
    means = Means()
    for turn in range(ranks.most(len(batches))):
        # a rank that has run out repeats its last, uncounted: a sharded pass needs all ranks
        batch = batches[min(turn, len(batches) - 1)]
        kl_SN, alpha_SN, mask_SN = (
            model(batch, depth) if model else depth_terms(draft, batch, depth)
        )
        if turn < len(batches):
            means.add(Means.of((kl_SN, alpha_SN, mask_SN, 0)))
    draft.train(training)
    kl, alpha, pairs = ranks.sums([means.kl, means.alpha, means.pairs])
    row = Means(kl=kl, alpha=alpha, pairs=round(pairs)).row()
    return {"heldout_kl": row["kl"], "heldout_alpha": row["alpha"]}


class _Update:
    """One step: the passes' losses, their gradients, the clipped update."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW,
        *,
        loss: Loss,
        depth: int,
        config: FitConfig,
        extra: Sequence[str],
        ranks: Ranks,
    ) -> None:
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self.loss, self.depth, self.config, self.extra = loss, depth, config, extra
        self.passes = config.batch_sequences // config.pass_sequences

    def __call__(self, batches: Iterable[Batch], lr: float) -> tuple[Means, list[str]]:
        """What was seen, and the ids of this rank; a loss that is not finite updates nothing.

        Nor does a step without a supervised pair: its gradient would be weight decay and momentum.
        """
        self.optimizer.zero_grad()
        seen, ids = Means(), list[str]()
        for number, batch in enumerate(batches, start=1):
            ids += batch.ids
            one = self._pass(batch, last=number == self.passes)
            if not _sound(one.loss):
                return one, ids
            seen.add(one)
        seen.steps, seen.loss = 1, seen.loss / self.passes
        if seen.pairs and any(p.grad is not None for p in self.optimizer.params):
            if not math.isfinite(self.optimizer.clip(self.config.clip)):
                seen.loss = math.nan
                return seen, ids
            self.optimizer.step(lr)
        return seen, ids

    def _pass(self, batch: Batch, *, last: bool) -> Means:
        """Terms and loss of all ranks, gradients of the own."""
        with self.ranks.accumulating(self.model, last=last):
            own = self.model(batch, self.depth, self.extra)
            seen, tokens = self.ranks.gather(own, tokens=int(batch.length.sum()))
            kl_SN, alpha_SN, mask_SN, *more = seen
            total = reduce(
                self.loss(kl_SN, alpha_SN, mask_SN, *more),
                mask_SN,
                depth_decay=self.config.depth_decay,
                depth_weights=self.config.depth_weights,
                alpha_SN=alpha_SN,
            )
            means = Means.of((kl_SN, alpha_SN, mask_SN, tokens), total)
            if _sound(means.loss) and total.requires_grad:
                # ranks' gradients are averaged (DDP, FSDP2), and their sum is what is wanted
                (total * (self.ranks.size / self.passes)).backward()
        return means


def _sound(loss: float) -> bool:
    return math.isfinite(loss) and loss <= EXPLODED


def _tensors(trained: Mapping[str, nn.Parameter], optimizer: AdamW) -> dict[str, Tensor]:
    """What a checkpoint holds: weights and moments, by the names of the parameters."""
    found: dict[str, Tensor] = {f"weight.{name}": p for name, p in trained.items()}
    for kind, tensors in (("mean", optimizer.mean), ("square", optimizer.square)):
        found |= {f"{kind}.{name}": t for name, t in zip(trained, tensors, strict=True)}
    return found


def _shown(done: int, steps: int, label: str, *, quiet: bool) -> Iterator[int]:
    """Steps done + 1 … steps under a progress line with rate and time left."""
    if quiet or not steps:
        yield from range(done + 1, steps + 1)
        return
    with ProgressLine(steps, label, unit="step", done=done) as line:
        for step in range(done + 1, steps + 1):
            yield step
            line.add()


def _exploded(label: str, step: int, value: float, ids: Sequence[str]) -> DraftError:
    return DraftError(
        found=f"{label}: loss {value:.3g} at step {step} on sequences {', '.join(ids)}",
        expected=f"a finite loss of at most {EXPLODED:g} nats",
        todo="lower lr in params.yaml, or look at those sequences with lkcache inspect",
    )


def _metrics(end: dict[str, float], last: Means, whole: Means) -> dict[str, Any]:
    """The numbers of a run: its last window, the held-out look at its end, its counts."""
    seen = last.row() if last.steps else {}
    return {
        "train_loss": seen.get("loss"),
        "train_kl": seen.get("kl"),
        "train_alpha": seen.get("alpha"),
        "heldout_kl": end["heldout_kl"],
        "heldout_alpha": end["heldout_alpha"],
        "supervised": whole.pairs,
        "uncovered": whole.uncovered,
    }


def reading(batches: Generator[Batch, None, None], device: str) -> Generator[Batch, None, None]:
    """Batches ahead of the step where another device computes it.

    On a CPU the thread takes from the step what it saves it (benchmarks/training.md).
    """
    return batches if device == "cpu" else prefetched(batches, depth=AHEAD)


def fit_from_cache(
    draft: Draft,
    inputs: Inputs,
    *,
    loss: Loss,
    config: FitConfig,
    seed: int,
    stage: str,
    cell: str,
    extra: Sequence[str] = (),
    ranks: Ranks = ALONE,
    resume: Path | None = None,
) -> Fitted:
    """`fit` on the training cache in the order of `seed` and `stage`; `draft` stays on its device.

    resume: the folder in which a killed run left its state and where this one leaves it; the first
    rank's counts.
    """
    steps = round(config.steps * inputs.section.steps_scale)
    needs, device, rank = inputs.needs, ranks.device, (ranks.index, ranks.size)
    if config.target_law is not None:
        for cache in (inputs.train, inputs.heldout):
            require_tail(stage, config.target_law, sampled=is_sampled(cache))
    keeper = Keeper(resume, ranks)
    saved = keeper.read()
    batches = training_batches(
        inputs.train,
        seed=seed,
        stage=stage,
        batch_sequences=config.batch_sequences,
        micro_batch_sequences=config.micro_batch_sequences,
        pack_tokens=config.pack_tokens,
        steps=steps,
        first_step=Progress.of(saved).step,
        needs=needs,
        device=device,
        rank=rank,
        head=inputs.head,
    )
    law, vocab_size = config.target_law, inputs.shape.vocab_size
    batches = served(batches, law, vocab_size=vocab_size)
    heldout, counts = serve_all(
        heldout_batches(
            inputs.heldout,
            batch_sequences=config.batch_sequences,
            sequences=config.heldout_sequences,
            needs=needs,
            device=device,
            rank=rank,
            head=inputs.head,
        ),
        law,
        vocab_size=vocab_size,
    )
    with closing(reading(batches, device)) as stream:
        fitted = fit(
            draft.to(ranks.device),
            stream,
            heldout=heldout,
            loss=loss,
            config=config,
            depth=inputs.depth,
            steps=steps,
            lr_scale=inputs.section.lr_scale,
            label=f"{stage} {cell}",
            extra=extra,
            ranks=ranks,
            keeper=keeper,
            saved=saved,
        )
    if law is not None:
        bounded, rows = ranks.sums(counts)
        fitted.metrics["heldout_bounded"] = round(bounded / max(1, rows), 6)
    return fitted
