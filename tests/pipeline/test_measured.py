"""The card's table holds the report's figures, or says why there is none."""

from pathlib import Path

from pipeline.findings import ReportConfig, find
from pipeline.measured import CONFIDENCE, RESAMPLES, SEED, rows
from pipeline.results import REPLAY, read_results
from tests.pipeline.synthetic import World, write_results

SMALL = World(prompts=24, decoded=12, depth=5, drafts={"lm": ("lm", 1, ("kl", "tv"))})


def test_its_figures_are_the_reports(tmp_path: Path) -> None:
    arms = write_results(tmp_path, SMALL)
    given = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED}
    config = ReportConfig(baseline="kl", gammas=[4], **given)
    taus = find(read_results(tmp_path / "results", arms), config).tau
    table = rows(tmp_path / "results", arms[0])
    overall = [x for x in taus if (x.objective, x.domain) == ("kl", "all")]
    assert overall
    for found in overall:
        mine = (
            f"| {REPLAY} | T = {found.temperature:g} | {found.gamma} | {found.tau.estimate:.3f} |"
        )
        assert [line for line in table if line.startswith(mine)], (mine, table)
    assert any(line.startswith("| decode |") for line in table)


def test_results_that_were_not_replayed_are_no_reason_to_fail(tmp_path: Path) -> None:
    arms = write_results(tmp_path, World(prompts=1, decoded=1, depth=5, drafts=SMALL.drafts))
    [line] = rows(tmp_path / "results", arms[0])
    assert line.startswith("No τ of this arm: replay was run on 1 prompt; expected at least")
