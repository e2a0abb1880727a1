"""The contract of a loss, and how one is found by name.

A loss lives in one file, `pipeline/losses/<kind>.py`, that defines `Config` (a `Strict` model with
`kind: Literal["<kind>"]`) and

    def loss(kl_SN: Tensor, alpha_SN: Tensor, mask_SN: Tensor, config: Config) -> Tensor  # [S, N]

a few lines over the two terms of every depth S and anchor N (`pipeline.terms`), without reduction;
entries outside the mask are ignored by the reduction (`reduce`). Its equation has a number in
MATHS.md.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.errors import ConfigError

FOLDER = Path(__file__).parent / "losses"


def masked_mean(x_SN: Tensor, mask_SN: Tensor) -> Tensor:
    """[S] mean over the supervised anchors of each depth; 0 where a depth has none."""
    total = torch.where(mask_SN, x_SN, 0.0).sum(-1)
    return total / mask_SN.sum(-1).clamp(min=1)


def reduce(loss_SN: Tensor, mask_SN: Tensor, *, depth_decay: float) -> Tensor:
    """Σ_k decay^k · mean of depth k over its supervised anchors: a scalar, MATHS (15)."""
    weight_S = depth_decay ** torch.arange(len(loss_SN), device=loss_SN.device, dtype=loss_SN.dtype)
    return (weight_S * masked_mean(loss_SN, mask_SN)).sum()


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
