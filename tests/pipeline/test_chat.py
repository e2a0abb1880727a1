"""Chat templates: which tokens the assistant wrote, and which templates are refused."""

from typing import Any

import pytest
from tokenizers import processors

from pipeline.chat import Spoken, _require_both, prompt_tokens, speak
from storage.errors import DataError, TargetError
from tests.targets import tokenizer

START, END = "<|im_start|>", "<|im_end|>"
HEAD = START + "{{ m.role }}\n"
TAIL = END + "\n"
ASK = "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"


def loop(body: str, before: str = "") -> str:
    return before + "{% for m in messages %}" + body + "{% endfor %}" + ASK


def tags(inside: str, after: str = "") -> str:
    """The assistant's messages with generation tags, the others without."""
    return loop(
        HEAD + "{% if m.role == 'assistant' %}{% generation %}" + inside
        + "{% endgeneration %}" + after + "{% else %}{{ m.content }}" + TAIL + "{% endif %}"
    )  # fmt: skip


UNTAGGED = loop(HEAD + "{{ m.content }}" + CALLS + TAIL)
TAGGED = tags("{{ m.content }}" + CALLS + END, "\n")
TAGGED_WITHOUT_END = tags("{{ m.content }}" + CALLS, TAIL)
# as reasoning models do: an earlier reply is written without its thinking
FORGETFUL = loop(
    HEAD + "{{ m.content if loop.last or m.role != 'assistant' else "
    "m.content.split('</think>')[-1].lstrip() }}" + TAIL
)
# a block that says: no thinking here
EMPTY_BLOCK = loop(
    HEAD + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}" + TAIL
)
DATED = loop(HEAD + "{{ m.content }}" + TAIL, "{{ strftime_now('%d %B %Y %H:%M:%S.%f') }}\n")

SYSTEM = {"role": "system", "content": "be a cat"}
TALK = [
    {"role": "user", "content": "where is the mat"},
    {"role": "assistant", "content": "the mat is at home"},
    {"role": "user", "content": "and the red apples"},
    {"role": "assistant", "content": "seven went with old friends"},
]
CALL = {"type": "function", "function": {"name": "sat", "arguments": {"on": "mat"}}}


@pytest.fixture(scope="module")
def words() -> Any:
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": [START, END]})
    return made


def spoken(words: Any, template: str, talk: Any, **options: Any) -> list[Spoken]:
    words.chat_template = template
    eos = [words.convert_tokens_to_ids(END)]
    return speak(words, talk, eos_ids=eos, name="t", **options)


def replies(words: Any, record: Spoken) -> list[str]:
    """The text of each turn of a record."""
    last = max(record.turn)
    turns = [[k for k, t in zip(record.tokens, record.turn, strict=True) if t == n]
             for n in range(last + 1)]  # fmt: skip
    return [words.decode(turn) for turn in turns]


@pytest.mark.parametrize("template", [UNTAGGED, TAGGED, TAGGED_WITHOUT_END])
@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_every_reply_is_its_own_turn_up_to_its_end_token(
    words: Any, template: str, before: Any
) -> None:
    (record,) = spoken(words, template, [*before, *TALK])
    assert replies(words, record) == [m["content"] + END for m in TALK if m["role"] == "assistant"]
    whole = words.apply_chat_template([*before, *TALK], tokenize=False)
    assert record.tokens == words(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [UNTAGGED, TAGGED])
def test_the_tokens_before_a_reply_are_the_prompt_that_the_target_reads(
    words: Any, template: str
) -> None:
    (record,) = spoken(words, template, TALK)
    for number, at in enumerate((1, 3)):
        prompt = prompt_tokens(words, TALK[:at], name="t")
        assert record.tokens[: len(prompt)] == prompt
        assert record.turn.index(number) == len(prompt)


@pytest.mark.parametrize("template", [UNTAGGED, TAGGED])
def test_a_tool_call_is_written_by_the_assistant_and_its_result_is_not(
    words: Any, template: str
) -> None:
    talk = [
        SYSTEM,
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "on a mat"},
        TALK[1],
    ]
    (record,) = spoken(words, template, talk)
    call, answer = replies(words, record)
    assert call == '<call>{"name": "sat", "arguments": {"on": "mat"}}</call>' + END
    assert answer == TALK[1]["content"] + END


def test_a_template_reads_the_tools(words: Any) -> None:
    words.chat_template = loop(HEAD + "{{ m.content }}" + TAIL, "{{ tools | tojson }}")
    tools = [{"type": "function", "function": {"name": "sat", "parameters": {}}}]
    tokens = prompt_tokens(words, TALK[:1], tools=tools, name="t")
    assert '"name": "sat"' in words.decode(tokens)


def test_a_template_that_forgets_thinking_gives_a_record_a_reply(words: Any) -> None:
    thought = [
        {**m, "content": "<think>old cat</think>" + m["content"]} if m["role"] == "assistant" else m
        for m in TALK
    ]
    records = spoken(words, FORGETFUL, thought)
    assert [replies(words, r) for r in records] == [[m["content"] + END] for m in thought[1::2]]
    first, second = (words.decode(r.tokens) for r in records)
    assert first.count("<think>") == second.count("<think>") == 1
    assert "mat is at home" in second
    # without thinking nothing is forgotten, and one record holds all
    (record,) = spoken(words, FORGETFUL, TALK)
    assert max(record.turn) == 1


def test_an_empty_think_block_is_nobodys_writing(words: Any) -> None:
    (record,) = spoken(words, EMPTY_BLOCK, TALK)
    assert replies(words, record) == [m["content"] + END for m in TALK[1::2]]
    assert words.decode(record.tokens).count("<think>") == 2
    (tagged,) = spoken(words, tags("<think>\n\n</think>\n\n{{ m.content }}" + END, "\n"), TALK)
    assert replies(words, tagged) == replies(words, record)


def test_a_block_that_the_prompt_opens_and_the_reply_closes_is_nobodys_writing(words: Any) -> None:
    """Qwen 3.5 asks with an open block; a reply without thinking closes it at once."""
    template = EMPTY_BLOCK.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    (record,) = spoken(words, template, TALK)
    assert replies(words, record) == [m["content"] + END for m in TALK[1::2]]
    thinks = template.replace("<think>\n\n</think>\n\n", "<think>\nold\n</think>\n\n")
    (record,) = spoken(words, thinks, TALK)
    assert replies(words, record)[0] == "old\n</think>\n\n" + TALK[1]["content"] + END


def test_a_reply_with_thinking_of_its_own_keeps_it(words: Any) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>old</think>at home"}]
    (record,) = spoken(words, UNTAGGED, talk)
    assert replies(words, record) == ["<think>old</think>at home" + END]


def test_what_follows_the_last_reply_is_left_out(words: Any) -> None:
    assert spoken(words, UNTAGGED, [*TALK, TALK[0]]) == spoken(words, UNTAGGED, TALK)


def test_a_template_that_asks_for_the_date_is_told_one_day(words: Any) -> None:
    (record,) = spoken(words, DATED, TALK)
    assert words.decode(record.tokens).startswith("26 July 2024 00:00:00.000000")
    assert words.decode(prompt_tokens(words, TALK[:1], name="t")).startswith("26 July 2024")


def test_a_token_across_the_boundary_is_the_prompts(words: Any) -> None:
    """`assistant:` and a space that joins the reply's first word."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + END + "{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    talk = [TALK[0], {"role": "assistant", "content": "cat sat"}]
    (record,) = spoken(words, template, talk)
    prompt = prompt_tokens(words, talk[:1], name="t")
    first = record.turn.index(0)
    assert record.tokens[:first] != prompt  # " cat" is one token of the whole
    assert replies(words, record) == [" sat" + END]


def test_offsets_without_white_space_lose_no_token(words: Any) -> None:
    """GPT-2's post-processor trims offsets; the prompt's own tokens then say where it ends."""
    trimmed = tokenizer()
    trimmed.add_special_tokens({"additional_special_tokens": [START, END]})
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for template in (UNTAGGED, TAGGED):
        assert spoken(trimmed, template, TALK) == spoken(words, template, TALK)


def test_a_template_without_an_end_token_ends_with_its_text(words: Any) -> None:
    template = loop("{{ m.role }}\n{{ m.content }}\n\n").replace(START, "")
    (record,) = spoken(words, template, TALK)
    assert replies(words, record) == [m["content"] for m in TALK[1::2]]


REFUSED = r"conversation 't': the target's chat template "
COUNTING = loop(HEAD + "{{ m.content }}" + TAIL, "{{ messages | length }} messages\n")
RANDOM = loop(HEAD + "{{ m.content }}" + TAIL, "{{ range(99999) | random }}\n")
# the prompt opens a thought that the reply's rendering does not have
OPENED = UNTAGGED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
RANDOM_ONCE = loop(HEAD + "{{ m.content }}" + TAIL)
RANDOM_ONCE += "{% if not add_generation_prompt %}{{ range(99999) | random }}{% endif %}"
NOTHING = "{% if not add_generation_prompt %}" + UNTAGGED + "{% endif %}"
# a question is written together with its answer
PAIRS = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
PAIRS += (
    "{{ messages[loop.index0 - 1].content }}: {{ m.content }}" + END + "{% endif %}{% endfor %}"
)
SILENT = loop(START + "{% if m.role == 'user' %}{{ m.content }}" + TAIL + "{% endif %}") + "\n"
SILENT = SILENT.replace("assistant\n", "")
EVERYTHING = "{% generation %}" + UNTAGGED + "{% endgeneration %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            COUNTING,
            r"changes its text before message 1 once that reply stands: '1 messages.*' becom",
        ),
        (OPENED, r"changes its text before message 1 once that reply stands: '<think>\\n' becomes"),
        (RANDOM, "changes its text before message 1 once that reply stands"),
        (
            RANDOM_ONCE,
            "gives another text when it is asked again; expected the same text every tim",
        ),
        (UNTAGGED + STRICT, r"cannot be applied \(TemplateError: no system role\); expected roles"),
        ("{{ messages[9].content.x }}", r"cannot be applied \(UndefinedError: "),
        ("{% for m in messages", r"cannot be applied \(TemplateSyntaxError: "),
        (NOTHING, "does not write message 0 before it asks for the reply; expected a prompt that"),
        (SILENT, r"makes none of \d+ tokens the assistant's; expected a prompt, and a reply to it"),
        (tags("", "{{ m.content }}" + TAIL), r"marks none of \d+ tokens as the assistant's by it"),
        (EVERYTHING, r"marks all of \d+ tokens as the assistant's by its generation tags; expect"),
        (PAIRS, "does not write message 0 before it asks for the reply"),
    ],
)
def test_a_template_that_does_not_add_up_is_refused(
    words: Any, template: str, sentence: str
) -> None:
    with pytest.raises(DataError, match=REFUSED + sentence):
        spoken(words, template, [SYSTEM, *TALK] if STRICT in template else TALK)


def test_a_full_mask_and_a_reply_to_nothing_are_refused(words: Any) -> None:
    with pytest.raises(
        DataError, match=REFUSED + "makes all of 2 tokens the assistant's; expected a"
    ):
        _require_both([0, 0], "t")
    with pytest.raises(
        DataError, match=REFUSED + "is asked for a reply to nothing; expected a reply"
    ):
        spoken(words, UNTAGGED, TALK[1:])


def test_the_refusal_says_what_to_do(words: Any) -> None:
    with pytest.raises(DataError, match=r"remove such conversations .*\(generate\.train_respo"):
        spoken(words, COUNTING, TALK)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        chat_template = UNTAGGED
        is_fast = False

        def apply_chat_template(self, talk: Any, **_: Any) -> str:
            return "".join(m["content"] for m in talk)

    with pytest.raises(TargetError, match="tokenizer is a Slow, which has no offsets; expected"):
        speak(Slow(), TALK, eos_ids=[0], name="t")
