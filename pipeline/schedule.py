"""What an `evaluate` cell has to do, as jobs; everything is checked before a model loads.

Prompts are decoded in the order of the cache and in fixed batches, so that no number depends on
how many workers share the jobs.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal, TypeVar

from pipeline.checkpoint import read_config
from pipeline.dataset import head_for, require
from pipeline.evaluate import (
    GREEDY,
    Bench,
    EvaluateConfig,
    Job,
    draft_section,
    split,
)
from pipeline.prompt_sets import digests, read_set, require_room, talks_of_set
from pipeline.setting import Setting
from pipeline.target import DeviceMap, TargetSpec, home_of, load_tokenizer, read_spec
from pipeline.turns import Talk
from storage.errors import ConfigError, DraftError, ResultError
from storage.manifest import MANIFEST
from storage.reader import Cache
from storage.record import Record
from storage.workspace import digest, file_digest, tree_digest

T = TypeVar("T")


def open_bench(
    target: Path,
    caches: Mapping[str, Path],
    drafts: Sequence[Path],
    *,
    config: EvaluateConfig,
    device: str,
    device_map: DeviceMap | None = None,
) -> Bench:
    """Absolute places and the digest of what lies there; refuses what is missing."""
    spec = read_spec(target)
    opened = {
        law: Cache.open(path, expect={"target": spec.fingerprint}) for law, path in caches.items()
    }
    for cache in opened.values():
        head_for(cache, target)
    for folder in drafts:
        _check_draft(folder, spec, caches=list(opened.values()))
    return Bench(
        target=target.resolve(),
        caches={law: path.resolve() for law, path in caches.items()},
        device=device,
        device_map=device_map,
        config=config,
        sources=digest(
            {
                "params": config.model_dump(),
                "target": spec.fingerprint,
                "drafts": [tree_digest(path) for path in drafts],
                "caches": [file_digest(path / MANIFEST) for path in caches.values()],
                "sets": digests(config.prompt_sets),
            }
        ),
    )


def laws_with_rollouts(config: EvaluateConfig, served: Path) -> list[str]:
    """The laws of `evaluate.laws` that `generate.laws` named too; `served` holds their sequences.

    Any other that is not T = 0 or T = 1 is decoded only: no rollouts are of its law.
    """
    laws = dict.fromkeys(Setting.parse(name).law for name in config.laws)
    return [law for law in laws if (served / f"{law}.parquet").is_file()]


def require_law(path: Path, cache: Cache, *, law: str) -> None:
    """`ResultError` unless a cache holds the target's own samples of `law`: others never replay."""
    found = cache.source.get("law", "an unnamed law")
    if found != law:
        raise ResultError(
            found=f"{path} holds sequences of {found}",
            expected=f"the pinned target's own samples at {law}, since replay is exact for no "
            "other text",
            todo="run dvc repro generate, and then capture, or take the law out of evaluate.laws",
        )
    if not cache.num_sequences:
        raise ResultError(
            found=f"{path} holds no sequence",
            expected="held-out rollouts",
            todo="raise prepare.heldout_prompts and run dvc repro",
        )


def balanced(domains: Sequence[str], count: int) -> list[int]:
    """Indices of `count` prompts (or all there are), as evenly over the domains as these allow."""
    places: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        places.setdefault(domain, []).append(index)
    turns = zip_longest(*places.values())
    order = [index for turn in turns for index in turn if index is not None]
    return sorted(order[:count])


def plan(bench: Bench, drafts: Sequence[Path], *, decode: bool) -> list[Job]:
    """All jobs of a start, draft by draft; with `decode`, plain decoding of a batch comes first.

    Refuses rollouts that are not samples of the law they would be replayed for, and those that
    decoding could not be compared with.
    """
    config, spec = bench.config, read_spec(bench.target)
    caches = {s: bench.cache(s) for s in map(Setting.parse, config.laws)}
    for setting in filter(bench.replayable, caches):
        require_law(bench.caches[setting.law], caches[setting], law=setting.law)
    chosen = _choose(bench, caches, spec) if decode else {}
    sets = _read_sets(bench, spec) if decode else {}
    served = {setting.served: rows for setting, rows in chosen.items()}
    jobs = [Job("plain", None, s, tuple(rows[: config.decode_batch])) for s, rows in served.items()]
    jobs += _plain_sets(sets, list(served), config)
    for folder in drafts:
        for setting, cache in caches.items():
            rows = chosen.get(setting, [])
            decoded = frozenset(cache.ids[i] for i in rows)
            picked = balanced([cache.domains[i] for i in rows], config.trace_prompts)
            traced = frozenset(cache.ids[rows[i]] for i in picked)
            if bench.replayable(setting):
                everything = range(cache.num_sequences)
                jobs.extend(
                    Job("replay", folder, setting, batch, decoded)
                    for batch in _batches(everything, config.batch_sequences)
                )
            jobs.extend(
                Job("decode", folder, setting, batch, traced=traced)
                for batch in _batches(rows, config.decode_batch)
            )
            jobs.extend(
                _set_job("decode", folder, setting, name, batch)
                for name, prompts in sets.items()
                for batch in _batches(prompts, config.decode_batch)
            )
    return jobs


def _read_sets(bench: Bench, spec: TargetSpec) -> dict[str, list[Talk]]:
    """The prompts of every set, as ids that fit into the target's context."""
    config = bench.config
    if not config.prompt_sets:
        return {}
    home = home_of(spec, bench.target)
    tokenizer = load_tokenizer(home, trust_remote_code=spec.trust_remote_code)
    found = {}
    for name, given in config.prompt_sets.items():
        prompts = read_set(name, given)
        order = balanced([p.category for p in prompts], given.max_prompts or len(prompts))
        found[name] = talks_of_set(
            name,
            [prompts[i] for i in order],
            tokenizer,
            turns=given.turns,
            reply_tokens=config.decode_new_tokens,
            new_tokens=config.room,
            context_tokens=spec.context_tokens,
        )
    return found


def _plain_sets(
    sets: Mapping[str, list[Talk]], settings: Sequence[Setting], config: EvaluateConfig
) -> list[Job]:
    """Plain decoding of one batch of each set for its speed; of all at T = 0, to compare texts."""
    return [
        _set_job("plain", None, setting, name, batch)
        for setting in settings
        for name, prompts in sets.items()
        for batch in list(_batches(prompts, config.decode_batch))[
            : None if setting == GREEDY else 1
        ]
    ]


def _set_job(
    instrument: Literal["decode", "plain"],
    draft: Path | None,
    setting: Setting,
    name: str,
    talks: tuple[Talk, ...],
) -> Job:
    return Job(instrument, draft, setting, (), prompt_set=name, talks=talks)


def _batches(rows: Sequence[T], size: int) -> Iterator[tuple[T, ...]]:
    for start in range(0, len(rows), size):
        yield tuple(rows[start : start + size])


def _check_draft(folder: Path, spec: TargetSpec, *, caches: Sequence[Cache]) -> None:
    """`DraftError` where a draft is another target's or reads what a cache lacks."""
    trained_for = read_config(folder)["source"].get("target")
    if trained_for != spec.fingerprint:
        raise DraftError(
            found=f"{folder} was trained for the target {trained_for}",
            expected=f"the pinned one, {spec.fingerprint}",
            todo="run dvc repro, so that the draft is trained anew",
        )
    model, section = draft_section(folder)
    for cache in caches:
        require(cache.layout, model.needs(section))


def _choose(
    bench: Bench, caches: dict[Setting, Cache], spec: TargetSpec
) -> dict[Setting, list[int]]:
    """Setting -> the sequences whose prompts are decoded: the same prompts at each."""
    config = bench.config
    first = next(iter(caches.values()))
    order = balanced(first.domains, config.decode_prompts)
    names = [first.ids[i] for i in order]
    chosen = {}
    for setting, cache in caches.items():
        place = {name: index for index, name in enumerate(cache.ids)}
        lost = [name for name in names if name not in place]
        if lost:
            raise ResultError(
                found=f"no rollout of the prompt {lost[0]} at {setting.words}",
                expected="rollouts of the same held-out prompts under every law",
                todo="run dvc repro generate, and then capture",
            )
        chosen[setting] = [place[name] for name in names]
        for record in cache.records(chosen[setting], arrays={"tokens", "turn"}):
            _check_response(record)
            length = len(split(record)[0])
            space = {"new_tokens": config.room, "context_tokens": spec.context_tokens}
            require_room(record.id, length, **space)
            if bench.replayable(setting):
                _check_length(record, config, spec)
    return chosen


def _check_response(record: Record) -> None:
    prompt, response = split(record)
    if not prompt or len(prompt) + len(response) != len(record.tokens):
        raise ResultError(
            found=f"sequence {record.id} is not one prompt with one response after it",
            expected="a place where decoding starts",
            todo="generate single responses, or set evaluate.decode_seeds: []",
        )


def _check_length(record: Record, config: EvaluateConfig, spec: TargetSpec) -> None:
    """Refuse a rollout that decoding would outlive: the two could not be compared."""
    _, response = split(record)
    if len(response) < config.decode_new_tokens and response[-1] not in spec.eos_ids:
        raise ConfigError(
            found=f"evaluate.decode_new_tokens is {config.decode_new_tokens}, but the rollout of "
            f"{record.id} was cut at {len(response)} tokens",
            expected="at most generate.max_new_tokens, so that replay and decode compare",
            todo="lower evaluate.decode_new_tokens or raise generate.max_new_tokens",
        )
