"""Documents and prompts: read from a source, freed of repeats, split, cut.

    documents = read_source(config.source, config.seed)   # and their duplicates, counted
    split     = split_documents(...)                      # train and held-out share no near-repeat
    prompts   = cut_prompts(...)                          # of each split, from its own documents

A source gives documents; a prompt is a document's beginning as the user wrote it (`prompt` rows of
a JSONL) or a piece cut at a line's or a sentence's start. Held-out prompts come from held-out
documents only. Everything is drawn from the seed by name. Sizes are characters.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.config import Strict
from pipeline.corpus import stdlib_documents
from pipeline.duplicates import exact_duplicates, near_duplicates
from pipeline.layouts import Row, read_rows
from pipeline.seeds import rng
from storage.errors import DataError

TRAIN, HELDOUT = "train", "heldout"
# a prompt may end at the last white space of its length, but not give up more than this share
TRIM_SHARE = 0.2
# where a piece may begin: a line, or a sentence within one
BOUNDARY = re.compile(r"(?m)^(?=[^\n]*\S)|(?<=[.!?] )(?=[A-Z])")
PROBLEM = re.compile(r"(?m)^(?=Problem \d)")


class StdlibSource(Strict):
    """The standard library's sources, docstrings and reference, and generated arithmetic."""

    kind: Literal["stdlib"]
    max_chars: Annotated[int, Field(ge=10_000)]


class JsonlSource(Strict):
    """JSON lines with a `prompt` or a `text` each, and optionally `id`, `domain`, `response`."""

    kind: Literal["jsonl"]
    train: Annotated[str, Field(min_length=1)]
    heldout: str | None
    """A file of its own, or null: held-out rows are then drawn from `train`."""


class PrepareConfig(Strict):
    """Section `prepare`."""

    source: Annotated[StdlibSource | JsonlSource, Field(discriminator="kind")]
    seed: Annotated[int, Field(ge=0)]
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)]
    near_duplicate: Annotated[float, Field(gt=0, le=1)]
    train_prompts: Annotated[int, Field(ge=1)]
    heldout_prompts: Annotated[int, Field(ge=1)]
    prompt_chars: Annotated[int, Field(ge=8)]


@dataclass(frozen=True)
class Piece:
    """A document or a prompt, one row of either table."""

    id: str
    domain: str
    split: str
    text: str
    whole: bool = False
    """True for a document that is one prompt already."""
    response: str | None = None


@dataclass(frozen=True)
class Prepared:
    """What the stage writes, and what it counted on the way."""

    documents: list[Piece]
    prompts: list[Piece]
    metrics: dict[str, Any]


def prepare(config: PrepareConfig) -> Prepared:
    """Read, free of duplicates, split, cut; `DataError` where the source has nothing to use."""
    documents = read_source(config)
    if not documents:
        raise DataError(
            found=f"prepare.source of kind {config.source.kind} has no usable document",
            expected="at least one document or prompt",
            todo="correct prepare.source",
        )
    kept, removed = drop_duplicates(documents, config.near_duplicate)
    split = split_documents(kept, fraction=config.heldout_fraction, seed=config.seed)
    prompts = cut_splits(split, config)
    metrics = {
        "documents": _count(split),
        "characters": _count(split, weigh=True),
        "prompts": _count(prompts),
        "duplicates_removed": removed,
    }
    return Prepared(documents=split, prompts=prompts, metrics=metrics)


def read_source(config: PrepareConfig) -> list[Piece]:
    """All documents of the source; `split` is "" where it is still to be drawn."""
    source = config.source
    if isinstance(source, StdlibSource):
        found = stdlib_documents(source.max_chars, config.seed)
        return [Piece(d.id, d.domain, "", d.text) for d in found]
    train = read_rows(Path(source.train)).rows
    if source.heldout is None:
        return _pieces(train, "")
    heldout = read_rows(Path(source.heldout)).rows
    documents = [*_pieces(train, TRAIN), *_pieces(heldout, HELDOUT)]
    refuse_overlap(documents, config.near_duplicate, source=source)
    return documents


def _pieces(rows: Iterable[Row], split: str) -> list[Piece]:
    return [
        Piece(row.id, row.domain, split, row.text, whole=row.is_prompt, response=row.response)
        for row in rows
    ]


def refuse_overlap(documents: Sequence[Piece], threshold: float, *, source: JsonlSource) -> None:
    """`DataError` where a held-out file repeats a training row, exactly or nearly."""
    texts = [d.text for d in documents]
    for repeats in (exact_duplicates(texts), near_duplicates(texts, threshold)):
        across = {b: a for b, a in repeats.items() if documents[a].split != documents[b].split}
        if across:
            later, earlier = next(iter(across.items()))
            raise DataError(
                found=f"{len(across)} of {source.heldout} repeat {source.train} (row "
                f"{documents[later].id!r} is row {documents[earlier].id!r} again)",
                expected="held-out rows that are not in the training file",
                todo="remove them from one of the two files",
            )


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
    if all(d.split for d in documents):
        return list(documents)
    domains: dict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        domains[document.domain].append(index)
    heldout: set[int] = set()
    for domain, members in sorted(domains.items()):
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        drawn = rng(seed, "heldout", domain).permutation(len(members))[:count]
        heldout.update(members[int(i)] for i in drawn)
    return [replace(d, split=HELDOUT if i in heldout else TRAIN) for i, d in enumerate(documents)]


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

    A domain that runs out is filled up by the others. `used` holds the texts that are taken.
    """
    count = config.heldout_prompts if split == HELDOUT else config.train_prompts
    queues: dict[str, list[Piece]] = {}
    for domain in sorted({d.domain for d in documents}):
        members = [d for d in documents if d.domain == domain]
        found = [c for d in members for c in _candidates(d, config.prompt_chars)]
        order = rng(config.seed, "prompts", split, domain).permutation(len(found))
        queues[domain] = [found[int(i)] for i in reversed(order)]
    chosen: list[Piece] = []
    taken: Counter[str] = Counter()
    while queues and len(chosen) < count:
        for domain in list(queues):
            prompt = _next_new(queues[domain], used)
            if prompt is None:
                del queues[domain]
            elif len(chosen) < count:
                name = prompt.id if prompt.whole else f"{split}-{domain}-{taken[domain]:05d}"
                chosen.append(replace(prompt, id=name))
                taken[domain] += 1
    return chosen


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


def _count(pieces: Iterable[Piece], *, weigh: bool = False) -> dict[str, dict[str, int]]:
    """{split: {domain: pieces}}, or characters."""
    counts: dict[str, Counter[str]] = {TRAIN: Counter(), HELDOUT: Counter()}
    for piece in pieces:
        counts[piece.split][piece.domain] += len(piece.text) if weigh else 1
    return {split: dict(sorted(count.items())) for split, count in counts.items()}
