"""The export stage on a tiny target: a folder that generates, or a sentence and no folder."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from pipeline.checkpoint import save_draft
from pipeline.config import parse
from pipeline.draft import find
from pipeline.exports import transformers as form
from pipeline.interface import Shape
from pipeline.pin import Origin, pin
from stages import export
from storage.errors import ConfigError, DraftError
from storage.workspace import tree_digest

V, ARM = 64, "lm-tv-0"
OUT = Path("export") / ARM / "transformers"
LM = {
    "kind": "lm",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 24,
    "lr_scale": 1.0,
    "steps_scale": 1.0,
}
CELL = {"start": "lm-0", "draft": "lm", "kind": "lm", "objective": "tv", "format": "transformers"}


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, **{f"w{i}": i for i in range(1, V)}}
    model = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>").save_pretrained(folder)


@pytest.fixture
def project(
    tmp_path: Path, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """A project with a target, a trained draft and the given export cell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", ARM])
    target = tmp_path / "target"
    tiny_model(vocab_size=V).save_pretrained(target)
    _tokenizer(target)
    spec = pin(target, target, origin=Origin(kind="embedded", model="."))
    module, shape = find("lm"), Shape(V, spec.hidden_size)
    draft = module.Model.build(parse("drafts.lm", LM, module.Config), shape, None, seed=3)

    def prepare(*, fingerprint: str = spec.fingerprint, **over: str) -> None:
        params = {
            "export": {"dtype": "float32", "num_assistant_tokens": 2},
            "exports": {ARM: {**CELL, **over}},
        }
        YAML().dump(params, tmp_path / "params.yaml")
        meta = {"draft": "lm", "objective": "tv", "target": fingerprint, "cache": "c" * 64}
        folder = tmp_path / "drafts" / "lm-0" / "tv" / "model"
        save_draft(folder, draft, config=LM, meta=meta, shape=shape)

    return prepare


def test_the_export_generates_with_its_target(project: Callable[..., None]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    project()
    export.main()
    target = AutoModelForCausalLM.from_pretrained("target")
    assistant = AutoModelForCausalLM.from_pretrained(OUT)
    tokens = AutoTokenizer.from_pretrained(OUT)("w3 w9 w27", return_tensors="pt")
    assert tokens["input_ids"].tolist() == [[3, 9, 27]]
    asked = {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 0,
    }
    plain = target.generate(**asked)
    assert torch.equal(plain, target.generate(assistant_model=assistant, **asked))


def test_a_second_run_writes_the_same_bytes_or_nothing(
    project: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    project()
    export.main()
    first = tree_digest(OUT)
    with monkeypatch.context() as patch:
        patch.setattr(export, "export_draft", None)  # what is complete is not written again
        export.main()
    for path in sorted(OUT.rglob("*"), reverse=True):
        path.unlink()
    export.main()
    assert tree_digest(OUT) == first


def test_an_arm_that_is_not_listed_is_refused(
    project: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    project()
    monkeypatch.setattr(sys, "argv", ["export", "lm-kl-0"])
    with pytest.raises(ConfigError, match=r"no exports\.lm-kl-0; expected .* exports: lm-tv-0"):
        export.main()


def test_an_unknown_format_is_refused_before_anything_is_read(
    project: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    project(format="gguf")
    monkeypatch.setattr(export, "read_spec", None)
    with pytest.raises(
        ConfigError, match=r"'gguf' for a draft of kind lm; expected .*transformers"
    ):
        export.main()


def test_a_draft_of_another_target_is_refused(project: Callable[..., None]) -> None:
    project(fingerprint="0" * 64)
    with pytest.raises(DraftError, match=r"with the target fingerprint 0{64}; expected"):
        export.main()
    assert not OUT.exists()


def _other_rope(config: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda *given: {**config(*given), "rope_theta": 77.0}


def test_an_export_that_fails_its_check_is_not_published(
    project: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    project()
    monkeypatch.setattr(form, "_config", _other_rope(form._config))
    with pytest.raises(DraftError, match=r"config\.json: rope_theta is 77\.0; expected 10000\.0"):
        export.main()
    assert not OUT.exists()
