"""A trial captures what `stages.capture` would, and scales it."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from lkcache.estimate import estimate
from pipeline.trial import trial
from stages import capture, generate
from storage.errors import ConfigError, DataError
from storage.reader import Cache
from tests.targets import write_params, write_project


def test_a_trial_of_all_sequences_foretells_the_cache(
    tmp_path: Path,
    tiny_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_project(tmp_path, tiny_model(vocab_size=300))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(DataError, match=r"sequences/train.parquet; .*dvc repro"):
        estimate(dry_run=True)
    generate.main()
    capture.main()
    cache = Cache.open(Path("cache/train.zarr"))
    assert cache.num_sequences <= 32
    lines = {line.what: line for line in trial(Path(), num_tokens=10 * cache.num_tokens)}
    assert lines["tokens tried"].value == cache.num_tokens
    stored = {name: size for name, size in cache.manifest.array_bytes.items() if name in lines}
    assert len(stored) > 8
    for name, size in stored.items():  # which counts metadata too
        assert (
            0
            < size / cache.num_tokens - lines[name].value
            < 2000 * cache.num_parts / cache.num_tokens
        )
    assert lines["cache"].value == pytest.approx(
        10 * cache.num_tokens * sum(lines[name].value for name in stored)
    )
    capsys.readouterr()
    assert estimate(dry_run=True) == 0
    said = capsys.readouterr().out
    assert "topk_ids" in said
    assert "assumed" not in said
    assert not list(Path(".scratch").glob("trial-*"))


def test_a_trial_without_torch_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        patch.dict(sys.modules, {"pipeline.trial": None}),
        pytest.raises(ConfigError, match=r"--dry-run without .* pip install lkcache\[pipeline\]"),
    ):
        estimate(dry_run=True)


def test_a_trial_spreads_its_target_as_capture_does(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    write_project(tmp_path, tiny_model(vocab_size=300))
    monkeypatch.chdir(tmp_path)
    generate.main()
    spread = {"kind": "device_map", "devices": 2, "map": "auto"}
    write_params(tmp_path, cluster={"parallel": spread})
    for captures in (capture.main, lambda: trial(Path(), num_tokens=1)):
        with pytest.raises(ConfigError, match=r"cluster\.parallel spreads a target over CUDA"):
            captures()
