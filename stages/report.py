"""Results to tables, plots and a page.

    python -m stages.report

Reads the results of exactly the arms that `arms:` lists, and what earlier stages recorded of
themselves; writes `report/` and the DVC metric `metrics/report.json`. Torch-free.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import load
from pipeline.exhibits import Curves
from pipeline.findings import ReportConfig, find
from pipeline.matrix import Arm
from pipeline.provenance import run
from pipeline.report import Records, build
from pipeline.results import read_results
from storage.workspace import Workspace, digest, read_json, write_json

OUTS = (Path("report"), Path("metrics/report.json"))
METRICS = ("prepare", "target", "generate", "capture")


def main() -> None:
    """Check that the arms can be compared, compare them, write the page and its tables."""
    config: ReportConfig = load("report", ReportConfig)
    listed: dict[str, Arm] = load("arms", dict[str, Arm])
    arms = list(listed.values())
    results = read_results(Path("results"), arms)
    report = build(results, find(results, config), config, records=_records(arms, config))
    fingerprint = digest([dict(report.files), dict(report.metrics)])
    with Workspace("report", fingerprint, outs=OUTS) as workspace:
        folder = workspace.path(OUTS[0])
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in report.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_json(workspace.path(OUTS[1]), report.metrics)
        workspace.publish()
    print(f"report: {OUTS[0] / 'index.html'}")


def _records(arms: Sequence[Arm], config: ReportConfig) -> Records:
    """What other stages wrote of themselves; a time or a metric that is not there is left out."""
    cells = [f"train-{arm.key}" for arm in arms]
    for start in dict.fromkeys(arm.start for arm in arms):
        cells += [f"warmup-{start}", f"evaluate-{start}"]
    timings = {name: Path("timings") / f"{name}.json" for name in ["generate", "capture", *cells]}
    metrics = {name: Path("metrics") / f"{name}.json" for name in METRICS}
    return Records(
        target=read_json(Path("target/target.json")),
        cache=read_json(Path("cache-report/report.json")),
        metrics={name: read_json(path) for name, path in metrics.items() if path.is_file()},
        timings={name: read_json(path) for name, path in timings.items() if path.is_file()},
        curves=_curves(arms),
        traces={
            arm.key: read_json(path)["traces"]
            for arm in arms
            for path in [Path("results", arm.start, "arms", f"{arm.objective}.traces.json")]
            if path.is_file()
        },
        params={"report": config.model_dump()},
        losses=load("losses", dict[str, dict[str, Any]]),
    )


def _curves(arms: Sequence[Arm]) -> Curves:
    """Training curves by draft and objective, the mean over seeds at each step."""
    seeds: dict[tuple[str, str], dict[float, list[dict[str, str]]]] = {}
    for arm in arms:
        path = Path("drafts") / arm.start / arm.objective / "curve.csv"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                steps = seeds.setdefault((arm.draft, arm.objective), {})
                steps.setdefault(float(row["step"]), []).append(row)
    return {
        cell: [
            {"step": step, **{name: _mean(rows, name) for name in ("alpha", "heldout_alpha")}}
            for step, rows in sorted(steps.items())
        ]
        for cell, steps in seeds.items()
    }


def _mean(rows: Sequence[dict[str, str]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row.get(name)]
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    run("report", main)
