"""Prompts -> sequences: the target's own responses, or the data's.

    prompts = {"train": encode(rows, tokenizer, ...), ...}   # ids, within the target's context
    responses, seconds = answer(prompts, job=job, ...)       # batches fixed by the prompts
    tables = {"train": sequence_rows(prompts["train"], responses["train"], "T=1"), ...}

Every sequence draws from uniforms of its own (seed, split, prompt), so that who shares a batch with
it changes rounding only, and the number of workers nothing at all.

Dims: B rows of a batch, Q prompt tokens (padded), V vocabulary, G response tokens.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from pipeline.cluster import Cluster
from pipeline.config import Strict
from pipeline.seeds import uniforms
from pipeline.session import Session
from pipeline.target import Target, resident_target
from storage.errors import DataError, TargetError
from storage.workspace import read_json, write_json

TRAIN, HELDOUT = "train", "heldout"
GREEDY = "greedy"
"""The held-out prompts again, at T = 0."""
LAWS = {TRAIN: "T=1", HELDOUT: "T=1", GREEDY: "T=0"}
DATA_LAW = "data"  # text that the target did not write: it trains, and is never replayed
# Rows that ended are dropped once they are this share of the batch: a drop copies the KV cache, and
# a kept one is computed for nothing.
DROP_SHARE = 0.125


class GenerateConfig(Strict):
    """Section `generate`."""

    engine: Literal["transformers", "none"]
    max_prompt_tokens: Annotated[int, Field(ge=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    batch_sequences: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    threads: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the target reads it."""

    id: str
    domain: str
    tokens: tuple[int, ...]
    response: str | None = None
    """The data's own."""


@dataclass(frozen=True)
class Response:
    """What followed a prompt."""

    tokens: list[int]
    """The end-of-sequence token included, where there was one."""
    finished: bool


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
    done = job.scratch / f"{unit.split}-{unit.index:05d}.json"
    if not done.is_file():
        target = resident_target(job.folder, device=job.device, fingerprint=job.fingerprint)
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
        write_json(done, {"responses": rows, "seconds": seconds})
    answer = read_json(done)
    return Answer([Response(*row) for row in answer["responses"]], answer["seconds"])


def sample(
    target: Target, prompts: Sequence[Prompt], *, max_new_tokens: int, uniform_BG: Tensor | None
) -> list[Response]:
    """Sample from the target at T = 1 by inverse CDF of `uniform_BG`, or greedily without them.

    A row ends with an end-of-sequence token or after `max_new_tokens`. `TargetError` names the
    prompt and position at which the target's logits are not finite.
    """
    length_B = torch.tensor([len(prompt.tokens) for prompt in prompts], device=target.device)
    longest = int(length_B.max())
    padded_BQ = torch.tensor(
        [[*p.tokens, *[0] * (longest - len(p.tokens))] for p in prompts], device=target.device
    )
    eos = torch.tensor(target.spec.eos_ids, dtype=torch.int64, device=target.device)
    out_BG = torch.full((len(prompts), max_new_tokens), -1, device=target.device)
    draw_BG = None if uniform_BG is None else uniform_BG.to(target.device)
    row_B = torch.arange(len(prompts), device=target.device)  # of the rows still in the session
    live_B = torch.ones_like(row_B, dtype=torch.bool)
    # the last token of a row is never fed
    session = Session(target, len(prompts), longest + max_new_tokens - 1)
    logits_BV = session.extend(padded_BQ, length_B, which="last").logits[:, 0]
    for step in range(max_new_tokens):
        draw_B = None if draw_BG is None else draw_BG[row_B, step]
        token_B, sound_B = choose(logits_BV, draw_B)
        _require_sound(sound_B | ~live_B, [prompts[b] for b in row_B.tolist()], step)
        out_BG[row_B[live_B], step] = token_B[live_B]
        live_B &= ~torch.isin(token_B, eos)
        num_live = int(live_B.sum())
        if not num_live or step == max_new_tokens - 1:
            break
        if num_live <= (1 - DROP_SHARE) * len(live_B):
            keep = live_B.nonzero()[:, 0]
            session.select(keep)
            row_B, token_B, live_B = row_B[keep], token_B[keep], live_B[keep]
        logits_BV = session.extend(token_B[:, None], live_B.long()).logits[:, 0]
    return [_response(row, target.spec.eos_ids) for row in out_BG.tolist()]


def choose(logits_BV: Tensor, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """A token of each row [B] int64, by inverse CDF (or the likeliest), and whether it is sound."""
    if uniform_B is None:
        best_B = logits_BV.max(-1)
        return best_B.indices, best_B.values.isfinite()
    # float64 for the sum alone: a float32 CDF of a large vocabulary loses its last tokens
    cdf_BV = torch.softmax(logits_BV, -1).cumsum(-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:].contiguous()
    wanted_B1 = uniform_B[:, None] * total_B1
    token_B1 = torch.searchsorted(cdf_BV, wanted_B1, right=True)
    last_B1 = torch.searchsorted(cdf_BV, total_B1)  # u · total may round up to total
    return torch.minimum(token_B1, last_B1)[:, 0], total_B1[:, 0].isfinite()


def _require_sound(sound_B: Tensor, prompts: Sequence[Prompt], step: int) -> None:
    if not bool(sound_B.all()):
        prompt = prompts[int((~sound_B).nonzero()[0])]
        raise TargetError(
            found=f"the target's logits after {step} response tokens to prompt {prompt.id!r} are "
            "NaN or infinite",
            expected="finite logits",
            todo="check the target's weights, or load it in a wider dtype (target.dtype)",
        )


def _response(row: Sequence[int], eos_ids: Sequence[int]) -> Response:
    tokens = [token for token in row if token >= 0]
    return Response(tokens, bool(tokens) and tokens[-1] in eos_ids)


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
    progress = tqdm(units, desc="generate", unit="batch", disable=None)
    for unit, done in zip(progress, answers, strict=True):
        seconds += done.seconds
        for member, response in zip(unit.members, done.responses, strict=True):
            placed[unit.split, member] = response
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
