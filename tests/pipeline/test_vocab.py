"""The draft vocabulary: what is kept, the way back, and what is refused."""

import pytest
import torch

from pipeline.vocab import coverage, draft_vocabulary, expand, require_d2t, target_to_draft
from storage.errors import DraftError


def test_the_most_frequent_tokens_are_kept_in_ascending_order() -> None:
    counts = torch.tensor([0, 5, 1, 9, 2])
    assert draft_vocabulary(counts, 3).tolist() == [1, 3, 4]


def test_it_is_topped_up_with_the_lowest_unused_ids() -> None:
    counts = torch.tensor([0, 0, 0, 0, 7, 0])
    assert draft_vocabulary(counts, 3).tolist() == [0, 1, 4]


def test_ties_go_to_the_lowest_ids() -> None:
    assert draft_vocabulary(torch.full((6,), 2), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [0, 7])
def test_a_size_beyond_the_target_is_refused(size: int) -> None:
    sentence = rf"a draft vocabulary of {size} ids; expected from 1 to the target's 6; correct"
    with pytest.raises(DraftError, match=sentence):
        draft_vocabulary(torch.ones(6), size)


def test_target_to_draft_inverts_d2t() -> None:
    d2t = torch.tensor([1, 3, 4])
    assert target_to_draft(d2t, 6).tolist() == [-1, 0, -1, 1, 2, -1]
    assert target_to_draft(d2t, 6)[d2t].tolist() == [0, 1, 2]


def test_expand_gives_pruned_tokens_no_probability() -> None:
    q = torch.tensor([[0.2, 0.3, 0.5]])
    out = expand(q, torch.tensor([1, 3, 4]), 6)
    assert out.tolist() == [[0.0, q[0, 0].item(), 0.0, q[0, 1].item(), q[0, 2].item(), 0.0]]
    assert expand(q, None, 3) is q


def test_coverage_is_the_share_of_supervised_tokens() -> None:
    counts = torch.tensor([1, 2, 3, 4])
    assert coverage(counts, torch.tensor([1, 3])) == pytest.approx(0.6)
    assert coverage(torch.zeros(4), torch.tensor([1, 3])) == 0.0


def test_the_whole_vocabulary_needs_no_map() -> None:
    assert require_d2t(None, None, 6) is None
    assert require_d2t(None, 6, 6) is None
    d2t = torch.tensor([0, 5], dtype=torch.int32)
    kept = require_d2t(d2t, 2, 6)
    assert kept is not None
    assert kept.dtype == torch.int64


def test_a_map_that_was_not_asked_for_is_refused() -> None:
    with pytest.raises(DraftError, match=r"a map of 2 draft ids; expected one for each of the 6"):
        require_d2t(torch.tensor([0, 5]), None, 6)


@pytest.mark.parametrize("ids", [[2, 1], [1, 1], [-1, 3], [1, 6]])
def test_a_map_that_is_not_ascending_ids_is_refused(ids: list[int]) -> None:
    with pytest.raises(DraftError, match=r"not ascending .* expected distinct ids below 6"):
        require_d2t(torch.tensor(ids), 2, 6)
