"""Processes that share the sequences of a training step: started or joined, their terms gathered.

    with open_ranks(2, where=device, sharding="ddp", module="stages.train") as ranks:
        model = ranks.wrap(model)

One rank is this process alone, and every method then returns what it was given. More of them are
torchrun's (its environment names them), or children of this process where none is named, so that
`dvc repro` needs no launcher. Every rank sees the terms of all anchors of a micro-batch, its own
with their graph: each computes the loss of the whole micro-batch, whatever the loss, with one
denominator and one ᾱ (DESIGN §6), and the sum of the ranks' gradients is that loss's gradient.

The number of ranks orders the additions, so it is a stage's parameter and no knob of `cluster`.
Backends: NCCL on GPUs, gloo on CPUs. Nothing is pickled on the wire. Knows no draft and no loss.

Dims: S depths, N anchors (padded over depths), R ranks.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from storage.errors import ConfigError, WorkspaceError

Sharding = Literal["ddp", "fsdp"]

TIMEOUT = timedelta(minutes=10)
"""Of one collective: the slowest rank may be decoding a part or writing a checkpoint."""
PARENT_PORT = "LKCACHE_RANKS_PORT"  # of the store that children of a stage meet at
POLL_S = 0.05
END_S = 30.0  # for children to end by themselves after the last collective


@dataclass(frozen=True)
class Ranks:
    """One process of R; made by `open_ranks`."""

    index: int = 0
    size: int = 1
    device: str = "cpu"
    sharding: Sharding = "ddp"

    @property
    def first(self) -> bool:
        """Whether this process writes: the others read and compute only."""
        return self.index == 0

    @property
    def shards(self) -> bool:
        """Whether a rank holds a slice of each parameter."""
        return self.size > 1 and self.sharding == "fsdp"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Under DDP every rank holds all weights; under FSDP2 a slice of each, moments too."""
        if self.size == 1:
            return model
        if self.sharding == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            return DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        fully_shard(model, mesh=mesh)  # in place
        return model

    @contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Exchange gradients in the last pass of a step only."""
        if self.size == 1 or last:
            yield
        elif self.sharding == "ddp":
            assert isinstance(model, nn.parallel.DistributedDataParallel)
            with model.no_sync():
                yield
        else:
            sharded: Any = model
            sharded.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                sharded.set_requires_gradient_sync(True)

    def gather(self, terms: tuple[Tensor, ...], *, tokens: int) -> tuple[tuple[Tensor, ...], int]:
        """The terms [S, N] of all ranks side by side, in the order of ranks; tokens summed.

        terms: of one shape; float64, or bool as the mask is. What pads a rank's N is masked.
        """
        if self.size == 1:
            return terms, tokens
        own_N = terms[0].shape[1]
        sizes = self._all(torch.tensor([own_N, tokens], device=terms[0].device))
        width = int(sizes[:, 0].max())
        wide = [pad(x, (0, width - own_N)) for x in terms]
        found = self._all(torch.stack([x.detach().double() for x in wide]))
        joined = []
        for mine, others in zip(wide, found.unbind(1), strict=True):
            columns = [x.to(mine.dtype) for x in others]
            columns[self.index] = mine  # with its graph
            joined.append(torch.cat(columns, 1))
        return tuple(joined), int(sizes[:, 1].sum())

    def _all(self, x: Tensor) -> Tensor:
        """[R, ...]: every rank's x, of one shape."""
        found = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        torch.distributed.all_gather(list(found.unbind(0)), x.contiguous())
        return found

    def total(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on all."""
        return x if self.size == 1 else self._all(x).sum(0)

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of every rank's values."""
        if self.size == 1:
            return list(values)
        return self.total(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        return int(self._all(torch.tensor(number, device=self.device)).max())

    def agree(self, flag: bool) -> bool:
        """The first rank's answer to a question that clocks answer differently."""
        if self.size == 1:
            return flag
        return bool(self._all(torch.tensor(int(flag), device=self.device))[0])

    def texts(self, text: Sequence[str]) -> list[str]:
        """All ranks' texts, in order."""
        if self.size == 1:
            return list(text)
        data = json.dumps(list(text)).encode("utf-8")
        sizes = self._all(torch.tensor(len(data), device=self.device)).tolist()
        padded = bytearray(data.ljust(max(sizes), b" "))
        rows = self._all(torch.frombuffer(padded, dtype=torch.uint8).to(self.device)).cpu()
        return [one for row in rows for one in json.loads(row.numpy().tobytes())]

    def spread(self, into: Tensor, value: Tensor | None) -> None:
        """Copy the first rank's whole `value` into every rank's tensor, or into its slice of it."""
        if self.size == 1:
            assert value is not None
            into.copy_(value)
            return
        whole = torch.empty(into.shape, dtype=into.dtype, device=self.device)
        if self.first:
            assert value is not None
            whole.copy_(value)
        torch.distributed.broadcast(whole, src=0)
        sharded: Any = into
        if hasattr(into, "to_local"):
            from torch.distributed.tensor import distribute_tensor

            placed = distribute_tensor(whole, sharded.device_mesh, sharded.placements)
            sharded.to_local().copy_(placed.to_local())
        else:
            into.copy_(whole)

    def unwrap(self, model: nn.Module) -> None:
        """Give a sharded model's modules their whole parameters back, equal on all ranks."""
        if not self.shards:
            return
        sharded: Any = model
        sharded.reshard()  # a last pass without gradients leaves gathered copies in their place
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(whole(p), requires_grad=p.requires_grad))


def local(x: Tensor) -> Tensor:
    """This rank's slice of a sharded tensor, sharing its memory; any other tensor itself."""
    sharded: Any = x
    return sharded.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor, detached: a collective; any other tensor itself."""
    sharded: Any = x.detach()
    return sharded.full_tensor() if hasattr(x, "full_tensor") else sharded


@contextmanager
def open_ranks(size: int, *, where: str, sharding: Sharding, module: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or start them with `python -m module` and this argv.

    `ConfigError` where torchrun's number is another or the machine has too few GPUs;
    `WorkspaceError` where a rank died, which ends the others.
    """
    named = "WORLD_SIZE" in os.environ
    if (world := int(os.environ.get("WORLD_SIZE", size))) != size:
        raise ConfigError(
            found=f"{world} processes of torchrun",
            expected=f"{size}, as params.yaml says: their number decides the order of additions",
            todo=f"set ranks: {world}, or start {size}",
        )
    if size == 1:
        yield Ranks(device=where)
        return
    index = int(os.environ.get("RANK", "0"))
    place = _place(where, int(os.environ.get("LOCAL_RANK", str(index))), size)
    store, children = (None, []) if named else _launch(size, module)
    try:
        _await_children(store, children)
        torch.distributed.init_process_group(
            "nccl" if place.startswith("cuda") else "gloo",
            rank=index,
            world_size=size,
            store=store or _parents_store(size),
            timeout=TIMEOUT,
        )
        yield Ranks(index, size, place, sharding)
        for child in children:
            child.wait(END_S)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        ended = [str(n) for n, child in enumerate(children, 1) if _ended(child)]
        if not ended:
            raise
        raise WorkspaceError(
            found=f"training rank {', '.join(ended)} of {size} ended early",
            expected="ranks that live as long as the first",
            todo="see what it said above and run dvc repro: training goes on from its checkpoint",
        ) from error
    finally:
        for child in children:
            child.kill()
            child.wait()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _launch(size: int, module: str) -> tuple[Any, list[subprocess.Popen[bytes]]]:
    """A store at a free port, and the children that are told of it."""
    untyped: Any = torch.distributed
    store = untyped.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    return store, _start(size, module, store.port)


def _await_children(store: Any, children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all have found the store; joining would wait for a dead one for minutes."""
    joined = [_joined(index) for index in range(1, len(children) + 1)]
    while children and not store.check(joined):
        if any(child.poll() is not None for child in children):
            raise RuntimeError("a rank ended before it joined")
        time.sleep(POLL_S)


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether a child is gone, or goes within a moment: its socket closes before it is reaped."""
    try:
        return child.wait(1.0) != 0
    except subprocess.TimeoutExpired:
        return False


def _joined(index: int) -> str:
    return f"joined-{index}"


def _parents_store(size: int) -> Any:
    """The store of the process that started this one; None for torchrun's own."""
    if PARENT_PORT not in os.environ:
        return None
    untyped: Any = torch.distributed
    store = untyped.TCPStore("127.0.0.1", int(os.environ[PARENT_PORT]), size)
    store.set(_joined(int(os.environ["RANK"])), "")
    return store


def _start(size: int, module: str, port: int) -> list[subprocess.Popen[bytes]]:
    """Ranks 1 … size − 1. In sessions of their own: the first rank alone hears Ctrl-C."""
    return [
        subprocess.Popen(  # noqa: S603  this program itself
            [sys.executable, "-m", module, *sys.argv[1:]],
            env={
                **os.environ,
                "WORLD_SIZE": str(size),
                "RANK": str(index),
                "LOCAL_RANK": str(index),
                PARENT_PORT: str(port),
            },
            start_new_session=True,
        )
        for index in range(1, size)
    ]


def _place(where: str, local_index: int, size: int) -> str:
    """The device of one rank: a GPU each."""
    if not where.startswith("cuda"):
        return where
    if local_index >= torch.cuda.device_count():
        raise ConfigError(
            found=f"{size} training ranks and {torch.cuda.device_count()} CUDA devices",
            expected="a device for every rank of this machine",
            todo="lower ranks in params.yaml, or start torchrun on more machines",
        )
    torch.cuda.set_device(local_index)
    return f"cuda:{local_index}"
