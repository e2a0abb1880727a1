"""A group of processes: what they compute together, and how the leader hears of a failure."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import group
from pipeline.group import Group
from storage.errors import WorkspaceError

MODULE = "tests.pipeline.summing_rank"


def opened(size: int = 2) -> Group:
    return Group(size, module=MODULE, device="cpu", setup={"scale": 10.0})


@pytest.fixture
def ranks() -> Iterator[Group]:
    found = opened()
    found.together(lambda: None)
    yield found
    found.close()


def summed(ranks: Group, how: str = "", x: Any = None, *, own: Any = None) -> torch.Tensor:
    """Rank 0's x and ten times x of every other rank, added up on all."""
    total = torch.arange(3.0) if x is None else x.clone()

    def part() -> torch.Tensor:
        if own is not None:
            raise own
        torch.distributed.all_reduce(total)
        return total

    return ranks.call("sum", {"how": how}, {"x": total.clone()}, part)


def test_all_ranks_compute_on_the_leaders_tensors(ranks: Group) -> None:
    assert summed(ranks).tolist() == [0.0, 11.0, 22.0]
    assert summed(ranks, x=torch.ones(2, dtype=torch.int64)).tolist() == [11, 11]
    mask = torch.tensor([True, False])
    ranks.call("mask", {}, {"x": mask, "none": torch.zeros(0, 4)}, lambda: None)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("die", r"rank 1 of the 2 that share the target ended early \(SIGKILL\); expected .*kept"),
        ("raise", r"rank 1 of the 2 .* failed \(ValueError: a defect\); expected"),
        ("hang", r"rank 1 of the 2 .* did not answer in time; expected"),
    ],
)
def test_a_failed_rank_is_named_and_none_waits_for_it(
    ranks: Group, monkeypatch: pytest.MonkeyPatch, how: str, sentence: str
) -> None:
    summed(ranks)
    if how == "hang":
        monkeypatch.setattr(group, "ANSWER_S", 1.0)
    with pytest.raises(WorkspaceError, match=sentence):
        summed(ranks, how)
    assert ranks.closed
    assert all(child.returncode is not None for child in ranks._children)


def test_a_rank_that_ends_between_calls_is_told_by_the_next(ranks: Group) -> None:
    ranks._children[0].kill()
    ranks._children[0].wait()
    with pytest.raises(WorkspaceError, match=r"ended early \(SIGKILL\)"):
        summed(ranks)


def test_memory_that_any_rank_lacks_is_the_leaders_error_and_a_new_group_goes_on() -> None:
    for how, own in (("memory", None), ("", torch.OutOfMemoryError("the leader's"))):
        ranks = opened()
        ranks.together(lambda: None)
        with pytest.raises(torch.OutOfMemoryError, match="rank 1 of 2" if how else "the leader's"):
            summed(ranks, how, own=own)
        assert ranks.closed
    ranks = opened(3)
    ranks.together(lambda: None)
    assert summed(ranks).tolist() == [0.0, 21.0, 42.0]
    ranks.close()
    assert not torch.distributed.is_initialized()


def test_a_rank_that_ends_before_it_joins_is_told() -> None:
    with pytest.raises(WorkspaceError, match=r"rank 1 of the 2 .* ended early \(1\)"):
        Group(2, module="tests.pipeline.no_such_rank", device="cpu", setup={})


LEADER = f"""
import time
from pipeline.group import Group
ranks = Group(2, module="{MODULE}", device="cpu", setup={{"scale": 1.0}})
ranks.together(lambda: None)
print(ranks._children[0].pid, flush=True)
time.sleep(600)
"""


def test_followers_end_with_their_leader() -> None:
    with subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        follower = int(leader.stdout.readline())
        os.kill(follower, 0)
        leader.send_signal(signal.SIGKILL)
        leader.wait()
    until = time.monotonic() + 30
    while _runs(follower):
        assert time.monotonic() < until, "the follower outlived its leader"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
