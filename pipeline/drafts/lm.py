"""A standalone language model as draft: a small Llama of its own, tied embedding.

It needs nothing of the target but its tokens. Teacher forced, depth k at anchor j is depth 0 at
anchor j + k (`shifts`): q for x_{j+2} are the logits at position j + 1 (draft_training.md §3.5).
Its weights carry to transformers' `LlamaForCausalLM` through the key table in `pipeline.export`.

Dims as in `pipeline.draft`; Q tokens fed at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.blocks import KVCache, Layer, RMSNorm, draw, rope_table, span, take_rows, visible
from pipeline.draft import Choose, Context, Draft, DraftConfig, Needs
from pipeline.interface import Interface, Shape
from pipeline.seeds import generator
from storage.errors import DraftError


class Config(DraftConfig):
    """Section `drafts.<name>` of kind `lm`."""

    kind: Literal["lm"]
    hidden_size: Annotated[int, Field(gt=0)]
    num_layers: Annotated[int, Field(gt=0)]
    num_heads: Annotated[int, Field(gt=0)]
    intermediate_size: Annotated[int, Field(gt=0)]


@dataclass
class State:
    """K/V of every layer, and the tokens they were computed from."""

    caches: list[KVCache]
    tokens: Tensor
    """[B, W] int64: what stands in the caches at each position, drafts included."""
    filled: Tensor
    """[B] int64: how many of them are there."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in that order."""
        for cache in self.caches:
            cache.select(rows)
        self.tokens, self.filled = self.tokens[rows], self.filled[rows]

    def agreement(self, context: Context) -> Tensor:
        """[B]: how many leading positions already hold the committed tokens.

        Drafts that were accepted stay; the first one that was not, and all after it, go.
        """
        width = min(self.tokens.shape[1], context.tokens.shape[1])
        position = torch.arange(width, device=self.tokens.device)
        same = self.tokens[:, :width] == context.tokens[:, :width]
        same &= position < torch.minimum(self.filled, context.length)[:, None]
        return same.long().cumprod(1).sum(1)


class Model(Draft):
    """Tied embedding, Llama layers, final norm."""

    shifts = True

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        size = config.hidden_size
        self.embed = nn.Parameter(torch.empty(shape.vocab_size, size))
        self.layers = nn.ModuleList(
            Layer(size, config.num_heads, inner_size=config.intermediate_size)
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(size)

    @staticmethod
    def needs(config: Config) -> Needs:
        """Tokens alone."""
        return Needs()

    @staticmethod
    def max_depth(config: Config) -> int | None:
        """No limit."""
        return None

    @staticmethod
    def loss_depth(config: Config) -> int:
        """One: deeper depths are shifts of it."""
        return 1

    @classmethod
    def build(
        cls,
        config: Config,
        shape: Shape,
        interface: Interface | None,
        seed: int,
        *,
        d2t: Tensor | None = None,
    ) -> "Model":
        """A fresh model from `seed`; `DraftError` where heads do not divide the width."""
        if config.hidden_size % (2 * config.num_heads):
            raise DraftError(
                found=f"hidden_size {config.hidden_size} with num_heads {config.num_heads}",
                expected="heads of an even number of channels that fill the width",
                todo="correct drafts.*.hidden_size or num_heads in params.yaml",
            )
        if d2t is not None:
            raise DraftError(
                found="a pruned draft vocabulary for a draft of kind lm",
                expected="the target's whole vocabulary, which it embeds itself",
                todo="remove draft_vocab_size",
            )
        model = cls(config, shape)
        draw(model, generator(seed, "draft", "lm"))
        return model

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embed)

    def training_states(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Depth 0 only: one causal pass, states at j + 1 of every supervised anchor j."""
        num_tokens = batch.tokens.shape[1]
        head_size = self.config.hidden_size // self.config.num_heads
        x = take_rows(self.embed, batch.tokens)
        table, mask = rope_table(batch.position, head_size, dtype=x.dtype), None
        if batch.first is not None:
            index = torch.arange(num_tokens, device=x.device).expand_as(batch.first)
            mask = visible(index, num_tokens, batch.first)
        for layer in self.layers:
            x = layer(x, table, mask)
        asked = take_rows(x.flatten(0, 1), batch.pairs(0).anchor + 1)
        yield self.norm(asked), self.embed

    def open(self, num_rows: int, width: int) -> State:
        """Empty caches for B rows of `width` tokens."""
        heads = (self.config.num_heads, self.config.hidden_size // self.config.num_heads)
        device = self.embed.device
        return State(
            caches=[
                KVCache.empty(num_rows, width, heads=heads, like=self.embed.data)
                for _ in self.layers
            ],
            tokens=torch.zeros(num_rows, width, dtype=torch.int64, device=device),
            filled=torch.zeros(num_rows, dtype=torch.int64, device=device),
        )

    def _feed(self, state: State, token_BQ: Tensor, *, position_BQ: Tensor, width: int) -> Tensor:
        """Run tokens through the layers at their positions; hidden states [B, Q, D]."""
        x = take_rows(self.embed, token_BQ)
        head_size = self.config.hidden_size // self.config.num_heads
        table = rope_table(position_BQ, head_size, dtype=x.dtype)
        for layer, cache in zip(self.layers, state.caches, strict=True):
            assert isinstance(layer, Layer)
            x = layer.extend(x, table, cache=cache, position_BQ=position_BQ, width=width)
        return x

    @torch.no_grad()
    def propose(self, state: State, context: Context, gamma: int, choose: Choose) -> Tensor:
        """Feed what is committed and not yet cached, then γ − 1 of its own tokens."""
        tokens, length = context.tokens, context.length
        # the last committed token is fed again at least: its output is what depth 0 needs
        start = torch.minimum(state.agreement(context), length - 1)
        longest, width = int(length.max()), state.tokens.shape[1]
        assert longest + gamma - 1 <= width, "opened with room for the drafts"
        position = span(start, length, spare=width)
        token_BQ = tokens.gather(1, position.clamp(max=tokens.shape[1] - 1))
        x = self._feed(state, token_BQ, position_BQ=position, width=longest)
        row = torch.arange(len(length), device=length.device)
        last = x[row, length - 1 - start]
        state.tokens[:, : tokens.shape[1]] = tokens
        logits = []
        for depth in range(gamma):
            logits.append(self._logits(last))
            token = choose(depth, logits[-1])
            if depth + 1 < gamma:
                at = (length + depth)[:, None]
                state.tokens[row, at[:, 0]] = token
                width = longest + depth + 1
                last = self._feed(state, token[:, None], position_BQ=at, width=width)[:, 0]
        state.filled = length + gamma - 1
        return torch.stack(logits, dim=1)
