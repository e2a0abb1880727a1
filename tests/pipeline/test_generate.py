"""Sampling from the target: its law, its independence of batches, its ends."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.generate import (
    GenerateConfig,
    asked,
    count,
    data_responses,
    encode,
    plan,
    sequence_rows,
    split_of,
    with_conversations,
)
from pipeline.sampling import Prompt, choose, sample
from pipeline.seeds import uniforms
from pipeline.target import Target
from storage.errors import DataError, TargetError
from storage.sequences import Sequences
from storage.tables import SEQUENCES, write_table
from tests.targets import target_of

CONFIG = GenerateConfig(
    engine="transformers",
    laws=[],
    max_prompt_tokens=6,
    max_new_tokens=12,
    batch_sequences=4,
    seed=0,
    threads=1,
)


@pytest.fixture(scope="module")
def target(tiny_model: Any) -> Target:
    # 6 of 64 tokens end a response, so that rows end all along the way
    return target_of(tiny_model(double=True), eos_ids=[0, 1, 2, 3, 4, 5])


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(f"p{i}", "ab"[i % 2], tuple(rng.integers(6, 64, 1 + (7 * i) % 9).tolist()))
        for i in range(11)
    ]


def draws(prompts: Any) -> torch.Tensor:
    return torch.stack([uniforms(0, "test", prompt.id, n=12) for prompt in prompts])


def by_batches(target: Target, prompts: list[Prompt], size: int, *, greedy: bool) -> list[Any]:
    found: dict[int, Any] = {}
    for unit in plan("train", prompts, batch_sequences=size):
        uniform = None if greedy else draws(unit.prompts)
        responses = sample(target, unit.prompts, max_new_tokens=12, uniform_BG=uniform)
        found.update(zip(unit.members, responses, strict=True))
    return [found[place] for place in range(len(prompts))]


@pytest.mark.parametrize("greedy", [False, True])
def test_who_shares_a_batch_changes_nothing(
    target: Target, prompts: list[Prompt], greedy: bool
) -> None:
    alone = by_batches(target, prompts, 1, greedy=greedy)
    assert by_batches(target, prompts, 4, greedy=greedy) == alone
    assert by_batches(target, prompts, 11, greedy=greedy) == alone
    assert len({len(response.tokens) for response in alone}) > 2


@pytest.mark.parametrize("greedy", [False, True])
def test_a_response_is_the_slow_loop_of_full_forwards(
    target: Target, prompts: list[Prompt], greedy: bool
) -> None:
    for prompt, response in zip(
        prompts, by_batches(target, prompts, 4, greedy=greedy), strict=True
    ):
        tokens, uniform = list(prompt.tokens), draws([prompt])[0]
        while True:
            last = target.forward(torch.tensor([tokens])).last_hidden[:, -1]
            p = torch.softmax(target.logits(last)[0], -1)
            at = len(tokens) - len(prompt.tokens)
            step = int((p.cumsum(0) <= uniform[at]).sum()) if not greedy else int(p.argmax())
            tokens.append(step)
            if step < 6 or at == 11:
                break
        assert response.tokens == tokens[len(prompt.tokens) :]
        assert response.finished == (tokens[-1] < 6)


def test_chosen_tokens_follow_the_law() -> None:
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    uniform = uniforms(1, n=40_000)
    token, sound = choose(logits.expand(len(uniform), -1), uniform)
    p = torch.softmax(logits[0].double(), -1).numpy()
    counts = np.bincount(token.numpy(), minlength=8)
    assert sound.all()
    assert ((counts - p * 40_000) ** 2 / (p * 40_000)).sum() < 24.3  # chi-square, 7 df, 0.999


def test_an_impossible_token_is_never_chosen() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    token, _ = choose(logits.expand(3, -1), torch.tensor([0.0, 0.5, 1 - 2**-53]).double())
    assert token.tolist() == [0, 2, 2]


@pytest.mark.parametrize("greedy", [False, True])
def test_logits_that_are_not_finite_name_the_prompt(
    tiny_model: Any, prompts: list[Prompt], greedy: bool
) -> None:
    model = tiny_model()
    model.lm_head.weight[9] = torch.nan
    uniform = None if greedy else draws(prompts)
    with pytest.raises(TargetError, match="after 0 response tokens to prompt 'p0' are NaN or inf"):
        sample(target_of(model), prompts, max_new_tokens=12, uniform_BG=uniform)


def test_batches_hold_prompts_of_similar_length(prompts: list[Prompt]) -> None:
    units = plan("train", prompts, batch_sequences=4)
    assert [len(unit.members) for unit in units] == [4, 4, 3]
    lengths = [len(prompt.tokens) for unit in units for prompt in unit.prompts]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(place for unit in units for place in unit.members) == list(range(11))


class Words:
    """A tokenizer of one token a character; with a template where asked."""

    def __init__(self, template: str | None = None) -> None:
        self.chat_template = template

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, turns: Any, **_: Any) -> str:
        return "<" + turns[0]["content"] + ">"


def row(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "x", "domain": "d", "split": "train", "text": text, "response": None, **more}


def test_a_long_prompt_keeps_its_end() -> None:
    found = encode([row("abcdefghij")], Words(), config=CONFIG, context_tokens=18)
    assert tuple(found[0].tokens) == tuple(map(ord, "efghij"))


def test_a_chat_model_reads_its_template() -> None:
    found = encode([row("ab")], Words("yes"), config=CONFIG, context_tokens=18)
    assert tuple(found[0].tokens) == tuple(map(ord, "<ab>"))


def test_a_long_prompt_of_a_chat_model_is_left_out_and_counted() -> None:
    left_out: Counter[str] = Counter()
    rows = [row("ab"), row("abcdefgh")]
    found = encode(rows, Words("yes"), config=CONFIG, context_tokens=18, left_out=left_out)
    assert [tuple(prompt.tokens) for prompt in found] == [tuple(map(ord, "<ab>"))]
    assert left_out == {"a long prompt": 1}
    with pytest.raises(
        DataError, match=r"every prompt of a split is longer than .*tokens, 6; expec"
    ):
        encode(rows[1:], Words("yes"), config=CONFIG, context_tokens=18)


USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}


def test_a_chat_model_is_asked_for_the_last_reply() -> None:
    assert asked(row("hi")) == ([USER], [])
    talk = [USER, REPLY, USER, REPLY]
    assert asked(row("hi", messages=talk, tools=[{"f": 1}])) == (talk[:3], [{"f": 1}])
    assert asked(row("hi", messages=talk[:3])) == (talk[:3], [])


def test_conversations_are_found_by_split_and_id() -> None:
    rows = [row("hi"), {**row("hi"), "split": "heldout"}]
    talk = {"split": "heldout", "id": "x", "messages": json.dumps([USER]), "tools": "[]"}
    plain, found = with_conversations(rows, [talk])
    assert "messages" not in plain
    assert (found["messages"], found["tools"]) == ([USER], [])


def test_a_target_without_a_template_reads_one_turn_and_its_reply() -> None:
    (found,) = encode(
        [row("hi", messages=[USER, REPLY])], Words(), config=CONFIG, context_tokens=18
    )
    assert (tuple(found.tokens), found.response) == (tuple(map(ord, "hi")), "so")
    with pytest.raises(
        DataError, match=r"'x' of 3 messages \(user, assistant, user\); .*no chat tem"
    ):
        encode([row("", messages=[USER, REPLY, USER])], Words(), config=CONFIG, context_tokens=18)


def test_a_prompt_beyond_the_context_is_named() -> None:
    with pytest.raises(
        DataError, match=r"prompt 'x' of 6 tokens and a response of up to 12; .* 17"
    ):
        encode([row("abcdefghij")], Words(), config=CONFIG, context_tokens=17)


def test_a_prompt_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="prompt 'x' has no token; expected at least one; remove"):
        encode([row("")], Words(), config=CONFIG, context_tokens=18)


def test_an_empty_split_is_named() -> None:
    with pytest.raises(DataError, match="no prompt of the split 'heldout' in data/prompts"):
        split_of([row("a")], "heldout")


def test_the_data_answers_in_place_of_the_target() -> None:
    prompts = [
        Prompt("a", "d", (1,), response="xy"),
        Prompt("b", "d", (1,), response="0123456789abc"),
    ]
    found = data_responses(prompts, Words(), config=CONFIG, eos_ids=[7])
    assert [response.finished for response in found] == [True, False]
    assert list(found[0].tokens) == [ord("x"), ord("y"), 7]
    assert list(found[1].tokens) == list(map(ord, "0123456789ab"))


def test_data_without_a_response_is_named() -> None:
    sentence = r"prompt 'a' has no response of its own; .*train_responses is data"
    with pytest.raises(DataError, match=sentence):
        data_responses([Prompt("a", "d", (1,))], Words(), config=CONFIG, eos_ids=[7])


def test_rows_and_counts_say_what_was_written(tmp_path: Path) -> None:
    prompts = [Prompt("a", "d", (1, 2)), Prompt("b", "e", (1,))]
    found = data_responses(
        [Prompt(p.id, p.domain, p.tokens, "xyz"[: 2 + i]) for i, p in enumerate(prompts)],
        Words(),
        config=CONFIG,
        eos_ids=[7],
    )
    rows = list(sequence_rows(prompts, found, "data"))
    assert rows[0]["turn"].tolist() == [-1, -1, 0, 0, 0]
    assert rows[0]["law"] == "data"
    write_table(tmp_path / "train.parquet", SEQUENCES, rows)
    assert count({"train": Sequences.open(tmp_path / "train.parquet")})["train"] == {
        "sequences": 2,
        "tokens": 10,
        "response_tokens": 7,
        "finished_share": 1.0,
        "mean_response_tokens": 3.5,
        "mean_response_tokens_by_domain": {"d": 3.0, "e": 4.0},
    }


@pytest.mark.parametrize(
    "key", ["max_prompt_tokens", "max_new_tokens", "batch_sequences", "threads"]
)
def test_counts_must_be_positive(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        GenerateConfig(**{**CONFIG.model_dump(), key: 0})
