"""A saved draft comes back to the bit, and nothing else is taken for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import load_draft, read_config, save_draft
from pipeline.draft import Draft, find
from pipeline.interface import Interface, Shape
from storage.errors import DraftError
from storage.workspace import read_json, tree_digest, write_json

SHAPE = Shape(vocab_size=40, hidden_size=16)
META: dict[str, str | int] = {"draft": "lm", "seed": 3, "target": "t" * 8, "cache": "c" * 8}
LM = {
    "kind": "lm",
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 12,
    "lr_scale": 1.0,
    "steps_scale": 1.0,
}
MEDUSA = {"kind": "medusa", "num_heads": 2, "num_layers": 1, "lr_scale": 1.0, "steps_scale": 1.0}


def interface(vocab_size: int = 40) -> Interface:
    g = torch.Generator().manual_seed(0)
    embed, head = (torch.randn(vocab_size, 16, generator=g) for _ in range(2))
    return Interface(embed, head, torch.ones(16), 1e-6)


def built(section: dict[str, Any], *, seed: int = 3, d2t: torch.Tensor | None = None) -> Draft:
    module = find(section["kind"])
    draft: Draft = module.Model.build(module.Config(**section), SHAPE, interface(), seed, d2t=d2t)
    return draft


def saved(folder: Path, section: dict[str, Any] = LM) -> Draft:
    draft = built(section)
    save_draft(folder, draft, config=section, meta=META, shape=SHAPE)
    return draft


@pytest.mark.parametrize("section", [LM, MEDUSA], ids=["lm", "medusa"])
def test_a_draft_comes_back_to_the_bit(tmp_path: Path, section: dict[str, Any]) -> None:
    draft = saved(tmp_path / "a", section)
    expect = {"target": "t" * 8, "cache": "c" * 8}
    loaded = load_draft(tmp_path / "a", interface(), SHAPE, expect=expect, config=section)
    assert type(loaded) is type(draft)
    mine, theirs = draft.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_equal_drafts_give_equal_bytes_and_others_do_not(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b")
    save_draft(tmp_path / "c", built(LM, seed=4), config=LM, meta=META, shape=SHAPE)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b") != tree_digest(tmp_path / "c")


def test_config_says_what_it_is_and_where_it_came_from(tmp_path: Path) -> None:
    saved(tmp_path)
    assert read_config(tmp_path) == {
        "draft": "lm",
        "seed": 3,
        "kind": "lm",
        "config": LM,
        "shape": {"vocab_size": 40, "hidden_size": 16},
        "source": {"target": "t" * 8, "cache": "c" * 8},
    }
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_the_targets_frozen_weights_are_not_stored_again(tmp_path: Path) -> None:
    saved(tmp_path, MEDUSA)
    assert sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values()) < 40 * 16


def test_a_pruned_vocabulary_comes_back_with_its_draft(tmp_path: Path) -> None:
    section, d2t = {**MEDUSA, "draft_vocab_size": 9}, torch.arange(0, 36, 4)
    save_draft(tmp_path, built(section, d2t=d2t), config=section, meta=META, shape=SHAPE)
    loaded = load_draft(tmp_path, interface(), SHAPE)
    assert loaded.d2t is not None
    assert loaded.d2t.tolist() == d2t.tolist()


def test_an_absent_draft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DraftError, match=r"no draft in .*nowhere; expected config\.json and model"):
        load_draft(tmp_path / "nowhere", None, SHAPE)


def test_another_target_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    sentence = r"was trained with the target fingerprint tttttttt; expected uuuu; run dvc repro"
    with pytest.raises(DraftError, match=sentence):
        load_draft(tmp_path, None, SHAPE, expect={"target": "uuuu"})


def test_another_shape_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(DraftError, match=r"the target's shape .*40.*; expected .*'vocab_size': 50"):
        load_draft(tmp_path, None, Shape(50, 16))


def test_another_section_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(DraftError, match=r"the draft's section .*; expected .*'num_layers': 2"):
        load_draft(tmp_path, None, SHAPE, config={**LM, "num_layers": 2})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norm.weight": None}, r"tensor norm\.weight is absent; expected \(8,\) for this draft"),
        ({"extra": torch.zeros(2)}, r"tensor extra is \(2,\); expected none of that name"),
        ({"embed": torch.zeros(41, 8)}, r"tensor embed is \(41, 8\); expected \(40, 8\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], sentence: str
) -> None:
    saved(tmp_path)
    tensors = {**load_file(tmp_path / "model.safetensors"), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "model.safetensors")
    with pytest.raises(DraftError, match=sentence):
        load_draft(tmp_path, None, SHAPE)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(DraftError, match=r"model\.safetensors is not a safetensors file"):
        load_draft(tmp_path, None, SHAPE)


def test_a_kind_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "kind": "gru"})
    with pytest.raises(Exception, match=r"draft kind 'gru'; expected one of"):
        load_draft(tmp_path, None, SHAPE)
