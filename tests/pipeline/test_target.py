"""The target: pinning, refusing, loading, and its two halves against transformers' own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import tests.targets
from pipeline.capture import law_of, layout_of
from pipeline.config import parse
from pipeline.embedded import train_tokenizer
from pipeline.interface import Head, HeadRule
from pipeline.pin import (
    Origin,
    PretrainedConfig,
    TargetConfig,
    check_folder,
    find_pretrained,
    pin,
    probe,
    write_interface,
)
from pipeline.session import Session
from pipeline.target import (
    Target,
    TargetSpec,
    load_target,
    read_head,
    read_interface,
    read_spec,
    sample_digest,
)
from pipeline.teacher import Pass
from storage.errors import ConfigError, DataError, TargetError
from storage.sequences import Sequences
from storage.tables import SEQUENCES, write_table
from tests.pipeline.test_capture import config_of

Build = Callable[..., Any]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the quick brown fox " * 3], 262, context_tokens=256)


@pytest.fixture
def home(tmp_path: Path, tiny_model: Build, tokenizer: Any) -> Path:
    """A folder as `save_pretrained` leaves it."""
    folder = tmp_path / "model"
    tiny_model(vocab_size=270).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pinned(home: Path, tmp_path: Path) -> Path:
    out = tmp_path / "target"
    pin(home, out, origin=Origin("pretrained", str(home)))
    return out


def pretrained(**over: Any) -> PretrainedConfig:
    section = {
        "kind": "pretrained",
        "model": "org/name",
        "revision": None,
        "dtype": "float32",
        "trust_remote_code": False,
        "threads": 1,
    }
    config: PretrainedConfig = parse("target", {**section, **over}, TargetConfig)
    return config


def spec_of(model: Any, **over: Any) -> TargetSpec:
    text = model.config.get_text_config()
    fields = {
        "kind": "pretrained", "model": "m", "revision": None, "fingerprint": "f",
        "weights_sha256": "w", "tokenizer_sha256": "t", "template_sha256": "c",
        "vocab_size": text.vocab_size, "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers, "eos_ids": [0], "bos_id": None,
        "context_tokens": 64, "dtype": "float32", "sharpen": 1.0,
    }  # fmt: skip
    return TargetSpec.model_validate({**fields, **over})


def test_a_pinned_folder_loads_and_gives_the_models_own_logits(home: Path, pinned: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(12).reshape(2, 6)
    target = load_target(pinned)
    own = AutoModelForCausalLM.from_pretrained(home)(tokens).logits
    features = target.forward(tokens)
    assert features.hidden is None
    assert torch.equal(target.logits(features.last_hidden.flatten(0, 1)), own.flatten(0, 1))
    assert not any(p.requires_grad for p in target.model.parameters())
    assert target.tokenizer.decode(target.tokenizer("quick é")["input_ids"]) == "quick é"


def test_the_description_holds_what_others_need(home: Path, pinned: Path) -> None:
    spec = read_spec(pinned)
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers) == (270, 32, 4)
    assert (spec.eos_ids, spec.bos_id, spec.context_tokens) == ([0], None, 256)
    assert (spec.kind, spec.model, spec.dtype, spec.sharpen) == (
        "pretrained", str(home), "float32", 1.0,
    )  # fmt: skip
    assert len(spec.fingerprint) == len(spec.weights_sha256) == 64


def test_the_fingerprint_follows_content_and_not_place(home: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        return pin(folder, tmp_path / "out", origin=Origin("pretrained", str(folder))).fingerprint

    first = fingerprint(home)
    moved = tmp_path / "moved"
    shutil.copytree(home, moved)
    assert fingerprint(moved) == first
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    templated = fingerprint(moved)
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert len({first, templated, fingerprint(home)}) == 3


def test_eos_ids_are_those_of_the_generation_config(home: Path, tmp_path: Path) -> None:
    (home / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert pin(home, tmp_path / "t", origin=Origin("pretrained", "m")).eos_ids == [3, 7]


def test_hidden_states_are_the_inputs_of_the_layers(tiny_model: Build) -> None:
    model = tiny_model()
    target = Target(model, None, spec_of(model))
    tokens = torch.arange(10).reshape(2, 5)
    seen: dict[int, torch.Tensor] = {}

    def output(k: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            seen[k] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [model.model.embed_tokens.register_forward_hook(output(0))]
    handles += [
        layer.register_forward_hook(output(k + 1)) for k, layer in enumerate(model.model.layers)
    ]
    own = model(tokens, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    features = target.forward(tokens, layers=[3, 0, 2])
    assert features.hidden is not None
    for place, k in enumerate([3, 0, 2]):
        assert torch.equal(features.hidden[:, :, place], seen[k])  # the stream after k layers
        assert torch.equal(features.hidden[:, :, place], own[k])
    assert torch.equal(features.last_hidden, own[4])  # after the norm, unlike the stream
    assert not torch.equal(own[4], seen[4])


@pytest.mark.parametrize("k", [-1, 4])
def test_a_layer_outside_the_target_is_refused(tiny_model: Build, k: int) -> None:
    model = tiny_model()
    with pytest.raises(TargetError, match=f"hidden layer {k} .* 4 layers; expected .* 0 to 3 "):
        Target(model, None, spec_of(model)).forward(torch.zeros(1, 2).long(), layers=[k])


def test_a_cached_pass_continues_the_first(tiny_model: Build) -> None:
    from transformers import DynamicCache

    model = tiny_model()
    target = Target(model, None, spec_of(model))
    tokens = torch.arange(8)[None]
    whole = target.forward(tokens, layers=[1])
    cache = DynamicCache()
    target.forward(tokens[:, :5], cache=cache)
    rest = target.forward(tokens[:, 5:], cache=cache, layers=[1])
    assert rest.hidden is not None
    assert whole.hidden is not None
    torch.testing.assert_close(rest.last_hidden, whole.last_hidden[:, 5:])
    torch.testing.assert_close(rest.hidden, whole.hidden[:, 5:])


SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}
RULED = {"Gemma2", "Cohere", "Granite"}


def family(name: str) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **FAMILIES[name]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    nn.init.normal_(model.get_output_embeddings().weight)
    nn.init.normal_(model.get_decoder().norm.weight)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_head_gives_the_models_own_logits(name: str) -> None:
    model = family(name)
    target = Target(model, None, spec_of(model))
    tokens = torch.arange(9)[None]
    own = model(tokens).logits[0]
    logits = target.logits(target.forward(tokens).last_hidden[0])
    assert torch.equal(logits, own)
    plain = model.get_output_embeddings()(target.forward(tokens).last_hidden[0])
    assert torch.equal(plain, own) == (name not in RULED)
    probe(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Qwen3", "Gemma2", "Granite"])
def test_a_head_is_written_with_its_scaling_and_caps(name: str, dtype: Any, tmp_path: Path) -> None:
    """What mode rebuild makes laws with gives the target's own logits, bit for bit."""
    model = family(name).to(dtype)
    target = Target(model, None, spec_of(model))
    write_interface(tmp_path, model)
    head = read_head(tmp_path)
    states = target.forward(torch.arange(9)[None]).last_hidden[0]
    assert head.weight.dtype == dtype
    assert torch.equal(head.logits(states), target.logits(states))
    assert (head.rule == HeadRule()) == (name not in RULED)
    assert head.digest == Head(head.weight.clone(), head.rule).digest
    others = [
        Head(head.weight * 2, head.rule),
        Head(head.weight[:-1], head.rule),
        Head(head.weight.half(), head.rule),
        Head(head.weight, HeadRule(caps=(7.0,))),
    ]
    assert len({head.digest, *(other.digest for other in others)}) == 5


def test_a_family_with_an_unknown_rule_is_refused(tiny_model: Build) -> None:
    model = tiny_model()
    forward = model.forward
    model.forward = lambda *args, **kwargs: _doubled(forward(*args, **kwargs))
    with pytest.raises(
        TargetError, match=r"the logits of LlamaForCausalLM differs .*; expected a h"
    ):
        probe(Target(model, None, spec_of(model)))


def _doubled(out: Any) -> Any:
    out.logits = out.logits * 2
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_interface_is_the_models_own(tiny_model: Build, tmp_path: Path, dtype: Any) -> None:
    model = tiny_model().to(dtype)
    nn.init.normal_(model.model.norm.weight)
    write_interface(tmp_path, model)
    interface = read_interface(tmp_path)
    pairs = {
        "embed": (interface.embed, model.model.embed_tokens.weight),
        "lm_head": (interface.lm_head, model.lm_head.weight),
        "norm": (interface.norm, model.model.norm.weight),
    }
    for ours, own in pairs.values():
        assert ours.dtype == torch.float32
        assert torch.equal(ours.to(dtype), own)
    assert interface.norm_eps == model.config.rms_norm_eps


def test_a_tied_head_and_a_norm_of_one_plus_weight_are_read_as_they_act(tmp_path: Path) -> None:
    model = family("Gemma2")
    write_interface(tmp_path, model)
    interface = read_interface(tmp_path)
    assert torch.equal(interface.embed, interface.lm_head)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + interface.norm_eps)
    torch.testing.assert_close(unit * interface.norm, model.model.norm(x))


def test_interface_bytes_are_the_same_every_time(tiny_model: Build, tmp_path: Path) -> None:
    digests = set()
    for turn in range(8):  # metadata of several keys would come in random order
        write_interface(tmp_path / str(turn), tiny_model())
        digests.add((tmp_path / str(turn) / "interface" / "interface.safetensors").read_bytes())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.zeros(64))),
         "with a bias; expected two matrices of one shape and no bias"),
        (lambda m: setattr(m, "lm_head", nn.Linear(32, 60, bias=False)),
         r"an LM head of \(60, 32\); expected two matrices"),
        (lambda m: setattr(m.model, "norm", _LayerNorm(32)),
         "a final norm of type _LayerNorm; expected an RMS norm"),
        (lambda m: delattr(m.model, "norm"),
         "LlamaForCausalLM whose decoder has no norm; expected a causal LM built as"),
    ],
)  # fmt: skip
def test_a_model_without_a_usable_interface_is_refused(
    tiny_model: Build, tmp_path: Path, break_it: Callable[[Any], None], sentence: str
) -> None:
    model = tiny_model()
    break_it(model)
    with pytest.raises(TargetError, match=sentence):
        write_interface(tmp_path, model)


class _LayerNorm(nn.LayerNorm):
    """Subtracts the mean."""


# on a CPU the disk is the second device: accelerate's hooks fetch what lies there for each call
PLACES = tuple(
    (name, "disk" if name == "model.layers.1" else "cpu")
    for name in ("model.embed_tokens", "model.rotary_emb", "model.norm",
                 *(f"model.layers.{n}" for n in range(4)), "lm_head")
)  # fmt: skip


def test_a_spread_target_gives_the_same_numbers(pinned: Path) -> None:
    pytest.importorskip("accelerate")
    plain, spread = load_target(pinned), load_target(pinned, device_map=PLACES)
    assert set(spread.model.hf_device_map.values()) == {"cpu", "disk"}
    tokens = torch.arange(24).view(2, 12)
    found, wanted = (t.forward(tokens, layers=[0, 1, 2, 3]) for t in (spread, plain))
    assert wanted.hidden is not None
    assert found.hidden is not None
    assert torch.equal(found.hidden, wanted.hidden)
    assert torch.equal(found.last_hidden, wanted.last_hidden)
    logits = [t.logits(wanted.last_hidden[0]) for t in (spread, plain)]
    assert torch.equal(*logits)
    sessions = [Session(t, 2, 16, layers=[1]) for t in (spread, plain)]
    for piece in (tokens[:, :9], tokens[:, 9:]):
        steps = [s.extend(piece, torch.full((2,), piece.shape[1])) for s in sessions]
        assert torch.equal(steps[0].logits, steps[1].logits)
    row = {"id": "a", "domain": "d", "law": "T=1", "tokens": list(range(12)), "turn": [0] * 12}
    config = config_of(hidden_layers=[1, 2])
    layout = layout_of(plain.spec, config)
    records = [
        Pass(t, layout, rule=config.rule(), batch_tokens=64, seed=0).records([row])[0]
        for t in (spread, plain)
    ]
    for name, value in vars(records[0]).items():
        np.testing.assert_array_equal(value, getattr(records[1], name))


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        (PLACES[:-1], r"map with no place for lm_head\.weight; expected a device for every module"),
        ((*PLACES, ("model.layers.9", "cpu")), r"map with a place for 'model\.layers\.9'; expec"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(
    pinned: Path, tiny_model: Build, monkeypatch: pytest.MonkeyPatch, places: Any, sentence: str
) -> None:
    model = tiny_model(vocab_size=270)
    monkeypatch.setattr("pipeline.target.load_model", lambda *_, **__: model)
    with pytest.raises(TargetError, match=sentence):
        load_target(pinned, device_map=places)


def test_layers_without_room_on_the_devices_are_told(
    pinned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": "disk"})
    monkeypatch.setattr("pipeline.target.load_model", lambda *_, **__: model)
    with pytest.raises(
        TargetError, match=r"layers of the target left to disk; .*parallel\.devices"
    ):
        load_target(pinned, device_map="auto")


def test_a_changed_file_is_refused_by_name(home: Path, pinned: Path, tiny_model: Build) -> None:
    todo = "; bring the pinned files back, or run dvc repro --force target to pin these"
    kept = {path.name: path.read_bytes() for path in home.iterdir()}
    cases = {
        "tokenizer_config.json": ("tokenizer", b'{"a": 1}'),
        "config.json": ("model configuration", b"{}"),
        "model.safetensors": (r"weights file model\.safetensors", None),
    }
    for name, (what, content) in cases.items():
        if content is None:
            tiny_model(vocab_size=270, seed=1).save_pretrained(home)
        else:
            (home / name).write_bytes(content)
        with pytest.raises(TargetError, match=rf"the {what} in .* has digest \w+; .*target\.json p"
                           rf"ins{todo}"):  # fmt: skip
            load_target(pinned)
        (home / name).write_bytes(kept[name])
    (home / "model.safetensors").unlink()
    with pytest.raises(TargetError, match=r"weights file model\.safetensors in .* digest absent"):
        load_target(pinned)
    shutil.rmtree(home)
    with pytest.raises(TargetError, match=r"no folder .*model, which .*target\.json pins"):
        load_target(pinned)


def test_sampled_digests_tell_large_twins_apart(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 256, (9 << 20,), dtype=torch.uint8, generator=generator)
    tuned = base.clone()
    tuned[torch.randint(0, len(base), (2000,), generator=generator)] += 1
    for name, tensor in (("a", base), ("b", tuned)):
        save_file({"w": tensor}, tmp_path / name)
    assert sample_digest(tmp_path / "a") != sample_digest(tmp_path / "b")


def test_a_missing_or_old_description_is_refused(tmp_path: Path, pinned: Path) -> None:
    with pytest.raises(TargetError, match=r"no file .*target\.json; expected the description"):
        read_spec(tmp_path)
    with pytest.raises(TargetError, match=r"no file .*interface\.safetensors; expected the targ"):
        read_interface(tmp_path)
    spec = json.loads((pinned / "target.json").read_text())
    del spec["eos_ids"]
    (pinned / "target.json").write_text(json.dumps(spec))
    with pytest.raises(TargetError, match=r"target\.json has eos_ids missing, unknown or of anoth"):
        read_spec(pinned)


def remove(*names: str) -> Callable[[Path], None]:
    def do(home: Path) -> None:
        for name in names:
            (home / name).unlink()

    return do


def pickled(home: Path) -> None:
    (home / "model.safetensors").rename(home / "pytorch_model.bin")


def wide_tokenizer(home: Path) -> None:
    texts = ["some other words to make many more pairs of bytes here, and more and more"]
    train_tokenizer(texts, 280, context_tokens=256).save_pretrained(home)


def unknown_family(home: Path) -> None:
    (home / "config.json").write_text('{"model_type": "nobody"}')


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (remove("config.json"), r"has no config\.json; expected a folder written by save_pretr"),
        (remove("model.safetensors"), r"has no weights; expected one or more \*\.safetensors fi"),
        (pickled, r"has its weights as pytorch_model\.bin, a pickle, .*; convert them: load wher"),
        (remove("tokenizer.json"), r"has no tokenizer; expected tokenizer\.json beside config"),
        (wide_tokenizer, r"the tokenizer in .* has 280 tokens; expected at most 270, the rows"),
        (unknown_family, r"transformers cannot read .*nobody.*; expected a causal LM that this"),
    ],
)
def test_a_folder_that_cannot_be_a_target_is_refused_before_loading(
    home: Path, break_it: Callable[[Path], None], sentence: str
) -> None:
    break_it(home)
    with pytest.raises(TargetError, match=sentence):
        check_folder(home)


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"model": "no/such/folder"}, r"no folder no/such/folder; expected a folder of transfo"),
        ({"model": "./none"}, r"no folder \./none; expected a folder of transformers, or a hub"),
        ({}, r"target\.revision None for org/name, which is no folder; expected a commit of 40"),
        ({"revision": "main"}, r"target\.revision 'main' for org/name, .* a branch or a tag"),
    ],
)
def test_a_model_that_is_not_pinned_is_refused(over: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TargetError, match=sentence):
        find_pretrained(pretrained(**over))


def test_a_revision_of_a_local_folder_is_refused(home: Path) -> None:
    with pytest.raises(TargetError, match=r"target\.revision '0.*' for the local folder .*; expec"):
        find_pretrained(pretrained(model=str(home), revision=COMMIT))
    assert find_pretrained(pretrained(model=str(home))) == home


def test_a_stated_shape_is_held_against_the_model(home: Path) -> None:
    stated = json.loads((home / "config.json").read_text())
    shape = {
        "vocab_size": stated["vocab_size"],
        "hidden_size": stated["hidden_size"],
        "num_layers": stated["num_hidden_layers"],
        "intermediate_size": 7,
        "num_parameters": 1e6,
        "active_parameters": 1e6,
    }
    assert find_pretrained(pretrained(model=str(home), shape=shape)) == home
    wrong = shape | {"num_layers": 99}
    with pytest.raises(
        TargetError, match=r"target\.shape\.num_layers 99; expected \d+, as .*config"
    ):
        find_pretrained(pretrained(model=str(home), shape=wrong))


@pytest.mark.parametrize("over", [{"dtype": "int8"}, {"model": ""}, {"threads": 0}])
def test_bad_parameters_are_named(over: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"target\.{next(iter(over))} is .*; expected"):
        pretrained(**over)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local hub cache and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_model_at_a_commit_is_found_in_the_cache(hub: Path, home: Path) -> None:
    place = hub / "models--org--name" / "snapshots" / COMMIT
    shutil.copytree(home, place)
    assert find_pretrained(pretrained(revision=COMMIT)) == place


def test_a_hub_model_that_cannot_be_had_is_refused(hub: Path) -> None:
    with pytest.raises(TargetError, match=r"hub model org/name at 0.* is not in the local cache"):
        find_pretrained(pretrained(revision=COMMIT))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("RevisionNotFoundError", "hub model org/name has no revision 0123.*; correct target.rev"),
        ("RepositoryNotFoundError", "neither a folder nor a readable hub model is named org/name"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, error: str, sentence: str
) -> None:
    import huggingface_hub
    import huggingface_hub.errors

    def fail(*args: Any, **kwargs: Any) -> str:
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind)  # its constructor asks for the HTTP client's own response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(TargetError, match=sentence):
        find_pretrained(pretrained(revision=COMMIT))


def test_reading_description_and_interface_does_not_import_transformers(pinned: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.target import read_interface, "
        "read_spec; folder = Path(sys.argv[1]); read_spec(folder); read_interface(folder); "
        "sys.exit('transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(pinned)], check=False)
    assert run.returncode == 0


ROPES = {
    "longrope": (
        "Phi3",
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        {"original_max_position_embeddings": 16, "max_position_embeddings": 64},
    ),
    "dynamic": (
        "Llama",
        {"rope_type": "dynamic", "factor": 4.0},
        {"max_position_embeddings": 16},
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_no_law_depends_on_a_neighbour_where_the_rotary_angles_follow_the_longest(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within the pinned context a padded batch changes nothing; beyond, transformers would."""
    family, rope, own = ROPES[kind]
    shape = {**tests.targets.SHAPE, **own, "rope_parameters": {"rope_theta": 1e4, **rope}}
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**shape)
    )
    model.lm_head.weight.data.normal_(std=0.6)
    model.eval().save_pretrained(tmp_path)
    tests.targets.tokenizer().save_pretrained(tmp_path)
    spec = pin(tmp_path, tmp_path, origin=Origin("embedded", "."))
    assert spec.context_tokens == 16
    assert (kind == "longrope") == ("--max-model-len" in capsys.readouterr().err)
    assert ("longrope" in json.loads((tmp_path / "target.json").read_text())) == spec.longrope
    target = load_target(tmp_path)
    tokens = torch.arange(1, 11)[None]
    alone = target.logits(target.forward(tokens).last_hidden[0])
    for width, same in ((16, True), (24, False)):
        batch = torch.zeros(2, width, dtype=torch.int64)
        batch[0, :10] = tokens
        beside = target.logits(target.forward(batch).last_hidden[0, :10])
        assert torch.allclose(alone, beside, atol=1e-5) == same
    why = r" \(beyond, longrope turns" if spec.longrope else ";"
    with pytest.raises(
        TargetError, match="rows of 17 tokens; expected .* context of 16 tokens" + why
    ):
        Session(target, 1, 17)
    row = {"id": "s", "domain": "d", "tokens": [1] * 17, "turn": [0] * 17, "law": "T=1"}
    write_table(tmp_path / "train.parquet", SEQUENCES, [{**row, "finished": True}])
    with pytest.raises(DataError, match="sequence 's' has 17 tokens; expected 1 to 16 tokens"):
        law_of(Sequences.open(tmp_path / "train.parquet"), spec)
