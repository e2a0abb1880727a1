"""What an `evaluate` cell has to do, as jobs; everything is checked before a model loads.

Prompts are decoded in the order of the cache and in fixed batches, so that no number depends on
how many workers share the jobs.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from pipeline.checkpoint import read_config
from pipeline.dataset import head_for, require
from pipeline.evaluate import (
    Bench,
    EvaluateConfig,
    Job,
    draft_section,
    law_name,
    replayable,
    split,
)
from pipeline.target import DeviceMap, TargetSpec, read_spec
from storage.errors import ConfigError, DraftError, ResultError
from storage.manifest import MANIFEST
from storage.reader import Cache
from storage.record import Record
from storage.workspace import digest, file_digest, tree_digest


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
            }
        ),
    )


def require_law(path: Path, cache: Cache, *, law: str) -> None:
    """`ResultError` unless a cache holds the target's own samples of `law`: others never replay."""
    found = cache.source.get("law", "an unnamed law")
    if found != law:
        raise ResultError(
            found=f"{path} holds sequences of {found}",
            expected=f"the pinned target's own samples at {law}, since replay is exact for no "
            "other text",
            todo="set generate.engine: transformers and run dvc repro, or take the temperature "
            "out of evaluate.temperatures",
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
    caches = {t: bench.cache(t) for t in config.temperatures}
    for t in filter(replayable, caches):
        require_law(bench.caches[law_name(t)], caches[t], law=law_name(t))
    chosen = _choose(caches, config, spec) if decode else {}
    jobs = [Job("plain", None, t, tuple(rows[: config.decode_batch])) for t, rows in chosen.items()]
    for folder in drafts:
        for t, cache in caches.items():
            rows = chosen.get(t, [])
            decoded = frozenset(cache.ids[i] for i in rows)
            picked = balanced([cache.domains[i] for i in rows], config.trace_prompts)
            traced = frozenset(cache.ids[rows[i]] for i in picked)
            if replayable(t):
                everything = range(cache.num_sequences)
                jobs.extend(
                    Job("replay", folder, t, batch, decoded)
                    for batch in _batches(everything, config.batch_sequences)
                )
            jobs.extend(
                Job("decode", folder, t, batch, traced=traced)
                for batch in _batches(rows, config.decode_batch)
            )
    return jobs


def _batches(rows: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
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
    caches: dict[float, Cache], config: EvaluateConfig, spec: TargetSpec
) -> dict[float, list[int]]:
    """Temperature -> the sequences whose prompts are decoded: the same prompts at each."""
    first = next(iter(caches.values()))
    order = balanced(first.domains, config.decode_prompts)
    names = [first.ids[i] for i in order]
    chosen = {}
    for t, cache in caches.items():
        place = {name: index for index, name in enumerate(cache.ids)}
        lost = [name for name in names if name not in place]
        if lost:
            raise ResultError(
                found=f"no rollout of the prompt {lost[0]} at T = {t:g}",
                expected="rollouts of the same held-out prompts at every temperature",
                todo="run dvc repro generate, and then capture",
            )
        chosen[t] = [place[name] for name in names]
        for record in cache.records(chosen[t], arrays={"tokens", "turn"}):
            _check_response(record)
            if replayable(t):
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
