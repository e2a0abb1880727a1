"""Conversations through the tokenizer's own chat template: prompts, and what the assistant wrote.

    tokens  = prompt_tokens(tokenizer, messages, tools=tools, name=id)
    records = speak(tokenizer, messages, tools=tools, eos_ids=eos_ids, name=id)

`speak` finds each reply by incremental rendering: what the template adds between the prompt of
reply i (with its generation prompt) and the conversation up to reply i. Within that, a template
with `{% generation %}` tags says itself which tokens the assistant wrote; without them all of it
counts, up to and with the last end-of-sequence token. An empty think block that the template puts
before a reply is nobody's writing. Whatever does not add up is refused: a template that changes
earlier text as the conversation grows gives wrong tokens at every later position.

A template that writes an earlier reply otherwise once more follows (without its thinking) gives one
record a reply, each with the text that the target would see when it writes that one.

A template may ask for the date: it is told one day, so that equal work gives equal bytes. The
tokenizer comes in as an object; neither torch nor transformers is imported here.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from storage.errors import DataError, TargetError

Message = Mapping[str, Any]
DAY = datetime(2024, 7, 26, tzinfo=UTC)  # what Llama 3's template takes where no clock is given
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
OPEN_THINK = re.compile(r"<think>\s*\Z")
SHOWN = 60


@dataclass(frozen=True)
class Spoken:
    """A conversation as tokens."""

    tokens: list[int]
    turn: list[int]
    """The assistant's reply, from 0, that a token belongs to; -1 outside."""


@dataclass(frozen=True)
class _Reply:
    """Characters start ... end of `text`, a rendering that ends with the reply."""

    text: str
    start: int
    end: int
    count: int
    """Messages up to and with the reply."""


def asks_of(row: Mapping[str, Any]) -> tuple[list[tuple[Message, ...]], int]:
    """The messages before each reply, and how many user turns stand behind a tool's answer.

    The data's own replies are left out. A tool's answer belongs to the data's own call, so that
    nothing behind it can be asked of a target that may have called otherwise.
    """
    messages = list(row.get("messages") or [{"role": "user", "content": row["text"]}])
    asks: list[tuple[Message, ...]] = []
    pending: list[Message] = []
    for place, message in enumerate(messages):
        if message["role"] == "tool":
            return asks, sum(m["role"] == "user" for m in messages[place:])
        if message["role"] != "assistant":
            pending.append(message)
        elif any(m["role"] == "user" for m in pending):
            asks.append(tuple(pending))
            pending = []
    if any(m["role"] == "user" for m in pending):
        asks.append(tuple(pending))
    return asks, 0


def turn_name(name: str, turn: int) -> str:
    """The name of a conversation's turn, from 0: the first has the conversation's own."""
    return f"{name}#{turn}" if turn else name


def talk_name(name: str, names: Collection[str]) -> str:
    """The conversation that a turn is of; itself where `names` do not hold its first turn."""
    talk, mark, turn = name.rpartition("#")
    return talk if mark and turn.isdecimal() and talk in names else name


def has_template(tokenizer: Any) -> bool:
    """Whether the target is a chat model."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Any] = (), name: str
) -> list[int]:
    """What the target reads before it writes the next reply."""
    text = render(tokenizer, messages, tools=tools, name=name, ask=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def speak(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    eos_ids: Sequence[int],
    name: str,
) -> list[Spoken]:
    """One record of the whole conversation; one a reply where the template rewrites earlier ones.

    Messages after the last reply are left out. `DataError` names the conversation and what the
    template does; a conversation without a reply is the caller's to refuse.
    """
    at = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    messages = messages[: at[-1] + 1]
    replies = [_reply(tokenizer, messages, i, tools=tools, name=name) for i in at]
    whole = render(tokenizer, messages, tools=tools, name=name)
    if whole != replies[-1].text:
        raise _refusal(
            name, "gives another text when it is asked again", "the same text every time"
        )
    if all(whole.startswith(reply.text) for reply in replies):
        return [_record(tokenizer, messages, whole, replies, tools, eos_ids, name)]
    return [
        _record(tokenizer, messages[: r.count], r.text, [r], tools, eos_ids, name) for r in replies
    ]


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    name: str,
    ask: bool = False,
) -> str:
    """The template's text; `ask` adds what stands before the next reply."""
    return str(_apply(tokenizer, messages, tools, name, tokenize=False, add_generation_prompt=ask))


def _apply(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], name: str, **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) or None,
            strftime_now=DAY.strftime,
            **options,
        )
    except Exception as error:  # a template raises what it likes: jinja2's, TypeError, KeyError
        raise _refusal(
            name,
            f"cannot be applied ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            "roles and fields that it takes",
        ) from None


def _refusal(name: str, found: str, expected: str) -> DataError:
    return DataError(
        found=f"conversation {name!r}: the target's chat template {found}",
        expected=expected,
        todo="remove such conversations from prepare.source, let the target answer "
        "(generate.train_responses: target), or choose a target with another template",
    )


def _reply(
    tokenizer: Any, messages: Sequence[Message], at: int, *, tools: Sequence[Any], name: str
) -> _Reply:
    """Where the message `at` stands in the rendering that ends with it."""
    if at == 0:
        raise _refusal(name, "is asked for a reply to nothing", "a reply after a user's turn")
    before = render(tokenizer, messages[:at], tools=tools, name=name, ask=True)
    after = render(tokenizer, messages[: at + 1], tools=tools, name=name)
    if not after.startswith(before):
        shared = min(len(before), len(after))
        place = next((i for i in range(shared) if before[i] != after[i]), shared)
        raise _refusal(
            name,
            f"changes its text before message {at} once that reply stands: "
            f"{before[place : place + SHOWN]!r} becomes {after[place : place + SHOWN]!r}",
            "the prompt of a reply to stay as the target saw it (thinking that is dropped from the "
            "reply, or a text that depends on what follows, breaks it)",
        )
    said = str(messages[at - 1]["content"]).strip()
    if not before or (messages[at - 1]["role"] == "user" and said not in before):
        raise _refusal(
            name,
            f"does not write message {at - 1} before it asks for the reply",
            "a prompt that ends with what the reply answers",
        )
    end = len(after)
    # a prompt may open the block that the reply closes at once
    opened = OPEN_THINK.search(before)
    empty = EMPTY_THINK.match(after, opened.start() if opened else len(before), end)
    return _Reply(after, empty.end() if empty else len(before), end, at + 1)


def _record(
    tokenizer: Any,
    messages: Sequence[Message],
    text: str,
    replies: Sequence[_Reply],
    tools: Sequence[Any],
    eos_ids: Sequence[int],
    name: str,
) -> Spoken:
    encoded = _encoded(tokenizer, text)
    tokens, ends = list(encoded["input_ids"]), _ends(encoded["offset_mapping"])
    tagged = None
    # of several templates by name, one is for tools
    if GENERATION.search(str(tokenizer.get_chat_template(tools=list(tools) or None))):
        tagged = _tagged(tokenizer, messages, tools, name, tokens)
    turn = [-1] * len(tokens)
    number = 0
    for reply in replies:
        first = _boundary(tokenizer, text, tokens, ends, reply.start)
        last = _last(text, tokens, ends, reply, eos_ids)
        mine = [k for k in range(first, last) if tagged is None or tagged[k]]
        if mine and mine[-1] == last - 2 and tokens[last - 1] in eos_ids:
            mine.append(last - 1)  # tags may end before it, but the target writes it
        before = mine[0] - 1 if mine else 0
        for k in mine:
            number += k != before + 1  # the tags left something out within the reply
            turn[k], before = number, k
        number += bool(mine)
    _require_both(turn, name)
    return Spoken(tokens, turn)


def _encoded(tokenizer: Any, text: str) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        raise TargetError(
            found=f"the target's tokenizer is a {type(tokenizer).__name__}, which has no offsets",
            expected="a tokenizer of the tokenizers library (tokenizer.json)",
            todo="convert it, or let the target answer (generate.train_responses: target)",
        )
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)


def _tagged(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], name: str, tokens: list[int]
) -> list[bool]:
    """What the template's own tags say of every token; all of them, or none, is no answer."""
    made = _apply(
        tokenizer,
        messages,
        tools,
        name,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    if list(made["input_ids"]) != tokens:
        raise _refusal(
            name, "gives another text when it is asked again", "the same text every time"
        )
    mask = [bool(flag) for flag in made["assistant_masks"]]
    if not any(mask) or all(mask):
        share = "all" if any(mask) else "none"
        raise _refusal(
            name,
            f"marks {share} of {len(mask)} tokens as the assistant's by its generation tags",
            "the replies and nothing else",
        )
    return mask


def _require_both(turn: Sequence[int], name: str) -> None:
    """`DataError` for a mask that is empty or full: neither can be right."""
    written = sum(k >= 0 for k in turn)
    if written in (0, len(turn)):
        share = "all" if written else "none"
        raise _refusal(
            name,
            f"makes {share} of {len(turn)} tokens the assistant's",
            "a prompt, and a reply to it that is not empty",
        )


def _ends(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The character after each token; never falling, since a token of no character has none."""
    ends, furthest = [], 0
    for _, end in offsets:
        furthest = max(furthest, end)
        ends.append(furthest)
    return ends


def _boundary(
    tokenizer: Any, text: str, tokens: Sequence[int], ends: Sequence[int], start: int
) -> int:
    """The first token that is wholly behind `start`, as the target counts when it is asked.

    A token across the boundary belongs to the prompt. Some tokenizers leave white space out of
    their offsets: where those do not meet `start`, the prompt's own tokens decide.
    """
    k = bisect_right(ends, start)
    if k == 0 or ends[k - 1] == start:
        return k
    alone = list(tokenizer(text[:start], add_special_tokens=False)["input_ids"])
    return k if alone == list(tokens[:k]) else k + 1


def _last(
    text: str, tokens: Sequence[int], ends: Sequence[int], reply: _Reply, eos_ids: Sequence[int]
) -> int:
    """The token after the reply: after its last end-of-sequence token, else after its last text."""
    begin, stop = bisect_right(ends, reply.start), bisect_right(ends, reply.end)
    for k in reversed(range(begin, stop)):
        if tokens[k] in eos_ids:
            return k + 1
    end = reply.start + len(text[reply.start : reply.end].rstrip())
    return min(bisect_left(ends, end) + 1, len(ends))
