"""The stage writes the page, its tables and the metric, and refuses what cannot be compared."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.report import main
from storage.errors import ConfigError, DataError
from storage.workspace import read_json
from tests.pipeline.synthetic import World, write_params, write_project

WORLD = World(
    prompts=18,
    decoded=9,
    depth=5,
    drafts={"lm": ("lm", 3, ("kl", "lk_lambda")), "medusa": ("medusa", 1, ("kl", "tv"))},
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_project(tmp_path, WORLD, resamples=300)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_report_writes_page_tables_and_metric(project: Path) -> None:
    main()
    tables = ("tau", "differences", "alpha", "predicted", "cache")
    expected = {f"{name}.{form}" for name in tables for form in ("md", "csv")} | {"index.html"}
    assert expected <= {path.name for path in (project / "report").iterdir()}
    assert read_json(project / "metrics/report.json")["lm"]["lk_lambda"]["T1"]["tau"] > 1
    page = (project / "report/index.html").read_text(encoding="utf-8")
    assert "Training" in page
    assert str(project) not in page


def test_the_same_results_give_the_same_bytes(project: Path) -> None:
    main()
    first = {path.name: path.read_bytes() for path in (project / "report").iterdir()}
    main()
    assert first == {path.name: path.read_bytes() for path in (project / "report").iterdir()}


def test_what_is_optional_may_be_missing(project: Path) -> None:
    for path in [*(project / "timings").iterdir(), *(project / "drafts").rglob("curve.csv")]:
        path.unlink()
    (project / "metrics/capture.json").unlink()
    main()
    page = (project / "report/index.html").read_text(encoding="utf-8")
    assert "No times were recorded" in page
    assert 'id="curves"' not in page


def test_an_unlisted_arm_is_not_read(project: Path) -> None:
    """Left-overs of an earlier matrix are on disk; the parameters say what is compared."""
    write_params(project, World(drafts={"lm": ("lm", 1, ("kl", "lk_lambda"))}), resamples=300)
    main()
    assert "medusa" not in (project / "report/index.html").read_text(encoding="utf-8")


def test_an_arm_that_was_not_evaluated_stops_the_report(project: Path) -> None:
    (project / "results/medusa-0/arms/tv.depths.parquet").unlink()
    with pytest.raises(DataError, match=r"no file results/medusa-0/arms/tv\.depths\.parquet"):
        main()
    assert not (project / "report").exists()


def test_a_bad_parameter_stops_the_report(project: Path) -> None:
    write_params(project, WORLD, confidence=95)
    with pytest.raises(ConfigError, match=r"report\.confidence is 95; expected input should be"):
        main()


def test_report_needs_no_torch(project: Path) -> None:
    """A page is made on any machine, and in seconds: nothing heavy is imported on the way."""
    heavy = "{'torch', 'transformers', 'dask', 'zarr', 'altair'}"
    code = f"import sys, stages.report as r; r.main(); sys.exit(str({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == "set()"
