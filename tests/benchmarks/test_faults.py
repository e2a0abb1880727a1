"""The fault campaign, small: every kind of damage, before and after a cache is opened."""

import os

import pytest

from benchmarks.faults import AFTER, BEFORE, campaign


def test_every_kind_of_fault_is_refused_by_name_and_never_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    found = campaign(2 * len(BEFORE), seed=1)
    assert len(found) == len(BEFORE) + len(AFTER)
    for kind, tally in found.items():
        assert tally.refused == tally.named == tally.faults, kind
        assert not tally.wrong, kind
