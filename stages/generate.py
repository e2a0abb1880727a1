"""Prompts -> sequences: the target's own responses, or the data's."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    by_engine,
    count,
    data_rows,
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


@dataclass(frozen=True)
class _Work:
    """What answering takes beside the prompts."""

    config: GenerateConfig
    spec: TargetSpec
    tokenizer: Any
    scratch: Path
    """Of the batches that are done."""


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
        scratch = workspace.path(OUT).parent / "batches"
        work = _Work(config, spec, tokenizer, scratch)
        tables: dict[str, Iterable[Row]] = {}
        turns: dict[str, Any] = {}
        if config.train_responses == "data":
            tables[TRAIN] = data_rows(
                chosen.pop(TRAIN),
                tokenizer,
                eos_ids=spec.eos_ids,
                left_out=left_out[TRAIN],
                **shared,
            )
        if config.turns == "every":
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
            said, worked_s, told = _speak(talks, work)
            answered, turns = _of_turns(said, config)
        else:
            prompts = {
                split: encode(some, tokenizer, left_out=left_out[split], **shared)
                for split, some in chosen.items()
            }
            prompts |= dict.fromkeys([GREEDY, *config.laws], prompts[HELDOUT])
            started = time.perf_counter()
            answered, worked_s, told = _answer(prompts, work)
        tables |= answered
        wall_s = time.perf_counter() - started
        files = {split: workspace.path(OUT) / file_of(split) for split in tables}
        for split, path in files.items():
            write_table(path, SEQUENCES, tables[split])
        written = {split: Sequences.open(path) for split, path in files.items()}
        metrics = _with_left_out(count(written), left_out)
        for split, of_split in turns.items():
            metrics[split]["turns"] = of_split
        write_json(workspace.path(METRICS), metrics | told)
        drawn = {split: of_split for split, of_split in metrics.items() if split in answered}
        timings = times(drawn, wall_s=wall_s, worked_s=worked_s)
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
    talks: dict[str, list[Talk]], work: _Work
) -> tuple[dict[str, list[Said]], float, dict[str, Any]]:
    """Let the engine answer every user turn; what it took, and what a server is known by."""
    said: dict[str, list[Said]] = {}
    seconds, told = 0.0, {}
    for engine, some in by_engine(talks, work.config.engine):
        with _answering(engine, work) as (reply, tally):
            said |= converse(
                some,
                reply,
                tokenizer=work.tokenizer,
                eos_ids=work.spec.eos_ids,
                max_prompt_tokens=work.config.max_prompt_tokens,
            )
        seconds += tally.seconds
        if isinstance(engine, ServerConfig):
            mine = {split: said[split] for split in some}
            told = {"failed": failures(mine, alone=TRAIN), "drifted": tally.drifted}
    return said, seconds, {"server": told} if told else {}


def _of_turns(
    said: dict[str, list[Said]], config: GenerateConfig
) -> tuple[dict[str, Iterable[Row]], dict[str, Any]]:
    """Tables and counts by split: training as chains, held out a turn a row."""
    tables: dict[str, Iterable[Row]] = {}
    if TRAIN in said:
        tables[TRAIN] = chains(said[TRAIN], law_of(TRAIN, config.engine))
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


def _answer(
    prompts: dict[str, list[Prompt]], work: _Work
) -> tuple[dict[str, Iterable[Row]], float, dict[str, Any]]:
    """Let the engine answer every prompt once; what it took, and what a server is known by."""
    tables: dict[str, Iterable[Row]] = {}
    seconds, told = 0.0, {}
    for engine, some in by_engine(prompts, work.config.engine):
        with _answering(engine, work) as (reply, tally):
            responses = reply(0, some)
        kept, answered, failed = without_failures(some, responses)
        tables |= {
            split: sequence_rows(kept[split], answered[split], law_of(split, work.config.engine))
            for split in kept
        }
        seconds += tally.seconds
        if isinstance(engine, ServerConfig):
            told = {"failed": failed, "drifted": tally.drifted}
    return tables, seconds, {"server": told} if told else {}


@contextmanager
def _answering(engine: str | ServerConfig, work: _Work) -> Iterator[tuple[Reply, Tally]]:
    with _asking(work) if isinstance(engine, ServerConfig) else _sampling(work) as found:
        yield found


@contextmanager
def _asking(work: _Work) -> Iterator[tuple[Reply, Tally]]:
    """Ask the server; answers outlive this run's fingerprint, so that new prompts cost alone."""
    config, spec = work.config, work.spec
    assert isinstance(config.engine, ServerConfig)
    # the law and the seed are in each answer's key; where the server stands changes nothing
    identity = digest({"target": spec.fingerprint, "protocol": config.engine.protocol})
    longest = spec.context_tokens if spec.longrope else None
    reader = Reader(work.tokenizer, spec.vocab_size, spec.eos_ids, longest)
    folder = scratch_root(Path()) / SERVED / identity[:16]
    tally = Tally()
    with Journal(folder, lock=Path(SCRATCH) / f"{SERVED}.lock") as journal:

        def reply(
            _turn: int, prompts: Mapping[str, Sequence[Prompt]]
        ) -> Mapping[str, Sequence[Response | None]]:
            return served(prompts, config=config, reader=reader, journal=journal, tally=tally)[0]

        yield reply, tally


@contextmanager
def _sampling(work: _Work) -> Iterator[tuple[Reply, Tally]]:
    """Sample in the workers of `cluster`."""
    config, spec = work.config, work.spec
    cluster: ClusterConfig = load("cluster", ClusterConfig)
    job = Job(
        folder=TARGET.absolute(),
        fingerprint=spec.fingerprint,
        device=device(cluster),
        scratch=work.scratch.absolute(),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        device_map=device_map(cluster, shards=spec.tensor_parallel),
    )
    tally = Tally()
    with open_cluster(cluster, threads=config.threads, shards=spec.tensor_parallel) as workers:

        def reply(turn: int, prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, list[Response]]:
            size = config.batch_sequences
            found, took = answer(prompts, job=job, batch_sequences=size, cluster=workers, turn=turn)
            tally.seconds += took
            return found

        yield reply, tally


if __name__ == "__main__":
    run("generate", main)
