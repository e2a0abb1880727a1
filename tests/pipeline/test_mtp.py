"""A draft that begins as the target's own MTP module: pinned, renamed, refused where it differs."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import parse
from pipeline.draft import find
from pipeline.interface import Interface, Mtp, Shape
from pipeline.pin import write_interface, write_mtp
from pipeline.target import read_interface
from storage.errors import DraftError

D, V = 32, 64
SECTION = {
    "kind": "mtp",
    "depth": 2,
    "init": "target",
    "attention": "step0",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": None,
    "intermediate_size": 64,
    "qk_norm": False,
    "qkv_bias": False,
    "rope_theta": 10_000.0,
    "norm_eps": 1e-6,
    "lr_scale": 1.0,
    "steps_scale": 1.0,
}
NAMES = {
    "deepseek": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
}


def own_module(layout: str) -> dict[str, Tensor]:
    """A dense module of that layout, random."""
    g = torch.Generator().manual_seed(2)
    token, hidden, project, final = NAMES[layout]
    shapes = {
        **dict.fromkeys(
            (token, hidden, final, "input_layernorm", "post_attention_layernorm"), (D,)
        ),
        project: (D, 2 * D),
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (D // 2, D),
        "self_attn.v_proj": (D // 2, D),
        "self_attn.o_proj": (D, D),
        "mlp.gate_proj": (64, D),
        "mlp.up_proj": (64, D),
        "mlp.down_proj": (D, 64),
    }
    return {f"{n}.weight": torch.randn(s, generator=g) for n, s in shapes.items()}


@pytest.fixture
def pinned(tmp_path: Path, tiny_model: Callable[..., Any]) -> Callable[..., Interface]:
    """The interface of a target whose files hold these tensors too."""

    def pin(tensors: dict[str, Tensor]) -> Interface:
        model, home, out = tiny_model(), tmp_path / "home", tmp_path / "target"
        model.save_pretrained(home)
        save_file({"lm_head.weight": torch.zeros(1), **tensors}, home / "more.safetensors")
        write_interface(out, model)
        write_mtp(out, home, model.config)
        return read_interface(out)

    return pin


def build(interface: Interface, **over: Any) -> Any:
    module = find("mtp")
    config = parse("drafts.mtp", {**SECTION, **over}, module.Config)
    return module.Model.build(config, Shape(V, D), interface, 0)


@pytest.mark.parametrize(
    ("layout", "prefix"), [("deepseek", "model.layers.4."), ("mimo", "model.mtp_layers.0.")]
)
def test_it_begins_with_the_targets_weights(
    pinned: Callable[..., Interface], layout: str, prefix: str
) -> None:
    own = own_module(layout)
    draft = build(pinned({f"{prefix}{name}": x for name, x in own.items()}))
    token, hidden, project, final = (own[f"{n}.weight"] for n in NAMES[layout])
    assert torch.equal(draft.token_norm.weight, token)
    assert torch.equal(draft.hidden_norm.weight, hidden)
    assert torch.equal(draft.norm.weight, final)
    assert torch.equal(draft.attention.out.weight, own["self_attn.o_proj.weight"])
    rows = [own[f"self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(draft.attention.qkv.weight, torch.cat(rows))
    # MiMo's projection reads [hidden; embedding]; ours, as DeepSeek's, [embedding; hidden]
    swapped = torch.cat([project[:, D:], project[:, :D]], dim=1)
    assert torch.equal(draft.project.weight, swapped if layout == "mimo" else project)


def test_a_target_without_a_module_is_refused_unless_fresh(
    pinned: Callable[..., Interface],
) -> None:
    interface = pinned({})
    assert interface.mtp is None
    with pytest.raises(DraftError, match=r"without a multi-token-prediction .* set init: fresh"):
        build(interface)
    assert build(interface, init="fresh") is not None


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        (
            {"num_heads": 2},
            "num_heads 2 for a target whose MTP module has 4; expected the target's",
        ),
        ({"num_kv_heads": 4}, "num_kv_heads 4 for a target whose MTP module has 2"),
        ({"intermediate_size": 32}, "intermediate_size 32 for a target whose MTP module has 64"),
        ({"rope_theta": 5e5}, r"rope_theta 500000\.0 for a target whose MTP module has 10000\.0"),
        ({"norm_eps": 1e-5}, "norm_eps 1e-05 for a target whose MTP module has 1e-06"),
        ({"qk_norm": True}, r"tensor self_attn\.k_norm\.weight is missing; expected \[8\]"),
    ],
)
def test_a_section_that_is_not_the_targets_is_refused(
    pinned: Callable[..., Interface], over: dict[str, Any], sentence: str
) -> None:
    own = {f"model.layers.4.{name}": x for name, x in own_module("deepseek").items()}
    with pytest.raises(DraftError, match=sentence):
        build(pinned(own), **over)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("mlp.experts.0.up_proj.weight", r"tensor mlp\.experts\.0\.up_proj\.weight is \[3, 3\]"),
        ("embed_tokens.weight", r"an MTP module .*|whose MTP module has a embed_tokens\.weight"),
    ],
)
def test_a_module_that_is_not_dense_or_shared_is_refused(
    pinned: Callable[..., Interface], extra: str, sentence: str
) -> None:
    own = {**own_module("deepseek"), extra: torch.zeros(3, 3)}
    interface = pinned({f"model.layers.4.{name}": x for name, x in own.items()})
    with pytest.raises(DraftError, match=sentence):
        build(interface)


def test_copies_of_embedding_and_head_are_no_part_of_the_module(
    pinned: Callable[..., Interface],
) -> None:
    interface = pinned({f"model.layers.4.{k}": x for k, x in own_module("deepseek").items()})
    assert interface.mtp is not None
    own = interface.mtp()
    shared = {"embed_tokens.weight": interface.embed, "shared_head.head.weight": interface.lm_head}
    carried = Mtp(own.layout, own.prefix, own.settings, {**own.tensors, **shared})
    draft = build(replace(interface, mtp=partial(lambda module: module, carried)))
    assert torch.equal(draft.token_norm.weight, own.tensors["enorm.weight"])


def test_gated_attention_is_refused(pinned: Callable[..., Interface]) -> None:
    with pytest.raises(DraftError, match=r"names of qwen3_next, .* expected a module of one"):
        build(pinned({"mtp.fc.weight": torch.zeros(2, 2)}))


def test_the_pinned_module_keeps_names_and_bits(
    pinned: Callable[..., Interface], tmp_path: Path
) -> None:
    own = {k: x.bfloat16() for k, x in own_module("mimo").items()}
    pinned({f"model.mtp_layers.0.{k}": x for k, x in own.items()})
    stored = load_file(tmp_path / "target" / "interface" / "mtp.safetensors")
    assert stored.keys() == own.keys()
    assert all(torch.equal(stored[k], own[k]) for k in own)
    assert json.loads((tmp_path / "home" / "config.json").read_text())["model_type"] == "llama"
