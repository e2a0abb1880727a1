"""The stage `target`: an embedded and a pretrained target, through the files that others read."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from pipeline.embedded import train_tokenizer
from pipeline.problems import problem_set
from pipeline.seeds import rng
from pipeline.target import load_target, read_interface, read_spec
from stages import target
from storage.errors import DataError, TargetError
from storage.tables import DOCUMENTS, write_table
from storage.workspace import tree_digest

EMBEDDED: dict[str, Any] = {
    "kind": "embedded",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 32,
    "context_tokens": 64,
    "steps": 3,
    "batch_sequences": 2,
    "sequence_tokens": 32,
    "lr": 1e-2,
    "sharpen": 0.6,
    "seed": 0,
    "threads": 1,
}
PRETRAINED: dict[str, Any] = {
    "kind": "pretrained",
    "model": "models/mine",
    "revision": None,
    "dtype": "float32",
    "trust_remote_code": False,
    "threads": 1,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "id": str(n),
            "domain": "maths",
            "split": "train" if n else "heldout",
            "text": problem_set(rng(0, n)),
        }
        for n in range(6)
    ]
    write_table(Path("data/documents.parquet"), DOCUMENTS, rows)
    return tmp_path


def write(section: dict[str, Any]) -> None:
    with Path("params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump({"target": section}, file)


def test_an_embedded_target_is_trained_pinned_and_loads(project: Path) -> None:
    write(EMBEDDED)
    target.main()
    spec, loaded = read_spec(Path("target")), load_target(Path("target"))
    assert (spec.kind, spec.model, spec.sharpen, spec.vocab_size) == ("embedded", ".", 0.6, 300)
    assert spec.eos_ids == [loaded.tokenizer.eos_token_id]
    interface = read_interface(Path("target"))
    assert torch.equal(interface.lm_head, loaded.model.lm_head.weight)
    assert torch.equal(interface.norm, loaded.model.model.norm.weight)
    tokens = torch.tensor([loaded.tokenizer("Compute 1 + 2.")["input_ids"]])
    own = loaded.model(tokens).logits[0]
    assert torch.equal(loaded.logits(loaded.forward(tokens).last_hidden[0]), own)
    metrics = json.loads(Path("metrics/target.json").read_text())
    assert metrics["sharpened"]["entropy"] < metrics["heldout"]["entropy"]
    rows = list(csv.DictReader(Path("plots/target.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]


def test_a_second_run_writes_the_same_bytes(project: Path) -> None:
    write(EMBEDDED)
    digests = set()
    for _ in range(2):
        target.main()
        digests.add(tuple(tree_digest(Path(p)) for p in ("target", "metrics", "plots")))
    assert len(digests) == 1


def test_a_pretrained_folder_is_pinned_in_place(
    project: Path, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(vocab_size=270)
    model.save_pretrained("models/mine")
    train_tokenizer(["some text"], 258, context_tokens=64).save_pretrained("models/mine")
    write(PRETRAINED)
    target.main()
    assert not list(Path("target").glob("*.safetensors"))  # the weights are not copied
    assert json.loads(Path("target/target.json").read_text())["model"] == "models/mine"
    loaded = load_target(Path("target"))
    tokens = torch.arange(7)[None]
    features = loaded.forward(tokens, layers=[1])
    assert torch.equal(loaded.logits(features.last_hidden[0]), model(tokens).logits[0])
    assert Path("plots/target.csv").read_text() == "step,loss,heldout_loss\n"


def test_a_refused_target_leaves_the_outputs_as_they_were(project: Path) -> None:
    write(EMBEDDED)
    target.main()
    before = tree_digest(Path("target"))
    write(PRETRAINED)
    with pytest.raises(TargetError, match=r"target\.revision None for models/mine, which is no f"):
        target.main()
    write({**EMBEDDED, "vocab_size": 5000})
    with pytest.raises(DataError, match=r"give \d+ BPE tokens; expected target\.vocab_size 5000"):
        target.main()
    assert tree_digest(Path("target")) == before


def test_documents_are_asked_for_before_any_work(project: Path) -> None:
    write(EMBEDDED)
    Path("data/documents.parquet").unlink()
    with pytest.raises(DataError, match=r"no file data/documents\.parquet; expected the table"):
        target.main()
