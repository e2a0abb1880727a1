"""A draft, a batch -> KL and α of every depth and anchor; logits whole, or never (`pipeline.head`).

Logits of all depths live until the loss of the pass is known. Where they would take more than
`WHOLE_BYTES` together, the head is fused with the terms: their blocks are then made once more in
backward, a product more, and nothing of size [N, V] is kept. The choice depends on the batch alone,
so that equal runs make equal bits on every machine. Knows no loss, no cache and no architecture.

Dims: S depths, N anchors of depth 0, V draft vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from torch import Tensor

from pipeline.batch import Batch
from pipeline.draft import Draft
from pipeline.head import head_terms
from pipeline.law import SparseLaw
from pipeline.loss import align
from pipeline.terms import terms

WHOLE_BYTES = 1 << 30
"""Of the logits of a pass, all depths: below, memory is not what limits a step, and whole logits
are the faster way (docs/training.md)."""


def depth_terms(
    draft: Draft,
    batch: Batch,
    depth: int,
    extra: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    whole_bytes: int = WHOLE_BYTES,
) -> tuple[Tensor, ...]:
    """(kl_SN, alpha_SN, mask_SN, *extra_SN) of all depths, a column an anchor of depth 0.

    Anchors that a depth lacks are masked. Backward overwrites the logits, which nobody else holds.
    dtype: bfloat16 runs the draft's products under autocast; terms are float32 or wider always.
    extra, and laws that are dense, ask for whole logits.
    """
    assert batch.law is not None, "training reads the law"
    rows: list[tuple[Tensor, ...]] = []
    every = [batch.pairs(k) for k in range(depth)]
    num_rows = sum(len(pairs.anchor) for pairs in every)
    half, place = dtype != torch.float32, batch.tokens.device.type
    with torch.autocast(place, dtype) if half else nullcontext():
        states = draft.training_states(batch, depth)
        for pairs, (hidden_NE, weight_VE) in zip(every, states, strict=False):
            law = batch.law.take(pairs.row)
            size = num_rows * len(weight_VE) * (dtype if half else hidden_NE.dtype).itemsize
            if isinstance(law, SparseLaw) and not extra and size > whole_bytes:
                rows.append(head_terms(hidden_NE, weight_VE, law, d2t=draft.d2t))
                continue
            logits_NV = F.linear(hidden_NE, weight_VE)
            with torch.autocast(place, enabled=False) if half else nullcontext():
                rows.append(terms(logits_NV, law, d2t=draft.d2t, extra=extra, in_place=True))
            del logits_NV
    anchors = [pairs.anchor for pairs in every[: len(rows)]]
    (kl_SN, mask_SN), (alpha_SN, _), *more = (align(x, anchors) for x in zip(*rows, strict=True))
    return kl_SN, alpha_SN, mask_SN, *(x_SN for x_SN, _ in more)
