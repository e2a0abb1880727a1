"""DeepSeek-V3's layer is transformers' own, and a draft that begins as it says what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.batch import Batch
from pipeline.blocks import Rotary
from pipeline.checkpoint import save_draft
from pipeline.config import parse
from pipeline.draft import find
from pipeline.export import ExportConfig, Source, export_draft, find_format
from pipeline.interface import Interface, Shape
from pipeline.mtp_keys import FP8_BLOCK, widened
from pipeline.pin import write_interface, write_mtp
from pipeline.target import read_interface
from pipeline.warm import begin
from storage.errors import ConfigError, DraftError
from storage.workspace import tree_digest
from tests.targets import DEEPSEEK_MTP, member, mtp_tensors, target_of

T, DEPTH = 30, 3


@pytest.fixture(scope="module")
def model() -> Any:
    return member("deepseek-v3")


@pytest.fixture(scope="module")
def own(model: Any) -> dict[str, Tensor]:
    """A module of DeepSeek's, under its names: the block is the target's last layer."""
    return mtp_tensors(model)


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory, model: Any, own: Any) -> Callable[..., Any]:
    def pin(**over: Tensor) -> Interface:
        folder = tmp_path_factory.mktemp("deepseek")
        save_file({**own, **over}, folder / "model.safetensors")
        write_interface(folder, model)
        write_mtp(folder, folder, model.config)
        return read_interface(folder)

    return pin


def build(interface: Interface, **over: Any) -> Any:
    module = find("mtp")
    config = parse("drafts.mtp", {**DEEPSEEK_MTP, **over}, module.Config)
    return module.Model.build(config, Shape(*interface.embed.shape), interface, 0).eval()


def batch(model: Any) -> Batch:
    """One sequence, one turn, and the target's own last states."""
    tokens = torch.randint(1, 300, (1, T), generator=torch.Generator().manual_seed(4))
    last = model.get_decoder()(tokens, use_cache=False).last_hidden_state
    return Batch(
        ids=("",),
        domains=("",),
        tokens=tokens,
        length=torch.tensor([T]),
        turn=torch.zeros(1, T, dtype=torch.int64),
        token_logp=torch.zeros(1, T),
        law_row=torch.arange(T)[None],
        law=None,
        hidden=None,
        last_hidden=last,
    )


def theirs(model: Any, own: dict[str, Tensor], data: Batch) -> Tensor:
    """Step 0 of DeepSeek-V3's report (arXiv:2412.19437 §2.2) by transformers' own layer."""
    body, norm = model.get_decoder(), torch.nn.functional.rms_norm
    named = {name.removeprefix("model.layers.4."): x for name, x in own.items()}
    eps, size = model.config.rms_norm_eps, (model.config.hidden_size,)
    after = data.tokens.roll(-1, dims=1)
    e = norm(body.embed_tokens.weight[after], size, named["enorm.weight"], eps)
    assert data.last_hidden is not None
    h = norm(data.last_hidden, size, named["hnorm.weight"], eps)
    u = torch.cat([e, h], dim=-1) @ named["eh_proj.weight"].T
    position = torch.arange(T)[None]
    mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
    table = body.rotary_emb(u, position)
    out = body.layers[3](u, attention_mask=mask, position_embeddings=table, position_ids=position)
    state = norm(out, size, named["shared_head.norm.weight"], eps)
    return (state @ model.lm_head.weight.T)[0]


def test_step_0_is_that_of_the_targets_own_layer(
    model: Any, own: dict[str, Tensor], pinned: Callable[..., Interface]
) -> None:
    """MLA under YaRN with its score scale, interleaved angles, grouped experts, the shared one."""
    draft, data = build(pinned()), batch(model)
    logits = next(iter(draft.training_logits(data, 1)))
    anchor = data.pairs(0).anchor
    torch.testing.assert_close(logits, theirs(model, own, data)[anchor], rtol=0.0, atol=1e-4)
    asked = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    assert len(draft.mlp.chosen(asked)[0].unique()) > 4
    other = build(pinned(**{"model.layers.4.mlp.gate.e_score_correction_bias": torch.zeros(8)}))
    assert not torch.allclose(next(iter(other.training_logits(data, 1))), logits, atol=1e-2)


def test_every_weight_but_the_corrections_learns(
    model: Any, pinned: Callable[..., Interface]
) -> None:
    draft = build(pinned())
    for logits in draft.training_logits(batch(model), DEPTH):
        logits.square().sum().backward(retain_graph=True)
    trained = {name for name, p in draft.named_parameters() if p.requires_grad}
    for name in trained:
        grad = draft.get_parameter(name).grad
        assert grad is not None and bool(grad.abs().max() > 0), name  # noqa: PT018
    assert draft.trainable().keys() - trained == {"mlp.correction"}


def test_the_native_folder_holds_the_targets_names_and_opens_again(
    model: Any, own: dict[str, Tensor], pinned: Callable[..., Interface], tmp_path: Path
) -> None:
    interface, form = pinned(), find_format("mtp", "native")
    draft, spec = build(interface), target_of(model).spec
    described = {"objective": "kl", "config": {}, "source": {}}
    source = Source("mtp-kl-0", spec, tmp_path, described, interface=interface)
    config = ExportConfig(dtype="float32", num_assistant_tokens=2)
    export_draft(tmp_path / "out", draft, form=form, source=source, config=config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(written[name], tensor), name
    path = tmp_path / "out" / "config.json"
    whole = json.loads(path.read_text())
    for part, name in (("latent", "key_rank"), ("experts", "scale"), ("rotary", "inv_freq")):
        without = {k: v for k, v in whole[part].items() if k != name}
        path.write_text(json.dumps({**whole, part: without}))
        with pytest.raises(DraftError, match=rf"{part}\.{name} is missing"):
            form.read(tmp_path / "out", interface)


def test_a_module_that_is_not_the_targets_is_not_exported_as_its_own(
    model: Any, pinned: Callable[..., Interface], tmp_path: Path
) -> None:
    """Engines run it with the target's settings, whatever it was trained with."""
    interface = pinned()
    source = Source("mtp-kl-0", target_of(model).spec, tmp_path, {}, interface=interface)
    config = ExportConfig(dtype="float32", num_assistant_tokens=2)
    dense = {"latent": None, "experts": None, "intermediate_size": 32, "init": "fresh"}
    for over, sentence in (
        (dense, "latent None for a target whose MTP module has {'query_rank': 24"),
        ({"init": "fresh"}, "rope_type default for a target whose MTP module has yarn"),
    ):
        form = find_format("mtp", "native")
        with pytest.raises(DraftError, match=sentence):
            form.write(tmp_path, build(interface, **over), source, config)


@pytest.mark.parametrize(
    ("part", "over", "sentence"),
    [
        ("latent", {"key_rank": 8}, r"latent {.*'key_rank': 8.* MTP module has {.*'key_rank': 16"),
        ("experts", {"scale": 1.0}, r"experts {.*'scale': 1\.0.* MTP module has {.*'scale': 2\.5"),
    ],
)
def test_a_section_that_is_not_the_targets_is_refused(
    pinned: Callable[..., Interface], part: str, over: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DraftError, match=sentence):
        build(pinned(), **{part: {**DEEPSEEK_MTP[part], **over}})


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"qk_norm": True}, "no qk_norm with latent, which does not read it"),
        ({"head_size": 8}, "no head_size with latent"),
        ({"intermediate_size": 32}, "intermediate_size or experts, and not both"),
        ({"experts": None}, "intermediate_size or experts, and not both"),
    ],
)
def test_a_parameter_that_nothing_reads_is_refused(over: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse("drafts.mtp", {**DEEPSEEK_MTP, **over}, find("mtp").Config)


def test_it_is_refused_where_a_format_cannot_say_it(pinned: Callable[..., Interface]) -> None:
    with pytest.raises(ConfigError, match=r"latent attention or experts .*; export the format nat"):
        find_format("mtp", "speculators").require(build(pinned()).config)


def test_scaled_angles_are_refused_where_a_format_is_given_a_base_alone(
    model: Any, pinned: Callable[..., Interface], tmp_path: Path
) -> None:
    dense = {"latent": None, "experts": None, "intermediate_size": 32, "init": "fresh"}
    draft = build(pinned(), **dense, qk_norm=True)
    draft.rotary = Rotary((1.0, 0.1, 0.01, 0.001), 1.0, 1.0)
    source = Source("mtp-kl-0", target_of(model).spec, tmp_path, {})
    (tmp_path / "config.json").write_text("{}")
    config = ExportConfig(dtype="float32", num_assistant_tokens=2)
    with pytest.raises(DraftError, match="turns with its target's scaled rotary angles; expected"):
        find_format("mtp", "speculators").write(tmp_path, draft, source, config)


def test_a_start_keeps_its_angles_or_is_refused(
    model: Any, pinned: Callable[..., Interface], tmp_path: Path
) -> None:
    interface, spec, module = pinned(), target_of(model).spec, find("mtp")
    shape, first = Shape(*interface.embed.shape), build(interface)
    config = first.config.model_dump()
    save_draft(tmp_path, first, config=config, meta={"target": spec.fingerprint}, shape=shape)
    start = {"folder": str(tmp_path), "sha256": tree_digest(tmp_path)}

    def again(init: str) -> Any:
        section = parse("drafts.mtp", {**config, "init": init, "start": start}, module.Config)
        return begin(section, model=module.Model, spec=spec, interface=interface, layers=[], seed=1)

    assert torch.equal(again("target").mlp.gate_up, first.mlp.gate_up)
    with pytest.raises(DraftError, match=r"a draft with other rotary angles; .* the same init"):
        again("fresh")


def test_8_bit_weights_are_widened_block_by_block() -> None:
    """The slow obvious version: each number times the scale of its block of 128 by 128."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(FP8_BLOCK + 7, 2 * FP8_BLOCK + 1, generator=g)
    scale = torch.rand(2, 3, generator=g)
    narrow = matrix.to(torch.float8_e4m3fn)
    found = widened({"w.weight": narrow.float(), "w.weight_scale_inv": scale, "n": matrix})
    assert found.keys() == {"w.weight", "n"}
    for i, j in ((0, 0), (127, 128), (128, 255), (134, 256)):
        assert found["w.weight"][i, j] == narrow[i, j].float() * scale[i // 128, j // 128]
