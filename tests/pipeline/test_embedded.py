"""The embedded target: tokenizer, packing, training, sharpening, and what it refuses."""

import hashlib
from typing import Any

import pytest
import torch

from pipeline.config import parse
from pipeline.embedded import (
    END,
    EmbeddedConfig,
    build_model,
    encode,
    learning_rate,
    measure,
    sharpen,
    spread,
    train_embedded,
    train_tokenizer,
)
from pipeline.pin import TargetConfig
from pipeline.problems import problem_set
from pipeline.seeds import rng
from storage.errors import ConfigError, DataError

MICRO: dict[str, Any] = {
    "kind": "embedded",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 64,
    "context_tokens": 64,
    "steps": 40,
    "batch_sequences": 8,
    "sequence_tokens": 32,
    "lr": 1e-2,
    "sharpen": 0.5,
    "seed": 0,
    "threads": 1,
}


def micro(**over: Any) -> EmbeddedConfig:
    config: EmbeddedConfig = parse("target", {**MICRO, **over}, TargetConfig)
    return config


def documents(count: int = 12) -> list[dict[str, str]]:
    texts = [problem_set(rng(0, number)) for number in range(count)]
    return [
        {"text": text, "domain": "maths", "split": "heldout" if n % 4 == 0 else "train"}
        for n, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any, dict[str, Any], list[dict[str, float]]]:
    return train_embedded(documents(), micro())


def test_any_text_survives_the_tokenizer(trained: Any) -> None:
    tokenizer = trained[1]
    text = "def é(x):\n\treturn 'ß' * 1234  # 漢字 \n\n end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone_and_the_end_token_is_zero(trained: Any) -> None:
    tokenizer = trained[1]
    assert len(tokenizer("1234")["input_ids"]) == 4
    assert tokenizer.eos_token == END
    assert tokenizer.eos_token_id == 0
    assert tokenizer.bos_token_id is None
    assert len(tokenizer) == 300


def test_a_saved_tokenizer_gives_the_same_ids(trained: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = trained[:2]
    model.save_pretrained(tmp_path)  # its config must not make transformers choose another class
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " A  sum: 11 + 22,\n\nthen 'é'."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.eos_token_id == 0


def test_documents_are_packed_with_an_end_token_after_each(trained: Any) -> None:
    tokenizer = trained[1]
    packed = encode(tokenizer, ["Add 1", "Add 2"]).tolist()
    assert packed == [*tokenizer("Add 1")["input_ids"], 0, *tokenizer("Add 2")["input_ids"], 0]


def test_training_learns_and_its_curve_ends_at_the_last_step(trained: Any) -> None:
    curve = trained[3]
    assert curve[-1]["step"] == 40
    assert curve[-1]["heldout_loss"] < curve[0]["heldout_loss"] - 1.0
    assert curve[-1]["loss"] < curve[0]["loss"] - 1.0


def test_training_twice_gives_the_same_bytes(trained: Any) -> None:
    again = train_embedded(documents(), micro())
    for before, after in zip(trained[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(before, after)
    one, two = (t.backend_tokenizer.to_str() for t in (trained[1], again[1]))
    assert hashlib.sha256(one.encode()).digest() == hashlib.sha256(two.encode()).digest()
    assert trained[2:] == again[2:]


def test_initial_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build_model(micro(), 0).state_dict()
    torch.manual_seed(2)
    two = build_model(micro(), 0).state_dict()
    other = build_model(micro(seed=1), 0).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_sharpening_is_a_temperature(trained: Any) -> None:
    model = build_model(micro(), 0).eval()
    tokens = torch.arange(20)[None]
    before = model(tokens).logits
    sharpen(model, 0.5)
    torch.testing.assert_close(model(tokens).logits, before / 0.5)
    metrics = trained[2]
    assert metrics["sharpened"]["entropy"] < metrics["heldout"]["entropy"]


def test_measures_are_those_of_the_law() -> None:
    model = build_model(micro(), 0).eval()
    tokens = torch.arange(30).reshape(2, 15)
    with torch.no_grad():
        logp = model(tokens[:, :-1]).logits.double().log_softmax(-1)
    got = measure(model, tokens)
    assert got["loss"] == pytest.approx(
        -logp.gather(2, tokens[:, 1:, None]).mean().item(), rel=1e-5
    )
    assert got["entropy"] == pytest.approx(
        torch.distributions.Categorical(logits=logp).entropy().mean().item(), rel=1e-5
    )
    assert got["top_probability"] == pytest.approx(logp.amax(-1).exp().mean().item(), rel=1e-5)


def test_windows_spread_over_the_whole_text() -> None:
    tokens = torch.arange(100)
    assert spread(tokens, 3, 10)[:, 0].tolist() == [0, 45, 90]
    assert spread(tokens[:10], 3, 10).shape == (1, 10)


def test_the_rate_warms_up_and_ends_at_a_twentieth() -> None:
    config = micro(steps=600)
    rates = [learning_rate(step, config) for step in range(600)]
    assert rates[0] == pytest.approx(config.lr / 20)
    assert max(rates) <= config.lr
    assert rates[-1] == pytest.approx(config.lr * 0.05)


def test_a_vocabulary_that_the_text_cannot_fill_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"give \d+ BPE tokens; expected target\.vocab_size 900; lo"
    ):
        train_tokenizer(["a short text"], 900, context_tokens=8)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_shorter_than_one_window_is_refused(split: str) -> None:
    rows = documents()
    short = [{**r, "text": "Add 1"} if r["split"] == split else r for r in rows]
    vocab = 258 if split == "train" else 300
    with pytest.raises(DataError, match=r"documents are shorter than one window of \d+ tokens; ex"):
        train_embedded(short, micro(vocab_size=vocab, sequence_tokens=64, steps=1))


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"vocab_size": 100}, r"target\.vocab_size is 100; expected .* 258"),
        ({"sharpen": 0.0}, r"target\.sharpen is 0\.0; expected .* greater than 0"),
        ({"sharpen": 1.5}, r"target\.sharpen is 1\.5; expected .* less than or equal to 1"),
        ({"hidden_size": 34}, r"target is not consistent; expected hidden_size must be a multiple"),
        ({"sequence_tokens": 65}, r"target is not consistent; expected sequence_tokens must not"),
        ({"steps": 0}, r"target\.steps is 0; expected"),
        ({"kind": "other"}, r"target is .*'embedded', 'pretrained'"),
    ],
)
def test_bad_parameters_are_named(over: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        micro(**over)
