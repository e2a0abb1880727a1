"""The public layouts of prompts and conversations, read as they are distributed.

| layout | a row is |
| --- | --- |
| `plain` | `prompt` (used as it is) or `text` (a document); optionally `response` |
| `messages` | OpenAI `messages`, optionally `tools`; UltraChat 200k adds `prompt_id` |
| `sharegpt` | `conversations` of `from`, `value`; Infinity-Instruct: `label`, `langdetect` |
| `ultrachat` | `data`: texts of user and assistant in turn |
| `mt_bench` | `question_id`, `category`, `turns` (or a list `prompt`, as the hub's copy has it) |
| `spec_bench` | the same; MT-Bench's eight categories are one domain, as in its own report |
| `humaneval` | `task_id`, `prompt`, `canonical_solution` |
| `gsm8k` | `question`, `answer` |

`auto` decides by the first row. Further fields are left alone; `id`, `domain` and `language` are
read in all. Unknown shapes are errors, named by file and line. ShareGPT is a scrape with rows that
no one can use (empty, a blank turn, a reply without a question): those are left out and counted.

A prompt of several turns (MT-Bench) is its **first turn**, as vLLM's own benchmark and DeepSpec
take it; EAGLE and Spec-Bench go on with the target's own reply, so compare no τ across the two. The
further turns are kept in `later`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pipeline.jsonl import Line, read_lines, shown
from storage.errors import DataError

Layout = Literal[
    "auto",
    "plain",
    "messages",
    "sharegpt",
    "ultrachat",
    "mt_bench",
    "spec_bench",
    "humaneval",
    "gsm8k",
]
Message = dict[str, Any]
"""`role`, `content`, and where they stand `reasoning_content`, `tool_calls`, `name`, …"""
ROLES = ("system", "user", "assistant", "tool")
# what else of a message a chat template may read; the rest is somebody's bookkeeping
KEPT = ("reasoning_content", "thinking", "name", "tool_call_id")
FROM = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
MT_BENCH = frozenset(
    {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
)
SCRAPED = frozenset({"sharegpt"})  # rows that cannot be used are counted, repeated ids told apart


@dataclass(frozen=True)
class Row:
    """One row: a document, a prompt, or a conversation."""

    id: str
    domain: str
    text: str
    """The document or prompt; of a conversation its user turns."""
    is_prompt: bool
    response: str | None = None
    messages: tuple[Message, ...] = ()
    """Of a conversation; empty otherwise."""
    tools: tuple[dict[str, Any], ...] = ()
    language: str | None = None
    later: tuple[str, ...] = ()
    """User turns after the first of a prompt of several turns."""
    place: str = ""
    """`<file>, line <n>`"""


@dataclass(frozen=True)
class Rows:
    """What a file holds, and what of it cannot be used: reason -> rows."""

    rows: list[Row]
    unfit: Counter[str]


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt of an evaluation set."""

    id: str
    category: str
    text: str
    """The first user turn."""
    messages: tuple[Message, ...]
    """What a chat template renders: up to and with the first user turn."""
    later: tuple[str, ...] = ()
    """Further user turns, for whoever goes on with the target's own replies."""


class Unfit(Exception):
    """A row of a scrape that has the layout and cannot be used; the reason is its only argument."""


def read_prompts(
    path: Path, layout: Layout = "auto", *, parameter: str = "evaluate.prompt_sets"
) -> list[EvalPrompt]:
    """The prompts of an evaluation set, in the file's order; a document or an unfit row is refused.

    `parameter` is what names the file in `params.yaml`.
    """
    found = read_rows(path, layout, parameter=parameter, strict=True).rows
    prompts = []
    for row in found:
        if not row.is_prompt:
            raise DataError(
                found=f"{row.place} is a document (text)",
                expected="a prompt, a question or a conversation",
                todo="name its beginning `prompt`, or take it for prepare.source",
            )
        if not row.messages:
            messages: tuple[Message, ...] = ({"role": "user", "content": row.text},)
            prompts.append(EvalPrompt(row.id, row.domain, row.text, messages, row.later))
            continue
        first = next(i for i, m in enumerate(row.messages) if m["role"] == "user")
        later = [str(m["content"]) for m in row.messages[first + 1 :] if m["role"] == "user"]
        text = str(row.messages[first]["content"])
        messages = row.messages[: first + 1]
        prompts.append(EvalPrompt(row.id, row.domain, text, messages, tuple(later)))
    return prompts


def read_conversations(
    path: Path, layout: Layout = "auto", *, parameter: str = "prepare.source"
) -> Rows:
    """The conversations of a training file; a row of any other layout is refused."""
    found = read_rows(path, layout, parameter=parameter)
    for row in found.rows:
        if not row.messages:
            raise DataError(
                found=f"{row.place} is no conversation",
                expected="rows with messages, conversations or data",
                todo="take the file as prompts, or name another",
            )
    return found


def read_rows(
    path: Path, layout: Layout = "auto", *, parameter: str = "prepare.source", strict: bool = False
) -> Rows:
    """All rows of a file; `strict` refuses what a scrape may hold, too."""
    return parse_rows(read_lines(path, parameter=parameter), layout, strict=strict)


def parse_rows(lines: Iterable[Line], layout: Layout, *, strict: bool = False) -> Rows:
    """All rows, wherever they come from; ids are their own."""
    rows: dict[str, Row] = {}
    unfit: Counter[str] = Counter()
    for line in lines:
        if layout == "auto":
            layout = detect(line)
        try:
            row = parse_row(line, layout)
        except Unfit as reason:
            if strict or layout not in SCRAPED:
                raise line.fault(f"has {reason}", "a conversation that can be used") from None
            unfit[str(reason)] += 1
            continue
        while row.id in rows:
            if layout not in SCRAPED and "prompt_id" not in line.value:
                raise line.fault(f"repeats the id {row.id!r}", "ids of their own")
            row = replace(row, id=f"{row.id}@{line.key}")
        rows[row.id] = row
    return Rows(list(rows.values()), unfit)


def detect(line: Line) -> Layout:
    """The layout of a row by its fields; `DataError` names them where it is none."""
    has = line.value.__contains__
    if has("messages"):
        return "messages"
    if has("conversations"):
        return "sharegpt"
    if has("turns") or (isinstance(line.value.get("prompt"), list) and has("category")):
        return "mt_bench"
    if has("task_id") and has("prompt"):
        return "humaneval"
    if has("question") and has("answer"):
        return "gsm8k"
    if has("data") and isinstance(line.value["data"], list):
        return "ultrachat"
    if has("prompt") or has("text"):
        return "plain"
    fields = ", ".join(map(str, list(line.value)[:8])) or "no field"
    raise line.fault(
        f"has {fields} and neither prompt nor text, in no layout that is known",
        "prompt or text; messages; conversations; data; turns; question and answer; or "
        "task_id and prompt",
    )


def parse_row(line: Line, layout: Layout) -> Row:
    """One row of a layout; `DataError` where it has another shape, `Unfit` where a scrape may."""
    row = PARSERS[layout](line)
    language = line.text("language") or line.text("lang") or line.text("langdetect")
    return replace(row, language=language, place=f"{line.path}, {line.unit} {line.number}")


def _id(line: Line, *names: str) -> str:
    for name in names:
        label = line.label(name)
        if label is not None:
            return label
    return f"{line.path.name.split('.')[0]}-{line.key}"


def _plain(line: Line) -> Row:
    prompt, text = line.text("prompt"), line.text("text")
    if (prompt is None) == (text is None):
        found = "has both prompt and text" if text else "has neither prompt nor text"
        raise line.fault(found, '{"prompt": …} or {"text": …}')
    return Row(
        id=_id(line, "id"),
        domain=line.text("domain") or "all",
        text=str(prompt or text),
        is_prompt=prompt is not None,
        response=line.text("response"),
    )


def _question(line: Line) -> Row:
    """MT-Bench: the first turn is the prompt."""
    name = "turns" if "turns" in line.value else "prompt"
    turns = _list(line, name, "a list of user turns")
    texts = [_need(line, f"{name}[{i}]", turn) for i, turn in enumerate(turns)]
    category = line.text("category")
    if category is None:
        raise line.fault("has no category", "question_id, category and turns")
    return Row(
        id=_id(line, "question_id", "prompt_id", "id"),
        domain=category,
        text=texts[0],
        is_prompt=True,
        later=tuple(texts[1:]),
    )


def _spec_bench(line: Line) -> Row:
    row = _question(line)
    return replace(row, domain="mt_bench") if row.domain in MT_BENCH else row


def _humaneval(line: Line) -> Row:
    return Row(
        id=_need(line, "task_id"),
        domain=line.text("domain") or "code",
        text=_need(line, "prompt"),
        is_prompt=True,
        response=line.text("canonical_solution"),
    )


def _gsm8k(line: Line) -> Row:
    return Row(
        id=_id(line, "id"),
        domain=line.text("domain") or "maths",
        text=_need(line, "question"),
        is_prompt=True,
        response=_need(line, "answer"),
    )


def _messages(line: Line) -> Row:
    listed = _list(line, "messages", "a list of messages")
    messages = []
    for i, value in enumerate(listed):
        where = f"messages[{i}]"
        if not isinstance(value, Mapping):
            raise line.fault(f"has {where} {shown(value)}", "an object with role and content")
        role = value.get("role")
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise line.fault(f"has {where}.role {shown(role)}", f"one of {', '.join(ROLES)}")
        messages.append(_message(line, where, str(role), value))
    return _conversation(line, messages)


def _message(line: Line, where: str, role: str, value: Mapping[str, Any]) -> Message:
    message: Message = {"role": role}
    calls = _calls(line, f"{where}.tool_calls", value.get("tool_calls"))
    if calls and role != "assistant":
        raise line.fault(f"has {where}.tool_calls of the {role}", "tool calls of the assistant")
    content = value.get("content")
    if isinstance(content, list):
        content = _parts(line, f"{where}.content", content)
    if content is None and "content" not in value and not calls:
        raise line.fault(f"has no {where}.content", "text, or tool_calls of the assistant")
    # an assistant that only calls, and a tool that returns nothing
    blank_is_well = bool(calls) or role == "tool"
    if blank_is_well and (content is None or content == ""):
        message["content"] = ""
    else:
        message["content"] = _need(line, f"{where}.content", content)
    for name in KEPT:
        if value.get(name) is not None:
            text = value[name]
            if not isinstance(text, str):
                raise line.fault(f"has {where}.{name} {shown(text)}", "text")
            message[name] = text
    if calls:
        message["tool_calls"] = calls
    return message


def _parts(line: Line, where: str, parts: Sequence[Any]) -> str:
    """OpenAI's list of content parts, joined; an image has no tokens here."""
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise line.fault(f"has {where}[{i}] of type {shown(kind)}", "parts of type text")
        texts.append(_need(line, f"{where}[{i}].text", part.get("text")))
    return "".join(texts)


def _calls(line: Line, where: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object: templates write those as JSON themselves."""
    if calls is None or calls == []:
        return []
    if not isinstance(calls, list):
        raise line.fault(f"has {where} {shown(calls)}", "a list of calls")
    found = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise line.fault(
                f"has {where}[{i}] {shown(call)}", '{"function": {"name": …, "arguments": …}}'
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                arguments = None
        if not isinstance(arguments, Mapping):
            raise line.fault(
                f"has {where}[{i}].function.arguments {shown(function.get('arguments'))}",
                "an object, or its JSON",
            )
        if line.unit == "row":  # parquet unites the fields of all rows: an absent one is null
            arguments = {key: value for key, value in arguments.items() if value is not None}
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        found.append({**made, "id": call["id"]} if isinstance(call.get("id"), str) else made)
    return found


def _sharegpt(line: Line) -> Row:
    listed = line.value.get("conversations")
    if listed == []:
        raise Unfit("no turn")
    listed = _list(line, "conversations", "a list of turns")
    messages = []
    for i, value in enumerate(listed):
        where = f"conversations[{i}]"
        if not isinstance(value, Mapping) or "from" not in value or "value" not in value:
            raise line.fault(f"has {where} {shown(value)}", "an object with from and value")
        role = FROM.get(value["from"]) if isinstance(value["from"], str) else None
        if role is None:
            known = ", ".join(FROM)
            raise line.fault(f"has {where}.from {shown(value['from'])}", f"one of {known}")
        content = value["value"]
        if not isinstance(content, str):
            raise line.fault(f"has {where}.value {shown(content)}", "text")
        if not content.strip():
            raise Unfit("a blank turn")
        messages.append({"role": role, "content": _need(line, f"{where}.value", content)})
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if spoken and spoken[0] == "assistant":
        raise Unfit("a reply before the first question")
    if any(a == b and a in ("user", "assistant") for a, b in pairwise(spoken)):
        raise Unfit("two turns of one speaker in a row")
    return _conversation(line, messages)


def _ultrachat(line: Line) -> Row:
    listed = _list(line, "data", "a list of texts, user and assistant in turn")
    return _conversation(
        line,
        [
            {"role": ("user", "assistant")[i % 2], "content": _need(line, f"data[{i}]", text)}
            for i, text in enumerate(listed)
        ],
    )


def _conversation(line: Line, messages: list[Message]) -> Row:
    users = [m["content"] for m in messages if m["role"] == "user"]
    if not users:
        raise line.fault("has no user turn", "at least one message of the user")
    tools = line.value.get("tools")
    if tools is None:
        tools = []
    if isinstance(tools, str):  # tables keep schemas of many shapes as JSON
        try:
            tools = json.loads(tools or "[]")
        except ValueError:
            raise line.fault(f"has tools {shown(tools)}", "a list of JSON schemas") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise line.fault(f"has tools {shown(tools)}", "a list of JSON schemas")
    return Row(
        id=_id(line, "id", "prompt_id"),
        domain=line.text("domain") or line.text("category") or _ability(line) or "all",
        text="\n\n".join(users),
        is_prompt=True,
        messages=tuple(messages),
        tools=tuple(tools),
    )


def _ability(line: Line) -> str | None:
    """Infinity-Instruct: the first of a row's categories of ability."""
    label = line.value.get("label")
    if not isinstance(label, Mapping):
        return None
    names = label.get("cate_ability_en")
    return str(names[0]) if isinstance(names, list) and names else None


def _list(line: Line, name: str, expected: str) -> list[Any]:
    value = line.value.get(name)
    if value is None:
        raise line.fault(f"has no {name}", expected)
    if not isinstance(value, list) or not value:
        raise line.fault(f"has {name} {shown(value)}", f"{expected}, at least one")
    return value


def _need(line: Line, name: str, value: Any = None) -> str:
    """Text that must be there, of a field of the row or of what was found under `name`."""
    nested = "[" in name
    if nested and value is None:
        raise line.fault(f"has {name} None", "text that is not blank")
    text = line.text(name, value)
    if text is None:
        raise line.fault(f"has no {name}", "text that is not blank")
    return text


PARSERS: dict[str, Callable[[Line], Row]] = {
    "plain": _plain,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "ultrachat": _ultrachat,
    "mt_bench": _question,
    "spec_bench": _spec_bench,
    "humaneval": _humaneval,
    "gsm8k": _gsm8k,
}
