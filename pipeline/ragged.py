"""Keys and values of rows of different length: a layer's buffer and the cursor that all share.

What `pipeline.session` feeds and cuts, and what each process that holds a shard of the target keeps
of its own heads.

Dims: B rows, Q fed tokens (padded), W width of a row, N visible slots, H heads, d of a head.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Cursor:
    """Where the running feed writes, shared by all layers."""

    row: Tensor
    """[B, Q] int64: b, by row."""
    slot: Tensor
    """[B, Q] int64."""
    visible: int
    """N: slots that any query of this feed may see; later ones are not read."""
    selected: list[Tensor] = field(default_factory=list)
    """Rows that were kept since the last feed, for those who hold the same rows elsewhere."""


class RaggedLayer:
    """Keys and values of one layer, [B, H, W + 1, d] each; slot W takes what padding writes.

    A `CacheLayerMixin` of transformers by registration (`as_cache`), not by inheritance, so that
    reading a stage's parameters does not import transformers.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    keys: Tensor
    values: Tensor

    def __init__(self, cursor: Cursor, *, width: int) -> None:
        self.cursor = cursor
        self.num_slots = width + 1
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: a masked slot still enters 0 · value, so it must be finite."""
        shape = (key_states.shape[0], key_states.shape[1], self.num_slots)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, d] at the cursor; return the slots that may be seen, [B, H, N, d]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.cursor
        row, slot = (x.to(self.keys.device) for x in (at.row, at.slot))  # the layer's own device
        self.keys[row, :, slot] = key_states.transpose(1, 2)
        self.values[row, :, slot] = value_states.transpose(1, 2)
        return self.keys[:, :, : at.visible], self.values[:, :, : at.visible]

    def select(self, rows: Tensor) -> None:
        """Keep these rows."""
        if self.is_initialized:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_seq_length(self) -> int:
        """Slots in use: asked by models that would otherwise guess positions."""
        return self.cursor.visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys seen and their offset: asked where a model builds a mask of its own."""
        return self.cursor.visible, 0

    def get_max_length(self) -> int:
        """Slots of a row."""
        return self.num_slots


def as_cache(layers: list[RaggedLayer]) -> Any:
    """The layers as the cache that models of transformers update."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(RaggedLayer)
    return Cache(layers=layers)
