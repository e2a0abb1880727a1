"""Conversations that the target carries on: it answers every user turn behind its own replies.

    prompts = encode(first_turns(rows), tokenizer, ...)
    said = converse({"train": talks_of(rows, prompts), ...}, reply, ...)  # all first turns, ...
    rows = chains(said["train"], law)    # training: turns whose ids go on stand in one sequence
    prompts, responses, _ = paired(rest) # held out: each turn is a prompt with one response

What the target reads before a turn is what a server would show it: the conversation so far, its
own earlier replies as text, in the tokenizer's chat template. Those ids need not begin with the ids
that were drawn: a template drops the thinking of earlier replies, and a text may be split into
tokens otherwise than it was sampled. The drawn ids are never changed. Where the next turn's ids
begin with all that was read and drawn so far, the turn goes on in the same sequence; where they do
not, it begins a sequence of its own, in which the earlier replies are context. So every reply is
supervised once, as it was drawn, behind what the target read when it drew it, and each is a sample
of its law.

A conversation ends early where its next turn would not be what serving sees: after a reply that was
cut or says nothing, before a context that is too long, before a tool's answer to the data's own
call, and where the template refuses. What is dropped is counted by reason. Knows no engine.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Message, asks_of, prompt_tokens, talk_name, turn_name
from pipeline.sampling import Prompt, Response
from storage.errors import DataError

# why the turns behind are dropped; a count stands before: "3 turns <why>"
CUT = "after a reply without an end"
BLANK = "after a reply that says nothing"
LONG = "before which the conversation is too long"
TOOL = "that need a tool's answer"
REFUSED = "whose conversation the template refuses"
FAILED = "after one that the server did not answer"
UNPAIRED = "that another law lacks"

# gpt-oss writes thinking and answer as messages of their own, and its template takes them as fields
HARMONY = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)"
    r"(?=<\|end\|>|<\|return\|>|<\|call\|>|\Z)",
    re.DOTALL,
)

Reply = Callable[[int, Mapping[str, Sequence[Prompt]]], Mapping[str, Sequence[Response | None]]]
"""Turn, prompts by split -> responses in their order; None where an engine gave none."""


@dataclass(frozen=True)
class Talk:
    """What a user says, turn by turn, whatever is answered."""

    first: Prompt
    """The first turn as the target reads it."""
    asks: tuple[tuple[Message, ...], ...]
    """The messages before each reply: a user's, at the start a system's too."""
    tools: tuple[Any, ...] = ()
    behind_tools: int = 0
    """User turns that stand behind a tool's answer, and cannot be asked."""


@dataclass
class Said:
    """A talk as far as the target has carried it on."""

    talk: Talk
    turns: list[tuple[Prompt, Response]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """Before the next ask: all that was asked, and the replies as text."""
    ended: str | None = None
    """Why no further turn is asked."""
    failed: str | None = None
    """The turn that the engine did not answer."""
    retokenised: int = 0
    """Replies that later turns read as the same text in other tokens."""
    rewritten: int = 0
    """Replies that later turns read as another text, or not at all."""

    @property
    def dropped(self) -> int:
        """Turns that were to be asked and were not."""
        return len(self.talk.asks) - len(self.turns) - (self.failed is not None)


def first_turns(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a split, each with the messages up to its first reply alone."""
    found = []
    listed = list(rows)
    ids = {row["id"] for row in listed}
    for row in listed:
        if talk_name(row["id"], ids) != row["id"]:
            raise DataError(
                found=f"the ids {talk_name(row['id'], ids)!r} and {row['id']!r}",
                expected="no id that is another's with a turn behind it",
                todo="give the rows of prepare.source other ids, or set generate.turns: last",
            )
        asks, _ = asks_of(row)
        if not asks:
            raise DataError(
                found=f"conversation {row['id']!r} has no user turn before a tool's answer",
                expected="a user turn that the target can answer",
                todo="remove it from prepare.source, or set generate.turns: last",
            )
        found.append({**row, "messages": list(asks[0]), "response": None})
    return found


def talks_of(rows: Iterable[Mapping[str, Any]], prompts: Iterable[Prompt]) -> list[Talk]:
    """The talks of prompts, which are the first turns of (some of) the rows, in their order."""
    asked = {prompt.id: prompt for prompt in prompts}
    talks = []
    for row in rows:
        if row["id"] in asked:
            asks, behind = asks_of(row)
            tools = tuple(row.get("tools") or ())
            talks.append(Talk(asked[row["id"]], tuple(asks), tools, behind))
    return talks


def converse(
    talks: Mapping[str, Sequence[Talk]],
    reply: Reply,
    *,
    tokenizer: Any,
    eos_ids: Sequence[int],
    max_prompt_tokens: int,
    after_any: bool = False,
) -> dict[str, list[Said]]:
    """Ask turn by turn until no talk goes on; every prompt is asked with the others of its turn.

    A turn whose ids are more than `max_prompt_tokens` is not asked. `after_any`: a talk goes on
    after a reply that was cut or says nothing, as published runs of MT-Bench do.
    """
    said = {split: [Said(talk) for talk in some] for split, some in talks.items()}
    for turn in range(max((len(t.asks) for some in talks.values() for t in some), default=0)):
        asked: dict[str, list[tuple[Said, Prompt]]] = {}
        for split, some in said.items():
            for one in some:
                prompt = _next(one, turn, tokenizer, max_prompt_tokens)
                if prompt is not None:
                    asked.setdefault(split, []).append((one, prompt))
        if not asked:
            break
        prompts = {split: [prompt for _, prompt in pairs] for split, pairs in asked.items()}
        answers = reply(turn, prompts)
        for split, pairs in asked.items():
            for (one, prompt), response in zip(pairs, answers[split], strict=True):
                _take(one, prompt, response, tokenizer, eos_ids, after_any)
    return said


def _next(one: Said, turn: int, tokenizer: Any, max_prompt_tokens: int) -> Prompt | None:
    """What a talk asks at a turn; None, and why in `ended`, where it asks nothing more."""
    talk = one.talk
    if one.ended is not None or turn >= len(talk.asks):
        return None
    one.messages.extend(talk.asks[turn])
    if turn == 0:
        return talk.first
    name = turn_name(talk.first.id, turn)
    try:
        tokens = prompt_tokens(tokenizer, one.messages, tools=talk.tools, name=name)
    except DataError:
        one.ended = REFUSED
        return None
    if len(tokens) > max_prompt_tokens:
        one.ended = LONG
        return None
    before = _read(one.turns[-1])
    if tokens[: len(before)] != before:
        if _text(tokenizer, tokens).startswith(_text(tokenizer, before)):
            one.retokenised += 1
        else:
            one.rewritten += 1
    return Prompt(name, talk.first.domain, tuple(tokens))


def _take(
    one: Said,
    prompt: Prompt,
    response: Response | None,
    tokenizer: Any,
    eos_ids: Sequence[int],
    after_any: bool,
) -> None:
    """Note a turn's response, and what of it the next turns read."""
    if response is None:
        one.failed, one.ended = prompt.id, FAILED
        return
    one.turns.append((prompt, response))
    message = reply_message(tokenizer, response.tokens, eos_ids)
    if after_any:
        pass
    elif not response.finished:
        one.ended = CUT
    elif not message["content"].strip():
        one.ended = BLANK
    one.messages.append(message)


def reply_message(tokenizer: Any, tokens: Sequence[int], eos_ids: Sequence[int]) -> dict[str, str]:
    """The assistant's message that the ids say, its end-of-sequence token left out.

    Text as a server returns it, without special tokens; what of its thinking an earlier reply keeps
    is the template's to say. Of gpt-oss's channels the last `final` one is the content, the others
    the `thinking`.
    """
    own = list(tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens)
    parts = HARMONY.findall(_text(tokenizer, own))
    if parts:
        thinking = "\n".join(text for channel, text in parts if channel != "final")
        final = [text for channel, text in parts if channel == "final"]
        message = {"role": "assistant", "content": final[-1] if final else ""}
        return message | ({"thinking": thinking} if thinking else {})
    return {"role": "assistant", "content": _text(tokenizer, own, skip_special_tokens=True)}


def _text(tokenizer: Any, tokens: Sequence[int], **options: bool) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False, **options))


def _read(turn: tuple[Prompt, Response]) -> list[int]:
    prompt, response = turn
    return [*prompt.tokens, *response.tokens]


def chains(said: Iterable[Said], law: str) -> list[dict[str, Any]]:
    """Rows of `storage.tables.SEQUENCES`: turns whose ids go on in one, others in their own.

    A row is named by its first turn; replies are counted from 0 in each.
    """
    rows: list[dict[str, Any]] = []
    for one in said:
        row: dict[str, Any] = {"tokens": []}
        for prompt, response in one.turns:
            before, count = row["tokens"], max(row.get("turn", ()), default=-1) + 1
            if not before or list(prompt.tokens[: len(before)]) != before:
                count = 0
                row = {"id": prompt.id, "domain": prompt.domain, "tokens": [], "turn": []}
                rows.append(row)
            new = prompt.tokens[len(row["tokens"]) :]
            row["turn"] = [*row["turn"], *[-1] * len(new), *[count] * len(response.tokens)]
            row["tokens"] = _read((prompt, response))
            row |= {"law": law, "finished": response.finished}
    if not rows:
        raise no_answer("train")
    return rows


def no_answer(split: str) -> DataError:
    """That no prompt of a split was answered."""
    return DataError(
        found=f"no prompt of the split {split!r} was answered",
        expected="at least one",
        todo="see to the server, lower generate.engine.max_failures, and run dvc repro",
    )


def paired(
    said: Mapping[str, Sequence[Said]],
) -> tuple[dict[str, list[Prompt]], dict[str, list[Response]], dict[str, int]]:
    """Prompts and responses of the turns that all splits have, and how many each loses thereby.

    The laws are compared by prompt, and a conversation may be longer under one than another.
    """
    named = {
        split: {prompt.id: (prompt, response) for one in some for prompt, response in one.turns}
        for split, some in said.items()
    }
    common = set.intersection(*(set(turns) for turns in named.values()))
    if not common:
        raise no_answer("heldout")
    kept = {s: [turn for name, turn in t.items() if name in common] for s, t in named.items()}
    prompts = {split: [prompt for prompt, _ in turns] for split, turns in kept.items()}
    responses = {split: [response for _, response in turns] for split, turns in kept.items()}
    return prompts, responses, {s: len(t) - len(common) for s, t in named.items()}


def failures(said: Mapping[str, Sequence[Said]], *, alone: str) -> dict[str, list[str]]:
    """Turns without an answer by split; those of all splits but `alone` are left out together."""
    found = {
        split: {one.failed for one in some if one.failed is not None}
        for split, some in said.items()
    }
    together = set().union(*(names for split, names in found.items() if split != alone))
    return {s: sorted(names if s == alone else together) for s, names in found.items()}


def counts(said: Sequence[Said], *, unpaired: int = 0) -> dict[str, Any]:
    """Metrics of a split: conversations, turns, those read otherwise, what is dropped."""
    dropped: Counter[str] = Counter()
    for one in said:
        if one.ended is not None:
            dropped[one.ended] += one.dropped
        dropped[TOOL] += one.talk.behind_tools
    dropped[UNPAIRED] += unpaired
    return {
        "conversations": sum(bool(one.turns) for one in said),
        "turns": sum(len(one.turns) for one in said) - unpaired,
        "retokenised": sum(one.retokenised for one in said),
        "rewritten": sum(one.rewritten for one in said),
        "dropped": {why: number for why, number in sorted(dropped.items()) if number},
    }
