"""`pipeline.budget` against the drafts themselves: every weight, as often as a token meets it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import draft
from pipeline.budget import WEIGHTS, training
from pipeline.interface import Interface, Shape

V, D = 40, 16
SCALES = {"lr_scale": 1.0, "steps_scale": 0.5}
LAYER = {"num_heads": 4, "num_kv_heads": 2, "head_size": 8, "intermediate_size": 24}
FLAGS = {"norm_before_residual": False, "norm_before_fc": False, "norm_output": False}
SECTIONS: dict[str, dict[str, Any]] = {
    "eagle3": {"depth": 3, "fused_layers": 2, "draft_vocab_size": 10, **LAYER, **FLAGS},
    "medusa": {"num_heads": 3, "num_layers": 2, "draft_vocab_size": 10},
    "mlp": {"num_heads": 3, "inner_size": 12, "tie_weights": False, "scale_input": True},
    "mtp": {"depth": 3, "init": "fresh", "attention": "step0", "qk_norm": True, "qkv_bias": False}
    | {"rope_theta": 1e4, "norm_eps": 1e-6, **LAYER},
    "lm": {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 20},
}
ONCE = {"fc.weight", "weight", "first", "later"}  # whatever the depth


def section(kind: str) -> dict[str, Any]:
    return {"kind": kind, **SCALES, **SECTIONS[kind]}


def slow_weights(kind: str) -> int:
    """Σ over the matrices of a built draft of its size times its uses at a token."""
    module = draft.find(kind)
    config = module.Config(**section(kind))
    target = Interface(torch.randn(V, D), torch.randn(V, D), torch.ones(D), 1e-6)
    d2t = torch.arange(10) if "draft_vocab_size" in SECTIONS[kind] else None
    model = module.Model.build(config, Shape(V, D), target, 0, d2t=d2t)
    matrices: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    uses = dict.fromkeys(matrices, SECTIONS[kind].get("depth", 1))
    uses |= dict.fromkeys(ONCE & set(uses), 1)
    if kind == "medusa":
        uses["head"] = 3
        matrices.pop("bias")
    if kind == "mlp":
        uses = dict.fromkeys(matrices, 1)
        for name in ("norm_weight", "norm_bias"):
            matrices.pop(name)
    if kind != "lm":  # whose embedding is its head
        matrices.pop("embed", None)
    return sum(matrix.numel() * uses[name] for name, matrix in matrices.items())


@pytest.mark.parametrize("kind", sorted(SECTIONS))
def test_every_weight_is_counted_as_often_as_it_is_used(kind: str) -> None:
    assert WEIGHTS[kind](section(kind), V, D) == slow_weights(kind)


def test_training_adds_up_starts_and_arms() -> None:
    fit = {"steps": 10, "batch_sequences": 4}
    params = {
        "prepare": {"train_prompts": 5},
        "generate": {"turns": "last"},
        "drafts": {"lm": section("lm"), "other": section("lm") | {"kind": "unheard_of"}},
        "starts": {"lm-0": {"draft": "lm"}, "other-0": {"draft": "other"}},
        "arms": {"lm-kl-0": {"draft": "lm"}, "lm-tv-0": {"draft": "lm"}},
        "warmup": fit,
        "train": fit | {"steps": 20},
    }
    steps = 0.5 * (10 + 2 * 20)
    tokens = steps * 4 * 100 / 5
    found = training(params, vocab_size=V, hidden_size=D, tokens=100)
    assert found == [("lm", 6 * slow_weights("lm") * tokens)]
