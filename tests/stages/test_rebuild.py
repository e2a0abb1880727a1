"""A cache of mode rebuild against one of mode full: the same laws, the same training, one head."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lkcache.inspect import inspect
from pipeline.checkpoint import save_draft
from pipeline.config import load
from pipeline.dataset import collate, head_for
from pipeline.evaluate import EvaluateConfig, Job, run_job
from pipeline.law import DenseLaw
from pipeline.loss import find
from pipeline.schedule import open_bench
from pipeline.setting import Setting
from pipeline.target import (
    INTERFACE,
    SPEC,
    load_target,
    read_head,
    read_interface,
    sample_digest,
)
from pipeline.train import FitConfig, Fitted, fit_from_cache, open_inputs
from stages import capture, generate, verify
from storage.errors import FingerprintMismatch, TargetError
from storage.reader import Cache
from storage.record import supervised
from storage.workspace import read_json, write_json
from tests.pipeline.test_capture import WHOLE
from tests.stages.training import FIT
from tests.targets import copy_project, write_params, write_project

MODES = ("full", "rebuild")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    """One target, its sequences, and a folder of caches and reports for each mode."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, tiny_model(vocab_size=300))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        generate.main()
        for mode in MODES:
            write_params(folder, capture={**WHOLE, "mode": mode, "part_tokens": 10_000})
            capture.main()
            verify.main()
            shutil.copytree("cache", mode)
            shutil.copy("cache-report/report.json", f"{mode}.json")
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def spoil_head(folder: Path) -> None:
    """Another head in `target/interface`, and nothing else changed."""
    from safetensors import safe_open

    path = folder / "target" / INTERFACE
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(path)
    tensors["lm_head"][0, 0] += 1
    save_file(tensors, path, metadata=metadata)


def pin_spoilt(folder: Path) -> None:
    """Take the other head for the pinned one, so that only what it computes tells them apart."""
    spec = read_json(folder / "target" / SPEC)
    spec["interface"] = {INTERFACE.name: sample_digest(folder / "target" / INTERFACE)}
    write_json(folder / "target" / SPEC, spec)


def test_the_rebuilt_law_is_the_targets_within_bfloat16(here: Path) -> None:
    target, head = load_target(Path("target")), read_head(Path("target"))
    laws = []
    for mode in MODES:
        cache = Cache.open(Path(mode) / "heldout.zarr")
        records = cache.records(range(cache.num_sequences))
        law = collate(records, cache.layout, head=head).law
        assert isinstance(law, DenseLaw)
        laws.append(law.logp.double().exp())
        assert collate(records, cache.layout).law is None or mode == "full"
    exact = []
    for record in records:
        tokens = torch.from_numpy(record.tokens.astype(np.int64))
        states = target.forward(tokens[None]).last_hidden[0]
        rows = torch.from_numpy(supervised(record.turn))
        exact.append(target.logits(states[rows]).double().softmax(-1))
    tv_full, tv_rebuild = (0.5 * (law - torch.cat(exact)).abs().sum(-1) for law in laws)
    # both round to bfloat16: one the law's logarithm, the other the states that it comes from
    assert 0 < tv_full.max() < 5e-3
    assert 0 < tv_rebuild.max() < 5e-3


def test_a_rebuilt_cache_is_smaller_and_says_what_it_keeps(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = [Cache.open(Path(mode) / "train.zarr") for mode in MODES]
    sizes = [sum(cache.manifest.array_bytes.values()) for cache in caches]
    assert sizes[1] < sizes[0]  # at V = 300 and D = 32; at 128k and 4096 it is 1 in 30
    assert caches[1].source["head"] == read_head(Path("target")).digest
    assert "head" not in caches[0].source
    reports = [read_json(Path(f"{mode}.json"))["splits"]["train"] for mode in MODES]
    for report in reports:
        assert report["mean_kept"] == 300
        assert report["mean_tail_mass"] == 0
        assert report["replay_max_error"]["token_logp"] < 1e-4
        assert report["replay_max_error"]["tv"] < 5e-3
    assert reports[1]["replay_max_error"]["tv_beyond_rounding"] < 1e-3
    inspect("rebuild/train.zarr", sequence=0)
    shown = " ".join(capsys.readouterr().out.split())
    assert "mode rebuild" in shown
    assert "made from last_hidden when read" in shown


def fitted(mode: str) -> tuple[Any, Fitted, Any]:
    config = FitConfig(**{**FIT, "steps": 20})
    loss = find("lk_lambda")
    inputs = open_inputs("lm", "lm", cache=Path(mode), target=Path("target"))
    draft = inputs.fresh(0)
    found = fit_from_cache(
        draft,
        inputs,
        loss=partial(loss.loss, config=loss.Config(kind="lk_lambda", eta=3.0)),
        config=config,
        seed=0,
        stage="train",
        cell=mode,
    )
    return draft, found, inputs


def test_a_draft_trains_to_nearly_the_same_from_either(here: Path, tmp_path: Path) -> None:
    alphas = []
    curves = []
    evaluate = load("evaluate", EvaluateConfig).model_copy(update={"depth": 4})
    for mode in MODES:
        draft, found, inputs = fitted(mode)
        curves.append([row["kl"] for row in found.curve])
        folder = tmp_path / mode
        section = inputs.section.model_dump()
        save_draft(folder, draft, config=section, meta=inputs.source, shape=inputs.shape)
        caches = {"T=1": Path(mode, "heldout.zarr"), "T=0": Path(mode, "greedy.zarr")}
        bench = open_bench(Path("target"), caches, [folder], config=evaluate, device="cpu")
        laws = Setting(1.0), Setting(0.0)
        outcomes = [run_job(bench, Job("replay", folder, law, (0, 1, 2, 3))) for law in laws]
        assert all(outcome.rounds for outcome in outcomes)
        rows = outcomes[0].depths
        assert all(row["alpha_lo"] <= row["alpha"] <= row["alpha_hi"] + 1e-6 for row in rows)
        alphas.append([row["alpha"] / max(1, row["anchors"]) for row in rows])
    assert curves[0][-1] < curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-3)
    np.testing.assert_allclose(alphas[1], alphas[0], atol=2e-3)


def test_another_head_is_refused_before_anything_is_trained(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_project(project, tmp_path))
    spoil_head(tmp_path)
    pinned = r"interface\.safetensors \(embedding, LM head, final norm\) has digest [0-9a-f]{12}; "
    for read in (read_interface, read_head):
        with pytest.raises(TargetError, match=pinned + "expected [0-9a-f]{12}, which target.json"):
            read(Path("target"))
    with pytest.raises(TargetError, match=pinned):
        fitted("rebuild")
    pin_spoilt(tmp_path)
    said = r"made from head [0-9a-f]{64}; expected head [0-9a-f]{64}; run dvc repro"
    cache = Cache.open(Path("rebuild/train.zarr"))
    assert head_for(Cache.open(Path("full/train.zarr")), Path("target")) is None
    with pytest.raises(FingerprintMismatch, match=said):
        head_for(cache, Path("target"))
    with pytest.raises(FingerprintMismatch, match=said):
        fitted("rebuild")
    with pytest.raises(FingerprintMismatch, match=said):
        verify.main()
    with pytest.raises(TargetError, match=r"an LM head in target/interface that does not give"):
        capture.main()
