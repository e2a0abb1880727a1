import os

import pytest


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing hundreds of tiny files takes most of a test's time and changes no outcome."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
