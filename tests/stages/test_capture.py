"""The stage capture on a tiny project; and generate and capture on two workers."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.capture
import pipeline.cluster
import storage.workspace
from lkcache.repair import repair
from pipeline.cluster import ClusterConfig, Later, device, open_cluster
from pipeline.provenance import run
from stages import capture, generate
from storage.errors import DataError, LkcacheError, TargetError, WorkspaceError
from storage.manifest import digest_line
from storage.reader import Cache
from storage.record import supervised
from storage.tables import SEQUENCES, read_table, write_table
from storage.verify import check_cache
from storage.workspace import file_digest, tree_digest
from tests.disks import small_disk
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
    for name in ("generate", "capture"):
        if (folder / f"metrics/{name}.json").exists():
            outs[name] = file_digest(folder / f"metrics/{name}.json")
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


def test_a_pre_empted_capture_goes_on_to_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(here)
    shutil.rmtree(here / "cache")
    plain, parts = pipeline.capture.write_part, []

    def terminated(folder: Path, index: int, *rest: Any) -> Any:
        parts.append(plain(folder, index, *rest))
        if len(parts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return parts[-1]

    monkeypatch.setattr("sys.argv", ["stage"])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.capture, "write_part", terminated)
        with pytest.raises(SystemExit) as stop:
            run("capture", capture.main)
    assert stop.value.code == 143
    assert "capture: stopped by SIGTERM; finished work is kept" in capsys.readouterr().err
    assert len(list(here.glob(".scratch/capture/*/cache/train.zarr/part-*"))) == 2
    run("capture", capture.main)
    assert digests(here) == before


def test_a_capture_stops_before_a_disk_is_full(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(here)
    shutil.rmtree(here / "cache")
    usage, asked = shutil.disk_usage(here), []

    def fills_up(_: Path) -> Any:
        asked.append(True)
        return usage._replace(free=usage.free if len(asked) < 3 else 100_000)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", fills_up)
        with pytest.raises(WorkspaceError, match=r"the rest of the capture needs .* 100 kB free"):
            capture.main()
    assert len(list(here.glob(".scratch/capture/*/cache/train.zarr/part-*"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
        with pytest.raises(WorkspaceError, match=r"the cache needs .* has 10 kB free"):
            capture.main()
    capture.main()
    assert digests(here) == before


def test_a_capture_on_a_small_disk_is_told_and_goes_on_when_there_is_room(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(project)
    # the guard is blind, so that the disk itself must say it
    monkeypatch.setattr(storage.workspace, "require_room", lambda *_: None)
    inputs = ("params.yaml", "target", "sequences")
    files = [p for name in inputs for p in [project / name, *(project / name).rglob("*")]]
    pages = sum(1 + path.stat().st_size // 4096 for path in files)
    with small_disk(tmp_path / "disk", f"{4 * pages + 400}k") as disk:
        for name in inputs:
            copy = shutil.copytree if (project / name).is_dir() else shutil.copy
            copy(project / name, disk.path / name)
        monkeypatch.chdir(disk.path)
        with pytest.raises(OSError, match="No space left") as caught:
            capture.main()
        assert caught.value.errno == errno.ENOSPC
        assert not list(disk.path.glob("cache/*.zarr"))
        whole = list(disk.path.glob(".scratch/capture/*/cache/*.zarr/part-*"))
        disk.set("size=64m")
        kept = {part.name: part.stat().st_ino for part in whole if "train" in str(part)}
        capture.main()
        for name, inode in kept.items():
            assert (disk.path / "cache/train.zarr" / name).stat().st_ino == inode
        assert digests(disk.path) == {k: v for k, v in before.items() if k != "generate"}
        monkeypatch.chdir(project)


def test_a_cache_of_other_parameters_is_moved_aside_and_taken_back(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(here)
    write_params(here, capture={"tail_samples": 2})
    capture.main()
    assert "were moved to .scratch/capture.aside/" in capsys.readouterr().err
    assert digests(here) != before
    write_params(here)
    monkeypatch.setattr(pipeline.capture, "write_part", None)  # nothing is captured again
    capture.main()
    assert "took the outs of these parameters and inputs back" in capsys.readouterr().err
    assert digests(here) == before


def test_writing_aside_by_three_threads_changes_no_byte(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(here)
    shutil.rmtree(here / "cache")
    aside = []

    def at_once(function: Any, units: Any, cores: Any) -> Any:
        for unit in units:
            value = function(unit)
            aside.append(value)
            yield value.finish(3) if isinstance(value, Later) else value

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
    rows = read_table(path, SEQUENCES)
    write_table(path, SEQUENCES, [*rows, rows[2]])
    with pytest.raises(DataError, match=r"heldout.parquet: two sequences 'heldout-2'; expected"):
        capture.main()
    write_table(path, SEQUENCES, [{**row, "turn": [-1] * len(row["turn"])} for row in rows])
    with pytest.raises(DataError, match=r"no token of its 6 sequences is in an assistant's turn"):
        capture.main()
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"heldout.parquet cannot be read \(.*whole parquet file"):
        capture.main()
    path.write_bytes(content)
    assert digests(here) == before


def test_two_workers_write_what_one_writes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(here)
    for name in ("sequences", "cache", "metrics", ".scratch"):
        shutil.rmtree(here / name)
    config = ClusterConfig(workers=2, device="cpu", address=None, parallel=None, writers=None)
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


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The parts that are written from here on."""
    plain, written = pipeline.capture.write_part, []

    def counts(folder: Path, index: int, *rest: Any) -> Any:
        written.append((folder.name, index))
        return plain(folder, index, *rest)

    monkeypatch.setattr(pipeline.capture, "write_part", counts)
    return written


def prepare_repair(folder: Path) -> None:
    """`repair` finds its project by these two files."""
    (folder / "dvc.yaml").touch()


def test_repair_refills_the_bad_part_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_repair(here)
    before, cache = digests(here), Path("cache/train.zarr")
    assert repair(cache) == 0
    assert "nothing to repair" in capsys.readouterr().out
    chunk = here / cache / "part-00001/topk_ids/c/0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    damaged = tree_digest(here / cache)
    assert repair(cache) == 1
    said = capsys.readouterr().out
    assert "train.zarr: part-00001: topk_ids/c/0 has sha256" in said
    assert "capture would then compute 1 part again" in " ".join(said.split())
    assert tree_digest(here / cache) == damaged  # nothing done until told
    assert repair(cache, yes=True) == 0
    assert not (here / cache / "part-00001").exists()
    # a stamp goes by the sizes of large files: it would call the cache complete
    assert not (here / ".scratch/capture.stamp.json").exists()
    written = counted(monkeypatch)
    capture.main()
    assert written == [("train.zarr", 1)]
    assert digests(here) == before
    assert not list(here.glob(".scratch/capture/*"))


def test_repair_trusts_what_capture_recorded_where_the_manifest_is_lost(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_repair(here)
    before, cache = digests(here), here / "cache/train.zarr"
    (cache / "manifest.json").write_text("{}")
    shutil.rmtree(cache / "part-00000")
    # whole in itself, and of another cache
    shutil.copytree(here / "cache/heldout.zarr/part-00000", cache / "part-00000")

    def no_links(*_: object) -> None:
        raise OSError(errno.EXDEV, "another filesystem")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_links)
        assert repair(cache, yes=True) == 0
    written = counted(monkeypatch)
    capture.main()
    assert written == [("train.zarr", 0)]
    assert digests(here) == before


def test_repair_says_what_an_older_capture_did_not_record(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_repair(here)
    path = here / "timings/capture.json"
    path.write_text(json.dumps({"seconds": 1.0}))
    (here / "cache/train.zarr/tokenizer.json").write_text("{}")
    assert repair(here / "cache/train.zarr") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "train.zarr: tokenizer.json: has" in said
    assert "timings/capture.json does not say what capture counted there" in said


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (
            lambda: write_params(Path(), capture={"seed": 1}),
            r"captured with capture.seed 0; .*own, 1",
        ),
        (lambda: Path("target/target.json").unlink(), r"with target .*; .* which is missing"),
        (lambda: shutil.rmtree("sequences"), r"with sequences .*; .* which is missing"),
        (lambda: Path("dvc.yaml").unlink(), r"lies in no project \(no dvc.yaml and params.yaml"),
        (
            lambda: [p.unlink() for p in Path().glob("cache/*/manifest.json")],
            r"no cache in .* has a sound manifest",
        ),
        (lambda: shutil.rmtree("cache"), r"no folder cache/train.zarr; expected a cache"),
    ],
    ids=["params", "target", "sequences", "project", "manifests", "cache"],
)
def test_repair_refuses_what_capture_would_not_refill(
    here: Path, break_it: Any, sentence: str
) -> None:
    prepare_repair(here)
    break_it()
    with pytest.raises(LkcacheError, match=sentence):
        repair(Path("cache/train.zarr"), yes=True)


def test_repair_refuses_caches_of_two_captures(here: Path) -> None:
    prepare_repair(here)
    old = here / "cache/old.zarr"
    shutil.copytree(here / "cache/train.zarr", old)
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["source"]["capture"] = "e" * 64
    content = json.dumps(manifest).encode()
    (old / "manifest.json").write_bytes(content)
    (old / "manifest.sha256").write_bytes(digest_line(content))
    with pytest.raises(
        LkcacheError, match=r"caches of different captures side by side: .*old.zarr of eeeeeeeeeeee"
    ):
        repair(here / "cache/train.zarr")
