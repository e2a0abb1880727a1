"""`lkcache show --mask`: samples of a split as text, what the assistant wrote in colour.

Of `sequences/`, which capture reads, or of `data/` before anything has run. Needs storage, rich and
tokenizers; only conversations of `data/` need transformers, for the target's chat template.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from lkcache.words import counted
from pipeline.config import PARAMS, read_params
from storage.errors import ConfigError, DataError
from storage.sequences import Sequences
from storage.tables import CONVERSATIONS, PROMPTS, read_table
from storage.workspace import read_json

SEQUENCES_FOLDER, DATA, TARGET = Path("sequences"), Path("data"), Path("target")
TOKENIZER = "tokenizer.json"
SHOWN_TOKENS = 2000
STYLES = ("black on green", "black on cyan")  # of turns, one after the other
OPEN, CLOSE, BREAK = "⟦", "⟧", "↵"


@dataclass(frozen=True)
class Sample:
    """One sequence to show."""

    id: str
    domain: str
    tokens: Sequence[int]
    turn: Sequence[int]


def show(
    split: Annotated[str, Argument(help="train, heldout or greedy.")] = "train",
    mask: Annotated[bool, Option("--mask", help="Mark the supervised spans.")] = False,
    samples: Annotated[int, Option(help="How many, spread evenly over the split.")] = 3,
    source: Annotated[
        str, Option("--from", help="sequences (what capture reads) or data (what prepare wrote).")
    ] = "sequences",
    tokenizer: Annotated[
        Path | None,
        Option(help="A tokenizer.json or its folder; the pinned target's if left out."),
    ] = None,
) -> None:
    """Print samples of SPLIT as the target reads them.

    With --mask, the assistant's turns are in colour; where the output is no terminal they stand
    between ⟦ and ⟧. A line break within them is shown as ↵.
    """
    if samples < 1 or source not in ("sequences", "data"):
        raise ConfigError(
            found=f"--samples {samples} --from {source}",
            expected="at least one sample, from sequences or data",
            todo="correct the option",
        )
    file = _tokenizer_file(tokenizer)
    words = _words(file)
    console = Console(highlight=False)
    if source == "sequences":
        found, told = _of_sequences(split, samples)
    else:
        found, told = _of_data(split, samples, file, words)
    for sample in found:
        console.print(_head(sample))
        console.print(_text(sample, words, mask=mask, colour=console.is_terminal), soft_wrap=True)
        console.print()
    console.print(told)


def _of_sequences(split: str, samples: int) -> tuple[list[Sample], str]:
    """Samples of `sequences/<split>.parquet`, and the whole split in a sentence."""
    table = Sequences.open(SEQUENCES_FOLDER / f"{split}.parquet")
    found = [
        Sample(row["id"], row["domain"], row["tokens"].tolist(), row["turn"].tolist())
        for row in table.take(_spread(len(table), samples))
    ]
    written, lengths = table.survey.written, table.survey.lengths
    told = f"{split}: {counted(len(table), 'sequence')}, "
    told += f"{counted(table.survey.num_tokens, 'token')}, "
    told += f"{100 * written.sum() / max(1, lengths.sum()):.1f} % of them supervised"
    for name, count in (("no", written == 0), ("only", written == lengths)):
        if count.any():
            told += f"; {counted(int(count.sum()), 'sequence')} with {name} supervised tokens"
    return found, told


def _of_data(split: str, samples: int, file: Path, words: Any) -> tuple[list[Sample], str]:
    """Samples of `data/`, rendered as `generate.train_responses: data` would."""
    prompts = [r for r in read_table(DATA / "prompts.parquet", PROMPTS) if r["split"] == split]
    talks = DATA / "conversations.parquet"
    table = read_table(talks, CONVERSATIONS) if talks.is_file() else []
    chats = {talk["id"]: talk for talk in table if talk["split"] == split}
    if not prompts:
        raise DataError(
            found=f"no prompt of the split {split!r} in {DATA}/",
            expected="train or heldout",
            todo="name one of them",
        )
    found: list[Sample] = []
    for index in _spread(len(prompts), samples):
        row = prompts[index]
        chat = chats.get(row["id"])
        found += _plain(row, words) if chat is None else _rendered(row, chat, file)
    replies = sum(r["response"] is not None for r in prompts) + sum(
        '"role": "assistant"' in talk["messages"] for talk in chats.values()
    )
    return (
        found,
        f"{split}: {counted(len(prompts), 'prompt')}, {replies:,} with a reply of the data's own",
    )


def _plain(row: dict[str, Any], words: Any) -> list[Sample]:
    """A prompt and the data's response as text, each by itself."""
    prompt = words.encode(row["text"], add_special_tokens=False).ids
    reply = words.encode(row["response"] or "", add_special_tokens=False).ids
    turn = [-1] * len(prompt) + [0] * len(reply)
    return [Sample(row["id"], row["domain"], [*prompt, *reply], turn)]


def _rendered(row: dict[str, Any], chat: dict[str, Any], file: Path) -> list[Sample]:
    """A conversation through the chat template that lies beside the tokenizer."""
    from pipeline.chat import has_template, prompt_tokens, speak

    try:
        # by name: no contract of the command may see transformers, and nothing else here needs it
        auto = import_module("transformers").AutoTokenizer
    except ImportError:
        raise DataError(
            found=f"conversation {row['id']!r}, and the package transformers is not installed",
            expected="transformers, which applies the target's chat template",
            todo='pip install "lkcache[pipeline]", or show --from sequences',
        ) from None
    words = auto.from_pretrained(file.parent, local_files_only=True)
    if not has_template(words):
        raise DataError(
            found=f"conversation {row['id']!r}, and no chat template in {file.parent}",
            expected="a chat model's tokenizer",
            todo="name its folder with --tokenizer",
        )
    messages, tools = json.loads(chat["messages"]), json.loads(chat["tools"])
    if not any(message["role"] == "assistant" for message in messages):
        tokens = prompt_tokens(words, messages, tools=tools, name=row["id"])
        return [Sample(row["id"], row["domain"], tokens, [-1] * len(tokens))]
    eos = _pinned().get("eos_ids") or [words.eos_token_id]
    records = speak(words, messages, tools=tools, eos_ids=eos, name=row["id"])
    return [Sample(row["id"], row["domain"], r.tokens, r.turn) for r in records]


def _spread(count: int, samples: int) -> list[int]:
    if not count:
        raise DataError(
            found="a split without a sequence", expected="at least one", todo="run dvc repro"
        )
    return np.unique(np.linspace(0, count - 1, min(samples, count)).astype(int)).tolist()


def _pinned() -> dict[str, Any]:
    path = TARGET / "target.json"
    return read_json(path) if path.is_file() else {}


def _named() -> Path | None:
    """The folder that params.yaml names as target, before the target stage has run."""
    section = read_params()["target"] if PARAMS.is_file() else {}
    return Path(section["model"]) if section.get("kind") == "pretrained" else None


def _tokenizer_file(given: Path | None) -> Path:
    """The given one, or that of the pinned target: beside it, in its folder, in the hub's cache."""
    if given is not None:
        places = [given / TOKENIZER if given.is_dir() else given]
    else:
        pinned = _pinned()
        model, revision = pinned.get("model", "."), pinned.get("revision")
        places = [TARGET / TOKENIZER, Path(model) / TOKENIZER]
        if not pinned and (named := _named()) is not None:
            places.append(named / TOKENIZER)
        if revision is not None:
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(model, TOKENIZER, revision=revision)
            places += [Path(cached)] if isinstance(cached, str) else []
    for place in places:
        if place.is_file():
            return place
    raise DataError(
        found=f"no tokenizer at {', '.join(map(str, places))}",
        expected="a tokenizer.json",
        todo="run dvc repro target, or name one with --tokenizer",
    )


def _words(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(
            found=f"{file} cannot be read ({error})",
            expected="a tokenizer of the tokenizers library",
            todo="name another with --tokenizer",
        ) from None


def _head(sample: Sample) -> Text:
    written = sum(turn >= 0 for turn in sample.turn)
    turns = len({turn for turn in sample.turn if turn >= 0})
    share = f"{100 * written / max(1, len(sample.turn)):.0f} %"
    return Text(
        f"{sample.id} · {sample.domain} · {counted(len(sample.tokens), 'token')}, "
        f"{written} supervised "
        f"({share}) in {turns} turn{'' if turns == 1 else 's'}",
        style="bold",
    )


def _text(sample: Sample, words: Any, *, mask: bool, colour: bool) -> Text:
    """The text, span by span; a span's tokens are decoded together, as letters may share one."""
    text = Text()
    for turn, ids in _spans(sample):
        piece: str = words.decode(ids, skip_special_tokens=False)
        if not mask:
            text.append(piece)
        elif turn < 0:
            text.append(piece, style="dim" if colour else "")
        else:
            piece = piece.replace("\n", f"{BREAK}\n")
            style = STYLES[turn % len(STYLES)] if colour else ""
            text.append(piece if colour else f"{OPEN}{piece}{CLOSE}", style=style)
    hidden = len(sample.tokens) - SHOWN_TOKENS
    if hidden > 0:
        text.append(f" … {hidden} more tokens", style="italic" if colour else "")
    return text


def _spans(sample: Sample) -> Iterator[tuple[int, list[int]]]:
    """(turn, ids) of every stretch of one turn."""
    pairs = list(zip(sample.turn, sample.tokens, strict=True))[:SHOWN_TOKENS]
    for turn, stretch in groupby(pairs, key=lambda pair: pair[0]):
        yield turn, [token for _, token in stretch]
