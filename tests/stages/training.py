"""A project folder in which the training stages run: parameters, caches, a target's interface."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from storage.layout import Layout
from tests.caches import LAYOUT, write_cache, write_target

FIT = {
    "steps": 6,
    "lr": 1e-2,
    "lr_warmup_steps": 2,
    "lr_final": 0.05,
    "batch_sequences": 3,
    "betas": [0.9, 0.95],
    "weight_decay": 0.01,
    "clip": 1.0,
    "depth_weights": "decay",
    "depth_decay": 0.8,
    "heldout_sequences": 4,
    "log_every": 3,
    "micro_batch_sequences": None,
    "pack_tokens": None,
    "checkpoint_depths": False,
    "target_law": None,
    "dtype": "float32",
    "ranks": 1,
    "sharding": "ddp",
    "threads": 1,
}
SCALE = {"lr_scale": 1.0, "steps_scale": 1.0}


def _start(draft: str, seed: int) -> dict[str, Any]:
    return {"draft": draft, "kind": draft, "seed": seed}


def _arm(draft: str, objective: str, seed: int, *, loss: str | None = None) -> dict[str, Any]:
    named = {"objective": objective, "loss": loss or objective, "start": f"{draft}-{seed}"}
    return {**_start(draft, seed), **named}


PARAMS: dict[str, Any] = {
    "warmup": {**FIT, "loss": "kl"},
    "train": {**FIT, "lr": 5e-3, "steps": 4},
    "cluster": {"workers": 1, "device": "cpu", "address": None, "parallel": None, "writers": None},
    "drafts": {
        "lm": {
            "kind": "lm",
            "hidden_size": 8,
            "num_layers": 1,
            "num_heads": 1,
            "intermediate_size": 12,
            **SCALE,
        },
        "medusa": {"kind": "medusa", "num_heads": 2, "num_layers": 1, **SCALE},
        "eagle3": {
            "kind": "eagle3",
            "depth": 2,
            "num_heads": 2,
            "intermediate_size": 12,
            "norm_before_residual": False,
            "norm_before_fc": False,
            "norm_output": False,
            **SCALE,
        },
        "mlp": {
            "kind": "mlp",
            "num_heads": 2,
            "inner_size": 12,
            "tie_weights": False,
            "scale_input": True,
            **SCALE,
        },
        "mtp": {
            "kind": "mtp",
            "depth": 2,
            "init": "fresh",
            "attention": "step0",
            "num_heads": 2,
            "num_kv_heads": None,
            "head_size": None,
            "intermediate_size": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "rope_theta": 1e4,
            "norm_eps": 1e-6,
            **SCALE,
        },
    },
    "losses": {
        "kl": {"kind": "kl"},
        "tv": {"kind": "tv"},
        "lk": {"kind": "lk_lambda", "eta": 3.0},
    },
    "starts": {
        f"{d}-{s}": {**_start(d, s), "objectives": ["kl"]}
        for d in ("lm", "medusa", "eagle3", "mlp", "mtp")
        for s in (0, 1)
    },
    "arms": {
        "lm-kl-0": _arm("lm", "kl", 0),
        "lm-tv-0": _arm("lm", "tv", 0),
        "lm-lk-0": _arm("lm", "lk", 0, loss="lk_lambda"),
        "medusa-lk-0": _arm("medusa", "lk", 0, loss="lk_lambda"),
        "eagle3-lk-0": _arm("eagle3", "lk", 0, loss="lk_lambda"),
    },
}


def edit(params: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A copy with keys of some sections replaced."""
    copy = deepcopy(params)
    for name, over in sections.items():
        copy[name].update(over)
    return copy


def project(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    params: dict[str, Any] = PARAMS,
    layout: Layout = LAYOUT,
) -> None:
    """Make the folder and go there."""
    root.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(root)
    with Path("params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(params, file)
    write_cache(Path("cache", "train.zarr"), layout=layout, num_sequences=10)
    write_cache(Path("cache", "heldout.zarr"), layout=layout, num_sequences=5, split="heldout")
    write_target(Path("target"))


def stage(module: Any, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a cell's `main` as `python -m stages.<verb> <key>` does."""
    monkeypatch.setattr(sys, "argv", [module.__name__, key])
    module.main()
