"""Prompts -> sequences: the target's own responses, or the data's."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    require_context,
    require_plain,
    sequence_rows,
    served,
    split_of,
    times,
    with_conversations,
    without_failures,
)
from pipeline.provenance import run
from pipeline.sampling import Prompt, Response
from pipeline.server import Journal, Reader, ServerConfig, Tally
from pipeline.target import TargetSpec, home_of, load_tokenizer, read_spec
from pipeline.turns import (
    Reply,
    Said,
    Talk,
    chains,
    converse,
    counts,
    failures,
    first_turns,
    paired,
    talks_of,
)
from storage.sequences import Row, Sequences
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
        tables: dict[str, Iterable[Row]]
        turns: dict[str, Any] = {}
        if config.engine == "none" and has_template(tokenizer):
            tables = {
                split: conversation_rows(
                    some, tokenizer, eos_ids=spec.eos_ids, left_out=left_out[split], **shared
                )
                for split, some in chosen.items()
            }
            tables |= dict.fromkeys([GREEDY, *config.laws], tables[HELDOUT])
            worked_s = time.perf_counter() - started
        elif config.turns == "every":
            if has_template(tokenizer):
                require_context(config, spec.context_tokens)
            else:
                for row in rows:
                    require_plain(row)
            talks = {
                split: talks_of(
                    some, encode(first_turns(some), tokenizer, left_out=left_out[split], **shared)
                )
                for split, some in chosen.items()
            }
            talks |= dict.fromkeys([GREEDY, *config.laws], talks[HELDOUT])
            started = time.perf_counter()
            scratch = workspace.path(OUT).parent / "batches"
            said, worked_s, told = _speak(talks, config, spec, tokenizer, scratch)
            tables, turns = _of_turns(said, config)
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
        files = {split: workspace.path(OUT) / file_of(split) for split in tables}
        for split, path in files.items():
            write_table(path, SEQUENCES, tables[split])
        written = {split: Sequences.open(path) for split, path in files.items()}
        metrics = _with_left_out(count(written), left_out)
        for split, of_split in turns.items():
            metrics[split]["turns"] = of_split
        write_json(workspace.path(METRICS), metrics | told)
        timings = times(metrics, wall_s=wall_s, worked_s=worked_s)
        write_json(workspace.path(TIMINGS), timings)
        workspace.publish()


def _with_left_out(metrics: dict[str, Any], left_out: dict[str, Counter[str]]) -> dict[str, Any]:
    """Count what was left out beside what was not, and say so."""
    for split, reasons_of in left_out.items():
        if reasons_of:
            metrics[split]["left_out"] = dict(sorted(reasons_of.items()))
            reasons = ", ".join(f"{n} with {why}" for why, n in sorted(reasons_of.items()))
            print(f"generate: {split} goes without {reasons}.", file=sys.stderr)
    return metrics


def _speak(
    talks: dict[str, list[Talk]],
    config: GenerateConfig,
    spec: TargetSpec,
    tokenizer: Any,
    scratch: Path,
) -> tuple[dict[str, list[Said]], float, dict[str, Any]]:
    """Let the engine answer every user turn; what it took, and what a server is known by."""
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "eos_ids": spec.eos_ids,
        "max_prompt_tokens": config.max_prompt_tokens,
    }
    if isinstance(config.engine, ServerConfig):
        with _asking(config, spec, tokenizer) as (reply, tally):
            said = converse(talks, reply, **settings)
        told = {"failed": failures(said, alone=TRAIN), "drifted": tally.drifted}
        return said, tally.seconds, {"server": told}
    seconds: list[float] = []
    with _sampling(config, spec, scratch, seconds) as reply:
        said = converse(talks, reply, **settings)
    return said, sum(seconds), {}


def _of_turns(
    said: dict[str, list[Said]], config: GenerateConfig
) -> tuple[dict[str, Iterable[Row]], dict[str, Any]]:
    """Tables and counts by split: training as chains, held out a turn a row."""
    tables: dict[str, Iterable[Row]] = {TRAIN: chains(said[TRAIN], law_of(TRAIN, config.engine))}
    prompts, responses, lost = paired({s: some for s, some in said.items() if s != TRAIN})
    tables |= {
        split: sequence_rows(some, responses[split], law_of(split, config.engine))
        for split, some in prompts.items()
    }
    found = {split: counts(some, unpaired=lost.get(split, 0)) for split, some in said.items()}
    for split, of_split in found.items():
        for why, number in of_split["dropped"].items():
            turns = "1 turn" if number == 1 else f"{number} turns"
            print(f"generate: {split} goes without {turns} {why}.", file=sys.stderr)
    return tables, found


def _serve(
    prompts: dict[str, list[Prompt]], config: GenerateConfig, spec: TargetSpec, tokenizer: Any
) -> tuple[dict[str, list[Prompt]], dict[str, list[Response]], float, dict[str, Any]]:
    """Ask the server once for every prompt."""
    with _asking(config, spec, tokenizer) as (reply, tally):
        responses = reply(0, prompts)
    kept, answered, failed = without_failures(prompts, responses)
    told = {"failed": failed, "drifted": tally.drifted}
    return kept, answered, tally.seconds, {"server": told}


@contextmanager
def _asking(
    config: GenerateConfig, spec: TargetSpec, tokenizer: Any
) -> Iterator[tuple[Reply, Tally]]:
    """Ask the server; answers outlive this run's fingerprint, so that new prompts cost alone."""
    assert isinstance(config.engine, ServerConfig)
    # the law and the seed are in each answer's key; where the server stands changes nothing
    identity = digest({"target": spec.fingerprint, "protocol": config.engine.protocol})
    longest = spec.context_tokens if spec.longrope else None
    reader = Reader(tokenizer, spec.vocab_size, spec.eos_ids, longest)
    folder = scratch_root(Path()) / SERVED / identity[:16]
    tally = Tally()
    with Journal(folder, lock=Path(SCRATCH) / f"{SERVED}.lock") as journal:

        def reply(
            _turn: int, prompts: Mapping[str, Sequence[Prompt]]
        ) -> Mapping[str, Sequence[Response | None]]:
            return served(prompts, config=config, reader=reader, journal=journal, tally=tally)[0]

        yield reply, tally


def _sample(
    prompts: dict[str, list[Prompt]], config: GenerateConfig, spec: TargetSpec, scratch: Path
) -> tuple[dict[str, list[Response]], float]:
    seconds: list[float] = []
    with _sampling(config, spec, scratch, seconds) as reply:
        responses = reply(0, prompts)
    return responses, sum(seconds)


@contextmanager
def _sampling(
    config: GenerateConfig, spec: TargetSpec, scratch: Path, seconds: list[float]
) -> Iterator[Callable[[int, Mapping[str, Sequence[Prompt]]], dict[str, list[Response]]]]:
    """Sample in the workers of `cluster`; `seconds` gets what each turn took of them."""
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

        def reply(turn: int, prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, list[Response]]:
            size = config.batch_sequences
            found, took = answer(prompts, job=job, batch_sequences=size, cluster=workers, turn=turn)
            seconds.append(took)
            return found

        yield reply


if __name__ == "__main__":
    run("generate", main)
