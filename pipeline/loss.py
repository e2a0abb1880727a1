"""The contract of a loss, and how one is found by name.

A loss lives in one file, `pipeline/losses/<kind>.py`, that defines `Config` (a `Strict` model with
`kind: Literal["<kind>"]`) and

    def loss(kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor, config: Config) -> Tensor  # [S, N]

a few lines over the two terms of every depth S and anchor N (`pipeline.terms`), without reduction;
entries outside the mask are ignored by the reduction (`reduce`). Column n is the same anchor at
every depth (`align`), so a loss may follow an anchor's path through the depths. Its equation has a
number in MATHS.md.

A loss that mixes another term than KL and α names it in its config, `extra_terms: ClassVar = (…)`,
names of `pipeline.terms.EXTRA`; `loss` then takes them after `mask_SN`, in that order. One that is
defined on whole laws alone says `whole_law: ClassVar = True` and is refused on a truncated cache
before anything is trained (`require_law`).

Knows no rank: who shares a batch among processes gathers its terms first, so that every mean here
is over all its anchors.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from storage.errors import ConfigError

FOLDER = Path(__file__).parent / "losses"

DepthWeights = Literal["decay", "uniform", "survival"]


def align(values: Sequence[Tensor], anchors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ragged depths -> [S, N] and its mask: column n belongs to the n-th anchor of depth 0.

    values[k], [N_k], belongs to anchors[k], ascending, of which every depth's are a subset of
    depth 0's (`Batch.pairs`). 0 and masked where a depth lacks the anchor.
    """
    shape = (len(values), len(anchors[0]))
    place = torch.cat(
        [torch.searchsorted(anchors[0], own) + k * shape[1] for k, own in enumerate(anchors)]
    )
    flat = torch.cat(list(values))
    mask = torch.zeros(shape, dtype=torch.bool, device=flat.device)
    mask.view(-1)[place] = True
    return flat.new_zeros(shape[0] * shape[1]).index_put((place,), flat).view(shape), mask


def reach(alpha_SN: Tensor, mask_SN: Tensor) -> Tensor:
    """[S, N]: Π_{i<k} α_i of the same anchor, the probability that depth k is reached; 1 at k = 0.

    Depths are supervised from the first on without a gap (DESIGN §6), so that where depth k is
    supervised every factor is.
    """
    before = torch.where(mask_SN, alpha_SN, 0.0)[:-1].cumprod(0)
    return torch.cat([torch.ones_like(alpha_SN[:1]), before])


def masked_mean(x_SN: Tensor, mask_SN: Tensor) -> Tensor:
    """[S] mean over the supervised anchors of each depth; 0 where a depth has none."""
    total = torch.where(mask_SN, x_SN, 0.0).sum(-1)
    return total / mask_SN.sum(-1).clamp(min=1)


def reduce(
    loss_SN: Tensor,
    mask_SN: Tensor,
    *,
    depth_decay: float,
    depth_weights: DepthWeights = "decay",
    alpha_SN: Tensor | None = None,
) -> Tensor:
    """Σ_k w_k · mean of depth k over its supervised anchors: a scalar, MATHS (15), (55).

    w_k is depth_decay^k, 1 (`uniform`), or of each anchor the detached probability that depth k is
    reached (`survival`, which asks for `alpha_SN`).
    """
    if depth_weights == "survival":
        assert alpha_SN is not None, "survival weighs by the acceptance of earlier depths"
        loss_SN = reach(alpha_SN.detach(), mask_SN) * loss_SN
    mean_S = masked_mean(loss_SN, mask_SN)
    if depth_weights == "decay":
        depth = torch.arange(len(loss_SN), device=loss_SN.device, dtype=loss_SN.dtype)
        mean_S = depth_decay**depth * mean_S
    return mean_S.sum()


def extra_terms(config: Any) -> tuple[str, ...]:
    """The terms beside KL and α that a loss asks for."""
    return getattr(config, "extra_terms", ())


def require_law(objective: str, config: Any, mode: str, *, cut: bool = False) -> None:
    """`ConfigError` where a loss of whole laws meets one that lacks ids.

    The cache truncates it, or (cut) top-k, top-p or temperature 0 of `train.target_law` does.
    """
    if not getattr(config, "whole_law", False):
        return
    if cut:
        raise ConfigError(
            found=f"objective {objective} (loss {config.kind}) with a train.target_law that cuts",
            expected="a law with no id of probability 0, where KL(q‖p) would be infinite",
            todo="give target_law a temperature alone, or train kl, jsd or another loss",
        )
    if mode == "topk":
        raise ConfigError(
            found=f"objective {objective} (loss {config.kind}) on a cache of mode topk",
            expected="whole laws: an estimate of its tail from samples has no finite variance",
            todo="set capture.mode: full, which captures again, or train kl, jsd or another loss",
        )


def kinds() -> list[str]:
    """The losses that exist: the files of `pipeline/losses/`."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")


def find(kind: str) -> Any:
    """The module of a loss, with `Config` and `loss`; `ConfigError` lists those that exist."""
    if kind not in kinds():
        raise ConfigError(
            found=f"loss {kind!r}",
            expected=f"one of {', '.join(kinds())}",
            todo="correct the name in params.yaml or add pipeline/losses/" + f"{kind}.py",
        )
    return import_module(f"pipeline.losses.{kind}")
