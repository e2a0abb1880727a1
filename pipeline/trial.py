"""A few sequences through the real capture -> what the whole of it will take, measured.

    measured = trial(Path(), num_tokens=1_250_000)     # of `lkcache estimate --dry-run`

Captures evenly spread sequences of the train split into a folder that is removed, by the code, the
parameters and the device of `stages.capture`, one worker, and scales bytes and seconds by tokens.
What it writes is no cache: it is never sealed. Metadata is left out, which few tokens carry and
many share.
"""

import tempfile
from pathlib import Path

from pipeline.capture import CaptureConfig, Done, Job, capture_part, law_of, layout_of, plan
from pipeline.cluster import ClusterConfig, device, device_map
from pipeline.config import load
from pipeline.estimate import Line
from pipeline.target import read_spec
from storage.sequences import Sequences
from storage.shard import METADATA
from storage.tables import SEQUENCES, write_table
from storage.workspace import file_digest, scratch_root

SEQUENCES_TRIED = 32
MEASURED = "measured"


def trial(root: Path, *, num_tokens: int) -> list[Line]:
    """Bytes a token by array, bytes and hours of `num_tokens`; `DataError` without sequences."""
    config: CaptureConfig = load("capture", CaptureConfig, path=root / "params.yaml")
    cluster: ClusterConfig = load("cluster", ClusterConfig, path=root / "params.yaml")
    target, source = root / "target", root / "sequences" / "train.parquet"
    spec = read_spec(target)
    table = Sequences.open(source)
    law_of(table, spec)
    step = max(1, len(table) // SEQUENCES_TRIED)
    picked = table.take(range(0, len(table), step)[:SEQUENCES_TRIED])
    job = Job(
        target.absolute(),
        spec.fingerprint,
        device(cluster),
        config,
        layout_of(spec, config),
        device_map(cluster, shards=spec.tensor_parallel),
    )
    scratch = scratch_root(root)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trial-", dir=scratch) as folder:
        sample = Path(folder, "train.parquet")
        write_table(sample, SEQUENCES, picked)
        parts = plan(
            [len(row["tokens"]) for row in picked],
            sequences=sample,
            sequences_digest=file_digest(sample),
            cache=Path(folder, "train.zarr"),
            part_tokens=config.part_tokens,
        )
        return _lines([capture_part(job, part) for part in parts], job, num_tokens)


def _lines(done: list[Done], job: Job, num_tokens: int) -> list[Line]:
    tried = sum(part.stats.tokens for part in done)
    sizes = {
        array.name: sum(
            entry.num_bytes
            for part in done
            for name, entry in part.entry.array_files(array.name).items()
            if not name.endswith(METADATA)
        )
        for array in job.layout.arrays()
    }
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    seconds = sum(part.stats.seconds for part in done) / tried
    return [
        Line("tokens tried", tried, "tokens", MEASURED),
        *(Line(name, size / tried, "B/token", MEASURED) for name, size in largest if size),
        Line("cache", sum(sizes.values()) / tried * num_tokens, "B", MEASURED),
        Line(f"pass, one worker on {job.device}", seconds * num_tokens / 3600, "h", MEASURED),
    ]
