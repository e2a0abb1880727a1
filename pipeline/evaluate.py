"""Measure one batch of prompts: a trained draft replayed over cached rollouts, or decoded.

A `Job` is a batch of prompts for one draft, setting (served law, drafts) and instrument;
`pipeline.schedule` makes them. `run_job` opens what it needs by path, once a process, and returns
plain rows, so that jobs run here or in workers alike. transformers is imported when a job decodes,
never for a replay.

| instrument | rows of `storage.tables.ROUNDS` |
| --- | --- |
| `replay` | every held-out rollout whole, every γ: exact expectations, token verification |
| `replay_block` | the same under block verification; T > 0 only, it is no different at T = 0 |
| `replay_decode` | the decoded prompts' rollouts, cut to the decoder's length limit, at its γ |
| `decode` | those prompts decoded for real |
| `decode:<set>` | the prompts of a set decoded (`evaluate.prompt_sets`); nothing to replay; a row
                   a turn where every turn is asked (`pipeline.chat.turn_name`) |

`replay_decode` and `decode` are what predicted against measured compares. At T = 0 on a CPU in
float32 they are equal prompt by prompt while `features: cache` holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from pipeline.chat import turn_name
from pipeline.checkpoint import load_draft, read_config
from pipeline.config import BatchSize, Gamma, Strict, Threads, parse
from pipeline.dataset import arrays, collate, head_for
from pipeline.draft import Draft, Needs, find
from pipeline.interface import Head, Shape
from pipeline.prompt_sets import DECODE_SET, PromptSets
from pipeline.replay import Replay, block_survival, replay, token_survival
from pipeline.sampling import Prompt, Response
from pipeline.score import Rollouts, Scores, depth_sums, rollouts, score, strata
from pipeline.seeds import uniforms
from pipeline.setting import Setting, SomeNames
from pipeline.sharded import resident_target
from pipeline.speculate import Decoded, Rules, decode
from pipeline.target import DeviceMap, Target, read_interface, read_spec
from pipeline.turns import Talk, converse
from storage.reader import Cache
from storage.record import Record

Count = Annotated[int, Field(gt=0)]
Rows = list[dict[str, Any]]
GREEDY, SAMPLED = Setting(0.0), Setting(1.0)
WARM_TOKENS = 2  # decoded before the clock starts: first calls allocate and choose kernels


class EvaluateConfig(Strict):
    """Section `evaluate`."""

    laws: SomeNames
    """Served laws and how drafts are drawn (`pipeline.setting`). All are decoded; those of which
    there are rollouts are replayed too: `T=0`, `T=1` and what `generate.laws` names."""
    depth: Gamma
    """Replay for every γ up to this, or up to what the draft can (MEDUSA: its heads)."""
    batch_sequences: BatchSize
    decode_seeds: list[Annotated[int, Field(ge=0)]]
    """Drafts of these seeds are decoded too."""
    decode_gamma: Gamma
    """γ of decoding, or the draft's deepest where that is less."""
    decode_prompts: Count
    decode_new_tokens: Annotated[int, Field(gt=1)]
    """Length limit of a decoded response, its first token included."""
    decode_batch: BatchSize
    trace_prompts: Annotated[int, Field(ge=0)]
    """Decoded prompts of which the report shows every round, spread over the domains."""
    features: Literal["cache", "exact"]
    """Whether decoding passes hidden states through the cache's dtype."""
    prompt_sets: PromptSets
    """Prompts of one's own to decode beside the held-out ones, under every law; by name."""
    seed: int
    threads: Threads

    @property
    def room(self) -> int:
        """Tokens that a response and the drafts of its last round may take after a prompt."""
        return self.decode_new_tokens + self.decode_gamma - 1

    @model_validator(mode="after")
    def _decoded_gamma_is_replayed(self) -> Self:
        if self.decode_gamma > self.depth:
            raise ValueError(
                f"decode_gamma of at most depth ({self.depth}), so that what is decoded "
                f"is predicted too; it is {self.decode_gamma}"
            )
        return self


@dataclass(frozen=True)
class Bench:
    """Where everything lies, for a worker on any host that sees the same paths."""

    target: Path
    caches: Mapping[str, Path]
    """Law (`Setting.law`) -> cache of rollouts that are the target's own samples of it."""
    device: str
    config: EvaluateConfig
    sources: str
    """Digest of all that is read: a worker that outlives a run must not answer from an older."""
    device_map: DeviceMap | None = None

    def cache(self, setting: Setting) -> Cache:
        """The rollouts of a served law; its prompts only, where no rollouts of it exist."""
        law = setting.law if self.replayable(setting) else SAMPLED.law
        return _open(self.caches[law], self.sources)

    def replayable(self, setting: Setting) -> bool:
        """Whether there are rollouts of the setting's law."""
        return setting.law in self.caches


@dataclass(frozen=True)
class Job:
    """One batch of one draft under one setting."""

    instrument: Literal["replay", "decode", "plain"]
    draft: Path | None
    """Folder of the trained draft; None for plain decoding."""
    setting: Setting
    rows: tuple[int, ...]
    """Sequences of the law's cache."""
    decoded: frozenset[str] = frozenset()
    """Of a replay: the prompts that are decoded too."""
    traced: frozenset[str] = frozenset()
    """Of a decoding: the prompts of which every round is kept."""
    prompt_set: str = ""
    """The set that `talks` are of; empty for held-out prompts, which `rows` name."""
    talks: tuple[Talk, ...] = ()


@dataclass
class Outcome:
    """What a job found; its rows lack the columns that name the arm."""

    rounds: Rows = field(default_factory=list)
    depths: Rows = field(default_factory=list)
    strata: Rows = field(default_factory=list)
    """Of a replay: sums over its anchors by place and by entropy."""
    speed: dict[str, float] = field(default_factory=dict)
    """Of a decoding: tokens, steps, seconds; measured, so never part of a result."""
    prompt_set: str = ""
    """Of a decoding: the job's."""
    unasked: int = 0
    """Of a set: turns that were not asked, since a reply left no room or the template refused."""
    identical: int = 0
    """Decoded responses that equal the cached rollout, cut to the limit."""
    texts: dict[str, list[int]] = field(default_factory=dict)
    """Of a set decoded at T = 0: each prompt's response, which plain decoding must give too."""
    traces: Rows = field(default_factory=list)
    """Of the traced prompts: what was drafted and kept, round by round, as text."""


def split(record: Record) -> tuple[list[int], list[int]]:
    """Prompt and first response of a sequence."""
    mine = record.turn >= 0
    first = int(mine.argmax()) if mine.any() else len(mine)
    size = int((record.turn == record.turn[first]).sum()) if mine.any() else 0
    tokens: list[int] = record.tokens.tolist()
    return tokens[:first], tokens[first : first + size]


@lru_cache(maxsize=8)
def _open(path: Path, _sources: str) -> Cache:
    return Cache.open(path)


def draft_section(folder: Path) -> tuple[Any, Any]:
    """The class and the config of a trained draft, nothing loaded."""
    found = read_config(folder)
    kind = find(found["kind"])
    return kind.Model, parse(f"{folder}: config", found["config"], kind.Config)


def _draft(bench: Bench, folder: Path) -> tuple[Draft, Needs, int | None]:
    """A trained draft, what it reads, and how deep it goes."""
    return _load(folder, bench.target, bench.device, bench.sources)


@lru_cache(maxsize=2)
def _load(
    folder: Path, target: Path, device: str, _sources: str
) -> tuple[Draft, Needs, int | None]:
    model, section = draft_section(folder)
    needs, spec = model.needs(section), read_spec(target)
    draft = load_draft(
        folder,
        read_interface(target) if needs.interface else None,
        Shape(vocab_size=spec.vocab_size, hidden_size=spec.hidden_size),
        expect={"target": spec.fingerprint},
    )
    return draft.to(device).eval(), needs, model.max_depth(section)


@lru_cache(maxsize=2)
def _head(cache: Path, target: Path, device: str, sources: str) -> Head | None:
    """What makes a cache's laws again, where it does not store them."""
    head = head_for(_open(cache, sources), target)
    return None if head is None else head.to(device)


def run_job(bench: Bench, job: Job) -> Outcome:
    """Run one job; the result depends on the job alone, not on what ran before it."""
    return _replay(bench, job) if job.instrument == "replay" else _decode(bench, job)


def _replay(bench: Bench, job: Job) -> Outcome:
    """Exact expectations of a batch of rollouts, and the sums of its anchors."""
    assert job.draft is not None
    config, cache = bench.config, bench.cache(job.setting)
    draft, needs, deepest = _draft(bench, job.draft)
    records = cache.records(job.rows, arrays=arrays(cache.layout, needs))
    head = _head(cache.path, bench.target, bench.device, bench.sources)
    batch = collate(records, cache.layout, device=bench.device, head=head)
    depth = config.depth if deepest is None else min(config.depth, deepest)
    gamma = min(config.decode_gamma, depth)
    vocab_size = cache.layout.vocab_size
    scores = score(draft, batch, depth=depth, setting=job.setting, vocab_size=vocab_size)
    whole = rollouts(scores, batch)
    cut = rollouts(scores, batch, max_new_tokens=config.decode_new_tokens)
    token = token_survival(whole.logr)
    outcome = Outcome(depths=_depth_rows(records, scores), strata=strata(scores, batch))
    add = outcome.rounds.extend
    add(_round_rows(records, whole, replay(token, whole.remaining), instrument="replay"))
    if job.setting.temperature > 0:
        block = replay(block_survival(whole.logr), whole.remaining)
        add(_round_rows(records, whole, block, instrument="replay_block"))
    shown = _round_rows(records, cut, replay(token, cut.remaining), instrument="replay_decode")
    add(row for row in shown if row["prompt"] in job.decoded and row["gamma"] == gamma)
    for row in (*outcome.rounds, *outcome.depths, *outcome.strata):
        row |= _law_of(job.setting)
    return outcome


def _law_of(setting: Setting) -> dict[str, Any]:
    """The columns that name a setting."""
    return {"temperature": float(setting.temperature), "law": setting.name}


def _round_rows(
    records: Sequence[Record], found: Rollouts, exact: Replay, *, instrument: str
) -> Rows:
    """One row a prompt and γ; a prompt's responses are pooled."""
    rows: Rows = []
    for b, record in enumerate(records):
        mine = found.row == b
        tokens = int(found.remaining[mine].sum())
        columns = (exact.rounds, exact.drafted, exact.accepted, exact.kept)
        rounds, drafted, accepted, kept = (column[mine].sum(0).tolist() for column in columns)
        for g in range(len(rounds)):
            counts = {"rounds": rounds[g], "drafted": drafted[g], "accepted": accepted[g]}
            counts["kept"] = kept[g][: g + 1]
            rows.append(
                _named(record)
                | {"instrument": instrument, "gamma": g + 1, "tokens": tokens}
                | counts
            )
    return rows


def _depth_rows(records: Sequence[Record], scores: Scores) -> Rows:
    sums = depth_sums(scores)
    rows: Rows = []
    for b, record in enumerate(records):
        for k in range(len(scores.pair)):
            numbers = {name: float(sums[name][k, b]) if name in sums else None for name in _SUMS}
            anchors = {"depth": k, "anchors": int(sums["anchors"][k, b])}
            rows.append(_named(record) | anchors | numbers)
    return rows


_SUMS = ("alpha", "alpha_lo", "alpha_hi", "accept", "survive")


def _named(asked: Record | Prompt) -> dict[str, Any]:
    return {"prompt": asked.id, "domain": asked.domain}


def _decode(bench: Bench, job: Job) -> Outcome:
    """Decode a batch of prompts; `plain` where the job has no draft."""
    config, cache = bench.config, bench.cache(job.setting)
    spec = read_spec(bench.target)
    target = resident_target(
        bench.target,
        device=bench.device,
        fingerprint=spec.fingerprint,
        device_map=bench.device_map,
    )
    draft, needs, gamma = None, Needs(), 0
    if job.draft is not None:
        draft, needs, deepest = _draft(bench, job.draft)
        gamma = config.decode_gamma if deepest is None else min(config.decode_gamma, deepest)
    rules = Rules(
        gamma=gamma,
        temperature=job.setting.temperature,
        top_k=job.setting.top_k,
        top_p=job.setting.top_p,
        drafting=job.setting.drafts,
        max_new_tokens=config.decode_new_tokens,
        eos_ids=tuple(spec.eos_ids),
        layers=cache.layout.hidden_layers if needs.num_layers else (),
        last_hidden=needs.last_hidden,
        features=config.features,
        hidden_dtype=cache.layout.hidden_dtype,
        last_hidden_dtype=cache.layout.last_hidden_dtype,
    )
    outcome = Outcome(prompt_set=job.prompt_set)

    def respond(pairs: Sequence[tuple[Prompt, list[int] | None]]) -> list[list[int]]:
        return _respond(target, draft, rules, pairs, outcome, config=config, job=job)

    if not job.talks:
        respond(_heldout(cache, job.rows))
        return outcome

    def reply(
        _turn: int, prompts: Mapping[str, Sequence[Prompt]]
    ) -> dict[str, list[Response | None]]:
        texts = respond([(prompt, None) for prompt in prompts[job.prompt_set]])
        return {job.prompt_set: [Response(text, text[-1] in rules.eos_ids) for text in texts]}

    said = converse(
        {job.prompt_set: job.talks},
        reply,
        tokenizer=target.tokenizer,
        eos_ids=rules.eos_ids,
        max_prompt_tokens=spec.context_tokens - config.room,
        after_any=True,
    )
    for one in said[job.prompt_set]:
        for turn in range(len(one.turns), len(one.talk.asks)):
            first = one.talk.first
            prompt = Prompt(turn_name(first.id, turn), first.domain, ())
            # every arm has the same rows: of none the statistics count nothing
            outcome.rounds.append(_decode_row(prompt, job, rules, Decoded([])) | {"tokens": 0})
            outcome.unasked += 1
            if job.setting == GREEDY:
                outcome.texts[prompt.id] = []
    return outcome


def _respond(
    target: Target,
    draft: Draft | None,
    rules: Rules,
    pairs: Sequence[tuple[Prompt, list[int] | None]],
    outcome: Outcome,
    *,
    config: EvaluateConfig,
    job: Job,
) -> list[list[int]]:
    """Decode prompts together, each beside its cached rollout where it has one; note it all."""
    from pipeline.trace import trace_row

    asked = [prompt for prompt, _ in pairs]
    prompts = [torch.tensor(prompt.tokens) for prompt in asked]
    # named by prompt, not by arm: all drafts meet the same luck, which narrows their differences
    drawn = [
        uniforms(config.seed, "decode", job.setting.law, prompt.id, n=rules.num_uniforms)
        for prompt in asked
    ]
    warm = replace(rules, max_new_tokens=WARM_TOKENS)
    first = drawn[0][None, : warm.num_uniforms]
    decode(target, draft, prompts[:1], warm, uniforms_BU=first)
    decoded, timing = decode(target, draft, prompts, rules, uniforms_BU=torch.stack(drawn))
    if shown := [i for i, prompt in enumerate(asked) if prompt.id in job.traced]:
        traced, _ = decode(
            target,
            draft,
            [prompts[i] for i in shown],
            replace(rules, trace=True),
            uniforms_BU=torch.stack([drawn[i] for i in shown]),
        )
        outcome.traces = [
            _named(asked[i])
            | trace_row(row, prompts[i], rules, target.tokenizer)
            | _law_of(job.setting)
            for i, row in zip(shown, traced, strict=True)
        ]
    speed = {
        "tokens": float(sum(row.num_counted for row in decoded)),
        "steps": float(timing.steps),
        "draft_s": timing.draft_s,
        "target_s": timing.target_s,
        "rounds_s": timing.rounds_s,
    }
    outcome.speed = {what: outcome.speed.get(what, 0.0) + value for what, value in speed.items()}
    if job.prompt_set and job.setting == GREEDY:
        outcome.texts |= {p.id: row.tokens for p, row in zip(asked, decoded, strict=True)}
    for (prompt, response), row in zip(pairs, decoded, strict=True):
        if response is not None:
            outcome.identical += row.tokens == response[: rules.max_new_tokens]
        outcome.rounds.append(_decode_row(prompt, job, rules, row))
    return [row.tokens for row in decoded]


def _decode_row(prompt: Prompt, job: Job, rules: Rules, row: Decoded) -> dict[str, Any]:
    return _named(prompt) | {
        "instrument": f"{DECODE_SET}{job.prompt_set}" if job.prompt_set else "decode",
        **_law_of(job.setting),
        "gamma": rules.gamma,
        "tokens": row.num_counted,
        "rounds": float(row.rounds),
        "drafted": float(row.drafted),
        "accepted": float(row.accepted),
        "kept": [float(kept) for kept in row.kept] or [0.0] * rules.gamma,
    }


def _heldout(cache: Cache, rows: Sequence[int]) -> list[tuple[Prompt, list[int] | None]]:
    """The prompts of cached sequences, each with its rollout."""
    found: list[tuple[Prompt, list[int] | None]] = []
    for record in cache.records(rows, arrays={"tokens", "turn"}):
        prompt, response = split(record)
        found.append((Prompt(record.id, record.domain, tuple(prompt)), response))
    return found
