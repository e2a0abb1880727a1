"""A draft, teacher forced over cached rollouts: what every (anchor, depth) pair and round needs.

Pure: a draft and a batch in, numbers out. Only log p of the emitted token enters the replay, so
that a truncated cache cannot bias it; α̂ and its certified bounds read the stored law. Under a
served law (`pipeline.setting`) the rollouts and their log p are of that law, the stored laws at
T = 1 and served here, the draft's logits too; greedy drafts are a point mass at argmax q.

Dims: B sequences, T tokens, S depths, E rollouts, N remaining tokens (padded), Vd draft vocabulary.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch
from pipeline.bounds import bounds
from pipeline.draft import Draft
from pipeline.law import DenseLaw, Law
from pipeline.replay import Floats, Ints
from pipeline.serve import serve_logits, serving_of
from pipeline.serving import serve
from pipeline.setting import Setting
from pipeline.terms import terms

POSITIONS = (1, 8, 32, 128, 512, 2048, np.inf)
"""Edges of `strata` by place in the response: token 0 is the target's own and never drafted."""
NATS = (0, 0.1, 0.5, 1, 2, 4, np.inf)
"""Edges of `strata` by entropy: near-certain tokens, chat models' mean of 0.5 to 1, hard ones."""

ALPHAS = ("alpha", "alpha_lo", "alpha_hi")
CHUNK_BYTES = 1 << 26  # of logits in float32: what is scored at once beside the draft's own output


@dataclass(frozen=True)
class Scores:
    """Numbers of every supervised pair, in arrays [S, B, T] by depth and anchor."""

    pair: NDArray[np.bool_]
    logr: Floats
    """T > 0: log q/p of the emitted token; T = 0: 0 where argmax q is that token, −inf elsewhere.
    −inf outside the pairs too."""
    alpha: dict[str, Floats]
    """`alpha`, `alpha_lo`, `alpha_hi`: the estimate (unbiased at T = 1) and the certified bounds of
    Σ min(p, q), which is p(argmax q) for greedy drafts; 0 outside the pairs, empty at T = 0."""


def score(draft: Draft, batch: Batch, *, depth: int, setting: Setting, vocab_size: int) -> Scores:
    """Score `depth` depths under the law whose rollouts the batch holds; V is the target's.

    A draft that shifts (`Draft.shifts`) is run once: depth k at anchor j is depth 0 at j + k.
    """
    num_rows, num_tokens = batch.tokens.shape
    shape = (depth, num_rows * num_tokens)
    pair = np.zeros(shape, dtype=np.bool_)
    logr = np.full(shape, -np.inf)
    alpha = {n: np.zeros(shape) for n in ALPHAS if setting.temperature > 0}
    with torch.inference_mode():
        produced = draft.training_logits(batch, 1 if draft.shifts else depth)
        for k in range(depth):
            anchor = batch.pairs(k).anchor.numpy(force=True)
            pair[k, anchor] = True
            if k > 0 and draft.shifts:
                for grid in (logr, *alpha.values()):
                    grid[k, anchor] = grid[0, anchor + k]
                continue
            logits = next(produced)
            found = _pairs(
                logits, batch, depth=k, d2t=draft.d2t, setting=setting, vocab_size=vocab_size
            )
            logr[k, anchor] = found["logr"]
            for name, grid in alpha.items():
                grid[k, anchor] = found[name]
    grid_shape = (depth, num_rows, num_tokens)
    return Scores(
        pair=pair.reshape(grid_shape),
        logr=logr.reshape(grid_shape),
        alpha={name: grid.reshape(grid_shape) for name, grid in alpha.items()},
    )


def _pairs(
    logits_NV: Tensor,
    batch: Batch,
    *,
    depth: int,
    d2t: Tensor | None,
    setting: Setting,
    vocab_size: int,
) -> dict[str, Floats]:
    """The numbers of one depth's pairs, [N] each, a block of rows at a time."""
    pairs = batch.pairs(depth)
    serving = serving_of(setting)
    found: dict[str, list[Tensor]] = {}
    block = max(1, CHUNK_BYTES // (4 * logits_NV.shape[1]))
    for start in range(0, len(pairs.token), block):
        rows = slice(start, start + block)
        logits, token = logits_NV[rows], pairs.token[rows]
        if setting.temperature == 0:
            values = {"logr": match_logr(logits, token, d2t=d2t)}
        else:
            logits = drafting_law(logits, setting)
            logq = token_logq(logits, token, d2t=d2t)
            values = {"logr": logq - pairs.logp[rows].double()}
            assert batch.law is not None, "T > 0 is scored from caches of laws"
            law = batch.law.take(pairs.row[rows])
            if serving is None:
                values["alpha"] = terms(logits, law, d2t=d2t)[1]
                values["alpha_lo"], values["alpha_hi"] = bounds(logits, law, d2t=d2t)
            else:
                served = serve(law, serving, vocab_size=vocab_size)
                values["alpha"] = terms(logits, served.law, d2t=d2t)[1]
                ends = served.alpha_bounds(logits, d2t=d2t)
                values["alpha_lo"], values["alpha_hi"] = ends
        for name, value in values.items():
            found.setdefault(name, []).append(value.double())
    return {name: torch.cat(values).numpy(force=True) for name, values in found.items()}


def drafting_law(logits_NV: Tensor, setting: Setting) -> Tensor:
    """Logits of the law that drafts are drawn from: the draft's own, served, or its argmax."""
    if setting.drafts == "greedy":
        point_NV = torch.full_like(logits_NV, -torch.inf)
        return point_NV.scatter_(1, logits_NV.argmax(-1, keepdim=True), 0.0)
    serving = serving_of(setting)
    return logits_NV if serving is None else serve_logits(logits_NV, serving)


def token_logq(logits_NV: Tensor, token_N: Tensor, *, d2t: Tensor | None) -> Tensor:
    """[N] float64 log q of target ids; −inf for those outside the draft's vocabulary."""
    column, inside = _column(token_N, logits_NV.shape[1], d2t)
    logits = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    logq = logits.gather(1, column[:, None])[:, 0].double() - logits.logsumexp(-1).double()
    return torch.where(inside, logq, -torch.inf)


def match_logr(logits_NV: Tensor, token_N: Tensor, *, d2t: Tensor | None) -> Tensor:
    """[N] float64: 0 where argmax q (the lowest id of a tie) is the token, −inf elsewhere."""
    best = logits_NV.argmax(-1)
    best = best if d2t is None else d2t[best]
    return torch.where(best == token_N, 0.0, -torch.inf).double()


def _column(token_N: Tensor, vocab_size: int, d2t: Tensor | None) -> tuple[Tensor, Tensor]:
    """The draft ids of target ids, and which of them exist."""
    if d2t is None:
        return token_N, torch.ones_like(token_N, dtype=torch.bool)
    column = torch.searchsorted(d2t, token_N).clamp_(max=vocab_size - 1)
    return column, d2t[column] == token_N


@dataclass(frozen=True)
class Rollouts:
    """The responses of a batch as `pipeline.replay` reads them."""

    row: Ints
    """[E] the sequence b of each response, ascending."""
    logr: Floats
    """[E, S, N], as `pipeline.replay` takes it."""
    remaining: Ints
    """[E] tokens after the first."""


def rollouts(scores: Scores, batch: Batch, *, max_new_tokens: int | None = None) -> Rollouts:
    """Cut the responses (assistant turns) out of a batch's scores.

    Token s after the first of a response that starts at position f is drafted at depth 0 from the
    anchor f − 1 + s, whose x_{j+1} is the last committed token. With `max_new_tokens` responses
    are cut to that length, first token included, as the decoder's limit would.
    """
    turn = batch.turn.numpy(force=True)
    before = np.concatenate([np.full((len(turn), 1), -1), turn[:, :-1]], axis=1)
    row, first = np.nonzero((turn >= 0) & (turn != before))
    length = (turn[row] == turn[row, first][:, None]).sum(1)
    remaining = length - 1
    if max_new_tokens is not None:
        remaining = np.minimum(remaining, max_new_tokens - 1)
    # a response without a prompt has no anchor for its second token
    assert np.all((first > 0) | (remaining == 0)), "responses follow a prompt"
    anchor = (first - 1)[:, None] + np.arange(max(int(remaining.max(initial=0)), 1))
    anchor = np.clip(anchor, 0, turn.shape[1] - 1)
    logr = scores.logr[:, row[:, None], anchor].transpose(1, 0, 2)
    return Rollouts(row=row, logr=logr, remaining=remaining.astype(np.int64))


def depth_sums(scores: Scores) -> dict[str, Floats]:
    """Sums over each sequence's pairs, [S, B] each: the columns of `storage.tables.DEPTHS`.

    `survive` is the product of the acceptances of depths 0 … k, averaged over all anchors: it is
    not τ's survival, because rounds start at harder places (reference/prototype.md §0).
    """
    return {name: grid.sum(-1) for name, grid in _numbers(scores).items()}


def _numbers(scores: Scores) -> dict[str, Floats]:
    """[S, B, T] each, 0 outside the pairs: 1, the acceptance of the token, its product, α."""
    accept = np.exp(np.minimum(scores.logr, 0.0))
    survive = np.cumprod(accept, axis=0)
    return {"anchors": scores.pair * 1.0, "accept": accept, "survive": survive, **scores.alpha}


def entropy(law: Law) -> Tensor:
    """[R] float64 nats: the entropy of each row, unbiased where its tail was sampled.

    A tail without samples counts as one symbol, which is never too much.
    """
    if isinstance(law, DenseLaw):
        return -(law.logp.exp() * law.logp).sum(-1, dtype=torch.float64)
    p = law.p.double()
    parts = -law.weight.double() * torch.xlogy(p, p)
    bucket = law.bucket.double()
    return -torch.xlogy(bucket, bucket).index_add(0, law.rows(), -parts)


def strata(scores: Scores, batch: Batch) -> list[dict[str, Any]]:
    """Sums of `depth_sums` over anchors of one kind: rows of `storage.tables.STRATA`, arm apart.

    An anchor's kind is that of its depth 0: the place of the drafted token in its response
    (`POSITIONS`), and the entropy of the target's law at T = 1 there (`NATS`; T > 0 only, where
    laws are stored). Joint acceptance of deeper depths is thus conditional on where a round starts.
    """
    turn = batch.turn.numpy(force=True)
    start = (turn >= 0) & (turn != np.pad(turn, ((0, 0), (1, 0)), constant_values=-1)[:, :-1])
    index = np.arange(turn.shape[1])
    first = np.maximum.accumulate(np.where(start, index, 0), axis=1)
    # anchor j drafts x_{j+2} of the response that x_{j+1} lies in
    place = np.pad(index + 1 - first, ((0, 0), (0, 1)))[:, 1:]
    kinds: dict[str, tuple[NDArray[Any], tuple[float, ...]]] = {"position": (place, POSITIONS)}
    if scores.alpha and batch.law is not None:
        row = np.pad(batch.law_row.numpy(force=True), ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
        nats = entropy(batch.law).clamp(min=0).numpy(force=True)
        kinds["entropy"] = (np.where(row >= 0, nats[row], np.inf), NATS)
    numbers = _numbers(scores)
    rows: list[dict[str, Any]] = []
    for kind, (value_BT, edges) in kinds.items():
        for lo, hi in pairwise(edges):
            inside_BT = (value_BT >= lo) & (value_BT < hi)
            for k in range(len(scores.pair)):
                mine = inside_BT & scores.pair[k]
                if mine.any():
                    sums = {name: float(grid[k][mine].sum()) for name, grid in numbers.items()}
                    rows.append({"by": kind, "lo": lo, "hi": hi, "depth": k} | sums)
    return rows
