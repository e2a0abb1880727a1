"""The stage verify on a tiny project."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import capture, generate, verify
from storage.errors import CacheError, ConfigError, FingerprintMismatch
from storage.tables import SEQUENCES, read_table, write_table
from storage.workspace import file_digest
from tests.targets import copy_project, write_params, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, tiny_model(vocab_size=300))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        generate.main()
        capture.main()
        verify.main()
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(copy_project(project, tmp_path))
    return tmp_path


def test_the_report_counts_and_compares_every_split(project: Path) -> None:
    report = json.loads((project / "cache-report/report.json").read_text())
    assert report["findings"] == []
    assert set(report["splits"]) == {"train", "heldout", "greedy"}
    for split in report["splits"].values():
        errors = split["replay_max_error"]
        assert errors["kept_set"] == 0
        assert errors["token_logp"] < 1e-4
        assert errors["tv_beyond_rounding"] <= errors["tv"] < 2e-2
        assert 0 < split["mean_kept_mass"] <= 1
        assert set(split["mean_kept_by_domain"]) == {"code", "prose"}
        certified = split.pop("certified")
        assert set(certified) == {"target at T=1.5", "unigram"}
        for numbers in certified.values():
            assert numbers["alpha_covered"] == numbers["kl_covered"] == 1
            assert 0 < numbers["alpha_width"] < numbers["alpha_width_p99"] < 1
            assert numbers["rows"] > 0
        # what the report page prints beside: numbers, and groups of numbers
        for value in split.values():
            numbers = value.values() if isinstance(value, dict) else [value]
            assert all(isinstance(number, int | float) for number in numbers)


def test_the_report_does_not_depend_on_the_run(here: Path) -> None:
    before = file_digest(here / "cache-report/report.json")
    shutil.rmtree(here / "cache-report")
    verify.main()
    assert file_digest(here / "cache-report/report.json") == before


def test_a_damaged_cache_is_refused(here: Path) -> None:
    (stored,) = here.glob("cache/heldout.zarr/part-00000/topk_p/c/0")
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    before = file_digest(here / "cache-report/report.json")
    with pytest.raises(CacheError, match=r"cache/heldout.zarr: part-00000.* remove cache/heldout"):
        verify.main()
    assert file_digest(here / "cache-report/report.json") == before


def test_a_missing_cache_is_refused(here: Path) -> None:
    shutil.rmtree(here / "cache/greedy.zarr")
    with pytest.raises(CacheError, match=r"no folder cache/greedy.zarr"):
        verify.main()


def test_a_cache_of_other_sequences_is_refused(here: Path) -> None:
    shutil.copy(here / "sequences/greedy.parquet", here / "sequences/heldout.parquet")
    with pytest.raises(FingerprintMismatch, match=r"heldout.zarr was made from sequences .* expec"):
        verify.main()


def test_a_cache_of_another_target_is_refused(here: Path) -> None:
    spec = json.loads((here / "target/target.json").read_text())
    spec["fingerprint"] = "0" * 64
    (here / "target/target.json").write_text(json.dumps(spec))
    with pytest.raises(FingerprintMismatch, match=r"train.zarr was made from target .* 0000"):
        verify.main()


def test_sequences_that_another_target_answered_are_refused(here: Path) -> None:
    """Same vocabulary and template, captured without complaint: only the surprise tells.

    At T = 0: the law of random weights is too flat for T = 1 (tests/pipeline/test_sampled.py).
    """
    report = json.loads((here / "cache-report/report.json").read_text())
    for split in ("train", "heldout"):
        own = report["splits"][split]["surprise_beyond_law"]
        assert abs(own["excess_nats"]) <= 6 * own["standard_error"]
    assert report["splits"]["greedy"]["surprise_beyond_law"]["excess_nats"] < 1e-3
    path = here / "sequences/greedy.parquet"
    rows = read_table(path, SEQUENCES)
    for row in rows:
        pairs = zip(row["tokens"], row["turn"], strict=True)
        row["tokens"] = [299 - token if turn >= 0 else token for token, turn in pairs]
    write_table(path, SEQUENCES, rows)
    shutil.rmtree(here / "cache")
    capture.main()
    with pytest.raises(
        CacheError, match=r"greedy cache: what was said is .* at T=0 \(\d+ replayed"
    ):
        verify.main()


def test_a_limit_that_rounding_exceeds_is_reported(here: Path) -> None:
    write_params(here, verify={"max_hidden_error": 1e-6})
    with pytest.raises(CacheError, match=r"sequence '\S+', position \d+ has a relative error of h"):
        verify.main()
    write_params(here, verify={"sequences": 0})
    with pytest.raises(ConfigError, match=r"verify.sequences is 0"):
        verify.main()
