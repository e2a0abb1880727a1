"""Prompts -> sequences: the target's own responses, or the data's."""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.chat import has_template
from pipeline.cluster import ClusterConfig, device, device_map, open_cluster
from pipeline.config import load
from pipeline.generate import (
    GREEDY,
    HELDOUT,
    TRAIN,
    GenerateConfig,
    Job,
    answer,
    conversation_rows,
    count,
    data_responses,
    encode,
    file_of,
    law_of,
    sequence_rows,
    served,
    split_of,
    times,
    with_conversations,
    without_failures,
)
from pipeline.provenance import run
from pipeline.sampling import Prompt, Response
from pipeline.server import Journal, Reader, ServerConfig
from pipeline.target import TargetSpec, home_of, load_tokenizer, read_spec
from storage.tables import CONVERSATIONS, PROMPTS, SEQUENCES, read_table, write_table
from storage.workspace import SCRATCH, Workspace, digest, file_digest, scratch_root, write_json

PROMPTS_FILE, TARGET = Path("data/prompts.parquet"), Path("target")
TALKS = Path("data/conversations.parquet")  # where the source has conversations
OUT = Path("sequences")
SERVED = "generate-server"  # what servers answered, under scratch
METRICS, TIMINGS = Path("metrics/generate.json"), Path("timings/generate.json")


def main() -> None:
    """Encode the prompts, answer them, write one table a split."""
    config: GenerateConfig = load("generate", GenerateConfig)
    rows, spec = read_table(PROMPTS_FILE, PROMPTS), read_spec(TARGET)
    sources = {"target": spec.fingerprint, "prompts": file_digest(PROMPTS_FILE)}
    if TALKS.is_file():
        rows = with_conversations(rows, read_table(TALKS, CONVERSATIONS))
        sources["conversations"] = file_digest(TALKS)
    fingerprint = digest({"params": config.model_dump(), **sources})
    with Workspace("generate", fingerprint, outs=[OUT, METRICS, TIMINGS]) as workspace:
        if workspace.complete():
            print(f"generate: {OUT}/ is complete, of these parameters and inputs.")
            return
        chosen = {split: split_of(rows, split) for split in (TRAIN, HELDOUT)}
        tokenizer = load_tokenizer(home_of(spec, TARGET), trust_remote_code=spec.trust_remote_code)
        left_out: dict[str, Counter[str]] = {split: Counter() for split in chosen}
        shared: dict[str, Any] = {"config": config, "context_tokens": spec.context_tokens}
        started = time.perf_counter()
        told: dict[str, Any] = {}
        if config.engine == "none" and has_template(tokenizer):
            tables = {
                split: conversation_rows(
                    some, tokenizer, eos_ids=spec.eos_ids, left_out=left_out[split], **shared
                )
                for split, some in chosen.items()
            }
            tables |= dict.fromkeys([GREEDY, *config.laws], tables[HELDOUT])
            worked_s = time.perf_counter() - started
        else:
            prompts = {
                split: encode(some, tokenizer, left_out=left_out[split], **shared)
                for split, some in chosen.items()
            }
            prompts |= dict.fromkeys([GREEDY, *config.laws], prompts[HELDOUT])
            started = time.perf_counter()
            if isinstance(config.engine, ServerConfig):
                prompts, responses, worked_s, told = _serve(prompts, config, spec, tokenizer)
            elif config.engine == "none":
                responses = data_responses(prompts, tokenizer, config=config, eos_ids=spec.eos_ids)
                worked_s = time.perf_counter() - started
            else:
                scratch = workspace.path(OUT).parent / "batches"
                responses, worked_s = _sample(prompts, config, spec, scratch)
            tables = {
                split: sequence_rows(some, responses[split], law_of(split, config.engine))
                for split, some in prompts.items()
            }
        wall_s = time.perf_counter() - started
        for split, table in tables.items():
            write_table(workspace.path(OUT) / file_of(split), SEQUENCES, table)
        metrics = _with_left_out(count(tables), left_out)
        write_json(workspace.path(METRICS), metrics | told)
        timings = times(metrics, wall_s=wall_s, worked_s=worked_s)
        write_json(workspace.path(TIMINGS), timings)
        workspace.publish()


def _with_left_out(metrics: dict[str, Any], left_out: dict[str, Counter[str]]) -> dict[str, Any]:
    """Count what was left out beside what was not, and say so."""
    for split, counts in left_out.items():
        if counts:
            metrics[split]["left_out"] = dict(sorted(counts.items()))
            reasons = ", ".join(f"{number} with {why}" for why, number in sorted(counts.items()))
            print(f"generate: {split} goes without {reasons}.", file=sys.stderr)
    return metrics


def _serve(
    prompts: dict[str, list[Prompt]], config: GenerateConfig, spec: TargetSpec, tokenizer: Any
) -> tuple[dict[str, list[Prompt]], dict[str, list[Response]], float, dict[str, Any]]:
    """Ask the server; answers outlive this run's fingerprint, so that new prompts cost alone."""
    assert isinstance(config.engine, ServerConfig)
    # the law and the seed are in each answer's key; where the server stands changes nothing
    identity = digest({"target": spec.fingerprint, "protocol": config.engine.protocol})
    reader = Reader(tokenizer, spec.vocab_size, spec.eos_ids)
    folder = scratch_root(Path()) / SERVED / identity[:16]
    with Journal(folder, lock=Path(SCRATCH) / f"{SERVED}.lock") as journal:
        responses, tally = served(prompts, config=config, reader=reader, journal=journal)
    kept, answered, failed = without_failures(prompts, responses)
    told = {"failed": failed, "drifted": tally.drifted}
    return kept, answered, tally.seconds, {"server": told}


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
        device_map=device_map(cluster, shards=spec.tensor_parallel),
    )
    with open_cluster(cluster, threads=config.threads, shards=spec.tensor_parallel) as workers:
        return answer(prompts, job=job, batch_sequences=config.batch_sequences, cluster=workers)


if __name__ == "__main__":
    run("generate", main)
