"""Prompts -> sequences: the target's own responses, or the data's.

    prompts = {"train": encode(rows, tokenizer, ...), ...}   # ids, within the target's context
    responses, seconds = answer(prompts, job=job, ...)       # batches fixed by the prompts
    rows = {"train": sequence_rows(prompts["train"], responses["train"], "T=1"), ...}

Prompts and responses that wait are 4 bytes a token (`compact`); rows are made as they are written.
Every sequence draws from uniforms of its own (seed, split, prompt), so that who shares a batch with
it changes rounding only, and the number of workers nothing at all. `pipeline.sampling` samples.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipeline.chat import Message, has_template, prompt_tokens, speak
from pipeline.cluster import Cluster
from pipeline.config import BatchSize, Strict, Threads
from pipeline.provenance import Progress
from pipeline.sampling import Prompt, Response, compact, sample
from pipeline.seeds import rng, uniforms
from pipeline.serve import serving_of
from pipeline.server import Ask, Journal, Reader, ServerConfig, Tally, ask
from pipeline.setting import Names, Setting
from pipeline.sharded import resident_target
from pipeline.target import DeviceMap
from storage.errors import DataError
from storage.sequences import Row, Sequences
from storage.workspace import digest, read_json, write_json

T = TypeVar("T")

TRAIN, HELDOUT = "train", "heldout"
GREEDY = "greedy"
"""The held-out prompts again, at T = 0."""
LAWS = {TRAIN: "T=1", HELDOUT: "T=1", GREEDY: "T=0"}
"""Of the splits that are always there. A split of `generate.laws` has its law's name."""
SERVED = "served"
"""The folder of those splits, in `sequences/` and in `cache/`."""
# why a prompt or a conversation is left out
TOO_LONG, NO_REPLY, TOO_SHORT = (
    "a long prompt",
    "no reply within the limit",
    "no reply of two tokens",
)
DATA_LAW = "data"  # text that is not for certain the target's: it trains, and is never replayed


def _kind(value: Any) -> str | None:
    if value == "transformers":
        return "name"
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "server" if kind == "server" else None


Engine = Annotated[
    Annotated[Literal["transformers"], Tag("name")] | Annotated[ServerConfig, Tag("server")],
    Discriminator(
        _kind,
        custom_error_type="engine",
        custom_error_message="Input should be transformers or a mapping of kind server (to train "
        "on the data's own responses: train_responses: data)",
    ),
]


class GenerateConfig(Strict):
    """Section `generate`."""

    engine: Engine
    """What samples the target: here, or a server by URL."""
    train_responses: Literal["target", "data"] = "target"
    """Whose responses the training split has. `data`: its own; what is held out and measured is
    sampled from the target all the same."""
    laws: Names
    """Served laws of which the held-out prompts get rollouts too, so that replay scores them."""
    turns: Literal["last", "every"] = "last"
    """The reply to the last user turn, earlier ones as the data has them; or to every user turn,
    each behind the target's own replies (`pipeline.turns`)."""
    max_prompt_tokens: Annotated[int, Field(ge=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    batch_sequences: BatchSize
    seed: Annotated[int, Field(ge=0)]
    threads: Threads

    @field_validator("laws")
    @classmethod
    def _further_laws(cls, laws: list[str]) -> list[str]:
        for law in map(Setting.parse, laws):
            if law.law in LAWS.values() or law.drafts != "sampled":
                raise ValueError("laws other than T=0 and T=1, without drafts=")
        return laws

    @model_validator(mode="after")
    def _laws_are_the_targets(self) -> Self:
        if not isinstance(self.engine, ServerConfig):
            return self
        if self.engine.protocol == "text":
            if self.train_responses == "data":
                raise ValueError(
                    "engine transformers or another protocol than text, which only training "
                    "prompts are asked by, where train_responses is data"
                )
        elif any(Setting.parse(law).top_k for law in self.laws):
            raise ValueError("laws without top_k=, which no server is asked for")
        return self


def file_of(split: str) -> str:
    """Where a split lies in `sequences/`: `heldout.parquet`, `served/T=0.7,top_p=0.9.parquet`."""
    return f"{split}.parquet" if split in LAWS else f"{SERVED}/{split}.parquet"


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
    """One batch of one split and turn."""

    split: str
    index: int
    members: tuple[int, ...]
    """Places in the split's list of prompts, longest prompt first."""
    prompts: tuple[Prompt, ...]
    turn: int = 0
    """Of the conversations, where the target answers every one."""

    @property
    def name(self) -> str:
        """Of its done file."""
        return f"{self.split}-{f'turn{self.turn}-' if self.turn else ''}{self.index:05d}"

    @property
    def asked(self) -> str:
        """A digest of the prompts: a later turn's prompts follow from what was answered before."""
        return digest([[prompt.id, list(prompt.tokens)] for prompt in self.prompts])


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


def with_conversations(
    rows: Iterable[Mapping[str, Any]], talks: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of `PROMPTS`, with the `messages` and `tools` of those that `CONVERSATIONS` has."""
    found = {
        (talk["split"], talk["id"]): {k: json.loads(talk[k]) for k in ("messages", "tools")}
        for talk in talks
    }
    return [{**row, **found.get((row["split"], row["id"]), {})} for row in rows]


def encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    config: GenerateConfig,
    context_tokens: int,
    left_out: Counter[str] | None = None,
) -> list[Prompt]:
    """Token ids of each prompt, at most `max_prompt_tokens` of them.

    A chat model reads the conversation up to the last user turn (or the prompt as one such turn)
    in its own template. One that is too long is left out and counted in `left_out`: cut, it would
    lose its beginning. A text keeps its end. `DataError` names a prompt without tokens, or one that
    leaves no room for the response in the target's context.
    """
    prompts = []
    for row in rows:
        if has_template(tokenizer):
            messages, tools = asked(row)
            tokens = prompt_tokens(tokenizer, messages, tools=tools, name=row["id"])
            if len(tokens) > config.max_prompt_tokens:
                if left_out is not None:
                    left_out[TOO_LONG] += 1
                continue
        else:
            require_plain(row)
            text_ids = tokenizer(row["text"])["input_ids"]
            tokens = list(text_ids)[-config.max_prompt_tokens :]
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
        response = row.get("response") or _only_reply(row)
        prompts.append(Prompt(row["id"], row["domain"], compact(tokens), response))
    if not prompts:
        raise DataError(
            found="every prompt of a split is longer than generate.max_prompt_tokens, "
            f"{config.max_prompt_tokens}",
            expected="prompts that fit with the target's chat template",
            todo="raise generate.max_prompt_tokens, or set prepare.filters.max_chars",
        )
    return prompts


def asked(row: Mapping[str, Any]) -> tuple[list[Message], list[Any]]:
    """What a chat model reads of a row: messages up to the last user turn (or tool's answer)."""
    messages = list(row.get("messages") or [{"role": "user", "content": row["text"]}])
    while messages[-1]["role"] == "assistant":
        messages.pop()
    return messages, list(row.get("tools") or [])


def require_plain(row: Mapping[str, Any]) -> None:
    """`DataError` for a conversation that no target without a chat template can read."""
    roles = [message["role"] for message in row.get("messages") or ()]
    if roles not in ([], ["user"], ["user", "assistant"]):
        raise DataError(
            found=f"conversation {row['id']!r} of {len(roles)} messages ({', '.join(roles[:6])})",
            expected="one user turn and at most one reply, since the target has no chat template",
            todo="choose a chat model, or set prepare.filters.max_turns: 1 and remove system turns",
        )


def _only_reply(row: Mapping[str, Any]) -> str | None:
    messages = list(row.get("messages") or [])
    return str(messages[1]["content"]) if len(messages) > 1 else None


def plan(
    split: str, prompts: Sequence[Prompt], *, batch_sequences: int, turn: int = 0
) -> list[Unit]:
    """Batches of prompts of similar length: by prompts and parameters alone, longest first."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), i))
    starts = range(0, len(order), batch_sequences)
    batches = [tuple(order[a : a + batch_sequences]) for a in starts]
    return [
        Unit(split, index, members, tuple(prompts[i] for i in members), turn)
        for index, members in enumerate(batches)
    ]


def sample_unit(job: Job, unit: Unit) -> Answer:
    """Responses of one batch, from its done file where an earlier run left one."""
    path = job.scratch / f"{unit.name}.json"
    done = _done(path, unit)
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
        serving=serving_of(Setting.parse(LAWS.get(unit.split, unit.split))),
    )
    seconds = time.perf_counter() - started
    rows = [[list(response.tokens), response.finished] for response in responses]
    write_json(path, {"asked": unit.asked, "responses": rows, "seconds": seconds})
    return Answer(responses, seconds)


def _done(path: Path, unit: Unit) -> Answer | None:
    """What an earlier run left of a batch; None where it is missing, torn or of other prompts."""
    try:
        answer = read_json(path)
    except DataError:
        return None
    if answer.get("asked") != unit.asked:
        return None
    return Answer([Response(*row) for row in answer["responses"]], answer["seconds"])


def data_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    config: GenerateConfig,
    eos_ids: Sequence[int],
    context_tokens: int,
    left_out: Counter[str],
) -> Iterable[Row]:
    """Rows of `SEQUENCES` with the data's own responses, which a draft may train on.

    A chat model's conversations whole (`conversation_rows`), else a prompt and its response.
    """
    limits: dict[str, Any] = {"config": config, "context_tokens": context_tokens}
    if has_template(tokenizer):
        return conversation_rows(rows, tokenizer, eos_ids=eos_ids, left_out=left_out, **limits)
    prompts = encode(rows, tokenizer, left_out=left_out, **limits)
    responses = data_responses(prompts, tokenizer, config=config, eos_ids=eos_ids)
    return sequence_rows(prompts, responses, DATA_LAW)


def data_responses(
    prompts: Iterable[Prompt], tokenizer: Any, *, config: GenerateConfig, eos_ids: Sequence[int]
) -> list[Response]:
    """The data's own responses, ended by an end-of-sequence token where that fits."""
    return [_data_response(prompt, tokenizer, config, eos_ids) for prompt in prompts]


def _data_response(
    prompt: Prompt, tokenizer: Any, config: GenerateConfig, eos_ids: Sequence[int]
) -> Response:
    if prompt.response is None:
        raise _no_response(prompt.id)
    tokens = list(tokenizer(prompt.response, add_special_tokens=False)["input_ids"])
    tokens = [*tokens, *eos_ids[:1]][: config.max_new_tokens]
    return Response(compact(tokens), bool(tokens) and tokens[-1] in eos_ids)


def conversation_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    config: GenerateConfig,
    eos_ids: Sequence[int],
    context_tokens: int,
    left_out: Counter[str],
) -> list[dict[str, Any]]:
    """Rows of `SEQUENCES` of a chat model's conversations, every reply supervised.

    A conversation is cut after `max_prompt_tokens` + `max_new_tokens`; one whose first reply does
    not begin within them is left out and counted in `left_out`.
    """
    limit = require_context(config, context_tokens)
    found = []
    for row in rows:
        messages, tools = asked(row)
        if len(row.get("messages") or ()) > len(messages):
            messages = list(row["messages"])
        elif row.get("response") is not None:
            messages.append({"role": "assistant", "content": row["response"]})
        if not any(message["role"] == "assistant" for message in messages):
            raise _no_response(row["id"])
        records = speak(tokenizer, messages, tools=tools, eos_ids=eos_ids, name=row["id"])
        for number, record in enumerate(records):
            tokens, turn = record.tokens[:limit], record.turn[:limit]
            if not any(a == b >= 0 for a, b in pairwise(turn)):
                left_out[NO_REPLY if len(record.tokens) > limit else TOO_SHORT] += 1
                continue
            found.append(
                {
                    "id": row["id"] if len(records) == 1 else f"{row['id']}#{number}",
                    "domain": row["domain"],
                    "tokens": np.array(tokens, np.uint32),
                    "turn": np.array(turn, np.int32),
                    "law": DATA_LAW,
                    "finished": turn[-1] >= 0 and tokens[-1] in eos_ids,
                }
            )
    if not found:
        raise DataError(
            found=f"no conversation of a split has a reply within {limit} tokens",
            expected="replies that begin within generate.max_prompt_tokens + max_new_tokens",
            todo="raise them, or set prepare.filters.max_chars",
        )
    return found


def require_context(config: GenerateConfig, context_tokens: int) -> int:
    """The longest conversation; `DataError` where the target's context is shorter."""
    limit = config.max_prompt_tokens + config.max_new_tokens
    if limit > context_tokens:
        raise DataError(
            found=f"conversations of up to {limit} tokens",
            expected=f"at most the target's context of {context_tokens} tokens",
            todo="lower generate.max_prompt_tokens or generate.max_new_tokens",
        )
    return limit


def _no_response(name: str) -> DataError:
    return DataError(
        found=f"prompt {name!r} has no response of its own",
        expected="one with every training prompt where generate.train_responses is data",
        todo="give the rows of prepare.source a `response` or an assistant's reply, or set "
        "generate.train_responses to target",
    )


def answer(
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    job: Job,
    batch_sequences: int,
    cluster: Cluster,
    turn: int = 0,
) -> tuple[dict[str, list[Response]], float]:
    """Responses by split in the order of the prompts, and the seconds that workers took.

    `turn` is the prompts' own in their conversations, where more than one is asked.
    """
    units = [
        unit
        for split, some in prompts.items()
        for unit in plan(split, some, batch_sequences=batch_sequences, turn=turn)
    ]
    answers = cluster.map(partial(sample_unit, job), units)
    placed: dict[tuple[str, int], Response] = {}
    seconds = 0.0
    with Progress(sum(map(len, prompts.values())), "generate", unit="sequence") as line:
        for unit, done in zip(units, answers, strict=True):
            seconds += done.seconds
            for member, response in zip(unit.members, done.responses, strict=True):
                placed[unit.split, member] = _compacted(response)
            line.add(len(unit.members))
    responses = {
        split: [placed[split, place] for place in range(len(some))]
        for split, some in prompts.items()
    }
    return responses, seconds


def served(
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    config: GenerateConfig,
    reader: Reader,
    journal: Journal,
    tally: Tally | None = None,
) -> tuple[dict[str, list[Response | None]], Tally]:
    """A server's responses by split, None where it gave none; see `pipeline.server.ask`.

    `tally` is of the turns before, where more than one is asked.
    """
    assert isinstance(config.engine, ServerConfig)
    asks = [_ask(split, prompt, config) for split, some in prompts.items() for prompt in some]
    answers, tally = ask(asks, server=config.engine, reader=reader, journal=journal, tally=tally)
    left = iter(answers)
    return {split: [next(left) for _ in some] for split, some in prompts.items()}, tally


def _compacted(response: Response) -> Response:
    return replace(response, tokens=compact(response.tokens))


def _ask(split: str, prompt: Prompt, config: GenerateConfig) -> Ask:
    """The request of one prompt; its seed is the prompt's own, whatever stands beside it."""
    assert isinstance(config.engine, ServerConfig)
    if split == TRAIN:
        temperature, top_p = config.engine.temperature, config.engine.top_p
    else:
        setting = Setting.parse(LAWS.get(split, split))
        temperature, top_p = setting.temperature, setting.top_p or 1.0
    seed = int(rng(config.seed, "serve", *prompt.tokens).integers(2**31))
    return Ask(prompt, temperature, top_p, seed, config.max_new_tokens)


def without_failures(
    prompts: Mapping[str, Sequence[Prompt]], responses: Mapping[str, Sequence[Response | None]]
) -> tuple[dict[str, list[Prompt]], dict[str, list[Response]], dict[str, list[str]]]:
    """What was answered, and ids of prompts left out, by split.

    A held-out prompt stays only where it has all its responses: the laws are compared by prompt.
    `DataError` where a split has none left.
    """
    failed = {
        split: {p.id for p, r in zip(prompts[split], some, strict=True) if r is None}
        for split, some in responses.items()
    }
    paired = set().union(*(ids for split, ids in failed.items() if split != TRAIN))
    failed = {split: ids if split == TRAIN else paired for split, ids in failed.items()}
    kept: dict[str, list[Prompt]] = {}
    answered: dict[str, list[Response]] = {}
    for split, some in responses.items():
        pairs = [
            (p, r)
            for p, r in zip(prompts[split], some, strict=True)
            if r is not None and p.id not in failed[split]
        ]
        if not pairs:
            raise DataError(
                found=f"no prompt of the split {split!r} was answered",
                expected="at least one",
                todo="see to the server, lower generate.engine.max_failures, and run dvc repro",
            )
        kept[split], answered[split] = [p for p, _ in pairs], [r for _, r in pairs]
    return kept, answered, {split: sorted(ids) for split, ids in failed.items()}


def by_engine(work: Mapping[str, T], engine: str | ServerConfig) -> list[tuple[Any, dict[str, T]]]:
    """Engines, and what of the splits each answers.

    A server of texts answers for training alone: encoded again they are not for certain the tokens
    that were drawn, and what is held out is to be replayed.
    """
    if not isinstance(engine, ServerConfig) or engine.protocol != "text":
        return [(engine, dict(work))]
    rest = {split: some for split, some in work.items() if split != TRAIN}
    return [(engine, {TRAIN: work[TRAIN]}), ("transformers", rest)]


def law_of(split: str, engine: str | ServerConfig) -> str:
    """The law of which a split's responses are samples, as the target's own ids."""
    if split == TRAIN and isinstance(engine, ServerConfig):
        return DATA_LAW if engine.protocol == "text" else engine.law
    return LAWS.get(split, split)


def sequence_rows(
    prompts: Iterable[Prompt], responses: Iterable[Response], law: str
) -> Iterator[Row]:
    """Rows of `storage.tables.SEQUENCES` in the order of the prompts, made one by one."""
    for prompt, response in zip(prompts, responses, strict=True):
        pair = [np.asarray(one.tokens, np.uint32) for one in (prompt, response)]
        yield {
            "id": prompt.id,
            "domain": prompt.domain,
            "tokens": np.concatenate(pair),
            "turn": np.repeat(np.array([-1, 0], np.int32), [len(one) for one in pair]),
            "law": law,
            "finished": response.finished,
        }


def count(tables: Mapping[str, Sequences]) -> dict[str, Any]:
    """Metrics by split: sequences, tokens, share that ended, mean response length by domain."""
    metrics = {}
    for split, table in tables.items():
        found = table.survey
        metrics[split] = {
            "sequences": len(table),
            "tokens": found.num_tokens,
            "response_tokens": int(found.written.sum(dtype=np.int64)),
            "finished_share": _mean(found.finished),
            "mean_response_tokens": _mean(found.written),
            "mean_response_tokens_by_domain": {
                name: _mean(found.written[found.domain == code])
                for code, name in enumerate(found.domains)
            },
        }
    return metrics


def _mean(values: NDArray[Any]) -> float:
    return round(int(values.sum(dtype=np.int64)) / len(values), 6)


def times(metrics: Mapping[str, Any], *, wall_s: float, worked_s: float) -> dict[str, float]:
    """Seconds on the wall and of all workers together; response tokens/s of one worker."""
    tokens = sum(split["response_tokens"] for split in metrics.values())
    return {
        "seconds": round(wall_s, 3),
        "worker_seconds": round(worked_s, 3),  # of earlier, interrupted runs too
        "tokens_per_s": round(tokens / max(worked_s, 1e-9), 1),
    }
