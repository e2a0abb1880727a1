"""Results of two runs pair by prompt and seed, or are refused naming both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.compare import between
from pipeline.findings import ReportConfig
from pipeline.results import Results, read_results
from storage.errors import ResultError
from storage.tables import ROUNDS, read_table, write_table
from tests.pipeline.synthetic import World, write_results

WORLD = World(
    prompts=18,
    decoded=0,
    depth=3,
    drafts={"lm": ("lm", 3, ("kl",)), "medusa": ("medusa", 1, ("kl", "tv"))},
)
CONFIG = ReportConfig(baseline="kl", gammas=[3], confidence=0.95, resamples=300, seed=0)
NAMES = ("left", "right")


def read(root: Path, world: World = WORLD, edit: Any = None) -> Results:
    arms = write_results(root, world)
    for path in root.glob("results/*/arms/*.rounds.parquet") if edit else ():
        write_table(path, ROUNDS, [new for row in read_table(path, ROUNDS) if (new := edit(row))])
    return read_results(root / "results", arms)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read(tmp_path_factory.mktemp("left"))


def test_a_known_gain_is_found_seed_by_seed(left: Results, tmp_path: Path) -> None:
    gain = {0: 1.02, 1: 1.03, 2: 1.04}

    def edit(row: dict[str, Any]) -> dict[str, Any]:
        faster = row["draft"] == "lm" and row["temperature"] == 1
        return row | {"rounds": row["rounds"] / gain[row["seed"]]} if faster else row

    right = read(tmp_path, edit=edit)
    # the order of prompts is each run's own affair
    right.prompts["replay"].reverse()
    for arrays in right.rounds.values():
        for name in arrays:
            arrays[name] = arrays[name][::-1].copy()
    found = between(left, right, CONFIG, names=NAMES)
    rows = {
        (r.comparison.draft, r.comparison.objective, r.comparison.temperature): r
        for r in found.rows
    }
    assert set(rows) == {
        (d, o, t) for d, o in (("lm", "kl"), ("medusa", "kl"), ("medusa", "tv")) for t in (0.0, 1.0)
    }
    lm = rows["lm", "kl", 1.0]
    mean = float(np.exp(np.mean(np.log(list(gain.values())))) - 1)
    assert lm.comparison.difference.these_seeds.estimate == pytest.approx(mean)
    assert lm.comparison.difference.over_seeds is not None
    assert lm.tau_b / lm.tau_a == pytest.approx(1.03, abs=0.005)
    assert not lm.same
    assert all(row.same for key, row in rows.items() if key != ("lm", "kl", 1.0))
    assert rows["medusa", "tv", 1.0].comparison.difference.over_seeds is None


def test_only_shared_arms_and_seeds_are_compared(left: Results, tmp_path: Path) -> None:
    other = World(
        prompts=18,
        decoded=0,
        depth=3,
        drafts={"lm": ("lm", 2, ("kl", "tv")), "lm_wide": ("lm", 1, ("kl",))},
    )
    found = between(left, read(tmp_path, other), CONFIG, names=NAMES)
    assert {r.comparison.draft for r in found.rows} == {"lm"}
    assert {r.comparison.difference.seeds for r in found.rows} == {2}
    assert found.only_a == ["lm-kl-2", "medusa-kl-0", "medusa-tv-0"]
    assert found.only_b == ["lm-tv-0", "lm-tv-1", "lm_wide-kl-0"]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda row: row if row["prompt"] != "heldout-0004" else None,
            r"left replayed 18 prompts and right 17, which differ in heldout-0004",
        ),
        (
            lambda row: row | {"tokens": row["tokens"] + (row["prompt"] == "heldout-0002")},
            r"but other responses: heldout-0002 has \d+ and \d+ tokens; expected rollouts of one",
        ),
        (
            lambda row: row if row["temperature"] == 1 else None,
            r"left was replayed at T = 0, T = 1, right at T = 1; expected the same temperatures",
        ),
        (
            lambda row: row | {"gamma": row["gamma"] + 10},
            r"left and right were replayed at different γ",
        ),
    ],
    ids=["prompts", "rollouts", "temperatures", "gamma"],
)
def test_other_prompts_and_rollouts_are_refused(
    left: Results, tmp_path: Path, edit: Any, sentence: str
) -> None:
    with pytest.raises(ResultError, match=sentence):
        between(left, read(tmp_path, edit=edit), CONFIG, names=NAMES)


def test_no_arm_in_common_is_refused(left: Results, tmp_path: Path) -> None:
    other = World(prompts=18, decoded=0, depth=3, drafts={"eagle3": ("eagle3", 1, ("kl",))})
    with pytest.raises(ResultError, match=r"left has the arms lm-kl-0, .*, right eagle3-kl-0"):
        between(left, read(tmp_path, other), CONFIG, names=NAMES)
