"""The public layouts as distributed, and what of them is refused with file and line."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.jsonl import Line
from pipeline.layouts import detect, read_conversations, read_prompts, read_rows
from storage.errors import DataError

USER, REPLY = (
    {"role": "user", "content": "How tall is it?"},
    {"role": "assistant", "content": "9 m"},
)
HUMAN, GPT = {"from": "human", "value": "How tall is it?"}, {"from": "gpt", "value": "9 m"}
CALL = {"id": "c1", "type": "function", "function": {"name": "height", "arguments": '{"of": "it"}'}}
# one row of each layout, with every field that its distribution has
ROWS: dict[str, dict[str, Any]] = {
    "mt_bench": {
        "question_id": 81,
        "category": "writing",
        "turns": ["Describe a lighthouse.", "Now in one line."],
        "reference": ["white", "tall"],
    },
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    },
    "gsm8k": {"question": "Two and two apples?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "messages": {"messages": [USER, REPLY]},
    "sharegpt": {"id": "QWJh_0", "conversations": [HUMAN, GPT, HUMAN, GPT]},
    "ultrachat": {"id": "0", "data": ["How tall is it?", "9 m", "And wide?", "2 m"]},
    "plain": {"prompt": "How tall is it?", "response": "9 m", "domain": "facts"},
}
ULTRACHAT_200K = {
    "prompt": "How tall is it?",
    "prompt_id": "f0e3",
    "messages": [USER, REPLY, USER, REPLY],
}
INFINITY = {
    "id": 7,
    "conversations": [HUMAN, GPT],
    "label": {"ability_en": ["logic"], "ability_zh": ["x"], "cate_ability_en": ["reasoning"]},
    "langdetect": "en",
    "source": "Subjective",
}


def lines(path: Path, *rows: Any) -> Path:
    data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_is_found_by_its_first_row(layout: str, tmp_path: Path) -> None:
    assert detect(Line(tmp_path, 1, ROWS[layout])) == layout


@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_gives_evaluation_prompts(layout: str, tmp_path: Path) -> None:
    (prompt,) = read_prompts(lines(tmp_path / "question.jsonl", ROWS[layout]))
    assert prompt.messages == ({"role": "user", "content": prompt.text},)
    assert prompt.category == {
        "mt_bench": "writing",
        "humaneval": "code",
        "gsm8k": "maths",
        "plain": "facts",
    }.get(layout, "all")


def test_a_prompt_of_several_turns_is_its_first_and_keeps_the_others(tmp_path: Path) -> None:
    (prompt,) = read_prompts(lines(tmp_path / "question.jsonl", ROWS["mt_bench"]))
    assert (prompt.id, prompt.text) == ("81", "Describe a lighthouse.")
    assert prompt.later == ("Now in one line.",)
    (chat,) = read_prompts(lines(tmp_path / "chat.jsonl", ULTRACHAT_200K))
    assert (chat.id, chat.messages, chat.later) == ("f0e3", (USER,), (USER["content"],))


def test_the_hubs_copy_of_mt_bench_reads_as_the_original(tmp_path: Path) -> None:
    hub = {"category": "writing", "prompt": ROWS["mt_bench"]["turns"], "prompt_id": 81}
    (copy,) = read_prompts(lines(tmp_path / "hub.jsonl", hub))
    (original,) = read_prompts(lines(tmp_path / "question.jsonl", ROWS["mt_bench"]))
    assert copy == original


def test_spec_bench_counts_the_categories_of_mt_bench_as_one_task(tmp_path: Path) -> None:
    rows = [{"question_id": i, "category": c, "turns": ["Say it."]}
            for i, c in enumerate(("writing", "stem", "rag"))]  # fmt: skip
    path = lines(tmp_path / "question.jsonl", *rows)
    assert [p.category for p in read_prompts(path, "spec_bench")] == ["mt_bench", "mt_bench", "rag"]
    assert [p.category for p in read_prompts(path)] == ["writing", "stem", "rag"]


def test_humaneval_reads_packed_as_distributed(tmp_path: Path) -> None:
    (prompt,) = read_prompts(lines(tmp_path / "HumanEval.jsonl.gz", ROWS["humaneval"]))
    assert (prompt.id, prompt.text) == ("HumanEval/0", ROWS["humaneval"]["prompt"])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["sharegpt.json", "sharegpt.json.gz"])
def test_sharegpt_reads_as_one_array(indent: int | None, name: str, tmp_path: Path) -> None:
    rows = [{**ROWS["sharegpt"], "id": f"a_{i}"} for i in range(3)]
    path = tmp_path / name
    data = json.dumps(rows, indent=indent).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = read_conversations(path)
    assert [row.id for row in found.rows] == ["a_0", "a_1", "a_2"]
    assert found.rows[0].messages == (USER, REPLY, USER, REPLY)
    if indent:
        start = data.decode().splitlines().index("  {", 5) + 1
        assert found.rows[1].place == f"{path}, line {start}"


def test_rows_that_share_a_line_or_an_id_are_told_apart(tmp_path: Path) -> None:
    bare = {"conversations": [HUMAN, GPT]}
    rows = [bare, bare, {**bare, "id": "x"}, {**bare, "id": "x@5"}, {**bare, "id": "x"}]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    found = [row.id for row in read_conversations(tmp_path / "s.json").rows]
    assert found == ["s-1", "s-2", "x", "x@5", "x@5@5"]


def test_infinity_instruct_keeps_its_language_and_its_ability(tmp_path: Path) -> None:
    (row,) = read_conversations(lines(tmp_path / "infinity.jsonl", INFINITY)).rows
    assert (row.id, row.language, row.domain) == ("7", "en", "reasoning")


@pytest.mark.parametrize("row", [ULTRACHAT_200K, INFINITY, ROWS["gsm8k"]])
def test_parquet_reads_as_json_lines_do(row: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (packed,) = read_rows(tmp_path / "a.parquet").rows
    (plain,) = read_rows(lines(tmp_path / "a.jsonl", row)).rows
    assert packed.place.endswith("a.parquet, row 1")
    assert {**vars(packed), "place": ""} == {**vars(plain), "place": ""}


def test_what_a_scrape_holds_and_nobody_can_use_is_counted(tmp_path: Path) -> None:
    talks = [[], [GPT, HUMAN, GPT], [HUMAN, {"from": "gpt", "value": " "}], [HUMAN, HUMAN], [HUMAN]]
    rows = [{"id": "same", "conversations": talk} for talk in [*talks, [HUMAN, GPT]]]
    found = read_conversations(lines(tmp_path / "s.jsonl", *rows))
    assert found.unfit == Counter(
        {
            "no turn": 1,
            "a reply before the first question": 1,
            "a blank turn": 1,
            "two turns of one speaker in a row": 1,
        }
    )
    assert [row.id for row in found.rows] == ["same", "same@6"]


def test_tool_calls_are_objects_and_parts_are_text(tmp_path: Path) -> None:
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("How ", "tall?")]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "assistant", "content": "9 m", "reasoning_content": "hm"},
    ]  # fmt: skip
    schema = {"type": "function", "function": {"name": "height", "parameters": {}}}
    rows = [{"messages": talk, "tools": tools, "id": i}
            for i, tools in enumerate(([schema], json.dumps([schema]), None, ""))]  # fmt: skip
    found = read_conversations(lines(tmp_path / "t.jsonl", *rows)).rows
    function = {"name": "height", "arguments": {"of": "it"}}
    assert found[0].messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How tall?"},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": function}]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "assistant", "content": "9 m", "reasoning_content": "hm"},
    )
    assert [len(row.tools) for row in found] == [1, 1, 0, 0]


def test_a_byte_order_mark_and_empty_lines_are_no_rows(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b"", b"  ", ROWS["plain"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(path).rows[0].id == "a-3"


SECOND = r"\.jsonl, line 2 "
MEND = "; mend or remove the line"
TEXT = "expected text that is not blank" + MEND
# (layout whose good row stands on line 1, the bad row of line 2, the sentence)
MALFORMED: list[tuple[str, Any, str]] = [
    ("plain", b'{"prompt": "\xff"}', "is not UTF-8 at byte 12; expected UTF-8 text" + MEND),
    ("plain", b'{"prompt": "a"', r"is not JSON \(.*\); expected one JSON object a line" + MEND),
    ("plain", b'{"prompt": "a"} {"prompt": "b"}', r"is not JSON \(Extra data\); expected one"),
    ("plain", b"[" * 100_000, r"is not JSON \(.*recursion.*\)"),
    ("plain", b'{"prompt": ' + b"9" * 5000 + b"}", r"is not JSON \(Exceeds the limit"),
    ("plain", [1], "holds a list; expected one JSON object a line" + MEND),
    ("plain", "prompt", "holds a str; expected one JSON object a line"),
    ("plain", None, "holds a NoneType; expected one JSON object a line"),
    ("plain", {"q": "x"}, r'has neither prompt nor text; expected \{"prompt": …\} or'),
    ("plain", {"prompt": "a", "text": "b"}, "has both prompt and text; expected"),
    ("plain", {"prompt": " "}, "has prompt ' '; " + TEXT),
    ("plain", {"prompt": ["a"]}, r"has prompt \['a'\]; " + TEXT),
    ("plain", b'{"prompt": "a \\ud800"}', "has prompt with half a surrogate pair at character 2;"),
    ("plain", {"prompt": "a", "response": 4}, "has response 4; " + TEXT),
    ("plain", {"prompt": "a", "language": 4}, "has language 4; " + TEXT),
    ("plain", {"prompt": "a", "id": True}, "has id True; " + TEXT),
    ("plain", {"prompt": "a", "id": "bad-1"}, "repeats the id 'bad-1'; expected ids of their own"),
    ("plain", {"messages": [USER]}, "has neither prompt nor text"),
    ("messages", {"text": "a"}, "has no messages; expected a list of messages" + MEND),
    ("messages", {"messages": None}, "has no messages; expected a list of messages"),
    ("messages", {"messages": []}, r"has messages \[\]; expected a list of messages, at least one"),
    ("messages", {"messages": "a"}, "has messages 'a'; expected a list of messages, at least one"),
    ("messages", {"messages": ["a"]}, r"has messages\[0\] 'a'; expected an object with role and"),
    ("messages", {"messages": [{"content": "a"}]}, r"has messages\[0\]\.role None; expected one o"),
    ("messages", {"messages": [{"role": "human", "content": "a"}]},
     r"has messages\[0\]\.role 'human'; expected one of system, user, assistant, tool"),
    ("messages", {"messages": [{"role": ["user"], "content": "a"}]}, r"has .*role \['user'\]; "),
    ("messages", {"messages": [{"role": "user"}]}, r"has no messages\[0\]\.content; expected text"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": None}]},
     r"has messages\[1\]\.content None; " + TEXT),
    ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]},
     r"has messages\[1\]\.content ''; " + TEXT),
    ("messages", {"messages": [USER, {"role": "assistant", "content": {"text": "a"}}]},
     r"has messages\[1\]\.content \{'text': 'a'\}; " + TEXT),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     r"has messages\[0\]\.content\[0\] of type 'image_url'; expected parts of type text"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     r"has messages\[0\]\.content\[0\]\.text None; " + TEXT),
    ("messages", {"messages": [{**REPLY, "reasoning_content": 1}, USER]},
     r"has messages\[0\]\.reasoning_content 1; expected text"),
    ("messages", {"messages": [{**USER, "tool_calls": [CALL]}]},
     r"has messages\[0\]\.tool_calls of the user; expected tool calls of the assistant"),
    ("messages", {"messages": [USER, {**REPLY, "tool_calls": "f"}]},
     r"has messages\[1\]\.tool_calls 'f'; expected a list of calls"),
    ("messages", {"messages": [USER, {**REPLY, "tool_calls": [{"name": "f"}]}]},
     r"has messages\[1\]\.tool_calls\[0\] \{'name': 'f'\}; expected \{\"function\""),
    ("messages", {"messages": [USER, {**REPLY, "tool_calls": [
        {"function": {"name": "f", "arguments": "{of"}}]}]},
     r"has messages\[1\]\.tool_calls\[0\]\.function\.arguments '\{of'; expected an object, or its"),
    ("messages", {"messages": [USER], "tools": "nope"}, "has tools 'nope'; expected a list of JSO"),
    ("messages", {"messages": [USER], "tools": ["f"]}, r"has tools \['f'\]; expected a list of JS"),
    ("messages", {"messages": [{"role": "system", "content": "a"}]}, "has no user turn; expected "),
    ("sharegpt", {"conversation": [HUMAN]}, "has no conversations; expected a list of turns"),
    ("sharegpt", {"conversations": {"from": "human"}}, "has conversations .*; expected a list of "),
    ("sharegpt", {"conversations": [USER]}, r"has conversations\[0\] .*; expected an object with "),
    ("sharegpt", {"conversations": [{"from": "narrator", "value": "a"}]},
     r"has conversations\[0\]\.from 'narrator'; expected one of human, user, gpt"),
    ("sharegpt", {"conversations": [{"from": "human", "value": 3}]},
     r"has conversations\[0\]\.value 3; expected text"),
    ("sharegpt", {"conversations": [{"from": "system", "value": "a"}]}, "has no user turn"),
    ("ultrachat", {"data": "a"}, "has data 'a'; expected a list of texts, user and assistant"),
    ("ultrachat", {"data": ["a", 2]}, r"has data\[1\] 2; " + TEXT),
    ("ultrachat", {"data": ["a", ""]}, r"has data\[1\] ''; " + TEXT),
    ("mt_bench", {"question_id": 82, "category": "x"}, "has no prompt; expected a list of user tu"),
    ("mt_bench", {"question_id": 82, "category": "x", "turns": []}, r"has turns \[\]; expected a "),
    ("mt_bench", {"question_id": 82, "category": "x", "turns": "a"}, "has turns 'a'; expected a l"),
    ("mt_bench", {"question_id": 82, "category": "x", "turns": [None]}, r"has turns\[0\] None"),
    ("mt_bench", {"question_id": 82, "turns": ["a"]}, "has no category; expected question_id, cat"),
    ("mt_bench", {"question_id": 81, "category": "x", "turns": ["a"]}, "repeats the id '81'"),
    ("mt_bench", {"question_id": [1], "category": "x", "turns": ["a"]}, r"has question_id \[1\]; "),
    ("humaneval", {"prompt": "a"}, "has no task_id; " + TEXT),
    ("humaneval", {"task_id": "HumanEval/1"}, "has no prompt; " + TEXT),
    ("gsm8k", {"question": "a"}, "has no answer; " + TEXT),
    ("gsm8k", {"question": "", "answer": "4"}, "has question ''; " + TEXT),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "row", "sentence"), MALFORMED)
def test_a_malformed_row_is_named_by_file_and_line(
    layout: str, row: Any, sentence: str, tmp_path: Path
) -> None:
    good = json.dumps(ROWS[layout]).encode()
    path = lines(tmp_path / "bad.jsonl", good, row)
    with pytest.raises(DataError, match=SECOND + sentence):
        read_rows(path)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'[\n{"prompt": "a"},\n{"prompt": }\n]', r"line 3 is not JSON \(.*\); expected one array"),
        (
            b'[\n{"prompt": "a"}\n{"prompt": "b"}]',
            "line 3 belongs to an array that has '{' after a",
        ),
        (b'[\n{"prompt": "a"},\n', r"line 3 is not JSON \(Expecting value\)"),
        (b'[\n{"prompt": "a"}\n', "line 3 belongs to an array that is not closed"),
        (b'[{"prompt": "a"}]\n\n[]', "line 3 goes on after the array's end; expected one array of"),
        (b'[\n{"prompt": "a"},\n7]', "line 3 holds a int; expected one JSON object a line"),
        (b'[\n{"prompt": "a"},\n{"prompt": "\xff"}]', "line 3 is not UTF-8 at byte 12"),
        (b'{"a": 1, "b": 2}\n', "line 1 has a, b and neither prompt nor text, in no layout that"),
        (b"{}\n", "line 1 has no field and neither prompt nor text"),
        (
            gzip.compress(b'{"prompt": "a"}\n' * 999, mtime=0)[:-9],
            r"line \d+ cannot be read: its gzip stre",
        ),
        (b"\x1f\x8b\x09 no gzip", "line 1 cannot be read: its gzip stream is damaged"),
        (b"PAR1 no parquet", r"row 1 cannot be read as parquet \(.*\); expected a whole parquet"),
        (b"[]", "is empty; expected at least one row; correct prepare.source"),
        (b"", "is empty; expected at least one row; correct prepare.source"),
    ],
)
def test_a_malformed_file_is_named_by_its_line(data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"bad\.json,? {sentence}"):
        read_rows(tmp_path / "bad.json")


def test_an_evaluation_set_takes_no_document_and_no_unfit_row(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", {"text": "a document"})
    with pytest.raises(
        DataError, match=r"d\.jsonl, line 1 is a document \(text\); expected a prom"
    ):
        read_prompts(path)
    path = lines(tmp_path / "s.jsonl", ROWS["sharegpt"], {"conversations": []})
    with pytest.raises(
        DataError, match=r"s\.jsonl, line 2 has no turn; expected a conversation th"
    ):
        read_prompts(path)
    with pytest.raises(
        DataError, match=r"none\.jsonl; .*that evaluate\.prompt_sets names; correct"
    ):
        read_prompts(tmp_path / "none.jsonl")


def test_training_on_conversations_takes_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"g\.jsonl, line 1 is no conversation; expected rows with"):
        read_conversations(lines(tmp_path / "g.jsonl", ROWS["gsm8k"]))
