"""Every export of a draft that reads the target, opened again: equal logits, or a name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.export import ExportConfig, Source, export_draft, find_format, formats
from pipeline.interface import Interface, Mtp, Shape
from pipeline.published import default_layers, read_eagle3
from pipeline.target import TargetSpec
from storage.errors import ConfigError, DraftError

V, D = 23, 8
SCALE = {"lr_scale": 1.0, "steps_scale": 1.0}
EAGLE3 = {
    "kind": "eagle3",
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 6,
    "intermediate_size": 12,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "norm_output": False,
    "rope_theta": 500.0,
    "norm_eps": 1e-5,
    "train_head": True,
    "draft_vocab_size": 9,
    **SCALE,
}
EAGLE31 = {
    **EAGLE3,
    "norm_before_residual": True,
    "norm_before_fc": True,
    "norm_output": True,
    "draft_vocab_size": None,
}
MEDUSA = {"kind": "medusa", "num_heads": 3, "num_layers": 2, **SCALE}
MLP = {
    "kind": "mlp",
    "num_heads": 3,
    "inner_size": 10,
    "tie_weights": False,
    "scale_input": True,
    **SCALE,
}
MTP = {
    "kind": "mtp",
    "depth": 2,
    "init": "fresh",
    "attention": "step0",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 6,
    "intermediate_size": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "rope_theta": 500.0,
    "norm_eps": 1e-5,
    **SCALE,
}


class Case(NamedTuple):
    form: str
    section: dict[str, Any]


CASES = {
    "speculators": Case("speculators", EAGLE3),
    "speculators 3.1": Case("speculators", EAGLE31),
    "speculators fc_norm": Case("speculators", {**EAGLE3, "fc_norm": True}),
    "sglang": Case("sglang", {**EAGLE3, "fc_norm": True}),
    "sglang whole": Case("sglang", {**EAGLE3, "draft_vocab_size": None, "train_head": False}),
    "eagle": Case("eagle", EAGLE3),
    "medusa": Case("medusa", MEDUSA),
    "medusa heads": Case("medusa", {**MEDUSA, "train_heads": True, "draft_vocab_size": 9}),
    "mlp": Case("mlp_speculator", MLP),
    "mlp tied": Case("mlp_speculator", {**MLP, "tie_weights": True}),
    "mtp": Case("speculators", {**MTP, "attention": "per_step"}),
    "native deepseek": Case("native", {**MTP, "qk_norm": False}),
    "native mimo": Case("native", {**MTP, "qk_norm": False, "qkv_bias": True}),
}


def interface(layout: str = "deepseek") -> Interface:
    g = torch.Generator().manual_seed(7)
    embed, head = (torch.randn(V, D, generator=g) for _ in range(2))
    prefix = {"deepseek": "model.layers.8.", "mimo": "model.mtp_layers.0."}.get(layout, "mtp.")
    own = Mtp(layout=layout, prefix=prefix, settings={}, tensors={})
    return Interface(embed, head, torch.ones(D), 1e-6, mtp=lambda: own)


def make(section: dict[str, Any]) -> Draft:
    """A draft far from where it was initialised."""
    module, size = find(section["kind"]), section.get("draft_vocab_size")
    d2t = None if size is None else torch.arange(size) * 2 + 1
    config = parse("drafts.x", section, module.Config)
    draft: Draft = module.Model.build(config, Shape(V, D), interface(), 0, d2t=d2t)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in draft.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return draft


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return source_in(tmp_path / "home")


def source_in(home: Path) -> Source:
    """The target of the cases, eight layers deep."""
    home.mkdir()
    (home / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    spec = TargetSpec(
        kind="pretrained",
        model="org/target",
        revision="a" * 40,
        fingerprint="f" * 64,
        weights_sha256="",
        tokenizer_sha256="",
        template_sha256="",
        vocab_size=V,
        hidden_size=D,
        num_layers=8,
        eos_ids=[0],
        bos_id=None,
        context_tokens=256,
        dtype="float32",
        sharpen=1.0,
    )
    described = {
        "objective": "lk_lambda",
        "config": {"num_heads": 4},
        "hidden_layers": [2, 4, 5],
        "source": {"target": "f" * 64, "cache": "c" * 64},
    }
    return Source("arm-0", spec, home, described, interface=interface())


def config(dtype: str) -> ExportConfig:
    parsed: ExportConfig = parse(
        "export", {"dtype": dtype, "num_assistant_tokens": 3}, ExportConfig
    )
    return parsed


def written(tmp_path: Path, source: Source, case: Case, dtype: str = "float32") -> Path:
    folder, form = tmp_path / "export", find_format(case.section["kind"], case.form)
    draft = make(case.section)
    export_draft(folder, draft, form=form, source=source, config=config(dtype))
    return folder


def of(name: str, source: Source) -> Source:
    """The source whose target has an MTP module of the case's layout."""
    layout = name.rsplit(maxsplit=1)[-1]
    return replace(source, interface=interface(layout)) if layout == "mimo" else source


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_opened_again_is_the_draft(
    tmp_path: Path, source: Source, name: str, dtype: str
) -> None:
    """`export_draft` compares bit for bit; here: it does hold the draft, in the asked dtype."""
    folder = written(tmp_path, of(name, source), CASES[name], dtype)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    stored = load_file(folder / "model.safetensors")
    kinds = {x.dtype for x in stored.values() if x.is_floating_point()}
    assert kinds == {getattr(torch, dtype)}


@pytest.mark.parametrize("name", CASES)
def test_an_altered_tensor_is_not_the_draft(tmp_path: Path, source: Source, name: str) -> None:
    source, case = of(name, source), CASES[name]
    folder = written(tmp_path, source, case)
    form, draft = find_format(case.section["kind"], case.form), make(case.section)
    tensors = load_file(folder / "model.safetensors")
    first = next(key for key, x in sorted(tensors.items()) if x.is_floating_point())
    tensors[first] = tensors[first] * 1.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DraftError, match=r"opened again with logits|copies, because tie_weights"):
        form.check(folder, draft, source, config("float32"))


@pytest.mark.parametrize("name", CASES)
def test_every_missing_extra_or_misnamed_tensor_is_named(
    tmp_path: Path, source: Source, name: str
) -> None:
    source, case = of(name, source), CASES[name]
    folder = written(tmp_path, source, case)
    read = find_format(case.section["kind"], case.form).read
    path = folder / "model.safetensors"
    whole = load_file(path)
    for key in whole:
        without = {k: x for k, x in whole.items() if k != key}
        _refused(path, without, key, "missing", lambda: read(folder, source.interface))
    wings = {**whole, "wings": torch.zeros(2)}
    _refused(path, wings, "wings", r"\[2\]", lambda: read(folder, source.interface))
    key = max(whole, key=lambda k: whole[k].ndim)
    renamed = {k if k != key else f"a.{k}": x for k, x in whole.items()}
    _refused(path, renamed, f"a.{key}", r"\[", lambda: read(folder, source.interface))
    other = {**whole, key: whole[key][:-1].contiguous()}
    _refused(path, other, key, r"\[", lambda: read(folder, source.interface))


def _refused(
    path: Path, tensors: dict[str, Tensor], key: str, what: str, read: Callable[[], object]
) -> None:
    save_file(tensors, path)
    with pytest.raises(DraftError, match=rf"tensor {key} is {what}"):
        read()


@pytest.mark.parametrize("name", CASES)
def test_every_missing_or_unknown_flag_is_named(tmp_path: Path, source: Source, name: str) -> None:
    source, case = of(name, source), CASES[name]
    folder = written(tmp_path, source, case)
    read, path = find_format(case.section["kind"], case.form).read, folder / "config.json"
    whole = json.loads(path.read_text())
    for dotted in _leaves(whole):
        path.write_text(json.dumps(_without(whole, dotted.split("."))))
        with pytest.raises(DraftError, match=rf"config\.json: {dotted} is missing"):
            read(folder, source.interface)
    path.write_text(json.dumps({**whole, "norm_wings": True}))
    with pytest.raises(DraftError, match="norm_wings is unknown; expected only flags"):
        read(folder, source.interface)


def _leaves(value: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, inner in value.items():
        inside = _leaves(inner, f"{prefix}{key}.") if isinstance(inner, dict) else [prefix + key]
        found += inside
    return found


def _without(value: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    if len(keys) == 1:
        return {k: v for k, v in value.items() if k != keys[0]}
    return {k: _without(v, keys[1:]) if k == keys[0] else v for k, v in value.items()}


def test_a_flag_of_another_value_or_type_is_named(tmp_path: Path, source: Source) -> None:
    folder = written(tmp_path, source, CASES["speculators"])
    path, read = folder / "config.json", find_format("eagle3", "speculators").read
    whole = json.loads(path.read_text())
    layer = whole["transformer_layer_config"]
    for change, sentence in (
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; expected 'silu', which is all"),
        ({"num_attention_heads": "4"}, r"num_attention_heads is '4'; expected a value of type int"),
        ({"num_attention_heads": True}, r"num_attention_heads is True; expected a value of type"),
        ({"attention_bias": True}, r"attention_bias is True; expected False"),
    ):
        changed = {**whole, "transformer_layer_config": {**layer, **change}}
        path.write_text(json.dumps(changed))
        with pytest.raises(DraftError, match=rf"transformer_layer_config\.{sentence}"):
            read(folder, None)


def test_two_rotary_bases_are_refused(tmp_path: Path, source: Source) -> None:
    folder = written(tmp_path, source, CASES["sglang"])
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 7.0}))
    with pytest.raises(DraftError, match=r"rope_theta is 7\.0; expected 500\.0, as rope_param"):
        find_format("eagle3", "sglang").read(folder, None)


def test_layer_ids_are_those_of_each_engine(tmp_path: Path, source: Source) -> None:
    """Ours are `hidden_states` indices: speculators' too; SGLang counts one less."""
    for form, ids in (("speculators", [2, 4, 5]), ("sglang", [1, 3, 4])):
        folder = written(tmp_path, source, Case(form, EAGLE3))
        described = json.loads((folder / "config.json").read_text())
        inside = described.get("eagle_config", described)
        assert inside["eagle_aux_hidden_state_layer_ids"] == ids
        assert read_eagle3(folder).layers == [2, 4, 5]


def test_engine_ids_name_the_streams_that_hooks_see(tiny_model: Callable[..., Any]) -> None:
    """SGLang's id i is captured after layer i; vLLM's k is the input of layer k."""
    from pipeline.published import input_index, output_index

    model, seen = tiny_model(num_layers=4), {}
    layers = model.model.layers

    def keep(i: int) -> Any:
        return lambda module, given, out: seen.update({i: out if torch.is_tensor(out) else out[0]})

    for i, layer in enumerate(layers):
        layer.register_forward_hook(keep(i))
    states = model(torch.arange(9)[None], output_hidden_states=True).hidden_states
    ours = [1, 2, 3]
    for k, i in zip(ours, output_index(ours), strict=True):
        assert torch.equal(states[k], seen[i])
    assert input_index(output_index(ours)) == ours


def test_offsets_give_target_ids(tmp_path: Path, source: Source) -> None:
    folder = written(tmp_path, source, CASES["speculators"])
    stored = load_file(folder / "model.safetensors")
    ids = stored["d2t"] + torch.arange(9)
    assert ids.tolist() == (torch.arange(9) * 2 + 1).tolist()
    assert stored["t2d"].nonzero().flatten().tolist() == ids.tolist()
    assert stored["t2d"].dtype == torch.bool


def test_maps_that_contradict_each_other_are_refused(tmp_path: Path, source: Source) -> None:
    folder = written(tmp_path, source, CASES["speculators"])
    path = folder / "model.safetensors"
    stored = load_file(path)
    save_file({**stored, "t2d": ~stored["t2d"]}, path)
    with pytest.raises(DraftError, match="t2d keeps other ids than d2t names"):
        find_format("eagle3", "speculators").read(folder, None)


@pytest.mark.parametrize(
    ("form", "option"),
    [
        *(("sglang", n) for n in ("norm_before_residual", "norm_before_fc", "norm_output")),
        *(
            ("eagle", n)
            for n in ("norm_before_residual", "norm_before_fc", "norm_output", "fc_norm")
        ),
    ],
)
def test_an_option_that_an_engine_does_not_serve_is_refused(form: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"an eagle3 draft with {option} for the format {form}"):
        find_format("eagle3", form).require(make({**EAGLE3, option: True}).config)


@pytest.mark.parametrize(
    ("form", "section", "sentence"),
    [
        ("speculators", {**MTP, "qk_norm": False}, "mtp draft with qk_norm false"),
        ("speculators", {**MTP, "qkv_bias": True}, "mtp draft with qkv_bias true"),
        ("speculators", {**MTP, "draft_vocab_size": 9}, "mtp draft with a pruned vocabulary"),
        ("native", {**MTP, "draft_vocab_size": 9}, "mtp draft with a pruned vocabulary"),
        ("mlp_speculator", {**MLP, "draft_vocab_size": 9}, "mlp draft with draft_vocab_size 9"),
    ],
)
def test_a_shape_that_a_format_cannot_say_is_refused(
    form: str, section: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        find_format(section["kind"], form).require(make(section).config)


@pytest.mark.parametrize(
    ("form", "layers", "sentence"),
    [
        ("speculators", [5, 2, 4], "fuses the layers .*; expected ascending and distinct"),
        ("sglang", [2, 2, 4], "fuses the layers .*; expected ascending and distinct"),
        ("sglang", [0, 2, 4], "reads layer 0, the embedding's output; expected layers from 1"),
        ("eagle", [1, 4, 5], r"fuses the layers \[1, 4, 5\]; expected \[2, 4, 5\]"),
        ("speculators", [], "without the layers that it reads; expected hidden_layers"),
    ],
)
def test_layers_that_an_engine_would_not_read_are_refused(
    tmp_path: Path, source: Source, form: str, layers: list[int], sentence: str
) -> None:
    described = {**source.draft, "hidden_layers": layers}
    with pytest.raises(DraftError, match=sentence):
        written(tmp_path, replace(source, draft=described), Case(form, EAGLE3))


def test_default_layers_are_the_papers() -> None:
    assert default_layers(32) == [2, 16, 29]


def test_a_target_without_native_names_is_refused(tmp_path: Path, source: Source) -> None:
    case = CASES["native deepseek"]
    assert source.interface is not None
    bare = replace(source, interface=replace(source.interface, mtp=None))
    with pytest.raises(DraftError, match="without an MTP module whose key names we know"):
        written(tmp_path, bare, case)
    gated = replace(source, interface=interface("qwen3_next"))
    with pytest.raises(DraftError, match="module has the names of qwen3_next; expected one of"):
        written(tmp_path, gated, case)


def test_the_card_says_where_the_draft_comes_from_and_what_was_measured(
    tmp_path: Path, source: Source
) -> None:
    measured = ["| instrument | T |", "| replay | 1 |"]
    folder = written(tmp_path, replace(source, measured=measured), CASES["medusa"])
    card = (folder / "README.md").read_text()
    for fact in ("org/target", "a" * 40, "f" * 64, "c" * 64, "lk_lambda", *measured, "legacy"):
        assert fact in card
    folder = written(tmp_path, source, CASES["medusa"])
    assert "Nothing was measured of this arm." in (folder / "README.md").read_text()


def test_every_format_is_tried() -> None:
    assert {case.form for case in CASES.values()} | {"transformers"} == set(formats())
