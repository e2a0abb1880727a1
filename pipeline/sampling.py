"""A batch of prompts -> the target's responses, under a served law or greedily, with a KV cache.

Randomness comes in as uniforms, one a row and step; who shares a batch with a row changes rounding
only. Knows no file, no split and no tokenizer.

Dims: B rows of a batch, Q prompt tokens (padded), V vocabulary, G response tokens.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.serve import Serving, serve_logits
from pipeline.session import Session
from pipeline.target import Target
from storage.errors import TargetError

# Rows that ended are dropped once they are this share of the batch: a drop copies the KV cache, and
# a kept one is computed for nothing.
DROP_SHARE = 0.125


@dataclass(frozen=True)
class Prompt:
    """A prompt as the target reads it."""

    id: str
    domain: str
    tokens: Sequence[int]
    response: str | None = None
    """The data's own."""


@dataclass(frozen=True)
class Response:
    """What followed a prompt."""

    tokens: Sequence[int]
    """The end-of-sequence token included, where there was one."""
    finished: bool


def compact(tokens: Iterable[int]) -> Sequence[int]:
    """Token ids at 4 bytes each: a list of Python's own numbers takes some 40."""
    return array("I", tokens)


def sample(
    target: Target,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    uniform_BG: Tensor | None,
    serving: Serving | None = None,
) -> list[Response]:
    """Sample from the target by inverse CDF of `uniform_BG`, or greedily without them.

    The law is the target's at T = 1, or that as `serving` changes it.

    A row ends with an end-of-sequence token or after `max_new_tokens`. `TargetError` names the
    prompt and position at which the target's logits are not finite.
    """
    length_B = torch.tensor([len(prompt.tokens) for prompt in prompts], device=target.device)
    longest = int(length_B.max())
    padded_BQ = torch.tensor(
        [[*p.tokens, *[0] * (longest - len(p.tokens))] for p in prompts], device=target.device
    )
    eos = torch.tensor(target.spec.eos_ids, dtype=torch.int64, device=target.device)
    out_BG = torch.full((len(prompts), max_new_tokens), -1, device=target.device)
    draw_BG = None if uniform_BG is None else uniform_BG.to(target.device)
    row_B = torch.arange(len(prompts), device=target.device)  # of the rows still in the session
    live_B = torch.ones_like(row_B, dtype=torch.bool)
    # the last token of a row is never fed
    session = Session(target, len(prompts), longest + max_new_tokens - 1)
    logits_BV = session.extend(padded_BQ, length_B, which="last").logits[:, 0]
    for step in range(max_new_tokens):
        draw_B = None if draw_BG is None else draw_BG[row_B, step]
        token_B, sound_B = choose(logits_BV, draw_B, serving)
        _require_sound(sound_B | ~live_B, [prompts[b] for b in row_B.tolist()], step)
        out_BG[row_B[live_B], step] = token_B[live_B]
        live_B &= ~torch.isin(token_B, eos)
        num_live = int(live_B.sum())
        if not num_live or step == max_new_tokens - 1:
            break
        if num_live <= (1 - DROP_SHARE) * len(live_B):
            keep = live_B.nonzero()[:, 0]
            session.select(keep)
            row_B, token_B, live_B = row_B[keep], token_B[keep], live_B[keep]
        logits_BV = session.extend(token_B[:, None], live_B.long()).logits[:, 0]
    rows = out_BG.tolist()
    target.settle()
    return [_response(row, target.spec.eos_ids) for row in rows]


def choose(
    logits_BV: Tensor, uniform_B: Tensor | None, serving: Serving | None = None
) -> tuple[Tensor, Tensor]:
    """A token of each row [B] int64, by inverse CDF (or the likeliest), and whether it is sound."""
    if uniform_B is None:
        best_B = logits_BV.max(-1)
        return best_B.indices, best_B.values.isfinite()
    # float64 for the sum alone: a float32 CDF of a large vocabulary loses its last tokens
    p_BV = (
        torch.softmax(logits_BV, -1) if serving is None else serve_logits(logits_BV, serving).exp()
    )
    cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:].contiguous()
    wanted_B1 = uniform_B[:, None] * total_B1
    token_B1 = torch.searchsorted(cdf_BV, wanted_B1, right=True)
    last_B1 = torch.searchsorted(cdf_BV, total_B1)  # u · total may round up to total
    return torch.minimum(token_B1, last_B1)[:, 0], total_B1[:, 0].isfinite()


def _require_sound(sound_B: Tensor, prompts: Sequence[Prompt], step: int) -> None:
    if not bool(sound_B.all()):
        prompt = prompts[int((~sound_B).nonzero()[0])]
        raise TargetError(
            found=f"the target's logits after {step} response tokens to prompt {prompt.id!r} are "
            "NaN or infinite",
            expected="finite logits",
            todo="check the target's weights, or load it in a wider dtype (target.dtype)",
        )


def _response(row: Sequence[int], eos_ids: Sequence[int]) -> Response:
    tokens = [token for token in row if token >= 0]
    return Response(tokens, bool(tokens) and tokens[-1] in eos_ids)
