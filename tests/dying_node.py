"""Preloaded by a dask worker: it stops for ever while it writes its first part of a cache."""

import time
from pathlib import Path
from typing import Any

from pipeline import capture


def dask_setup(worker: Any) -> None:
    """Dask calls it when the worker is there."""

    def hangs(*_: Any) -> None:
        Path("waits-to-be-killed").write_text("")
        time.sleep(600)

    capture.write_part = hangs
