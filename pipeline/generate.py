"""Prompts -> sequences: the target's own responses, or the data's.

    prompts = {"train": encode(rows, tokenizer, ...), ...}   # ids, within the target's context
    responses, seconds = answer(prompts, job=job, ...)       # batches fixed by the prompts
    tables = {"train": sequence_rows(prompts["train"], responses["train"], "T=1"), ...}

Every sequence draws from uniforms of its own (seed, split, prompt), so that who shares a batch with
it changes rounding only, and the number of workers nothing at all. `pipeline.sampling` samples.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from pipeline.cluster import Cluster
from pipeline.config import Strict
from pipeline.provenance import Progress
from pipeline.sampling import Prompt, Response, sample
from pipeline.seeds import uniforms
from pipeline.target import DeviceMap, resident_target
from storage.errors import DataError
from storage.workspace import read_json, write_json

TRAIN, HELDOUT = "train", "heldout"
GREEDY = "greedy"
"""The held-out prompts again, at T = 0."""
LAWS = {TRAIN: "T=1", HELDOUT: "T=1", GREEDY: "T=0"}
DATA_LAW = "data"  # text that the target did not write: it trains, and is never replayed


class GenerateConfig(Strict):
    """Section `generate`."""

    engine: Literal["transformers", "none"]
    max_prompt_tokens: Annotated[int, Field(ge=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    batch_sequences: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    threads: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Answer:
    """One batch's responses, and what they took (not an output: it goes to `timings/`)."""

    responses: list[Response]
    seconds: float


@dataclass(frozen=True)
class Job:
    """What all units of a run share; small and picklable."""

    folder: Path
    fingerprint: str
    device: str
    scratch: Path
    max_new_tokens: int
    seed: int
    device_map: DeviceMap | None = None


@dataclass(frozen=True)
class Unit:
    """One batch of one split."""

    split: str
    index: int
    members: tuple[int, ...]
    """Places in the split's list of prompts, longest prompt first."""
    prompts: tuple[Prompt, ...]


def split_of(rows: Sequence[Mapping[str, Any]], split: str) -> list[Mapping[str, Any]]:
    """The rows of a split; `DataError` where there is none."""
    chosen = [row for row in rows if row["split"] == split]
    if not chosen:
        raise DataError(
            found=f"no prompt of the split {split!r} in data/prompts.parquet",
            expected="at least one of each split",
            todo="correct the section prepare and run dvc repro",
        )
    return chosen


def encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    config: GenerateConfig,
    context_tokens: int,
) -> list[Prompt]:
    """Token ids of each prompt, its last `max_prompt_tokens` ones.

    A chat model's prompt is one user turn in its own template. `DataError` names a prompt without
    tokens, or one that leaves no room for the response in the target's context.
    """
    prompts = []
    for row in rows:
        tokens = _ids(tokenizer, row["text"])[-config.max_prompt_tokens :]
        if not tokens:
            raise DataError(
                found=f"prompt {row['id']!r} has no token",
                expected="at least one",
                todo="remove it from the source of prepare",
            )
        if len(tokens) + config.max_new_tokens > context_tokens:
            raise DataError(
                found=f"prompt {row['id']!r} of {len(tokens)} tokens and a response of up to "
                f"{config.max_new_tokens}",
                expected=f"at most the target's context of {context_tokens} tokens together",
                todo="lower generate.max_prompt_tokens or generate.max_new_tokens",
            )
        prompts.append(Prompt(row["id"], row["domain"], tuple(tokens), row.get("response")))
    return prompts


def _ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt's ids, through the chat template where the target has one."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def plan(split: str, prompts: Sequence[Prompt], *, batch_sequences: int) -> list[Unit]:
    """Batches of prompts of similar length: by prompts and parameters alone, longest first."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), i))
    starts = range(0, len(order), batch_sequences)
    batches = [tuple(order[a : a + batch_sequences]) for a in starts]
    return [
        Unit(split, index, members, tuple(prompts[i] for i in members))
        for index, members in enumerate(batches)
    ]


def sample_unit(job: Job, unit: Unit) -> Answer:
    """Responses of one batch, from its done file where an earlier run left one."""
    path = job.scratch / f"{unit.split}-{unit.index:05d}.json"
    done = _done(path)
    if done is not None:
        return done
    target = resident_target(
        job.folder,
        device=job.device,
        fingerprint=job.fingerprint,
        device_map=job.device_map,
    )
    started = time.perf_counter()
    names = [(unit.split, prompt.id) for prompt in unit.prompts]
    draws = [uniforms(job.seed, "generate", *name, n=job.max_new_tokens) for name in names]
    responses = sample(
        target,
        unit.prompts,
        max_new_tokens=job.max_new_tokens,
        uniform_BG=None if unit.split == GREEDY else torch.stack(draws),
    )
    seconds = time.perf_counter() - started
    rows = [[response.tokens, response.finished] for response in responses]
    write_json(path, {"responses": rows, "seconds": seconds})
    return Answer(responses, seconds)


def _done(path: Path) -> Answer | None:
    """What an earlier run left of a batch; None where that is missing or torn."""
    try:
        answer = read_json(path)
    except DataError:
        return None
    return Answer([Response(*row) for row in answer["responses"]], answer["seconds"])


def data_responses(
    prompts: Mapping[str, Sequence[Prompt]],
    tokenizer: Any,
    *,
    config: GenerateConfig,
    eos_ids: Sequence[int],
) -> dict[str, list[Response]]:
    """The data's own responses by split, ended by an end-of-sequence token where that fits."""
    return {
        split: [_data_response(prompt, tokenizer, config, eos_ids) for prompt in some]
        for split, some in prompts.items()
    }


def _data_response(
    prompt: Prompt, tokenizer: Any, config: GenerateConfig, eos_ids: Sequence[int]
) -> Response:
    if prompt.response is None:
        raise DataError(
            found=f"prompt {prompt.id!r} has no response of its own",
            expected="a response with every prompt where generate.engine is none",
            todo="give the rows of prepare.source a `response`, or set generate.engine to "
            "transformers",
        )
    tokens = list(tokenizer(prompt.response, add_special_tokens=False)["input_ids"])
    tokens = [*tokens, *eos_ids[:1]][: config.max_new_tokens]
    return Response(tokens, bool(tokens) and tokens[-1] in eos_ids)


def answer(
    prompts: Mapping[str, Sequence[Prompt]], *, job: Job, batch_sequences: int, cluster: Cluster
) -> tuple[dict[str, list[Response]], float]:
    """Responses by split in the order of the prompts, and the seconds that workers took."""
    units = [
        unit
        for split, some in prompts.items()
        for unit in plan(split, some, batch_sequences=batch_sequences)
    ]
    answers = cluster.map(partial(sample_unit, job), units)
    placed: dict[tuple[str, int], Response] = {}
    seconds = 0.0
    with Progress(sum(map(len, prompts.values())), "generate", unit="sequence") as line:
        for unit, done in zip(units, answers, strict=True):
            seconds += done.seconds
            for member, response in zip(unit.members, done.responses, strict=True):
                placed[unit.split, member] = response
            line.add(len(unit.members))
    responses = {
        split: [placed[split, place] for place in range(len(some))]
        for split, some in prompts.items()
    }
    return responses, seconds


def law_of(split: str, engine: str) -> str:
    """The law of which a split's responses are samples."""
    return DATA_LAW if engine == "none" else LAWS[split]


def sequence_rows(
    prompts: Iterable[Prompt], responses: Iterable[Response], law: str
) -> list[dict[str, Any]]:
    """Rows of `storage.tables.SEQUENCES`, in the order of the prompts."""
    return [
        {
            "id": prompt.id,
            "domain": prompt.domain,
            "tokens": [*prompt.tokens, *response.tokens],
            "turn": [-1] * len(prompt.tokens) + [0] * len(response.tokens),
            "law": law,
            "finished": response.finished,
        }
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def count(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Metrics by split: sequences, tokens, share that ended, mean response length by domain."""

    def mean(rows: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], float]) -> float:
        return round(sum(map(of, rows)) / len(rows), 6)

    def response_tokens(row: Mapping[str, Any]) -> float:
        return float(sum(turn >= 0 for turn in row["turn"]))

    metrics = {}
    for split, rows in tables.items():
        domains = sorted({row["domain"] for row in rows})
        by_domain = {d: [row for row in rows if row["domain"] == d] for d in domains}
        metrics[split] = {
            "sequences": len(rows),
            "tokens": sum(len(row["tokens"]) for row in rows),
            "response_tokens": int(sum(map(response_tokens, rows))),
            "finished_share": mean(rows, lambda row: float(row["finished"])),
            "mean_response_tokens": mean(rows, response_tokens),
            "mean_response_tokens_by_domain": {
                domain: mean(some, response_tokens) for domain, some in by_domain.items()
            },
        }
    return metrics


def times(metrics: Mapping[str, Any], *, wall_s: float, worked_s: float) -> dict[str, float]:
    """Seconds on the wall and of all workers together; response tokens/s of one worker."""
    tokens = sum(split["response_tokens"] for split in metrics.values())
    return {
        "seconds": round(wall_s, 3),
        "worker_seconds": round(worked_s, 3),  # of earlier, interrupted runs too
        "tokens_per_s": round(tokens / max(worked_s, 1e-9), 1),
    }
