"""The benchmark of remotes: its caches are sound, and its split of a cost finds what was put in."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.remotes import LARGE, LAW, Found, Spent, room, write_cache
from lkcache.verify import verify

SIZES = {
    "one": {"files": 34, "objects": 30, "bytes": 60_000},
    "many": {"files": 1800, "objects": 1030, "bytes": 3_000_000},
    "large": {"files": 400, "objects": 390, "bytes": 4_000_000_000},
}


def test_a_cost_is_split_into_its_start_its_files_and_its_bytes() -> None:
    spent = {
        f"{name} push": asdict(
            Spent(
                clock_s=1.0,
                cpu_s=0.5 + 0.002 * size["objects"] + 3e-9 * size["bytes"],
                server_s=2e-9 * size["bytes"],
            )
        )
        for name, size in SIZES.items()
    }
    found = Found({"sizes": SIZES, "spent": spent, "damage": {}, "host": "", "load": [0.0]})
    cost = found.cost("push", "objects")
    assert cost.fixed == pytest.approx(0.5, abs=0.01)
    assert cost.files == pytest.approx(2.0, rel=0.01)
    assert (cost.gigabyte, cost.server) == pytest.approx((3.0, 2.0), rel=0.01)


def test_its_caches_are_sound(tmp_path: Path) -> None:
    for layout in (LAW, replace(LARGE, hidden_size=256)):
        path = tmp_path / f"{layout.hidden_size}.zarr"
        write_cache(path, layout, num_tokens=4096, part_tokens=1536)
        assert verify(path) == 0


def test_a_size_that_the_disk_will_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"GiB free; expected .* for 5 copies of 1e\+09 GiB"):
        room(tmp_path, 1e9)
