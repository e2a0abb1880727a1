"""Results pair by prompt, or are refused naming both sides."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.findings import ReportConfig, find
from pipeline.results import BLOCK, REPLAY, Key, read_results
from storage.errors import DataError, ResultError
from storage.tables import ROUNDS, read_table, write_table
from tests.pipeline.synthetic import World, write_results

SMALL = World(
    prompts=24,
    decoded=12,
    depth=5,
    drafts={"lm": ("lm", 3, ("kl", "lk_lambda")), "medusa": ("medusa", 1, ("kl", "tv"))},
)
CONFIG = ReportConfig(baseline="kl", gammas=[4, 5], confidence=0.95, resamples=300, seed=0)


def change(root: Path, stem: str, edit: Any) -> None:
    """Rewrite one arm's rounds."""
    path = root / "results" / f"{stem}.rounds.parquet"
    write_table(path, ROUNDS, [new for row in read_table(path, ROUNDS) if (new := edit(row))])


def test_columns_hold_the_same_prompts_in_the_same_order(tmp_path: Path) -> None:
    arms = write_results(tmp_path, SMALL)
    # row order is the scheduler's business, not the report's
    path = tmp_path / "results/lm-1/arms/kl.rounds.parquet"
    write_table(path, ROUNDS, reversed(read_table(path, ROUNDS)))
    results = read_results(tmp_path / "results", arms)
    a, b = (results.rounds[Key(name, REPLAY, 1.0, 4)]["tokens"] for name in ("lm-kl-0", "lm-kl-1"))
    assert np.array_equal(a, b)
    assert results.drafts == ["lm", "medusa"]
    assert results.objectives() == ["kl", "lk_lambda", "tv"]
    assert results.gammas("medusa-kl-0", 1.0) == [1, 2, 3, 4]
    assert results.domains() == ["code", "maths", "prose"]


def test_rows_of_another_arm_are_refused(tmp_path: Path) -> None:
    arms = write_results(tmp_path, SMALL)
    change(tmp_path, "lm-0/arms/kl", lambda row: row | {"arm": "lm-tv-0"})
    with pytest.raises(
        ResultError, match=r"holds rows of the arm lm-tv-0; expected rows of lm-kl-0"
    ):
        read_results(tmp_path / "results", arms)


def test_other_prompts_are_refused_naming_both_arms(tmp_path: Path) -> None:
    arms = write_results(tmp_path, SMALL)
    gone = "heldout-0003"
    change(tmp_path, "lm-2/arms/lk_lambda", lambda row: row if row["prompt"] != gone else None)
    with pytest.raises(
        ResultError,
        match=r"lm-lk_lambda-2 has 23 prompts and lm-kl-0 24, which differ in heldout-0003",
    ):
        read_results(tmp_path / "results", arms)


def test_other_rollouts_are_refused_naming_both_arms(tmp_path: Path) -> None:
    arms = write_results(tmp_path, SMALL)
    change(tmp_path, "medusa-0/arms/tv", lambda row: row | {"tokens": row["tokens"] + 1})
    with pytest.raises(
        ResultError, match=r"medusa-tv-0 and lm-kl-0 replayed different rollouts of heldout-0000"
    ):
        read_results(tmp_path / "results", arms)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    arms = write_results(tmp_path, SMALL)
    change(tmp_path, "lm-0/arms/kl", lambda row: None)
    with pytest.raises(ResultError, match=r"kl\.rounds\.parquet holds no rows"):
        read_results(tmp_path / "results", arms)


def test_a_listed_arm_without_results_is_refused(tmp_path: Path) -> None:
    arms = write_results(tmp_path, SMALL)
    (tmp_path / "results/lm-1/arms/kl.rounds.parquet").unlink()
    with pytest.raises(DataError, match=r"no file .*lm-1/arms/kl\.rounds\.parquet"):
        read_results(tmp_path / "results", arms)


def test_findings_know_which_seeds_and_depths_there_are(tmp_path: Path) -> None:
    found = find(read_results(tmp_path / "results", write_results(tmp_path, SMALL)), CONFIG)
    primary = {(c.draft, c.objective, c.temperature): c.difference for c in found.overall(4)}
    assert set(primary) == {
        (d, o, t) for d, o in (("lm", "lk_lambda"), ("medusa", "tv")) for t in (0.0, 1.0)
    }
    assert primary["lm", "lk_lambda", 1.0].over_seeds is not None
    assert primary["medusa", "tv", 1.0].over_seeds is None
    assert primary["lm", "lk_lambda", 1.0].these_seeds.estimate == pytest.approx(0.038, abs=0.01)
    # MEDUSA stops at its heads: no row at γ = 5, no error either
    assert {c.draft for c in found.overall(5)} == {"lm"}
    assert {d.depth for d in found.depths if d.draft == "medusa"} == {0, 1, 2, 3}
    assert all((d.alpha is None) == (d.temperature == 0) for d in found.depths)


def test_block_verification_is_compared_with_token_verification(tmp_path: Path) -> None:
    found = find(read_results(tmp_path / "results", write_results(tmp_path, SMALL)), CONFIG)
    gains = [c.difference.these_seeds.estimate for c in found.blocks]
    assert gains == pytest.approx([1 / 0.985 - 1] * len(gains))
    assert {c.temperature for c in found.blocks} == {1.0}


def test_only_replay_is_needed(tmp_path: Path) -> None:
    """Decode and block rows are extra instruments: without them their tables are empty."""
    arms = write_results(tmp_path, SMALL)
    for arm in arms:
        stem = f"{arm.start}/arms/{arm.objective}"
        change(tmp_path, stem, lambda row: row if row["instrument"] == REPLAY else None)
    found = find(read_results(tmp_path / "results", arms), CONFIG)
    assert found.predictions == []
    assert found.blocks == []
    assert found.overall(4)


def test_block_rows_share_the_rollouts(tmp_path: Path) -> None:
    results = read_results(tmp_path / "results", write_results(tmp_path, SMALL))
    token, block = (
        results.rounds[Key("lm-kl-0", name, 1.0, 4)]["tokens"] for name in (REPLAY, BLOCK)
    )
    assert np.array_equal(token, block)


def test_one_prompt_is_refused(tmp_path: Path) -> None:
    arms = write_results(tmp_path, World(prompts=1, decoded=0, drafts={"lm": ("lm", 1, ("kl",))}))
    with pytest.raises(ResultError, match=r"replay was run on 1 prompt; expected at least 2"):
        read_results(tmp_path / "results", arms)


def test_no_replay_at_all_is_refused(tmp_path: Path) -> None:
    arms = write_results(tmp_path, World(prompts=3, decoded=3, drafts={"lm": ("lm", 1, ("kl",))}))
    change(tmp_path, "lm-0/arms/kl", lambda row: row if row["instrument"] == "decode" else None)
    with pytest.raises(ResultError, match=r"no arm was replayed; expected rollouts of the target"):
        read_results(tmp_path / "results", arms)
