"""Serving laws of whole rows of logits: temperature, then top-k, then top-p (MATHS (60)).

Ties: of equally likely ids the lower one is the likelier. top-p keeps the fewest most likely ids
whose mass reaches it, counted after top-k, as engines do. Knows no cache and no draft; truncated
rows are `pipeline.serving`'s. Dims: N rows, V vocabulary.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Strict
from pipeline.setting import Setting

BLOCK_ELEMENTS = 1 << 22
"""Logits of `token_logp` at once: 32 MB in float64."""


class Serving(Strict):
    """How a law is changed before it is sampled."""

    temperature: Annotated[float, Field(ge=0)]
    """0: the most likely id"""
    top_k: Annotated[int, Field(ge=1)] | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None


def serving_of(setting: Setting) -> Serving | None:
    """How a setting changes a law at T = 1; None where it does not."""
    if setting.served == Setting(1.0):
        return None
    return Serving(temperature=setting.temperature, top_k=setting.top_k, top_p=setting.top_p)


def serve_logits(logits_NV: Tensor, serving: Serving) -> Tensor:
    """[N, V] float64 log-probabilities of served full rows, −inf outside their support."""
    serving = plain(serving, logits_NV.shape[1])
    logp_NV = (logits_NV.double() / serving.temperature).log_softmax(-1)
    if serving.top_k is None and serving.top_p is None:
        return logp_NV
    falling = logits_NV.sort(dim=-1, descending=True, stable=True).indices
    p_NV = logp_NV.gather(1, falling).exp()
    if serving.top_k is not None:
        p_NV[:, serving.top_k :] = 0.0
    keep_NV = p_NV > 0
    keep_NV[:, 0] = True  # the likeliest id of a law that float64 cannot add up
    if serving.top_p is not None:
        before_NV = p_NV.cumsum(-1) - p_NV
        keep_NV &= before_NV < serving.top_p * p_NV.sum(-1, keepdim=True)
    inside_NV = torch.zeros_like(keep_NV).scatter(1, falling, keep_NV)
    return logp_NV.masked_fill(~inside_NV, -torch.inf).log_softmax(-1)


def plain(serving: Serving, vocab_size: int) -> Serving:
    """The same law in fewer words: T = 0 is top-1, a cut that cuts nothing is none."""
    temperature, top_k, top_p = serving.temperature, serving.top_k, serving.top_p
    if temperature == 0:
        return Serving(temperature=1.0, top_k=1, top_p=None)
    return Serving(
        temperature=float(temperature),
        top_k=None if top_k is None or top_k >= vocab_size else top_k,
        top_p=None if top_p == 1 else top_p,
    )


def token_logp(logits_NV: Tensor, token_N: Tensor, serving: Serving) -> Tensor:
    """[N] float64 log-probability of one token of each served row.

    A token that was sampled, and lies outside the support by the rounding of another pass, counts
    as its last id: the log-probability is always finite, and exact inside.
    """
    rows = max(1, BLOCK_ELEMENTS // logits_NV.shape[1])
    found = []
    for logits, token in zip(logits_NV.split(rows), token_N.split(rows), strict=True):
        whole = (logits.double() / serving.temperature).log_softmax(-1)
        inside = serve_logits(logits, serving) > -torch.inf
        inside.scatter_(1, token[:, None], True)
        total = whole.masked_fill(~inside, -torch.inf).logsumexp(-1)
        found.append(whole.gather(1, token[:, None])[:, 0] - total)
    return torch.cat(found)
