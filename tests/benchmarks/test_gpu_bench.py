"""What `make gpu-bench` runs, on a CPU in tiny shapes, and without what a GPU box may lack."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import eagle, terms

ROOT = Path(__file__).parents[2]
SHAPE = {"tokens": 6, "vocab": 700, "dtype": "float32"}
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("zarr", "dask", "distributed", "dvc", "pyarrow"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from benchmarks import eagle, terms

assert "transformers" not in sys.modules
loss, leaves = terms.build("LM head fused", {"tokens": 4, "vocab": 96, "dtype": "float32"}, "cpu")
print(loss().isfinite().item())
"""


def test_it_needs_no_cache_and_no_scheduler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_an_eagle3_step_runs_both_ways() -> None:
    text = eagle.report(eagle.TINY, "cpu", repeats=0)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:]] == ["cache", "online", "target alone"]
    assert all(float(row[1]) > 0 for row in rows[2:])
    assert "From the cache a step is" in text


def test_both_ways_take_steps_of_the_same_draft() -> None:
    held = eagle.stored(eagle.TINY, pinned=False)
    target = eagle.target_of(eagle.TINY, "cpu")
    assert next(target.parameters()).dtype == torch.bfloat16
    made = [eagle.cached(held, "cpu"), eagle.online(held, target, eagle.TINY, "cpu")]
    for depth in range(eagle.TINY.depth):
        anchors = [batch.pairs(depth).anchor.tolist() for batch in made]
        assert anchors[0] == anchors[1]
        assert len(anchors[0]) == eagle.TINY.sequences * (eagle.TINY.tokens - 2 - depth)
    assert made[0].hidden is not None
    assert made[1].hidden is not None
    assert made[0].hidden.shape == made[1].hidden.shape


@pytest.mark.parametrize("name", ["ours", "ours, gradient in place", "plain torch"])
def test_all_ways_of_the_loss_have_one_value(name: str) -> None:
    loss, leaves = terms.build(name, SHAPE, "cpu")
    expected, _ = terms.build("ours", SHAPE, "cpu")
    assert loss().item() == pytest.approx(expected().item(), rel=1e-5)
    assert all(x.requires_grad for x in leaves)


def test_the_verdicts_put_a_figure_beside_each_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "bandwidth", lambda: 2e12)
    shape = {"tokens": 8192, "vocab": 128_256, "dtype": "bfloat16"}
    loss = {
        "ours, gradient in place": [{"seconds": 4e-3}, {"seconds": 5e-3}],
        "speculators fused": [{"seconds": 12e-3}],
    }
    head = {
        "LM head fused": [{"beyond": 2**20 * 10}],
        "LM head and ours": [{"beyond": 2**20 * 100}],
    }
    text = "\n".join(terms.verdicts(shape, "cuda", loss, head))
    assert "fused 10 MiB, whole logits 100 MiB, 0.10 of it (bar: 0.25)" in text
    copied = 3 * 128_256 * 2 * 8192 / 2e12
    assert f"takes {4e-3 / copied:.2f} of that (bar: 1.43)" in text
    assert "takes 3.00 times as long (bar: 2)" in text
    missing = "\n".join(terms.verdicts(shape, "cuda", {}, head))
    assert "nan times as long" in missing
    assert math.isnan(terms.least({}, "ours", "seconds"))
    assert len(terms.verdicts(shape, "cpu", {}, head)) == 2
