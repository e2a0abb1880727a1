"""The cache -> a report on it: intact, what the target says, how much it covers, and how surely."""

from pathlib import Path

from pipeline.audit import Job, VerifyConfig, choose, replay_all, unigrams
from pipeline.certificate import summary
from pipeline.cluster import ClusterConfig, device, device_map, open_cluster
from pipeline.config import load
from pipeline.coverage import coverage
from pipeline.provenance import run
from pipeline.sampled import Surprise
from pipeline.target import read_head, read_spec
from storage.errors import CacheError
from storage.manifest import check_source
from storage.reader import Cache
from storage.verify import check_cache
from storage.workspace import Workspace, digest, file_digest, write_json

TARGET = Path("target")
SPLITS = ("train", "heldout", "greedy")
CACHES = {split: Path(f"cache/{split}.zarr") for split in SPLITS}
SEQUENCES = {split: Path(f"sequences/{split}.parquet") for split in SPLITS}
OUT = Path("cache-report")


def main() -> None:
    """Check the structure, replay a sample, certify its truncation, count the coverage."""
    config: VerifyConfig = load("verify", VerifyConfig)
    cluster: ClusterConfig = load("cluster", ClusterConfig)
    spec = read_spec(TARGET)
    served = [path.stem for path in sorted(Path("sequences/served").glob("*.parquet"))]
    paths = CACHES | {law: Path(f"cache/served/{law}.zarr") for law in served}
    files = SEQUENCES | {law: Path(f"sequences/served/{law}.parquet") for law in served}
    caches = {split: _open(paths[split], files[split], spec.fingerprint) for split in paths}
    sources = {split: cache.source for split, cache in caches.items()}
    fingerprint = digest({"params": config.model_dump(), "caches": sources})
    with Workspace("verify", fingerprint, outs=[OUT]) as workspace:
        units = choose(paths, files, config)
        job = Job(
            folder=TARGET.absolute(),
            fingerprint=spec.fingerprint,
            device=device(cluster),
            config=config,
            unigrams=unigrams(paths),
            identity=fingerprint,
            device_map=device_map(cluster, shards=spec.tensor_parallel),
        )
        with open_cluster(
            cluster, threads=config.threads, units=len(units), shards=spec.tensor_parallel
        ) as opened:
            found = replay_all(units, job, opened)
        splits = {
            split: {
                **coverage(cache),
                "replay_max_error": found[split].errors,
                "certified": summary(found[split].certificate),
                **_sampling(found[split].surprise),
            }
            for split, cache in caches.items()
        }
        report = {
            "splits": splits,
            "replayed_sequences_per_split": config.sequences,
            "source": sources,
            "findings": [],
        }
        write_json(workspace.path(OUT) / "report.json", report)
        workspace.publish()


def _sampling(found: Surprise) -> dict[str, dict[str, float]]:
    """How far a split's tokens are from samples of its law; nothing where that is not asked."""
    return {"surprise_beyond_law": found.summary()} if found.rows else {}


def _open(path: Path, sequences: Path, target: str) -> Cache:
    """A cache whose every file and array is sound; `CacheError` names the first thing that is not.

    Made from this target and these sequences, and with this LM head where that makes its laws, or
    it is a `FingerprintMismatch`.
    """
    findings = check_cache(path)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise CacheError(
            found=f"{path}: {findings[0]}{more}",
            expected="a cache as capture wrote it",
            todo=f"remove {path} and run dvc repro, which captures it anew",
        )
    expect = {"target": target, "sequences": file_digest(sequences)}
    cache = Cache.open(path, expect=expect)
    if cache.layout.mode == "rebuild":
        check_source(cache.path, cache.source, {"head": read_head(TARGET).digest})
    return cache


if __name__ == "__main__":
    run("verify", main)
