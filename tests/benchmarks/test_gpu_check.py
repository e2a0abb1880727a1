"""The random target of the GPU check keeps what a real one's cache would keep."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import NATS, SHAPES, padded_tokenizer, random_target, scale_to


def entropy(logits: torch.Tensor) -> float:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean().item()


def test_logits_are_scaled_to_the_entropy_that_was_asked_for() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    assert entropy(logits * scale_to(logits, 0.7)) == pytest.approx(0.7, abs=1e-4)


def test_a_random_target_has_laws_worth_keeping_and_words_for_every_id() -> None:
    shape = SHAPES["tiny"]
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    tokenizer = padded_tokenizer([readme], shape.vocab_size)
    ids = torch.tensor(tokenizer("the cat sat on a mat")["input_ids"])
    model = random_target(shape, ids, "cpu")
    assert entropy(model(input_ids=ids[None]).logits[0]) == pytest.approx(NATS, abs=1e-3)
    assert all(tokenizer.decode([i]) for i in range(1, shape.vocab_size))
    assert tokenizer.decode(ids) == "the cat sat on a mat"
