"""A follower of `test_group`: adds `scale` times what the leader says, or fails as it is told."""

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

from pipeline.group import Follow, follow


def build(setup: dict[str, Any]) -> Follow:
    def part(name: str, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if name == "mask":
            if tensors["x"].tolist() != [True, False] or tensors["none"].shape != (0, 4):
                raise ValueError("other tensors than the leader's")
            return
        if said["how"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if said["how"] == "hang":
            time.sleep(600)
        if said["how"] == "memory":
            raise torch.OutOfMemoryError
        if said["how"] == "raise":
            raise ValueError("a defect")
        torch.distributed.all_reduce(tensors["x"].mul_(int(setup["scale"])))

    return part


if __name__ == "__main__":
    follow(build)
