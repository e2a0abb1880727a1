"""The transformers folder of an `lm` draft, opened by transformers: equal logits and text."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import export
from pipeline.config import parse
from pipeline.draft import Draft, find
from pipeline.export import ExportConfig, Source, export_draft, find_format
from pipeline.exports import transformers as form
from pipeline.interface import Shape
from pipeline.keys import rename
from pipeline.target import TargetSpec
from storage.errors import ConfigError, DraftError
from storage.workspace import tree_digest
from tests.targets import assert_assisted_alike, target_of

V = 64
LM = {
    "kind": "lm",
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 40,
    "lr_scale": 1.0,
    "steps_scale": 1.0,
}


@pytest.fixture
def draft() -> Draft:
    module = find("lm")
    built: Draft = module.Model.build(
        parse("drafts.lm", LM, module.Config), Shape(V, 32), None, seed=0
    )
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return built


@pytest.fixture
def source(tmp_path: Path) -> Source:
    home = tmp_path / "target"
    home.mkdir()
    (home / "tokenizer.json").write_text('{"version": "1.0"}')
    (home / "tokenizer_config.json").write_text("{}")
    spec = TargetSpec(
        kind="embedded",
        model=".",
        revision=None,
        fingerprint="f" * 64,
        weights_sha256="",
        tokenizer_sha256="",
        template_sha256="",
        vocab_size=V,
        hidden_size=32,
        num_layers=4,
        eos_ids=[0],
        bos_id=None,
        context_tokens=256,
        dtype="float32",
        sharpen=1.0,
    )
    described = {
        "kind": "lm",
        "objective": "lk_lambda",
        "config": LM,
        "shape": {"vocab_size": V, "hidden_size": 32},
        "source": {"target": "f" * 64, "cache": "c" * 64},
    }
    return Source(arm="lm-lk_lambda-0", spec=spec, home=home, draft=described)


def config(dtype: str = "float32") -> ExportConfig:
    parsed: ExportConfig = parse(
        "export", {"dtype": dtype, "num_assistant_tokens": 3}, ExportConfig
    )
    return parsed


def written(tmp_path: Path, draft: Draft, source: Source, dtype: str = "float32") -> Path:
    folder = tmp_path / "export"
    found = find_format("lm", "transformers")
    export_draft(folder, draft, form=found, source=source, config=config(dtype))
    return folder


def test_transformers_gives_our_logits(tmp_path: Path, draft: Draft, source: Source) -> None:
    from transformers import AutoModelForCausalLM

    folder = written(tmp_path, draft, source)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    probe = export.probe(draft, source)
    with torch.no_grad():
        ours = next(iter(draft.training_logits(probe, 1)))
        theirs = opened(probe.tokens).logits.flatten(0, 1)[probe.pairs(0).anchor + 1]
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)
    assert ours.std() > 0.5  # equal, and not because all are nothing


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_draft(
    tmp_path: Path, draft: Draft, source: Source, dtype: str
) -> None:
    folder = written(tmp_path, draft, source, dtype)
    stored = load_file(folder / "model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {f"torch.{dtype}"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_assisted_generation_emits_the_targets_greedy_text(
    tmp_path: Path, draft: Draft, source: Source, tiny_model: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    target = tiny_model(vocab_size=V, eos_token_id=0)
    assistant = AutoModelForCausalLM.from_pretrained(written(tmp_path, draft, source))
    settings = assistant.generation_config
    assert settings.num_assistant_tokens == 3
    assert settings.num_assistant_tokens_schedule == "constant"
    assert settings.assistant_confidence_threshold == 0
    prompt = torch.tensor([[5, 9, 33, 2, 17]])
    asked = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 40,
        "do_sample": False,
        "pad_token_id": 0,
    }
    plain = target.generate(prompt, **asked)
    assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **asked))


def test_assisted_generation_accepts_what_our_decoder_counts(
    tmp_path: Path, draft: Draft, source: Source
) -> None:
    """On a target that the draft nearly is: its own model, its weights disturbed."""
    from transformers import AutoModelForCausalLM

    folder = written(tmp_path, draft, source)
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    g = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=g) * 0.03)
    kept: list[int] = []
    for prompt in ([5, 9, 33, 2, 17], [40, 3], [11, 12, 60]):
        target = target_of(model)
        kept += assert_assisted_alike(target, folder, prompt, gamma=3, new_tokens=40)
    assert set(kept) >= {0, 1, 3}


def test_folder_holds_the_targets_tokenizer_and_where_it_comes_from(
    tmp_path: Path, draft: Draft, source: Source
) -> None:
    folder = written(tmp_path, draft, source)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source.home / name).read_bytes()
    card = (folder / "README.md").read_text()
    for fact in ("f" * 64, "c" * 64, "lk_lambda", "lm-lk_lambda-0", "| config.hidden_size | 24 |"):
        assert fact in card


def test_equal_drafts_give_equal_bytes(tmp_path: Path, draft: Draft, source: Source) -> None:
    folder = written(tmp_path, draft, source)
    first = tree_digest(folder)
    (folder / "left_over.bin").write_bytes(b"of a killed run")
    assert tree_digest(written(tmp_path, draft, source)) == first


def test_key_table_holds_every_tensor_of_transformers(draft: Draft) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            tie_word_embeddings=True,
        )
    )
    theirs = {k: v.shape for k, v in llama.state_dict().items() if k != "lm_head.weight"}
    ours = {k: v.shape for k, v in rename(draft.trainable(), form.KEYS).items()}
    assert ours == theirs


def test_a_tensor_outside_the_key_table_is_refused(draft: Draft) -> None:
    with pytest.raises(DraftError, match=r"a tensor layers\.0\.wings in the draft"):
        rename({"layers.0.wings": torch.zeros(2)}, form.KEYS)


def _alter(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.wings.weight": torch.zeros(2)}),
            r"unexpected keys: model\.wings\.weight",
        ),
        (lambda t: t["model.norm.weight"].mul_(1.01), r"logits off by .* expected the draft's own"),
        (lambda t: t["model.embed_tokens.weight"].fill_(torch.nan), "logits off by nan"),
    ],
)
def test_an_export_that_is_not_the_draft_is_refused(
    tmp_path: Path,
    draft: Draft,
    source: Source,
    change: Callable[[dict[str, Any]], Any],
    sentence: str,
) -> None:
    folder = written(tmp_path, draft, source)
    _alter(folder, change)
    with pytest.raises(DraftError, match=sentence):
        form.check_theirs(folder, draft, source, config())


def test_a_wrong_flag_is_seen_in_the_logits(tmp_path: Path, draft: Draft, source: Source) -> None:
    folder = written(tmp_path, draft, source)
    described = json.loads((folder / "config.json").read_text())
    described["rope_parameters"]["rope_theta"] = 500.0
    described["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(DraftError, match="logits off by"):
        form.check_theirs(folder, draft, source, config())


def test_a_target_without_tokenizer_is_refused(
    tmp_path: Path, draft: Draft, source: Source
) -> None:
    bare = replace(source, home=tmp_path)
    with pytest.raises(DraftError, match=r"no tokenizer in .*; expected at least one of tokenizer"):
        written(tmp_path, draft, bare)


def test_a_format_that_a_kind_lacks_lists_those_that_exist() -> None:
    with pytest.raises(
        ConfigError, match=r"'vllm' for a draft of kind lm; expected .*transformers"
    ):
        find_format("lm", "vllm")
    with pytest.raises(ConfigError, match=r"of kind medusa; expected one of medusa; correct"):
        find_format("medusa", "transformers")
    with pytest.raises(ConfigError, match=r"kind lstm; expected a kind that some format takes"):
        find_format("lstm", "transformers")


@pytest.mark.parametrize("value", [0, -1])
def test_no_assistant_tokens_are_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=r"export\.num_assistant_tokens is"):
        parse("export", {"dtype": "float32", "num_assistant_tokens": value}, ExportConfig)
