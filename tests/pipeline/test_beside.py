"""Served laws and prompt sets stand beside the primary numbers, and change none of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.beside import served_tables, set_tables
from pipeline.findings import ReportConfig, find
from pipeline.report import Records, build
from pipeline.results import DECODE, REPLAY, Key, Results, read_results
from pipeline.statistics import Interval
from storage.errors import ResultError
from storage.tables import ROUNDS, read_table, write_table
from tests.pipeline.synthetic import World, write_records, write_results

WORLD = World(prompts=18, decoded=12, depth=4, drafts={"lm": ("lm", 3, ("kl", "tv"))})
CONFIG = ReportConfig(baseline="kl", gammas=[4], confidence=0.95, resamples=300, seed=0)
LAW, GREEDY = "T=0.7,top_p=0.9", "T=1,drafts=greedy"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A served law that was replayed and decoded, one that was decoded only, and a set."""
    root = tmp_path_factory.mktemp("project")
    found = read_results(root / "results", write_results(root, WORLD))
    for key, columns in list(found.rounds.items()):
        if key.temperature != 1 or key.gamma != 4:
            continue
        slower = columns | {"rounds": columns["rounds"] * 1.1}
        if key.instrument == REPLAY:
            found.rounds[Key(key.arm, REPLAY, 0.7, 4, LAW)] = slower
            sums = {"anchors": 100.0, "alpha": 60.0, "alpha_lo": 59.0, "alpha_hi": 61.0}
            sums |= {"accept": 60.0, "survive": 60.0}
            found.served_depths[key.arm, LAW, 0] = sums
        if key.instrument == DECODE:
            found.rounds[Key(key.arm, DECODE, 0.7, 4, LAW)] = slower
            found.rounds[Key(key.arm, DECODE, 1.0, 4, GREEDY)] = slower
            found.rounds[Key(key.arm, "decode:mt_bench", 1.0, 4)] = columns
    found.prompts["decode:mt_bench"] = found.prompts[DECODE]
    return found


def test_primary_numbers_do_not_see_them(results: Results, tmp_path: Path) -> None:
    plain = read_results(tmp_path / "results", write_results(tmp_path, WORLD))
    assert results.temperatures() == plain.temperatures()
    assert find(results, CONFIG) == find(plain, CONFIG)
    assert results.laws() == [LAW, GREEDY]
    assert plain.laws() == []
    assert served_tables(plain, CONFIG) == set_tables(plain, CONFIG) == []


def test_a_served_law_has_its_tau_difference_and_acceptance(results: Results) -> None:
    (table,) = served_tables(results, CONFIG)
    rows = {(r["law"], r["how"], r["objective"]): r for r in table.rows}
    assert table.rows[0]["law"] == "T = 1, greedy drafts"
    assert ("T = 1, greedy drafts", "replayed", "kl") not in rows
    tv = rows["T = 0.7, top-p 0.9", "replayed", "tv"]
    keys = {arm: Key(arm, REPLAY, 0.7, 4, LAW) for arm in ("lm-tv-0", "lm-tv-1", "lm-tv-2")}
    tokens = sum(results.rounds[key]["tokens"].sum() for key in keys.values())
    passes = sum(results.rounds[key]["rounds"].sum() for key in keys.values())
    assert isinstance(tv["tau"], Interval)
    assert tv["tau"].estimate == pytest.approx(tokens / passes)
    # all rounds were stretched alike: the difference is that at T = 1
    at_one = next(
        c for c in find(results, CONFIG).comparisons if (c.temperature, c.domain) == (1, "all")
    )
    assert tv["difference_percent"] == pytest.approx(100 * at_one.difference.these_seeds.estimate)
    assert isinstance(tv["over_seeds_percent"], Interval)
    assert tv["kept"] == Interval(0.6, 0.59, 0.61)
    assert tv["kept_name"] == "α"
    # one seed was decoded
    assert rows["T = 1, greedy drafts", "decoded", "tv"]["over_seeds_percent"] is None
    assert rows["T = 1, greedy drafts", "decoded", "kl"].get("difference_percent") is None


def test_a_set_is_shown_by_category(results: Results) -> None:
    (table,) = set_tables(results, CONFIG)
    assert {r["category"] for r in table.rows} == {"all", "code", "maths", "prose"}
    whole = next(r for r in table.rows if (r["category"], r["objective"]) == ("all", "kl"))
    assert (whole["set"], whole["law"], whole["prompts"]) == ("mt_bench", "T = 1", 12)
    columns = results.rounds[Key("lm-kl-0", "decode:mt_bench", 1.0, 4)]
    assert isinstance(whole["tau"], Interval)
    assert whole["tau"].estimate == pytest.approx(columns["tokens"].sum() / columns["rounds"].sum())
    part = next(r for r in table.rows if (r["category"], r["objective"]) == ("code", "kl"))
    inside = np.array([results.domain[p] == "code" for p in results.prompts["decode:mt_bench"]])
    assert isinstance(part["tau"], Interval)
    assert part["tau"].estimate == pytest.approx(
        columns["tokens"][inside].sum() / columns["rounds"][inside].sum()
    )


def numbers(cell: Any) -> Any:
    """A cell, numbers to what sums in another order keep."""
    if isinstance(cell, Interval):
        return [round(end, 9) for end in (cell.estimate, cell.lo, cell.hi)]
    return round(cell, 9) if isinstance(cell, float) else cell


def test_texts_that_were_sampled_may_differ_by_arm(tmp_path: Path) -> None:
    arms = write_results(tmp_path, WORLD)
    for arm in arms:
        path = tmp_path / f"results/{arm.start}/arms/{arm.objective}.rounds.parquet"
        rows = read_table(path, ROUNDS)
        some = [r for r in rows if (r["instrument"], r["temperature"]) == (DECODE, 1)]
        longer = int(arm.objective == "tv")
        new = [r | {"instrument": "decode:own", "tokens": r["tokens"] + longer} for r in some]
        write_table(path, ROUNDS, [*rows, *new])
    found = read_results(tmp_path / "results", arms)
    assert len(found.prompts["decode:own"]) == 12


def test_turns_of_a_conversation_are_one_draw_and_have_rows_of_their_own(
    results: Results,
) -> None:
    """Twice the same turn says as much as once: τ, its interval and its prompts stay."""
    (whole,) = set_tables(results, CONFIG)
    plain = {(r["category"], r["objective"]): r for r in whole.rows}
    names = results.prompts["decode:mt_bench"]
    domain = results.domain | {f"{name}#1": results.domain[name] for name in names}
    prompts = results.prompts | {"decode:mt_bench": [*names, *(f"{name}#1" for name in names)]}
    rounds = {
        key: {name: np.concatenate([x, 3 * x]) for name, x in columns.items()}
        if key.instrument == "decode:mt_bench"
        else columns
        for key, columns in results.rounds.items()
    }
    twice = Results(results.arms, prompts=prompts, domain=domain, rounds=rounds)
    (table,) = set_tables(twice, CONFIG)
    rows = {(r["category"], r["objective"]): r for r in table.rows}
    assert set(rows) - set(plain) == {(f"turn {n}", o) for n in (1, 2) for o in ("kl", "tv")}
    for at, row in plain.items():
        assert list(map(numbers, rows[at].values())) == list(map(numbers, row.values()))
    for turn in ("turn 1", "turn 2"):
        assert numbers(rows[turn, "tv"]["tau"]) == numbers(plain["all", "tv"]["tau"])
        assert rows[turn, "tv"]["prompts"] == 12
    # a turn's own sums: the second one's rounds are half as many again
    for key, columns in rounds.items():
        if key.instrument == "decode:mt_bench":
            columns["rounds"][12:] *= 1.5
    (table,) = set_tables(twice, CONFIG)
    slow, fast = (
        next(r["tau"] for r in table.rows if (r["category"], r["objective"]) == (turn, "kl"))
        for turn in ("turn 2", "turn 1")
    )
    assert isinstance(slow, Interval)
    assert isinstance(fast, Interval)
    assert slow.estimate == pytest.approx(fast.estimate / 1.5)


def test_the_page_has_a_section_of_them(results: Results, tmp_path: Path) -> None:
    write_records(tmp_path, WORLD)
    page = build(results, find(results, CONFIG), CONFIG, records=Records(target={}, cache={}))
    assert 'id="beside"' in page.files["index.html"]
    assert "T = 0.7, top-p 0.9" in page.files["served.md"]
    assert page.files["prompt_sets.csv"].startswith("set,law,category,draft,objective,gamma")
    assert "p(argmax q)" not in page.files["served.csv"]


def test_a_row_of_no_law_is_refused(tmp_path: Path) -> None:
    arms = write_results(tmp_path, WORLD)
    path = tmp_path / "results/lm-0/arms/kl.rounds.parquet"
    rows = read_table(path, ROUNDS)
    write_table(path, ROUNDS, [rows[0] | {"law": "warm"}, *rows[1:]])
    with pytest.raises(ResultError, match="a row of lm-kl-0 names the law 'warm'; expected a name"):
        read_results(tmp_path / "results", arms)
