"""Every user turn answered: what the target reads, what is stored, and where a talk ends."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline.chat import asks_of, prompt_tokens, talk_name, turn_name
from pipeline.sampling import Prompt, Response
from pipeline.turns import (
    Said,
    Talk,
    chains,
    converse,
    counts,
    failures,
    first_turns,
    paired,
    reply_message,
    talks_of,
)
from storage.errors import DataError
from tests.pipeline.test_chat import (
    END,
    FORGETFUL,
    SYSTEM,
    TALK,
    UNTAGGED,
    loop,
)
from tests.targets import tokenizer

START = "<|im_start|>"
FIRST, SECOND, THIRD = TALK[0], TALK[2], {"role": "user", "content": "and friends"}
ROW = {"id": "x", "domain": "d", "messages": [FIRST, TALK[1], SECOND, TALK[3], THIRD]}


@pytest.fixture
def words() -> Any:
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": [START, END]})
    made.chat_template = UNTAGGED
    return made


def first(words: Any, row: Mapping[str, Any]) -> Talk:
    asks, _ = asks_of(row)
    tokens = prompt_tokens(words, asks[0], name="x")
    (talk,) = talks_of([row], [Prompt(row["id"], row["domain"], tuple(tokens))])
    return talk


class Script:
    """An engine that says what it is given, turn by turn, and notes what it was asked."""

    def __init__(self, words: Any, *replies: Any) -> None:
        self.words, self.replies = words, replies
        self.asked: list[list[int]] = []

    def __call__(
        self, turn: int, prompts: Mapping[str, Sequence[Prompt]]
    ) -> dict[str, list[Response | None]]:
        said = self.replies[turn]
        if isinstance(said, str):
            ids = self.words(said, add_special_tokens=False)["input_ids"]
            said = Response(ids, said.endswith(END))
        self.asked += [list(p.tokens) for some in prompts.values() for p in some]
        return {split: [said] * len(some) for split, some in prompts.items()}


def carried_on(words: Any, *replies: Any, row: Any = ROW, limit: int = 500) -> tuple[Said, Script]:
    script = Script(words, *replies)
    said = converse(
        {"train": [first(words, row)]},
        script,
        tokenizer=words,
        eos_ids=[words.convert_tokens_to_ids(END), 0],
        max_prompt_tokens=limit,
    )
    return said["train"][0], script


def spoken(words: Any, row: Mapping[str, Any]) -> list[str]:
    last = max(row["turn"])
    turns = [[t for t, k in zip(row["tokens"], row["turn"], strict=True) if k == n]
             for n in range(last + 1)]  # fmt: skip
    return [words.decode(turn) for turn in turns]


REPLIES = ("old cat" + END, "seven" + END, "home" + END)


def test_every_reply_stands_behind_the_targets_own(words: Any) -> None:
    said, script = carried_on(words, *REPLIES)
    (row,) = chains([said], "T=1")
    assert spoken(words, row) == list(REPLIES)
    assert (row["id"], row["law"], row["finished"]) == ("x", "T=1", True)
    mine = [FIRST, *({"role": "assistant", "content": r.removesuffix(END)} for r in REPLIES)]
    talk = [FIRST, mine[1], SECOND, mine[2], THIRD]
    for turn in range(3):
        assert script.asked[turn] == prompt_tokens(words, talk[: 2 * turn + 1], name="x")
        assert row["tokens"][: len(script.asked[turn])] == script.asked[turn]
        assert row["turn"].index(turn) == len(script.asked[turn])
    assert row["tokens"] == [*script.asked[2], *words("home" + END)["input_ids"]]
    assert counts([said]) == {
        "conversations": 1,
        "turns": 3,
        "retokenised": 0,
        "rewritten": 0,
        "dropped": {},
    }


def test_thinking_that_a_template_drops_gives_a_sequence_a_turn(words: Any) -> None:
    words.chat_template = FORGETFUL
    thought = [f"<think>red apples</think>{reply}" for reply in REPLIES]
    said, script = carried_on(words, *thought)
    rows = chains([said], "T=1")
    assert [row["id"] for row in rows] == ["x", "x#1", "x#2"]
    assert [spoken(words, row) for row in rows] == [[reply] for reply in thought]
    assert [row["tokens"][: row["turn"].index(0)] for row in rows] == script.asked
    assert "think" not in words.decode(script.asked[2])
    assert "old cat" in words.decode(script.asked[2])
    assert (said.rewritten, said.retokenised) == (2, 0)


def test_a_reply_that_is_tokenised_otherwise_is_context_in_other_ids(words: Any) -> None:
    """The drawn ids train as they were drawn; the next turn begins a sequence of its own."""
    letters = [words.convert_tokens_to_ids(c) for c in "cat"]
    end = words.convert_tokens_to_ids(END)
    assert words("cat")["input_ids"] != letters
    said, script = carried_on(words, Response([*letters, end], True), *REPLIES[1:])
    rows = chains([said], "T=1")
    assert [row["id"] for row in rows] == ["x", "x#1"]
    assert rows[0]["tokens"] == [*script.asked[0], *letters, end]
    assert spoken(words, rows[1]) == list(REPLIES[1:])
    assert rows[1]["turn"].index(0) == len(script.asked[1])
    assert (said.rewritten, said.retokenised) == (0, 1)


def test_an_end_that_the_template_does_not_write_begins_a_new_sequence(words: Any) -> None:
    said, _ = carried_on(words, "old cat<|end|>", *REPLIES[1:])
    assert said.ended == "after a reply without an end"  # the script says when it ends
    ids = [*words("old cat")["input_ids"], 0]
    said, _ = carried_on(words, Response(ids, True), *REPLIES[1:])
    assert [row["id"] for row in chains([said], "T=1")] == ["x", "x#1"]
    assert said.rewritten == 1


STRICT = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}"
REFUSING = STRICT + "{% endfor %}" + UNTAGGED


@pytest.mark.parametrize(
    ("replies", "options", "why", "turns", "dropped"),
    [
        (("old", *REPLIES), {}, "after a reply without an end", 1, 2),
        ((REPLIES[0], END), {}, "after a reply that says nothing", 2, 1),
        ((REPLIES[0], " \n" + END), {}, "after a reply that says nothing", 2, 1),
        (REPLIES, {"limit": "one less"}, "before which the conversation is too long", 2, 1),
        (("bad" + END,), {}, "whose conversation the template refuses", 1, 2),
        ((REPLIES[0], None), {}, "after one that the server did not answer", 1, 1),
        ((None,), {}, "after one that the server did not answer", 0, 2),
    ],
)
def test_a_talk_ends_where_its_next_turn_is_not_what_serving_sees(
    words: Any, replies: Any, options: Any, why: str, turns: int, dropped: int
) -> None:
    words.chat_template = REFUSING
    if options:
        _, free = carried_on(words, *replies)
        options = {"limit": len(free.asked[2]) - 1}
        assert len(free.asked[1]) < options["limit"]
    said, _ = carried_on(words, *replies, **options)
    found = counts([said])
    assert (said.ended, found["turns"], found["dropped"]) == (why, turns, {why: dropped})
    failed = f"x#{turns}" if turns else "x"
    wanted = [failed] if replies[-1] is None else []
    assert failures({"train": [said]}, alone="train") == {"train": wanted}


def test_the_last_turn_may_end_as_it_likes(words: Any) -> None:
    said, _ = carried_on(words, REPLIES[0], REPLIES[1], "hom")
    (row,) = chains([said], "T=1")
    assert (said.dropped, row["finished"]) == (0, False)


def test_turns_behind_a_tool_are_not_asked(words: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": []}
    tool = {"role": "tool", "content": "on a mat"}
    row = {**ROW, "messages": [SYSTEM, FIRST, TALK[1], SECOND, call, tool, TALK[3], THIRD]}
    assert asks_of(row) == ([(SYSTEM, FIRST), (SECOND,)], 1)
    said, script = carried_on(words, *REPLIES, row=row)
    assert counts([said])["dropped"] == {"that need a tool's answer": 1}
    assert "be a cat" in words.decode(script.asked[1])
    none = {"id": "n", "messages": [tool, FIRST]}
    with pytest.raises(DataError, match="'n' has no user turn before a tool's answer; expected a"):
        first_turns([none])


def test_a_prompt_is_a_talk_of_one_turn(words: Any) -> None:
    row = {"id": "x", "domain": "d", "text": "the cat", "response": "sat"}
    assert asks_of(row) == ([({"role": "user", "content": "the cat"},)], 0)
    (turn,) = first_turns([row])
    assert (turn["response"], len(turn["messages"])) == (None, 1)
    # a reply to nothing is not asked for, and what is too long for a first turn is no talk
    assert asks_of({"messages": [TALK[1], FIRST]}) == ([(FIRST,)], 0)
    assert talks_of([row], []) == []


def test_ids_that_would_name_a_turn_are_refused() -> None:
    rows = [{"id": name, "messages": [FIRST]} for name in ("a", "a#1")]
    with pytest.raises(DataError, match="the ids 'a' and 'a#1'; expected no id that is another's"):
        first_turns(rows)
    assert len(first_turns(rows[1:])) == 1


def test_a_turn_is_known_by_its_conversation() -> None:
    assert (turn_name("a", 0), turn_name("a", 2)) == ("a", "a#2")
    names = {"a", "a#1", "b#1", "c#d"}
    assert [talk_name(n, names) for n in sorted(names)] == ["a", "a", "b#1", "c#d"]


GPT_OSS = loop(
    START
    + "{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    + "{{ m.content }}<|end|>"
)


def test_channels_are_thinking_and_content(words: Any) -> None:
    marks = ["<|channel|>", "<|message|>", "<|start|>", "<|return|>"]
    words.add_special_tokens({"additional_special_tokens": [START, END, *marks]})
    ids = words(
        "<|channel|>analysis<|message|>the cat<|end|><|start|>assistant<|channel|>final"
        "<|message|>old mat<|return|>"
    )["input_ids"]
    wanted = {"role": "assistant", "content": "old mat", "thinking": "the cat"}
    assert reply_message(words, ids, [ids[-1]]) == wanted
    thought = words("<|channel|>analysis<|message|>the cat")["input_ids"]
    assert reply_message(words, thought, [ids[-1]]) == {**wanted, "content": ""}
    words.chat_template = GPT_OSS
    said, script = carried_on(words, Response([*ids[:-1], 0], True), Response(ids, False))
    assert "the cat<" not in words.decode(script.asked[1])
    assert "<|channel|>final<|message|>old mat<|end|>" in words.decode(script.asked[1])
    assert said.rewritten == 1


def test_special_tokens_within_a_reply_are_not_shown_again(words: Any) -> None:
    ids = words("old" + START + " cat" + END)["input_ids"]
    assert reply_message(words, ids, ids[-1:]) == {"role": "assistant", "content": "old cat"}


def test_held_out_turns_are_those_of_all_laws(words: Any) -> None:
    whole, _ = carried_on(words, *REPLIES)
    short, _ = carried_on(words, REPLIES[0], "seven")
    prompts, responses, lost = paired({"heldout": [whole], "greedy": [short]})
    for split in ("heldout", "greedy"):
        assert [prompt.id for prompt in prompts[split]] == ["x", "x#1"]
        assert len(responses[split]) == 2
    assert lost == {"heldout": 1, "greedy": 0}
    assert counts([whole], unpaired=1)["dropped"] == {"that another law lacks": 1}
    silent, _ = carried_on(words, None)
    failed = failures({"train": [whole], "heldout": [silent], "greedy": [whole]}, alone="train")
    assert failed == {"train": [], "heldout": ["x"], "greedy": ["x"]}
    for some in ({"heldout": [whole], "greedy": [silent]}, {"heldout": [silent]}):
        with pytest.raises(DataError, match="no prompt of the split 'heldout' was answered"):
            paired(some)
    with pytest.raises(DataError, match="no prompt of the split 'train' was answered"):
        chains([silent], "T=1")
