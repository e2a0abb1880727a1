"""Two processes are one: the same curve to the order of additions, under DDP and under FSDP2."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.ranks import Ranks, open_ranks
from storage.errors import ConfigError, WorkspaceError
from tests.caches import write_cache
from tests.pipeline import two_ranks
from tests.pipeline.two_ranks import MODULE, one_sided, run

# float32 sums in another order: 6e-8 a product, times what 8 steps of AdamW at 1e-2 make of it
# (measured: 2e-7 in the curve); a wrong denominator or λ of one rank alone is off by 1e-2
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    write_cache(made / "train.zarr", num_sequences=10)
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run(Ranks(), folder)


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    out = subprocess.run(
        [sys.executable, "-m", MODULE, str(folder)], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return seen


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_give_the_loss_curve_of_one(
    sharding: str, one: dict[str, Any], two: dict[str, Any]
) -> None:
    assert len(one["curve"]) == two_ranks.STEPS
    for mine, theirs in zip(one["curve"], two[sharding]["curve"], strict=True):
        assert theirs == pytest.approx(mine, rel=CLOSE)
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(two[sharding]["weights"][name], weight, rtol=1e-3, atol=CLOSE)
    counts = ("steps", "tokens", "supervised", "uncovered", "parameters", "skipped")
    assert [two[sharding]["metrics"][c] for c in counts] == [one["metrics"][c] for c in counts]


def test_a_broken_sharded_run_goes_on_to_the_same_bits(two: dict[str, Any]) -> None:
    assert two["resumed"] == two["fsdp"]


def test_the_first_rank_names_the_sequences_of_all(two: dict[str, Any]) -> None:
    found = two["exploded"].split("on sequences ")[1].split(";")[0].split(", ")
    assert len(set(found)) == 3
    assert two["exploded"].startswith("train eagle3: loss nan at step 1 on sequences train-")


def test_a_rank_without_a_supervised_token_adds_nothing(two: dict[str, Any]) -> None:
    assert two["one_sided"] == pytest.approx(one_sided(Ranks()), rel=CLOSE)


def test_torchruns_number_is_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with (
        pytest.raises(ConfigError, match=r"4 processes of torchrun; expected 2, .* set ranks: 4"),
        open_ranks(2, where="cpu", sharding="ddp", module=MODULE),
    ):
        pass


def test_more_ranks_than_gpus_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match=r"2 training ranks and 0 CUDA devices; .* lower ranks"),
        open_ranks(2, where="cuda", sharding="ddp", module=MODULE),
    ):
        pass


@pytest.mark.parametrize("module", [MODULE, "tests.no_such_module"])
def test_a_rank_that_dies_ends_the_run_with_a_sentence(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "die"])
    sentence = r"training rank 1 of 2 ended early; expected .*; see what it said above and run dvc"
    with (
        pytest.raises(WorkspaceError, match=sentence),
        open_ranks(2, where="cpu", sharding="ddp", module=module) as ranks,
    ):
        ranks.most(1)
