"""Score all arms of a start: exact replay from the cache, and real decoding of its seeds."""

import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from pipeline.cluster import ClusterConfig, device, device_map, open_cluster
from pipeline.config import load
from pipeline.evaluate import GREEDY, SAMPLED, EvaluateConfig, Job, Outcome, run_job
from pipeline.matrix import Arm, Start, cell
from pipeline.provenance import Progress, run
from pipeline.schedule import laws_with_rollouts, open_bench, plan
from pipeline.summary import identical, merge_strata, speeds, summarise, unasked
from pipeline.target import read_spec
from storage.tables import DEPTHS, ROUNDS, STRATA, write_table
from storage.workspace import Workspace, digest, write_json

TARGET, SEQUENCES = Path("target"), Path("sequences/served")
SERVED = Path("cache/served")
CACHES = {SAMPLED.law: Path("cache/heldout.zarr"), GREEDY.law: Path("cache/greedy.zarr")}


def main() -> None:
    """Plan the jobs of every arm, run them, write each arm's tables, the metrics and the times."""
    started = perf_counter()
    config: EvaluateConfig = load("evaluate", EvaluateConfig)
    where: ClusterConfig = load("cluster", ClusterConfig)
    key, start = cell("starts", sys.argv, Start)
    every: dict[str, Arm] = load("arms", dict[str, Arm])
    arms = {name: arm for name, arm in every.items() if arm.start == key}
    models = {n: Path(f"drafts/{key}/{arm.objective}/model").resolve() for n, arm in arms.items()}
    drafts, decoding = list(models.values()), start.seed in config.decode_seeds
    shards = read_spec(TARGET).tensor_parallel if decoding else 1
    rolled = {law: SERVED / f"{law}.zarr" for law in laws_with_rollouts(config, SEQUENCES)}
    bench = open_bench(
        TARGET,
        CACHES | rolled,
        drafts,
        config=config,
        device=device(where),
        device_map=device_map(where, shards=shards),
    )
    jobs = plan(bench, drafts, decode=decoding)
    if not decoding:  # a replay alone is over before workers have started
        where = where.model_copy(update={"workers": 1})
    tables, metrics_file = Path(f"results/{key}/arms"), Path(f"results/{key}/metrics.json")
    times = Path(f"timings/evaluate-{key}.json")
    outs = [tables, metrics_file, times]
    with Workspace("evaluate", digest(bench.sources), outs=outs, cell=key) as workspace:
        with (
            open_cluster(where, threads=config.threads, shards=shards) as cluster,
            Progress(len(jobs), key, unit="batch") as line,
        ):
            done = []
            for job, result in zip(jobs, cluster.map(partial(run_job, bench), jobs), strict=True):
                done.append((job, result))
                line.add()
        metrics: dict[str, Any] = {}
        plain = [found for job, found in done if job.draft is None]
        seconds = speeds("plain", plain)
        for name, arm in arms.items():
            mine = [(job, found) for job, found in done if job.draft == models[name]]
            metrics[arm.objective] = _write_arm(workspace.path(tables), name, arm, mine)
            metrics[arm.objective] |= identical([found for _, found in mine], plain)
            metrics[arm.objective] |= unasked([found for _, found in mine])
            seconds |= speeds(arm.objective, [found for _, found in mine])
        write_json(workspace.path(metrics_file), metrics)
        write_json(workspace.path(times), seconds | {"seconds": perf_counter() - started})
        workspace.publish()


def _write_arm(folder: Path, key: str, arm: Arm, done: list[tuple[Job, Outcome]]) -> dict[str, Any]:
    """An arm's tables and traces; returns its metrics."""
    named = {"arm": key, **arm.model_dump(exclude={"start"})}
    rounds = [named | row for _, found in done for row in found.rounds]
    depths = [named | row for _, found in done for row in found.depths]
    write_table(folder / f"{arm.objective}.rounds.parquet", ROUNDS, rounds)
    write_table(folder / f"{arm.objective}.depths.parquet", DEPTHS, depths)
    strata = merge_strata(row for _, found in done for row in found.strata)
    write_table(folder / f"{arm.objective}.strata.parquet", STRATA, [named | r for r in strata])
    traces = [row for _, found in done for row in found.traces]
    write_json(folder / f"{arm.objective}.traces.json", {"arm": key, "traces": traces})
    return summarise(rounds, depths)


if __name__ == "__main__":
    run("evaluate", main)
