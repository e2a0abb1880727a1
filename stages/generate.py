"""Prompts -> sequences: the target's own responses, or the data's."""

import time
from pathlib import Path

from pipeline.cluster import ClusterConfig, device, device_map, open_cluster
from pipeline.config import load
from pipeline.generate import (
    GREEDY,
    HELDOUT,
    TRAIN,
    GenerateConfig,
    Job,
    answer,
    count,
    data_responses,
    encode,
    law_of,
    sequence_rows,
    split_of,
    times,
)
from pipeline.provenance import run
from pipeline.sampling import Prompt, Response
from pipeline.target import TargetSpec, home_of, load_tokenizer, read_spec
from storage.tables import PROMPTS, SEQUENCES, read_table, write_table
from storage.workspace import Workspace, digest, file_digest, write_json

PROMPTS_FILE, TARGET = Path("data/prompts.parquet"), Path("target")
OUT = Path("sequences")
METRICS, TIMINGS = Path("metrics/generate.json"), Path("timings/generate.json")


def main() -> None:
    """Encode the prompts, answer them, write one table a split."""
    config: GenerateConfig = load("generate", GenerateConfig)
    rows, spec = read_table(PROMPTS_FILE, PROMPTS), read_spec(TARGET)
    sources = {"target": spec.fingerprint, "prompts": file_digest(PROMPTS_FILE)}
    fingerprint = digest({"params": config.model_dump(), **sources})
    with Workspace("generate", fingerprint, outs=[OUT, METRICS, TIMINGS]) as workspace:
        if workspace.complete():
            print(f"generate: {OUT}/ is complete, of these parameters and inputs.")
            return
        chosen = {split: split_of(rows, split) for split in (TRAIN, HELDOUT)}
        tokenizer = load_tokenizer(home_of(spec, TARGET), trust_remote_code=spec.trust_remote_code)
        prompts = {
            split: encode(some, tokenizer, config=config, context_tokens=spec.context_tokens)
            for split, some in chosen.items()
        }
        prompts[GREEDY] = prompts[HELDOUT]
        started = time.perf_counter()
        if config.engine == "none":
            responses = data_responses(prompts, tokenizer, config=config, eos_ids=spec.eos_ids)
            worked_s = time.perf_counter() - started
        else:
            scratch = workspace.path(OUT).parent / "batches"
            responses, worked_s = _sample(prompts, config, spec, scratch)
        wall_s = time.perf_counter() - started
        tables = {
            split: sequence_rows(some, responses[split], law_of(split, config.engine))
            for split, some in prompts.items()
        }
        for split, table in tables.items():
            write_table(workspace.path(OUT) / f"{split}.parquet", SEQUENCES, table)
        metrics = count(tables)
        write_json(workspace.path(METRICS), metrics)
        timings = times(metrics, wall_s=wall_s, worked_s=worked_s)
        write_json(workspace.path(TIMINGS), timings)
        workspace.publish()


def _sample(
    prompts: dict[str, list[Prompt]], config: GenerateConfig, spec: TargetSpec, scratch: Path
) -> tuple[dict[str, list[Response]], float]:
    cluster: ClusterConfig = load("cluster", ClusterConfig)
    job = Job(
        folder=TARGET.absolute(),
        fingerprint=spec.fingerprint,
        device=device(cluster),
        scratch=scratch.absolute(),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        device_map=device_map(cluster),
    )
    with open_cluster(cluster, threads=config.threads) as workers:
        return answer(prompts, job=job, batch_sequences=config.batch_sequences, cluster=workers)


if __name__ == "__main__":
    run("generate", main)
