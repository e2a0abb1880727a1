"""The contract of a draft, and how one is found by name.

A draft lives in one file, `pipeline/drafts/<kind>.py`, that defines `Config` (a `Strict` model with
`kind: Literal["<kind>"]`) and `Model` (a `Draft`). Nothing else refers to it by import, so that an
edit retrains that kind only.

Dims: B sequences, T tokens, W width of a token buffer, N supervised anchors, V target vocabulary,
Vd draft vocabulary, S depths, L captured layers, D target width. Anchor, depth: `pipeline.batch`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch.nn.functional as F  # noqa: N812  the name that torch's users know
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.interface import Interface, Shape
from storage.errors import ConfigError, DraftError

FOLDER = Path(__file__).parent / "drafts"


class StartFrom(Strict):
    """A checkpoint or published folder whose weights a draft begins with, pinned by its content."""

    folder: Annotated[str, Field(min_length=1)]
    """Of ours (`drafts/…/model`), or a published EAGLE-3 folder; relative to the project."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the folder's content (`storage.workspace.tree_digest`): other weights, other draft."""


class DraftConfig(Strict):
    """What every draft's section holds besides its own shape."""

    kind: str
    lr_scale: Annotated[float, Field(gt=0)]
    """Factor on `warmup.lr` and `train.lr` for this draft, every loss alike."""
    steps_scale: Annotated[float, Field(gt=0)]
    """Factor on `warmup.steps` and `train.steps` for this draft, every loss alike."""
    start: StartFrom | None = None
    """Where its weights begin; None draws them from the seed."""


@dataclass(frozen=True)
class Needs:
    """What a draft reads of a cached sequence beside its tokens."""

    num_layers: int = 0
    """L: how many captured layers (`capture.hidden_layers`); 0 for none."""
    last_hidden: bool = False
    interface: bool = False
    """Whether it is built on the target's embedding and LM head (`target/interface`)."""


@dataclass
class Context:
    """What a round of decoding knows, for B rows of different length.

    `length[b]` tokens are committed; the last one (just sampled by the target) has not been through
    the target yet, so features are valid at positions < length[b] − 1. The anchor is length[b] − 2:
    depth k drafts the token of position length[b] + k.
    """

    tokens: Tensor
    """[B, W] int64"""
    length: Tensor
    """[B] int64, at least 2."""
    hidden: Tensor | None
    """[B, W, L, D]"""
    last_hidden: Tensor | None
    """[B, W, D]"""


class State(Protocol):
    """A draft's decoding state (its KV caches) for B rows."""

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows ([B'] int64), in that order."""


Choose = Callable[[int, Tensor], Tensor]
"""(depth k, logits [B, Vd]) -> drafted tokens [B] int64, in ids of the *target's* vocabulary."""


class Draft(nn.Module, ABC):
    """A draft model: all depths of a batch at once for training, a chain of γ for decoding."""

    shifts: ClassVar[bool] = False
    """True where depth k at anchor j is depth 0 at anchor j + k (a standalone LM)."""

    recompute: bool = False
    """Whether a draft that unrolls makes a step's activations again in backward
    (`train.checkpoint_depths`); the others have none worth it."""

    config: Any
    """Its section of `params.yaml`, parsed."""
    d2t: Tensor | None
    """[Vd] int64 target id of each draft id, ascending; None where Vd = V. A buffer, so that it
    follows the draft into its checkpoint."""

    def __init__(self, d2t: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("d2t", d2t)

    @staticmethod
    @abstractmethod
    def needs(config: Any) -> Needs:
        """What the cache must hold for this draft; known before anything is loaded."""

    @staticmethod
    @abstractmethod
    def max_depth(config: Any) -> int | None:
        """The deepest γ that it can draft (MEDUSA: its heads); None where there is no limit."""

    @staticmethod
    @abstractmethod
    def loss_depth(config: Any) -> int:
        """S: how many depths stand in the training loss (1 for a standalone LM)."""

    @classmethod
    @abstractmethod
    def build(
        cls,
        config: Any,
        shape: Shape,
        interface: Interface | None,
        seed: int,
        *,
        d2t: Tensor | None = None,
    ) -> "Draft":
        """A fresh draft, initialised from `seed` alone; `DraftError` where shapes do not fit.

        `d2t` ([Vd] int64, `pipeline.vocab.draft_vocabulary`) prunes the draft vocabulary of a kind
        whose config asks for one.
        """

    @abstractmethod
    def training_states(self, batch: Batch, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for k = 0 … depth−1 hidden states [N_k, E] and the head [Vd, E] that reads them.

        Of `batch.pairs(k).anchor`, in that order, teacher forced; logits are their product. A draft
        whose `shifts` is True yields depth 0 only.
        """

    def training_logits(self, batch: Batch, depth: int) -> Iterator[Tensor]:
        """The logits [N_k, Vd] of `training_states`, each made whole."""
        for hidden_NE, weight_VE in self.training_states(batch, depth):
            yield F.linear(hidden_NE, weight_VE)

    @abstractmethod
    def open(self, num_rows: int, width: int) -> State:
        """A fresh decoding state for B rows of at most `width` tokens, drafts included."""

    @abstractmethod
    def propose(self, state: Any, context: Context, gamma: int, choose: Choose) -> Tensor:
        """Draft γ tokens a row; returns their logits [B, γ, Vd] and lets `choose` pick each token.

        Catches its state up with `context` first; what earlier rounds wrote beyond the committed
        tokens must not be seen. Equal, up to rounding, to `training_logits` on the same path.
        """

    def trainable(self) -> dict[str, Tensor]:
        """What a checkpoint stores: all parameters and buffers but the target's frozen ones."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if k not in frozen}


def require_interface(kind: str, shape: Shape, interface: Interface | None) -> Interface:
    """The interface that a draft is built on; `DraftError` where it is missing or of other size."""
    if interface is None:
        raise DraftError(
            found=f"no target interface for a draft of kind {kind}",
            expected="the target's embedding and LM head",
            todo="run dvc repro target, which writes target/interface",
        )
    expected = (shape.vocab_size, shape.hidden_size)
    for name, matrix in (("embedding", interface.embed), ("LM head", interface.lm_head)):
        if tuple(matrix.shape) != expected:
            raise DraftError(
                found=f"a target {name} of shape {list(matrix.shape)}",
                expected=f"{list(expected)}, vocabulary by width",
                todo="run dvc repro target, so that the interface is of the pinned target",
            )
    return interface


def require_last_hidden(kind: str, last_hidden: Tensor | None) -> Tensor:
    """The target's last hidden state; `DraftError` where the cache holds none."""
    if last_hidden is None:
        raise DraftError(
            found=f"a cache without last_hidden for a draft of kind {kind}",
            expected="the target's last hidden state of every token",
            todo="set capture.last_hidden: true and run dvc repro capture",
        )
    return last_hidden


def require_depth(kind: str, depth: int, num_heads: int) -> None:
    """`DraftError` where a draft of one head a depth is asked for more than it has."""
    if depth > num_heads:
        raise DraftError(
            found=f"depth {depth} for a {kind} draft of {num_heads} heads",
            expected="no more depths than heads",
            todo="lower it or set more drafts.*.num_heads and train again",
        )


def kinds() -> list[str]:
    """The draft kinds that exist: the files of `pipeline/drafts/`."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")


def find(kind: str) -> Any:
    """The module of a draft kind (`Config`, `Model`); `ConfigError` lists those that exist."""
    if kind not in kinds():
        raise ConfigError(
            found=f"draft kind {kind!r}",
            expected=f"one of {', '.join(kinds())}",
            todo="correct `kind` in params.yaml or add pipeline/drafts/" + f"{kind}.py",
        )
    return import_module(f"pipeline.drafts.{kind}")
