"""Documents and prompts: read from a source, freed of repeats, split, cut.

    found     = read_source(config.source, seed=config.seed)
    wanted    = drop_unwanted(found.pieces, config)   # length, language, turns, evaluation prompts
    documents = drop_duplicates(wanted, ...)          # all that is dropped is counted, by reason
    split     = split_documents(...)                  # train and held-out share no near-repeat
    prompts   = cut_prompts(...)                      # of each split, from its own documents

A source gives documents; a prompt is a document's beginning as the user wrote it (`prompt` rows,
conversations) or a piece cut at a line's or a sentence's start. Held-out prompts come from held-out
documents only. Everything is drawn from the seed by name. Sizes are characters.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.config import Strict
from pipeline.duplicates import exact_duplicates, near_duplicates, overlaps
from pipeline.layouts import read_prompts
from pipeline.seeds import rng
from pipeline.sources import (
    HELDOUT,
    TRAIN,
    MixSource,
    Piece,
    Source,
    StdlibSource,
    Text,
    parts_of,
    read_source,
)
from storage.errors import DataError

# a prompt may end at the last white space of its length, but not give up more than this share
TRIM_SHARE = 0.2
# where a piece may begin: a line, or a sentence within one
BOUNDARY = re.compile(r"(?m)^(?=[^\n]*\S)|(?<=[.!?] )(?=[A-Z])")
PROBLEM = re.compile(r"(?m)^(?=Problem \d)")
SETS = "prepare.filters.evaluation_prompts"


class FilterConfig(Strict):
    """What a row must be to be used; null asks for nothing."""

    min_chars: Annotated[int, Field(ge=1)] | None
    max_chars: Annotated[int, Field(ge=1)] | None
    """Of a document or a prompt; of a conversation, of all its turns together."""
    max_turns: Annotated[int, Field(ge=1)] | None
    """User turns of a conversation."""
    languages: Annotated[list[Text], Field(min_length=1)] | None
    """Tags as the rows have them (`language`, `lang`, `langdetect`); others are dropped."""
    evaluation_prompts: list[Text]
    """Files of prompts (pipeline.layouts) that no row may hold, exactly or nearly."""


class PrepareConfig(Strict):
    """Section `prepare`."""

    source: Source
    filters: FilterConfig
    seed: Annotated[int, Field(ge=0)]
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)]
    near_duplicate: Annotated[float, Field(gt=0, le=1)]
    train_prompts: Annotated[int, Field(ge=1)]
    heldout_prompts: Annotated[int, Field(ge=1)]
    prompt_chars: Annotated[int, Field(ge=8)]


@dataclass(frozen=True)
class Prepared:
    """What the stage writes, and what it counted on the way."""

    documents: list[Piece]
    prompts: list[Piece]
    metrics: dict[str, Any]


def prepare(config: PrepareConfig) -> Prepared:
    """Read, free of duplicates, split, cut; `DataError` where the source has nothing to use."""
    found = read_source(config.source, seed=config.seed)
    for name in parts_of(config.source):
        refuse_overlap([p for p in found.pieces if p.source == name], config.near_duplicate)
    wanted, dropped = drop_unwanted(found.pieces, config)
    dropped = {**{reason: found.unfit[reason] for reason in sorted(found.unfit)}, **dropped}
    if not wanted:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise DataError(
            found=f"prepare.source of kind {config.source.kind} has no usable document"
            + (f" (dropped: {why})" if why else ""),
            expected="at least one document or prompt",
            todo="correct prepare.source" + (" or prepare.filters" if why else ""),
        )
    kept, removed = drop_duplicates(wanted, config.near_duplicate)
    split = split_documents(kept, fraction=config.heldout_fraction, seed=config.seed)
    prompts = cut_splits(split, config)
    metrics: dict[str, Any] = {
        "documents": _count(split),
        "characters": _count(split, weigh=True),
        "prompts": _count(prompts),
        "duplicates_removed": removed,
    }
    if dropped:
        metrics["dropped"] = dropped
    if isinstance(config.source, MixSource):
        metrics["prompts_by_part"] = _count(prompts, by="source")
    return Prepared(documents=split, prompts=prompts, metrics=metrics)


def refuse_overlap(documents: Sequence[Piece], threshold: float) -> None:
    """`DataError` where a source's own held-out rows repeat its training rows, or nearly."""
    if HELDOUT not in {d.split for d in documents}:
        return
    texts = [d.text for d in documents]
    for repeats in (exact_duplicates(texts), near_duplicates(texts, threshold)):
        across = {b: a for b, a in repeats.items() if documents[a].split != documents[b].split}
        if across:
            later, earlier = next(iter(across.items()))
            raise DataError(
                found=f"{len(across)} held-out rows of prepare.source repeat training rows (row "
                f"{documents[later].id!r} is row {documents[earlier].id!r} again)",
                expected="held-out rows that are not among the training rows",
                todo="remove them from one of the two",
            )


def drop_unwanted(
    documents: Sequence[Piece], config: PrepareConfig
) -> tuple[list[Piece], dict[str, int]]:
    """Keep what the filters want; count what went by the first filter that dropped it."""
    filters = config.filters
    checks: dict[str, Any] = {
        "too few characters": filters.min_chars and (lambda d: _size(d) < (filters.min_chars or 0)),
        "too many characters": filters.max_chars
        and (lambda d: _size(d) > (filters.max_chars or 0)),
        "too many turns": filters.max_turns
        and (lambda d: len(_user_turns(d)) > (filters.max_turns or 0)),
        "another language": filters.languages
        and (lambda d: d.language not in (filters.languages or [])),
    }
    checks = {reason: check for reason, check in checks.items() if check}
    dropped = dict.fromkeys(checks, 0)
    kept = []
    for document in documents:
        reason = next((reason for reason, check in checks.items() if check(document)), None)
        if reason is None:
            kept.append(document)
        else:
            dropped[reason] += 1
    if filters.evaluation_prompts:
        reference = [
            text
            for path in filters.evaluation_prompts
            for prompt in read_prompts(Path(path), parameter=SETS)
            for text in (prompt.text, *prompt.later)
        ]
        held = overlaps([_user_turns(d) for d in kept], reference, config.near_duplicate)
        dropped["an evaluation prompt"] = len(held)
        kept = [d for index, d in enumerate(kept) if index not in held]
    return kept, dropped


def _user_turns(document: Piece) -> list[str]:
    if not document.messages:
        return [document.text]
    return [str(m["content"]) for m in document.messages if m["role"] == "user"]


def _size(document: Piece) -> int:
    if not document.messages:
        return len(document.text)
    return sum(len(str(m["content"])) for m in document.messages)


def drop_duplicates(
    documents: Sequence[Piece], threshold: float
) -> tuple[list[Piece], dict[str, int]]:
    """Keep the first of every group of repeats, before any split; count what went, by kind."""
    exact = exact_duplicates([d.text for d in documents])
    once = [d for index, d in enumerate(documents) if index not in exact]
    near = near_duplicates([d.text for d in once], threshold)
    kept = [d for index, d in enumerate(once) if index not in near]
    return kept, {"exact": len(exact), "near": len(near)}


def split_documents(documents: Sequence[Piece], *, fraction: float, seed: int) -> list[Piece]:
    """Draw the held-out documents of each domain; a split that the source gave stays."""
    domains: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        if not document.split:
            domains[_names(document)].append(index)
    heldout: set[int] = set()
    for names, members in sorted(domains.items()):
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        drawn = rng(seed, "heldout", *names).permutation(len(members))[:count]
        heldout.update(members[int(i)] for i in drawn)
    return [
        replace(d, split=d.split or (HELDOUT if i in heldout else TRAIN))
        for i, d in enumerate(documents)
    ]


def _names(document: Piece) -> tuple[str, ...]:
    """Its part of a mix, where it is of one, and its domain."""
    return (document.source, document.domain) if document.source else (document.domain,)


def cut_splits(documents: Sequence[Piece], config: PrepareConfig) -> list[Piece]:
    """The prompts of both splits; no text stands in both, or twice in one."""
    used: set[str] = set()
    wanted = {HELDOUT: config.heldout_prompts, TRAIN: config.train_prompts}
    cut = {
        split: cut_prompts([d for d in documents if d.split == split], split, used, config=config)
        for split in (HELDOUT, TRAIN)  # the smaller one first: it can spare no prompt
    }
    for split, prompts in cut.items():
        # a file of prompts is as long as it is; the corpus is as long as prepare.source says
        floor = wanted[split] if isinstance(config.source, StdlibSource) else 1
        if len(prompts) < floor:
            raise DataError(
                found=f"{len(prompts)} places for a {split} prompt of {config.prompt_chars} "
                f"characters in {sum(d.split == split for d in documents)} documents",
                expected=f"at least {floor}",
                todo=f"give prepare.source more text, or ask for fewer in prepare.{split}_prompts",
            )
    return [*cut[TRAIN], *cut[HELDOUT]]


def cut_prompts(
    documents: Sequence[Piece], split: str, used: set[str], *, config: PrepareConfig
) -> list[Piece]:
    """At most `<split>_prompts` prompts, domains in turn so that any first few are balanced.

    A domain that runs out is filled up by the others, and so is a part of a mix; parts take turns
    by weight. `used` holds the texts that are taken.
    """
    count = config.heldout_prompts if split == HELDOUT else config.train_prompts
    parts = parts_of(config.source)
    waiting = {
        name: _in_turn([d for d in documents if d.source == name], split, used, config=config)
        for name in parts
    }
    chosen: list[Piece] = []
    taken: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    while waiting and len(chosen) < count:
        part = min(waiting, key=lambda name: (drawn[name] + 1) / parts[name].weight)
        prompt = next(waiting[part], None)
        if prompt is None:
            del waiting[part]
            continue
        domain = prompt.domain
        name = prompt.id if prompt.whole else f"{split}-{domain}-{taken[domain]:05d}"
        chosen.append(replace(prompt, id=name))
        taken[domain] += 1
        drawn[part] += 1
    return chosen


def _in_turn(
    documents: Sequence[Piece], split: str, used: set[str], *, config: PrepareConfig
) -> Iterator[Piece]:
    """New prompts of one part, one domain after the other."""
    queues: dict[str, list[Piece]] = {}
    for domain in sorted({d.domain for d in documents}):
        members = [d for d in documents if d.domain == domain]
        found = [c for d in members for c in _candidates(d, config.prompt_chars)]
        order = rng(config.seed, "prompts", split, *_names(members[0])).permutation(len(found))
        queues[domain] = [found[int(i)] for i in reversed(order)]
    while queues:
        for domain in list(queues):
            prompt = _next_new(queues[domain], used)
            if prompt is None:
                del queues[domain]
            else:
                yield prompt


def _next_new(queue: list[Piece], used: set[str]) -> Piece | None:
    while queue:
        prompt = queue.pop()
        key = " ".join(prompt.text.split())
        if key not in used:
            used.add(key)
            return prompt
    return None


def _candidates(document: Piece, prompt_chars: int) -> list[Piece]:
    """The document itself where it is a prompt, else its pieces: disjoint, at natural starts."""
    if document.whole:
        return [document]
    text, pieces, free = document.text, [], 0
    boundary = PROBLEM if document.domain == "maths" and PROBLEM.search(text) else BOUNDARY
    for match in boundary.finditer(text):
        start, end = match.start(), match.start() + prompt_chars
        if start < free or end >= len(text):  # something must be left to go on with
            continue
        piece = text[start:end]
        if not text[end].isspace():
            whole_words = re.sub(r"\S+\Z", "", piece).rstrip()
            piece = whole_words if len(whole_words) >= (1 - TRIM_SHARE) * prompt_chars else piece
        piece = piece.rstrip()
        if len(piece) >= (1 - TRIM_SHARE) * prompt_chars:
            pieces.append(replace(document, text=piece))
            free = end
    return pieces


def _count(
    pieces: Iterable[Piece], *, weigh: bool = False, by: str = "domain"
) -> dict[str, dict[str, int]]:
    """{split: {domain: pieces}}, or characters."""
    counts: dict[str, Counter[str]] = {TRAIN: Counter(), HELDOUT: Counter()}
    for piece in pieces:
        counts[piece.split][getattr(piece, by)] += len(piece.text) if weigh else 1
    return {split: dict(sorted(count.items())) for split, count in counts.items()}
