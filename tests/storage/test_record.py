from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from storage.errors import CacheError
from storage.record import supervised
from tests.storage.samples import FULL, TOPK, make_records


def test_supervised_rows_predict_inside_one_assistant_turn() -> None:
    turn = np.array([-1, -1, 0, 0, 1, 1, -1, 2], dtype=np.int32)
    assert supervised(turn).tolist() == [False, False, True, False, True, False, False, False]
    assert supervised(np.array([0], dtype=np.int32)).tolist() == [False]
    assert supervised(np.zeros(0, dtype=np.int32)).tolist() == []


@pytest.mark.parametrize("layout", [TOPK, FULL])
def test_a_sound_record_passes(layout: Any) -> None:
    for record in make_records(layout, [1, 5, 20]):
        record.check(layout)


def changed(array: np.ndarray, value: object, at: int = -1) -> np.ndarray:
    copy = array.copy()
    copy[at] = value
    return copy


def with_all_supervised() -> Any:
    """A record of mode `full` whose rows are all supervised but the last."""
    record = make_records(FULL, [12], seed=3)[0]
    turn = np.zeros(12, dtype=np.int32)
    return replace(record, turn=turn, logits=np.zeros((11, 64), dtype=np.uint16))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: {"tokens": changed(r.tokens, 64)}, "tokens hold 64, vocabulary 64"),
        (lambda r: {"tokens": r.tokens[:0]}, "no tokens"),
        (lambda r: {"turn": r.turn[:-1]}, r"turn \(11,\) int32, not \(12,\) int32"),
        (lambda r: {"turn": r.turn.astype(np.int64)}, "turn .* int64, not .* int32"),
        (lambda r: {"logits": None}, "no logits"),
        (lambda r: {"logits": r.logits[:-1]}, r"logits \(10, 64\)"),
        (lambda r: {"logits": changed(r.logits, 0x7F80)}, "logits is not finite"),
        (lambda r: {"hidden": np.zeros((12, 1, 8), np.uint16)}, "hidden that the layout does not"),
        (lambda r: {"token_logp": changed(r.token_logp, np.nan, 2)}, "NaN at position 2"),
        (lambda r: {"token_logp": changed(r.token_logp, -np.inf, 3)}, "infinite at position 3"),
        (lambda r: {"token_logp": changed(r.token_logp, -1)}, "not 0 at an unsupervised"),
        (lambda r: {"tail_logp_mass": changed(r.tail_logp_mass, -1)}, "not 0 at an unsupervised"),
        (lambda r: {"kept": changed(r.kept, 1, 0)}, r"topk_ids \(0,\) .* not \(1,\)"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_name(change: Any, sentence: str) -> None:
    record = with_all_supervised()
    bad = replace(record, **change(record))
    with pytest.raises(CacheError, match=f"sequence '{record.id}': .*{sentence}"):
        bad.check(FULL)


def test_codes_beyond_the_scale_are_refused() -> None:
    record = next(r for r in make_records(TOPK, [20, 20, 20]) if len(r.topk_p))
    with pytest.raises(CacheError, match="code 1024, largest 1023"):
        replace(record, topk_p=changed(record.topk_p, 1024)).check(TOPK)
