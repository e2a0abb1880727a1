"""KV-cached decoding of the target for rows of different length: feed, roll back, select.

Row b of every layer's buffer (`pipeline.ragged`) holds its tokens at slots 0 … length[b]−1,
whatever the other rows do, so that feeding is a scatter, rolling a rejected draft back a change of
length, and dropping finished rows a gather. An explicit 4-D mask and explicit position ids say so
to the model; any causal LM of transformers whose attention takes such a mask (eager, sdpa) works,
sliding windows included.

Knows nothing of sampling, drafts or end-of-sequence tokens.

Dims: B rows, Q fed tokens (padded), W width of a row, N visible slots, H heads, L captured layers,
D target width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.ragged import Cursor, RaggedLayer, as_cache
from pipeline.target import Target
from storage.errors import TargetError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass
class Step:
    """What the target says at the fed positions; entries at or beyond count[b] are meaningless."""

    logits: Tensor
    """[B, Q, V] float32 (or the model's dtype where wider); [B, 1, V] of `which="last"`."""
    hidden: Tensor | None
    """[B, Q, L, D] in the model's dtype: hidden_states of the session's `layers`."""
    last_hidden: Tensor | None
    """[B, Q, D] in the model's dtype, after the final norm."""


class Session:
    """The target's decoding state for B rows of at most `width` tokens."""

    length: Tensor
    """[B] int64: tokens processed and kept."""

    def __init__(
        self,
        target: Target,
        num_rows: int,
        width: int,
        *,
        layers: Sequence[int] = (),
        last_hidden: bool = False,
    ) -> None:
        """Allocate nothing yet; `TargetError` where the model's context or attention forbids it."""
        if width > target.spec.context_tokens:
            raise TargetError(
                found=f"rows of {width} tokens",
                expected=f"at most the target's context of {target.spec.context}",
                todo="ask for fewer prompt or response tokens",
            )
        config = target.model.config.get_text_config()
        self._target, self._width = target, width
        self._layers, self._last_hidden = tuple(layers), last_hidden
        self._device, self._dtype = target.device, target.model.dtype
        self._windows = attention_windows(config)
        none = torch.zeros(0, 0, dtype=torch.int64, device=self._device)
        self._cursor = Cursor(none, none, 0)
        self._kv = [RaggedLayer(self._cursor, width=width) for _ in range(config.num_hidden_layers)]
        self._cache = as_cache(self._kv)
        self.length = torch.zeros(num_rows, dtype=torch.int64, device=self._device)

    @torch.no_grad()
    def extend(
        self, tokens_BQ: Tensor, count_B: Tensor, *, which: Literal["all", "last"] = "all"
    ) -> Step:
        """Feed the first count[b] tokens of row b at positions length[b] … and keep them.

        `which="last"` computes the logits at position count[b] − 1 only (a prefill needs no other).
        `ValueError` where a row would outgrow the session.
        """
        tokens_BQ, count_B = tokens_BQ.to(self._device), count_B.to(self._device)
        end_B = self.length + count_B
        visible = int(end_B.max())
        if visible > self._width:
            row = int(end_B.argmax())
            raise ValueError(
                f"row {row} would hold {visible} tokens; this session was opened for {self._width}"
            )
        query_Q = torch.arange(tokens_BQ.shape[1], device=self._device)
        position_BQ = self.length[:, None] + query_Q
        rows_B = torch.arange(len(end_B), device=self._device)
        self._cursor.row = rows_B[:, None].expand_as(position_BQ)
        # what padding writes past the row's end lands in slots that no query sees before they are
        # written anew, or in the spare one
        self._cursor.slot = position_BQ.clamp(max=self._width)
        self._cursor.visible = max(visible, 1)
        features = self._target.forward(
            tokens_BQ,
            attention_mask=self._mask(position_BQ),
            position_ids=position_BQ.clamp(max=self._width - 1),
            cache=self._cache,
            layers=self._layers,
        )
        self.length = end_B
        last, hidden = features.last_hidden.to(self._device), features.hidden
        asked = last[rows_B, (count_B - 1).clamp(min=0)][:, None] if which == "last" else last
        logits_NV = self._target.logits(asked.flatten(0, 1)).to(self._device)
        logits = logits_NV.unflatten(0, asked.shape[:2])
        return Step(
            logits=logits if logits.dtype == torch.float64 else logits.float(),
            hidden=None if hidden is None else hidden.to(self._device),
            last_hidden=last if self._last_hidden else None,
        )

    def rollback(self, length_B: Tensor) -> None:
        """Forget everything beyond length_B (rejected drafts); `ValueError` if that is no past."""
        length_B = length_B.to(self._device)
        if bool(((length_B > self.length) | (length_B < 0)).any()):
            raise ValueError(
                f"rollback to lengths {length_B.tolist()}; each must lie in "
                f"0 … {self.length.tolist()}"
            )
        self.length = length_B.clone()

    def select(self, rows: Tensor) -> None:
        """Keep the given rows ([B'] int64), in that order."""
        rows = rows.to(self._device)
        self.length = self.length[rows]
        for layer in self._kv:
            layer.select(rows)
        self._cursor.selected.append(rows)

    def _mask(self, position_BQ: Tensor) -> Any:
        """[B, 1, Q, N] additive: i sees j <= i (within the window); a dict where kinds mix."""
        slot_N = torch.arange(self._cursor.visible, device=self._device)
        masks = {}
        for kind, window in self._windows.items():
            seen_BQN = slot_N <= position_BQ[..., None]
            if window is not None:
                seen_BQN &= slot_N > position_BQ[..., None] - window
                # padding beyond the slots would see nothing, and its softmax be 0/0
                seen_BQN |= ~seen_BQN.any(-1, keepdim=True)
            mask = torch.zeros(seen_BQN.shape, dtype=self._dtype, device=self._device)
            masks[kind] = mask.masked_fill_(~seen_BQN, torch.finfo(self._dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


def attention_windows(config: Any) -> dict[str, int | None]:
    """The kinds of attention that a model mixes, each with its window; `TargetError` for others.

    One kind takes one mask; a model of several (Gemma, gpt-oss) takes a mapping by these names.
    """
    window: int | None = getattr(config, "sliding_window", None)
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {FULL: None} if window is None else {SLIDING: window}
    unknown = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if unknown:
        raise TargetError(
            found=f"a target with {', '.join(unknown)} layers",
            expected=f"layers of {FULL} or {SLIDING}",
            todo="name another target; decoding of this kind is not implemented",
        )
    return {kind: window if kind == SLIDING else None for kind in kinds}
