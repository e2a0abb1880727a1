"""Feeding the target in pieces gives what one full forward gives."""

from typing import Any

import pytest
import torch

from pipeline.session import Session, attention_windows
from pipeline.target import Target
from storage.errors import TargetError
from tests.targets import target_of

LAYERS = (0, 2, 3)
LENGTHS = (23, 9, 17)
WIDTH = 24


@pytest.fixture(scope="module")
def target(tiny_model: Any) -> Target:
    return target_of(tiny_model(double=True))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(64, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(1))


class Truth:
    """One full forward of every row, alone and without a cache."""

    def __init__(self, target: Target, tokens: torch.Tensor) -> None:
        self.logits, self.hidden, self.last = [], [], []
        for row, length in zip(tokens, LENGTHS, strict=True):
            features = target.forward(row[None, :length], layers=LAYERS)
            self.logits.append(target.logits(features.last_hidden[0]))
            self.hidden.append(features.hidden[0])
            self.last.append(features.last_hidden[0])


@pytest.fixture(scope="module")
def truth(target: Target, tokens: torch.Tensor) -> Truth:
    return Truth(target, tokens)


def feed(session: Session, tokens: torch.Tensor, count: torch.Tensor, rows: list[int]) -> Any:
    """Feed count[b] tokens of each row from its present length."""
    start, most = session.length, int(count.max())
    index = (start[:, None] + torch.arange(most)).clamp(max=WIDTH - 1)
    return session.extend(tokens[rows].gather(1, index), count)


def check(
    step: Any,
    truth: Truth,
    rows: list[int],
    start: list[int],
    count: list[int],
    *,
    atol: float = 1e-9,
) -> None:
    close = {"atol": atol, "rtol": 0.0}
    for b, row in enumerate(rows):
        here, there = slice(0, count[b]), slice(start[b], start[b] + count[b])
        torch.testing.assert_close(step.logits[b, here], truth.logits[row][there], **close)
        torch.testing.assert_close(step.hidden[b, here], truth.hidden[row][there], **close)
        torch.testing.assert_close(step.last_hidden[b, here], truth.last[row][there], **close)


@pytest.mark.parametrize("chunks", [[1] * 23, [7, 7, 9], [23]], ids=["tokens", "chunks", "whole"])
def test_pieces_give_one_full_forward(
    target: Target, tokens: torch.Tensor, truth: Truth, chunks: list[int]
) -> None:
    session = Session(target, 3, WIDTH, layers=LAYERS, last_hidden=True)
    for chunk in chunks:
        start = session.length.tolist()
        count = [min(chunk, length - s) for length, s in zip(LENGTHS, start, strict=True)]
        step = feed(session, tokens, torch.tensor(count), [0, 1, 2])
        check(step, truth, [0, 1, 2], start, count)
    assert session.length.tolist() == list(LENGTHS)


def test_ragged_feeds_rollbacks_and_selection_give_one_full_forward(
    target: Target, tokens: torch.Tensor, truth: Truth
) -> None:
    generator = torch.Generator().manual_seed(5)
    session = Session(target, 3, WIDTH, layers=LAYERS, last_hidden=True)
    rows = [0, 1, 2]
    for turn in range(30):
        start = session.length.tolist()
        room = [LENGTHS[row] - s for row, s in zip(rows, start, strict=True)]
        draw = torch.randint(0, 6, (len(rows),), generator=generator).tolist()
        count = [min(c, r) for c, r in zip(draw, room, strict=True)]
        check(feed(session, tokens, torch.tensor(count), rows), truth, rows, start, count)
        back = torch.randint(0, 4, (len(rows),), generator=generator)
        session.rollback((session.length - back).clamp(min=0))
        if turn == 12:  # reordered, and one row twice: copies go on apart
            keep = [2, 0, 2]
            session.select(torch.tensor(keep))
            rows = [rows[k] for k in keep]
    assert rows == [2, 0, 2]


def test_rejected_tokens_are_forgotten(target: Target, tokens: torch.Tensor, truth: Truth) -> None:
    session = Session(target, 3, WIDTH, layers=LAYERS, last_hidden=True)
    feed(session, tokens, torch.tensor([4, 4, 4]), [0, 1, 2])
    session.extend(torch.full((3, 5), 63), torch.tensor([5, 2, 5]))
    session.rollback(torch.tensor([4, 4, 4]))
    step = feed(session, tokens, torch.tensor([5, 5, 5]), [0, 1, 2])
    check(step, truth, [0, 1, 2], [4, 4, 4], [5, 5, 5])


def test_a_prefill_may_ask_for_its_last_logits_only(
    target: Target, tokens: torch.Tensor, truth: Truth
) -> None:
    session = Session(target, 3, WIDTH)
    step = session.extend(tokens, torch.tensor(LENGTHS), which="last")
    assert step.logits.shape == (3, 1, 64)
    assert step.hidden is None
    assert step.last_hidden is None
    want = torch.stack([logits[-1] for logits in truth.logits])
    torch.testing.assert_close(step.logits[:, 0], want, atol=1e-9, rtol=0)


def test_eager_attention_and_sliding_windows_give_one_full_forward(tokens: torch.Tensor) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False).double()
    target = target_of(model)
    assert attention_windows(model.config) == {"sliding_attention": 5, "full_attention": None}
    truth = Truth(target, tokens)
    session = Session(target, 3, WIDTH, layers=LAYERS, last_hidden=True)
    for chunk in (3, 8, 4, 8):
        start = session.length.tolist()
        count = [min(chunk, length - s) for length, s in zip(LENGTHS, start, strict=True)]
        step = feed(session, tokens, torch.tensor(count), [0, 1, 2])
        # eager attention takes its softmax in float32 whatever the model's dtype
        check(step, truth, [0, 1, 2], start, count, atol=1e-6)


def test_a_row_that_outgrows_the_session_is_refused(target: Target, tokens: torch.Tensor) -> None:
    session = Session(target, 3, 8)
    session.extend(tokens[:, :6], torch.tensor([6, 2, 6]))
    with pytest.raises(ValueError, match=r"row 2 would hold 9 tokens; .* opened for 8"):
        session.extend(tokens[:, :3], torch.tensor([2, 3, 3]))
    assert session.length.tolist() == [6, 2, 6]


def test_a_rollback_to_the_future_is_refused(target: Target, tokens: torch.Tensor) -> None:
    session = Session(target, 3, 8)
    session.extend(tokens[:, :4], torch.tensor([4, 2, 4]))
    with pytest.raises(ValueError, match="rollback to lengths"):
        session.rollback(torch.tensor([4, 3, 4]))


def test_a_width_beyond_the_context_is_refused(target: Target) -> None:
    with pytest.raises(
        TargetError, match=r"rows of 257 tokens; .* context of 256 tokens; ask for fewer"
    ):
        Session(target, 1, 257)


def test_a_recurrent_layer_is_refused_by_name() -> None:
    class Config:
        sliding_window = None
        layer_types = ("full_attention", "linear_attention")

    with pytest.raises(TargetError, match="linear_attention layers; expected layers of full_att"):
        attention_windows(Config())
