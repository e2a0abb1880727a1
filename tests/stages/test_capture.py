"""The stage capture on a tiny project; and generate and capture on two workers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.capture
import pipeline.cluster
from pipeline.cluster import ClusterConfig, Later, device, open_cluster
from stages import capture, generate
from storage.errors import DataError, TargetError
from storage.reader import Cache
from storage.record import supervised
from storage.tables import SEQUENCES, read_table, write_table
from storage.verify import check_cache
from storage.workspace import file_digest, tree_digest
from tests.pipeline.test_capture import WHOLE
from tests.targets import copy_project, write_params, write_project

SPLITS = ("train", "heldout", "greedy")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    """A project whose caches are captured."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, tiny_model(vocab_size=300))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        generate.main()
        capture.main()
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_project(project, tmp_path))
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    """Of every out but the times."""
    outs = {"sequences": tree_digest(folder / "sequences")}
    outs |= {split: tree_digest(folder / f"cache/{split}.zarr") for split in SPLITS}
    outs |= {name: file_digest(folder / f"metrics/{name}.json") for name in ("generate", "capture")}
    return outs


def test_three_caches_are_written_whole(project: Path) -> None:
    for split, law in (("train", "T=1"), ("heldout", "T=1"), ("greedy", "T=0")):
        path = project / f"cache/{split}.zarr"
        assert check_cache(path) == []
        cache = Cache.open(path)
        rows = read_table(project / f"sequences/{split}.parquet", SEQUENCES)
        assert cache.ids == [row["id"] for row in rows]
        assert cache.domains == [row["domain"] for row in rows]
        assert cache.source["law"] == law
        assert (
            cache.source["target"]
            == json.loads((project / "target/target.json").read_text())["fingerprint"]
        )
        assert cache.source["sequences"] == file_digest(project / f"sequences/{split}.parquet")
        assert cache.layout.hidden_layers == (1, 3)
        assert (path / "tokenizer.json").read_bytes() == (
            project / "target/tokenizer.json"
        ).read_bytes()
        for row, record in zip(rows, cache.records(range(len(rows))), strict=True):
            assert record.tokens.tolist() == row["tokens"]
            assert (record.kept[supervised(record.turn)] > 0).all()
    assert Cache.open(project / "cache/train.zarr").num_parts > 1


def test_metrics_and_times_say_what_was_captured(project: Path) -> None:
    metrics = json.loads((project / "metrics/capture.json").read_text())["train"]
    cache = Cache.open(project / "cache/train.zarr")
    kept = np.concatenate([r.kept[supervised(r.turn)] for r in cache.epoch(0)])
    assert metrics["tokens"] == cache.num_tokens
    assert metrics["rows"] == len(kept)
    assert metrics["mean_kept"] == pytest.approx(kept.mean(), abs=1e-5)
    assert metrics["coverage"] == pytest.approx(1 - metrics["mean_tail_mass"])
    assert 0 < metrics["mean_entropy"] < np.log(300)
    assert sum(metrics["bytes_per_token"].values()) == pytest.approx(
        metrics["bytes"] / metrics["tokens"], abs=0.01
    )
    times = json.loads((project / "timings/capture.json").read_text())
    assert 0 < times["target_seconds"] <= times["worker_seconds"]
    assert times["tokens_per_s"] > 0


def test_a_complete_cache_is_left_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(here)
    capture.main()
    assert "caches are complete, of these parameters and inputs" in capsys.readouterr().out
    assert digests(here) == before


def test_a_killed_capture_resumes_to_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(here)
    shutil.rmtree(here / "cache")
    plain, written = pipeline.capture.write_part, []

    def stops(folder: Path, index: int, *rest: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append((folder.name, index))
        return plain(folder, index, *rest)

    monkeypatch.setattr(pipeline.capture, "write_part", stops)
    with pytest.raises(KeyboardInterrupt):
        capture.main()
    assert not (here / "cache/train.zarr").exists()
    (torn,) = here.glob(".scratch/capture/*/cache/train.zarr/part-00001/token_logp/c/0")
    torn.write_bytes(torn.read_bytes()[:-1])

    def counts(folder: Path, index: int, *rest: Any) -> Any:
        written.append((folder.name, index))
        return plain(folder, index, *rest)

    monkeypatch.setattr(pipeline.capture, "write_part", counts)
    capture.main()
    assert digests(here) == before
    assert written.count(("train.zarr", 0)) == 1
    assert written.count(("train.zarr", 1)) == 2


def test_writing_aside_changes_no_byte(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(here)
    shutil.rmtree(here / "cache")
    aside = []

    def at_once(function: Any, units: Any) -> Any:
        for unit in units:
            value = function(unit)
            aside.append(value)
            yield value.finish() if isinstance(value, Later) else value

    monkeypatch.setattr(pipeline.cluster, "_here", at_once)
    capture.main()
    assert digests(here) == before
    assert len(aside) > 3
    assert all(isinstance(value, Later) for value in aside)


def test_full_mode_keeps_every_logit(here: Path) -> None:
    write_params(here, capture={**WHOLE, "mode": "full", "hidden_layers": [], "last_hidden": False})
    capture.main()
    cache = Cache.open(here / "cache/train.zarr")
    record = cache.records([0])[0]
    assert record.logits is not None
    assert record.logits.shape == (supervised(record.turn).sum(), 300)
    assert check_cache(here / "cache/train.zarr") == []


def test_bad_inputs_cost_nothing(here: Path) -> None:
    before = digests(here)
    write_params(here, capture={"hidden_layers": [1, 4]})
    with pytest.raises(TargetError, match="hidden layer 4 asked of a target of 4 layers"):
        capture.main()
    write_params(here)
    path = here / "sequences/heldout.parquet"
    content = path.read_bytes()
    rows = read_table(path, SEQUENCES)
    rows[1]["tokens"][0] = 300
    write_table(path, SEQUENCES, rows)
    with pytest.raises(
        DataError, match=r"heldout.parquet: sequence 'heldout-1' holds the token id"
    ):
        capture.main()
    path.write_bytes(content)
    assert digests(here) == before


def test_two_workers_write_what_one_writes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(here)
    for name in ("sequences", "cache", "metrics", ".scratch"):
        shutil.rmtree(here / name)
    config = ClusterConfig(workers=2, device="cpu", address=None)
    assert device(config) == "cpu"
    # both stages share the workers: their start is what takes time
    with open_cluster(config, threads=1) as workers:
        for stage in (generate, capture):
            monkeypatch.setattr(stage, "open_cluster", lambda *_, **__: _Lent(workers))
            stage.main()
    assert digests(here) == before


class _Lent:
    """An open cluster that is not closed."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster

    def __enter__(self) -> Any:
        return self.cluster

    def __exit__(self, *_: object) -> None:
        pass
