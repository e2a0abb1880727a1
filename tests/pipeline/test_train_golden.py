"""The default loop computes what it always did: ten steps of each draft, recorded once."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.caches import write_cache
from tests.golden.curves import FILE, KINDS, curve


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_lose_what_they_lost(kind: str, tmp_path: Path) -> None:
    write_cache(tmp_path / "train.zarr", num_sequences=10)
    golden = json.loads(FILE.read_text(encoding="utf-8"))[kind]
    # the same bits on the machine that recorded it; 1e-6 for another order of float32 sums
    assert curve(kind, tmp_path)["loss"] == pytest.approx(golden, rel=1e-6)


@pytest.mark.parametrize("over", [{"pack_tokens": 60}, {"checkpoint_depths": True}])
def test_packing_and_recomputing_leave_the_curve_where_it_was(
    over: dict[str, Any], tmp_path: Path
) -> None:
    write_cache(tmp_path / "train.zarr", num_sequences=10)
    golden = json.loads(FILE.read_text(encoding="utf-8"))["eagle3"]
    assert curve("eagle3", tmp_path, **over)["loss"] == pytest.approx(golden, rel=1e-5)
