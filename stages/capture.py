"""Sequences -> the cache: the target's law and features at every token, in one pass."""

import time
from pathlib import Path

from pipeline.capture import (
    CaptureConfig,
    Job,
    capture_all,
    fingerprint_of,
    law_of,
    layout_of,
    least_bytes,
    plan,
    seal_cache,
    times,
)
from pipeline.cluster import ClusterConfig, device, device_map, open_cluster
from pipeline.config import load
from pipeline.provenance import run
from pipeline.target import home_of, read_head, read_spec
from pipeline.teacher import served_law
from storage.sequences import Sequences
from storage.workspace import Workspace, file_digest, write_json

TARGET, SEQUENCES_FOLDER = Path("target"), Path("sequences")
CACHES = {split: Path(f"cache/{split}.zarr") for split in ("train", "heldout", "greedy")}
SERVED = Path("cache/served")
"""A cache for each law that `generate.laws` names, by the law's name; empty where there is none."""
METRICS, TIMINGS = Path("metrics/capture.json"), Path("timings/capture.json")


def main() -> None:
    """Check the sequences, plan the parts, capture them, seal a cache for each split."""
    config: CaptureConfig = load("capture", CaptureConfig)
    cluster: ClusterConfig = load("cluster", ClusterConfig)
    spec = read_spec(TARGET)
    layout = layout_of(spec, config)
    files = {split: SEQUENCES_FOLDER / f"{split}.parquet" for split in CACHES}
    served = {path.stem: path for path in sorted(SEQUENCES_FOLDER.glob("served/*.parquet"))}
    caches = CACHES | {law: SERVED / f"{law}.zarr" for law in served}
    files |= served
    tables = {split: Sequences.open(path) for split, path in files.items()}
    laws = {split: law_of(table, spec) for split, table in tables.items()}
    surveys = {split: table.survey for split, table in tables.items()}
    digests = {split: file_digest(path) for split, path in files.items()}
    head = {"head": read_head(TARGET).digest} if layout.mode == "rebuild" else {}
    fingerprint = fingerprint_of(spec, config, digests | head)
    outs = [*caches.values(), METRICS, TIMINGS]
    SERVED.mkdir(parents=True, exist_ok=True)  # an out that is there, whatever it holds
    with Workspace("capture", fingerprint, outs=outs, keep_replaced=True) as workspace:
        if workspace.complete():
            print("capture: the caches are complete, of these parameters and inputs.")
            return
        parts = {
            split: plan(
                survey.lengths.data,
                sequences=files[split],
                sequences_digest=digests[split],
                cache=workspace.path(caches[split]),
                part_tokens=config.part_tokens,
            )
            for split, survey in surveys.items()
        }
        where, places = device(cluster), device_map(cluster, shards=spec.tensor_parallel)
        cut = spec.tensor_parallel > 1
        job = Job(TARGET.absolute(), spec.fingerprint, where, config, layout, places)
        num_tokens = sum(survey.num_tokens for survey in surveys.values())
        least = least_bytes(layout, surveys.values())
        workspace.require_room("the cache", left=least, total=least)
        started = time.perf_counter()
        with open_cluster(cluster, threads=config.threads, shards=spec.tensor_parallel) as workers:
            done = capture_all(
                parts, job, workers, num_tokens=num_tokens, require_room=workspace.require_room
            )
        wall_s = time.perf_counter() - started
        metrics = {
            split: seal_cache(
                workspace.path(caches[split]),
                done[split],
                job=job,
                source={
                    "target": spec.fingerprint,
                    **({"tensor_parallel": str(spec.tensor_parallel)} if cut else {}),
                    "sequences": digests[split],
                    "split": split,
                    "law": laws[split],
                    **({"token_law": laws[split]} if served_law(laws[split]) else {}),
                    "capture": fingerprint,
                    **head,
                },
                tokenizer=home_of(spec, TARGET) / "tokenizer.json",
            )
            for split in caches
        }
        write_json(workspace.path(METRICS), metrics)
        write_json(workspace.path(TIMINGS), times(done, wall_s=wall_s))
        workspace.publish()


if __name__ == "__main__":
    run("capture", main)
