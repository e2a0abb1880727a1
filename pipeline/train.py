"""`fit`: a draft, batches and a loss -> a trained draft, its curve and its metrics.

The loop knows neither a draft's architecture nor a loss's equation: depth after depth of logits
goes through `pipeline.terms`, the loss mixes the terms, `pipeline.loss.reduce` weighs the depths.
Two runs of equal arguments give equal bits on one machine; so do the data order, the number of
steps and the rate of all losses of a draft and seed (DESIGN §6).

Dims: S depths, N supervised anchors (padded over depths), V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from pipeline.batch import Batch
from pipeline.config import Strict, load
from pipeline.dataset import (
    head_for,
    heldout_batches,
    require,
    supervised_counts,
    training_batches,
)
from pipeline.draft import Draft, DraftConfig, Needs, find
from pipeline.interface import Head, Interface, Shape
from pipeline.loss import reduce
from pipeline.optimizer import AdamW, learning_rate
from pipeline.target import read_interface, read_spec
from pipeline.terms import terms
from pipeline.vocab import draft_vocabulary
from storage.errors import DraftError
from storage.manifest import MANIFEST
from storage.reader import Cache
from storage.workspace import file_digest

EXPLODED = 1e3
"""Nats. KL to a uniform draft is log V < 13 at V = 262,144, five depths of it < 65."""

HELDOUT_POINTS = 4
"""Early evaluations a run, the end included: a few rows of the curve, under 3 % of the time."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(kl_SN, alpha_SN, mask_SN) -> loss_SN: a loss of `pipeline.losses` with its config bound."""

Positive = Annotated[int, Field(gt=0)]


class FitConfig(Strict):
    """Section `train`, and the part of `warmup` that is the same."""

    steps: Annotated[int, Field(ge=0)]
    """Times the draft's `steps_scale`."""
    lr: Annotated[float, Field(gt=0)]
    """Peak rate, times the draft's `lr_scale`."""
    lr_warmup_steps: Annotated[int, Field(ge=0)]
    lr_final: Annotated[float, Field(ge=0, le=1)]
    """Rate of the last step, as a share of the peak."""
    batch_sequences: Positive
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[float, Field(ge=0)]
    clip: Annotated[float, Field(gt=0)]
    """Largest norm of all gradients together."""
    depth_decay: Annotated[float, Field(gt=0, le=1)]
    """Weight of depth k is depth_decay^k."""
    heldout_sequences: Positive
    """Of the held-out cache, for early evaluation; the score is `evaluate`'s."""
    log_every: Positive
    threads: Positive


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

    def add(self, loss: float, kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor) -> None:
        """Count one batch; kl and alpha are summed over its supervised pairs of all depths."""
        self.loss += loss
        self.steps += 1
        self.kl += torch.where(mask_SN, kl_SN, 0.0).sum().item()
        self.alpha += torch.where(mask_SN, alpha_SN, 0.0).sum().item()
        self.pairs += int(mask_SN.sum())
        self.uncovered += int((mask_SN & (alpha_SN == 0)).sum())

    def row(self) -> dict[str, float]:
        """Mean loss of a step, mean KL and α of a pair."""
        steps, pairs = max(1, self.steps), max(1, self.pairs)
        return {"loss": self.loss / steps, "kl": self.kl / pairs, "alpha": self.alpha / pairs}


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
) -> Fitted:
    """Train `draft` in place on the first `steps` batches; depth: S, `Draft.loss_depth`.

    `DraftError` names the step and the sequences of a batch whose loss is not finite or explodes.
    """
    optimizer = AdamW(
        [p for p in draft.parameters() if p.requires_grad],
        (config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
    )
    looks = {math.ceil(steps * i / HELDOUT_POINTS) for i in range(1, HELDOUT_POINTS + 1)}
    fitted, window, whole, tokens = Fitted(), Means(), Means(), 0
    draft.train()
    for step, batch in enumerate(_shown(batches, steps, label), start=1):
        lr = lr_scale * learning_rate(
            step - 1,
            steps=steps,
            peak=config.lr,
            warmup=config.lr_warmup_steps,
            final=config.lr_final,
        )
        value, seen = _step(draft, batch, optimizer, loss=loss, depth=depth, config=config, lr=lr)
        if not math.isfinite(value) or value > EXPLODED:
            raise _exploded(label, step, value, batch)
        window.add(value, *seen)
        whole.add(value, *seen)
        tokens += int(batch.length.sum())
        if step % config.log_every == 0 or step in looks or step == steps:
            look = evaluate(draft, heldout, depth) if step in looks else {}
            fitted.curve.append({"step": step, **window.row(), "lr": lr, **look})
            last, window = window, Means()
    draft.eval()
    if not steps:
        fitted.curve.append({"step": 0, **evaluate(draft, heldout, depth)})
        last = Means()
    fitted.metrics = _metrics(fitted.curve[-1], last, whole) | {
        "steps": steps,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in draft.parameters() if p.requires_grad),
    }
    return fitted


def depth_terms(draft: Draft, batch: Batch, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """(kl_SN, alpha_SN, mask_SN) of all depths; anchors that a depth lacks are masked."""
    assert batch.law is not None, "training reads the law"
    kls, alphas = [], []
    for k, logits_NV in enumerate(draft.training_logits(batch, depth)):
        law = batch.law.take(batch.pairs(k).row)
        kl_N, alpha_N = terms(logits_NV, law, d2t=draft.d2t)
        kls.append(kl_N)
        alphas.append(alpha_N)
    counts = torch.tensor([len(kl_N) for kl_N in kls], device=kls[0].device)
    widest = torch.arange(int(counts.max()), device=counts.device)
    mask_SN = widest < counts[:, None]
    return pad_sequence(kls, batch_first=True), pad_sequence(alphas, batch_first=True), mask_SN


@torch.no_grad()
def evaluate(draft: Draft, batches: Sequence[Batch], depth: int) -> dict[str, float]:
    """Mean KL and α̂ over the supervised pairs of fixed batches: heldout_kl, heldout_alpha."""
    training = draft.training
    draft.eval()
    means = Means()
    for batch in batches:
        means.add(0.0, *depth_terms(draft, batch, depth))
    draft.train(training)
    row = means.row()
    return {"heldout_kl": row["kl"], "heldout_alpha": row["alpha"]}


def _step(
    draft: Draft,
    batch: Batch,
    optimizer: AdamW,
    *,
    loss: Loss,
    depth: int,
    config: FitConfig,
    lr: float,
) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """One update; the loss, and the detached terms. A loss that is not finite updates nothing."""
    optimizer.zero_grad()
    kl_SN, alpha_SN, mask_SN = depth_terms(draft, batch, depth)
    total = reduce(loss(kl_SN, alpha_SN, mask_SN), mask_SN, depth_decay=config.depth_decay)
    value = total.item()
    if math.isfinite(value) and value <= EXPLODED and total.requires_grad:
        total.backward()
        norm = optimizer.clip(config.clip)
        if not math.isfinite(norm):
            return math.nan, (kl_SN, alpha_SN, mask_SN)
        optimizer.step(lr)
    return value, (kl_SN.detach(), alpha_SN.detach(), mask_SN)


def _shown(batches: Iterable[Batch], steps: int, label: str) -> Iterator[Batch]:
    """The first `steps` batches under a progress line with rate and time left."""
    with tqdm(total=steps, desc=label, unit="step", mininterval=1.0, disable=not steps) as line:
        for _, batch in zip(range(steps), batches, strict=False):
            yield batch
            line.update()


def _exploded(label: str, step: int, value: float, batch: Batch) -> DraftError:
    return DraftError(
        found=f"{label}: loss {value:.3g} at step {step} on sequences {', '.join(batch.ids)}",
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


def fit_from_cache(
    draft: Draft,
    inputs: Inputs,
    *,
    loss: Loss,
    config: FitConfig,
    seed: int,
    stage: str,
    cell: str,
    device: str = "cpu",
) -> Fitted:
    """`fit` on the training cache in the order of `seed` and `stage`; `draft` stays on `device`."""
    steps = round(config.steps * inputs.section.steps_scale)
    heldout = heldout_batches(
        inputs.heldout,
        batch_sequences=config.batch_sequences,
        sequences=config.heldout_sequences,
        needs=inputs.needs,
        device=device,
        head=inputs.head,
    )
    batches = training_batches(
        inputs.train,
        seed=seed,
        stage=stage,
        batch_sequences=config.batch_sequences,
        steps=steps,
        needs=inputs.needs,
        device=device,
        head=inputs.head,
    )
    began = time.perf_counter()
    fitted = fit(
        draft.to(device),
        batches,
        heldout=heldout,
        loss=loss,
        config=config,
        depth=inputs.depth,
        steps=steps,
        lr_scale=inputs.section.lr_scale,
        label=f"{stage} {cell}",
    )
    fitted.seconds = time.perf_counter() - began
    return fitted
