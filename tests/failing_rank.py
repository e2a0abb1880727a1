"""A follower of `pipeline.sharded` that fails once, in the middle of a pass: `FAIL` says how.

FAIL=memory:5 or die:5, at its fifth pass, before the last layer; the file `failed` in the working
folder keeps it from failing again.
"""

import os
import signal
from pathlib import Path
from typing import Any

import torch

from pipeline import sharded
from pipeline.group import follow
from pipeline.target import Features, Target

forward = Target.forward
how, _, at = os.environ["FAIL"].partition(":")
passes = [0]


def fail(*_: Any) -> None:
    Path("failed").touch()
    if how == "memory":
        raise torch.OutOfMemoryError("a device of the test")
    os.kill(os.getpid(), signal.SIGKILL)


def fails_once(self: Target, *args: Any, **kwargs: Any) -> Features:
    passes[0] += 1
    if passes[0] == int(at) and not Path("failed").exists():
        layers: Any = self.body.layers
        layers[-1].register_forward_pre_hook(fail)
    return forward(self, *args, **kwargs)


Target.forward = fails_once  # type: ignore[method-assign]
if __name__ == "__main__":
    follow(sharded._follower)
