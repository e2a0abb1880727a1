"""Warm starts: whose weights a draft begins with, and every reason to refuse them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import save_draft
from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.export import Source, export_draft, find_format
from pipeline.interface import Shape
from pipeline.published import read_eagle3
from pipeline.warm import begin, check_start
from storage.errors import DraftError
from storage.workspace import tree_digest
from tests.pipeline.test_exports import EAGLE3, MEDUSA, D, V, config, interface, make, source

__all__ = ["source"]
LAYERS = [2, 4, 5]


def section(folder: Path, params: dict[str, Any], **over: Any) -> Any:
    """A section that starts from the folder as it is now."""
    start = {"folder": str(folder), "sha256": tree_digest(folder)}
    module = find(params["kind"])
    return parse("drafts.x", {**params, "start": start, **over}, module.Config)


def begun(folder: Path, source: Source, params: dict[str, Any] = EAGLE3, **over: Any) -> Draft:
    return begin(
        section(folder, params, **over),
        model=find(params["kind"]).Model,
        spec=source.spec,
        interface=source.interface,
        layers=LAYERS,
        seed=5,
    )


def published(tmp_path: Path, source: Source, form: str) -> tuple[Path, Draft]:
    folder, draft = tmp_path / form, make(EAGLE3)
    found = find_format("eagle3", form)
    export_draft(folder, draft, form=found, source=source, config=config("float32"))
    return folder, draft


def checkpoint(tmp_path: Path, params: dict[str, Any] = EAGLE3, **meta: Any) -> tuple[Path, Draft]:
    folder, draft = tmp_path / "model", make(params)
    written = {"objective": "kl", "target": "f" * 64, "hidden_layers": LAYERS, **meta}
    full = draft.config.model_dump()
    save_draft(folder, draft, config=full, meta=written, shape=Shape(V, D))
    return folder, draft


def assert_same(one: Draft, other: Draft) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("form", ["speculators", "sglang", "eagle"])
def test_a_published_folder_gives_its_weights_and_its_vocabulary(
    tmp_path: Path, source: Source, form: str
) -> None:
    folder, draft = published(tmp_path, source, form)
    assert_same(begun(folder, source), draft)


def test_another_arms_checkpoint_gives_its_weights(tmp_path: Path, source: Source) -> None:
    folder, draft = checkpoint(tmp_path)
    assert_same(begun(folder, source, depth=5, lr_scale=0.5), draft)
    folder, draft = checkpoint(tmp_path / "medusa", MEDUSA)
    assert_same(begun(folder, source, MEDUSA), draft)


def test_what_transformers_leaves_out_has_its_default(tmp_path: Path, source: Source) -> None:
    """Published folders hold differences from the defaults alone, and keys of transformers' own."""
    folder, draft = published(tmp_path, source, "speculators")
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    layer = whole["transformer_layer_config"]
    for name in ("hidden_act", "attention_bias", "mlp_bias"):
        del layer[name]
    layer["rope_theta"] = layer.pop("rope_parameters")["rope_theta"]
    whole |= {"transformers_version": "5", "auto_map": {"": "x.py"}}
    path.write_text(json.dumps(whole))
    assert_same(read_eagle3(folder).draft, draft)
    del whole["norm_before_residual"]  # true to vLLM, false to speculators
    path.write_text(json.dumps(whole))
    with pytest.raises(DraftError, match="norm_before_residual is missing; expected every"):
        read_eagle3(folder)


@pytest.mark.parametrize("form", ["speculators", "eagle"])
def test_what_engines_take_from_the_target_may_be_left_out(
    tmp_path: Path, source: Source, form: str
) -> None:
    """Published folders seldom hold the embedding, and engines read `d2t` alone."""
    folder, draft = published(tmp_path, source, form)
    _changed(folder, lambda t: (t.pop("embed_tokens.weight"), t.pop("t2d")))
    assert_same(begun(folder, source), draft)
    with pytest.raises(DraftError, match=r"tensor t2d is missing; expected \[23\]"):
        find_format("eagle3", form).read(folder, None)
    _changed(folder, lambda t: t.pop("d2t"))
    with pytest.raises(DraftError, match=r"tensor d2t is missing; expected \[9\]"):
        begun(folder, source)


def test_scaled_rotary_positions_are_refused(tmp_path: Path, source: Source) -> None:
    folder, _ = published(tmp_path, source, "eagle")
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    del whole["rope_parameters"]
    path.write_text(json.dumps({**whole, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}))
    with pytest.raises(DraftError, match=r"rope_parameters\.\w+ (is|is unknown)"):
        read_eagle3(folder)


def test_other_content_than_was_pinned_is_refused(tmp_path: Path, source: Source) -> None:
    folder, _ = checkpoint(tmp_path)
    pinned = section(folder, EAGLE3).start
    assert check_start(pinned) == folder
    (folder / "more").write_text("x")
    with pytest.raises(
        DraftError, match=rf"digest {tree_digest(folder)}; expected {pinned.sha256}"
    ):
        check_start(pinned)
    with pytest.raises(DraftError, match=r"no config\.json in .*nowhere, which"):
        check_start(pinned.model_copy(update={"folder": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"norm_output": True}, "holds a draft with norm_output False; expected True"),
        ({"rope_theta": 1e4}, r"with rope_theta 500\.0; expected 10000\.0"),
        ({"num_heads": 2}, "with num_heads 4; expected 2"),
        ({"num_kv_heads": None}, "with num_kv_heads 2; expected 4"),
        ({"draft_vocab_size": None}, "with draft_vocab_size 9; expected 23"),
        ({"intermediate_size": 10}, "with intermediate_size 12; expected 10"),
        ({"train_head": False}, "tensor head was trained .* set train_head: true"),
    ],
)
def test_another_architecture_is_refused_by_name(
    tmp_path: Path, source: Source, over: dict[str, Any], sentence: str
) -> None:
    folder, _ = checkpoint(tmp_path)
    with pytest.raises(DraftError, match=sentence):
        begun(folder, source, **over)


def test_another_kind_target_or_layers_are_refused(tmp_path: Path, source: Source) -> None:
    folder, _ = checkpoint(tmp_path, MEDUSA)
    with pytest.raises(DraftError, match="holds a draft of kind medusa; expected kind eagle3"):
        begun(folder, source)
    folder, _ = checkpoint(tmp_path / "b", target="0" * 64)
    with pytest.raises(DraftError, match=r"with the target fingerprint 0{64}"):
        begun(folder, source)
    folder, _ = checkpoint(tmp_path / "c", hidden_layers=[1, 2, 3])
    with pytest.raises(DraftError, match=r"fuses the layers \[1, 2, 3\]; expected \[2, 4, 5\]"):
        begun(folder, source)


def _changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_tensors_of_a_published_folder_are_checked(tmp_path: Path, source: Source) -> None:
    folder, _ = published(tmp_path, source, "eagle")
    _changed(folder, lambda t: t.update({"embed_tokens.weight": t["embed_tokens.weight"] + 1}))
    with pytest.raises(DraftError, match="tensor embed was trained and is no longer"):
        begun(folder, source)
    _changed(folder, lambda t: t.pop("fc.weight"))
    with pytest.raises(DraftError, match=r"tensor fc\.weight is missing; expected \[8, 24\]"):
        begun(folder, source)


def test_a_pickle_or_another_folder_is_refused(tmp_path: Path, source: Source) -> None:
    folder, _ = published(tmp_path, source, "eagle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DraftError, match=r"weights as pytorch_model\.bin, a pickle"):
        read_eagle3(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(DraftError, match=r"no .*model\.safetensors; expected weights"):
        read_eagle3(folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DraftError, match="is not a safetensors file"):
        read_eagle3(folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(
        DraftError, match=r"architectures \['LlamaForCausalLM'\]; expected an EAGLE"
    ):
        read_eagle3(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DraftError, match=r"no .*config\.json; expected a published draft"):
        read_eagle3(folder)


def test_a_copy_in_half_precision_is_the_targets_embedding(tmp_path: Path, source: Source) -> None:
    assert source.interface is not None
    folder, draft = tmp_path / "half", make({**EAGLE3, "train_head": False})
    form = find_format("eagle3", "eagle")
    export_draft(folder, draft, form=form, source=source, config=config("bfloat16"))
    start = begun(folder, replace(source, interface=interface()), train_head=False)
    assert torch.equal(start.state_dict()["embed"], interface().embed)
    assert start.trainable().keys() == draft.trainable().keys()
