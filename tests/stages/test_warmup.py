"""The warm-up as a process sees it: a project folder in, four outputs out, or one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages import warmup
from storage.errors import ConfigError, DraftError, FingerprintMismatch, MissingManifest
from storage.layout import Layout
from storage.workspace import tree_digest
from tests.caches import D, V, write_cache
from tests.stages.training import PARAMS, edit, project, stage

OUT = Path("warmup", "lm-0")


def test_it_writes_a_start_that_can_be_told_from_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path, monkeypatch)
    stage(warmup, "lm-0", monkeypatch)
    config = json.loads((OUT / "model" / "config.json").read_text())
    assert (config["draft"], config["kind"], config["objective"]) == ("lm", "lm", "kl")
    assert set(config["source"]) == {"target", "cache"}
    metrics = json.loads((OUT / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert 0 < metrics["heldout_alpha"] < 1
    assert (OUT / "curve.csv").read_text().startswith("step,loss,kl,alpha,lr,heldout_kl")
    timing = json.loads(Path("timings", "warmup-lm-0.json").read_text())
    assert set(timing) == {"seconds", "steps_per_s", "tokens_per_s"}
    assert not list(Path(".scratch").rglob("model.safetensors"))


@pytest.mark.parametrize("key", ["lm-0", "medusa-0", "eagle3-0"])
def test_two_runs_give_the_same_bytes(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for name in ("one", "two"):
        project(tmp_path / name, monkeypatch)
        stage(warmup, key, monkeypatch)
        digests.append(tree_digest(Path("warmup")))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("key", ["mlp-0", "mtp-0"])
def test_every_kind_learns(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, monkeypatch, params=edit(PARAMS, warmup={"steps": 30}))
    stage(warmup, key, monkeypatch)
    rows = Path("warmup", key, "curve.csv").read_text().split("\n")[1:]
    losses = [float(row.split(",")[1]) for row in rows if row]
    assert losses[-1] < 0.9 * losses[0]


def test_seeds_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, monkeypatch)
    stage(warmup, "lm-0", monkeypatch)
    stage(warmup, "lm-1", monkeypatch)
    weights = [
        Path("warmup", k, "model", "model.safetensors").read_bytes() for k in ("lm-0", "lm-1")
    ]
    assert weights[0] != weights[1]


def test_no_steps_save_the_fresh_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, monkeypatch, params=edit(PARAMS, warmup={"steps": 0}))
    stage(warmup, "lm-0", monkeypatch)
    metrics = json.loads((OUT / "metrics.json").read_text())
    assert metrics["steps"] == 0
    assert metrics["train_loss"] is None


def test_a_pruned_vocabulary_is_counted_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = edit(PARAMS, drafts={"medusa": {**PARAMS["drafts"]["medusa"], "draft_vocab_size": 12}})
    project(tmp_path, monkeypatch, params=params)
    stage(warmup, "medusa-0", monkeypatch)
    metrics = json.loads(Path("warmup", "medusa-0", "metrics.json").read_text())
    assert metrics["supervised"] > metrics["uncovered"]


def test_a_cache_without_what_the_draft_needs_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path, monkeypatch, layout=Layout("topk", V, D, (1,), last_hidden=False))
    with pytest.raises(DraftError, match=r"set capture\.last_hidden: true in params\.yaml"):
        stage(warmup, "medusa-0", monkeypatch)
    with pytest.raises(DraftError, match=r"1 captured layers; expected the 3 .* reruns capture"):
        stage(warmup, "eagle3-0", monkeypatch)
    assert not Path("warmup").exists()


@pytest.mark.parametrize(
    ("kind", "over", "sentence"),
    [
        (
            "eagle3",
            {"draft_vocab_size": V + 1},
            f"a draft vocabulary of {V + 1} ids; expected from 1 to the target's {V}; correct dra",
        ),
        ("eagle3", {"num_heads": 3}, f"num_heads 3 on a target of width {D}; .* that fill the wid"),
        ("mtp", {"head_size": 5}, "head_size 5; expected heads of an even number of channels;"),
        ("mtp", {"num_kv_heads": 3}, "num_kv_heads 3 for num_heads 2; expected a divisor"),
        ("lm", {"num_heads": 3}, "hidden_size 8 with num_heads 3; expected heads of an even numb"),
        (
            "mtp",
            {"init": "target"},
            "a target without a multi-token-prediction module .* asks for init: target; set init",
        ),
        (
            "eagle3",
            {"fused_layers": 2},
            "a cache with 3 captured layers; expected the 2 .* capture.hidden_layers .* reruns cap",
        ),
    ],
)
def test_a_draft_that_does_not_fit_the_target_is_one_sentence_before_training(
    kind: str,
    over: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = edit(PARAMS, drafts={kind: {**PARAMS["drafts"][kind], **over}})
    project(tmp_path, monkeypatch, params=params)
    with pytest.raises(DraftError, match=sentence):
        stage(warmup, f"{kind}-0", monkeypatch)
    assert not Path("warmup").exists()


def test_a_cache_of_another_target_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path, monkeypatch)
    write_cache(Path("other.zarr"), target="u" * 64)
    Path("cache", "train.zarr").rename("gone.zarr")
    Path("other.zarr").rename(Path("cache", "train.zarr"))
    with pytest.raises(FingerprintMismatch, match=r"made from target uuuu.*; expected target tttt"):
        stage(warmup, "lm-0", monkeypatch)


def test_an_unfinished_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, monkeypatch)
    Path("cache", "heldout.zarr", "manifest.json").unlink()
    with pytest.raises(
        MissingManifest, match=r"manifest\.json does not exist; expected a finished"
    ):
        stage(warmup, "lm-0", monkeypatch)


def test_a_key_that_is_no_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"no starts\.lm-9; expected one of the keys of starts"):
        stage(warmup, "lm-9", monkeypatch)


def test_it_starts_from_a_pinned_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No steps: what it writes is what it began with, whatever its seed."""
    project(tmp_path, monkeypatch)
    stage(warmup, "eagle3-0", monkeypatch)
    first = Path("warmup", "eagle3-0", "model")
    start = {"folder": str(first), "sha256": tree_digest(first)}
    drafts = {"eagle3": {**PARAMS["drafts"]["eagle3"], "start": start, "depth": 3}}
    params = edit(PARAMS, warmup={"steps": 0}, drafts=drafts)
    with Path("params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(params, file)
    stage(warmup, "eagle3-1", monkeypatch)
    second = Path("warmup", "eagle3-1", "model")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
    described = json.loads((second / "config.json").read_text())
    assert described["config"]["start"] == start
    assert described["hidden_layers"] == [1, 2, 3]
    (first / "model.safetensors").write_bytes(b"other")
    stage_again = edit(params, warmup={"steps": 1})
    with Path("params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(stage_again, file)
    with pytest.raises(DraftError, match=r"with the digest .*drafts\.\*\.start\.sha256 pins"):
        stage(warmup, "eagle3-1", monkeypatch)
