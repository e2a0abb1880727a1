"""The target of a process: whole, spread by layers, or as this process's part of N shards.

`target.tensor_parallel: N` splits every matrix of transformers' plan over N processes of one
host, each with a device of its own (`pipeline.group`). The leader is the worker; it holds a
`Target` whose `forward` and `logits` the followers compute with it, and nobody else need know:
truncation, writing and sampling are the leader's alone. Every tensor that leaves a pass is whole.

Shards are added in another order than one device adds, so N is part of the target's identity.

Dims: B sequences, T tokens, N rows, D width, V vocabulary.
"""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.group import Follow, Group, follow
from pipeline.ragged import Cursor, RaggedLayer, as_cache
from pipeline.target import (
    DeviceMap,
    Features,
    Target,
    TargetSpec,
    check_files,
    check_layers,
    home_of,
    load_model,
    load_target,
    load_tokenizer,
    read_probe,
    read_spec,
)
from storage.errors import ConfigError, TargetError

FOLLOWER = "pipeline.sharded"  # this module, as the followers run it
# of the median token's distance from the whole target's, relative; a wrong shard is off by about 1,
# and a mixture of experts may route a token of 16 bits elsewhere
PROBE_DISTANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}


@lru_cache(maxsize=1)
def resident_target(
    folder: Path, *, device: str, fingerprint: str, device_map: DeviceMap | None = None
) -> Target:
    """This process's target, loaded by the first unit of work and kept for the others."""
    size = read_spec(folder).tensor_parallel
    target = (
        load_target(folder, device=device, device_map=device_map)
        if size == 1
        else load_shards(folder, device=device)
    )
    assert target.spec.fingerprint == fingerprint, "the target changed during the run"
    return target


def load_shards(folder: Path, *, device: str) -> "ShardedTarget":
    """The pinned target over this process and the followers that it starts.

    `ConfigError` where a worker has too few devices, `TargetError` where the files are others, a
    rank has no memory for its share, or the shards do not give what the whole target gave.
    """
    spec = read_spec(folder)
    home = home_of(spec, folder)
    check_files(spec, home)
    require_devices(device, spec.tensor_parallel)
    tokenizer = load_tokenizer(home, trust_remote_code=spec.trust_remote_code)
    target = ShardedTarget(home, spec, tokenizer, device=device)
    target.check(*read_probe(folder))
    return target


def require_devices(device: str, size: int) -> None:
    """`ConfigError` unless this process has a device for each of the shards."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and count < size:
        raise ConfigError(
            found=f"target.tensor_parallel is {size}, and a worker here has {count} CUDA devices",
            expected="a device for each shard, all of one host",
            todo="lower target.tensor_parallel, or give each worker more devices",
        )
    if device == "cpu" and count:
        raise ConfigError(
            found=f"target.tensor_parallel is {size} on a CPU, where torch sees {count} CUDA "
            "devices, which transformers would use",
            expected="shards on CUDA devices, or a process that sees none",
            todo="set cluster.device to cuda, or CUDA_VISIBLE_DEVICES to nothing",
        )


class ShardedTarget(Target):
    """Rank 0's shards of a target, and the followers that compute with it.

    A rank that ends or finds no memory ends the group; the next call starts it anew.
    """

    def __init__(self, home: Path, spec: TargetSpec, tokenizer: Any, *, device: str) -> None:
        """Start the group and load: rank 0's shards here, the others' in their own processes."""
        super().__init__(model=None, tokenizer=tokenizer, spec=spec)
        self._home, self._where = home, "cuda:0" if device == "cuda" else device
        self._ids = itertools.count()
        self._caches: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._dropped: list[int] = []
        self._end: Any = None
        self._group = self._opened()

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        return torch.device(self._where)

    def _opened(self) -> Group:
        """A new group, its shards loaded."""
        self.model = None  # what a failed group held goes first
        for name in ("body", "_head"):
            self.__dict__.pop(name, None)
        if self._where.startswith("cuda"):
            torch.cuda.empty_cache()
        setup = {"home": str(self._home.absolute()), "spec": self.spec.model_dump(mode="json")}
        size = self.spec.tensor_parallel
        group = Group(size, module=FOLLOWER, device=self._where, setup=setup)
        if self._end is not None:
            self._end.detach()
        self._end = weakref.finalize(self, group.close)
        self._caches.clear()
        self._dropped.clear()
        try:
            self.model = group.together(lambda: load_shard(self._home, self.spec))
        except torch.OutOfMemoryError as error:
            raise TargetError(
                found=f"no memory for a shard of the target ({' '.join(str(error).split())[:100]})",
                expected=f"memory for a {size}th of its matrices, and for what is not split, on "
                "every device",
                todo="raise target.tensor_parallel, or free the devices",
            ) from None
        return group

    def _running(self) -> Group:
        self.settle()  # of a rank that was lost between calls
        if self._group.closed:
            self._group = self._opened()
        return self._group

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """As `Target.forward`; the followers run the same pass and keep nothing of it.

        A cache must be one of `pipeline.ragged`: each rank keeps the keys and values of its heads.
        """
        check_layers(layers, self.spec.num_layers)
        group = self._running()
        tensors = {"tokens": tokens_BT}
        if position_ids is not None:
            tensors["position_ids"] = position_ids
        if isinstance(attention_mask, Mapping):
            tensors |= {f"mask.{kind}": x for kind, x in attention_mask.items()}
        elif attention_mask is not None:
            tensors["mask"] = attention_mask
        said, of_cache = self._of_cache(cache)
        own = partial(
            super().forward,
            tokens_BT,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            layers=layers,
        )
        return group.call("forward", said, tensors | of_cache, own)

    def logits(self, last_hidden_ND: Tensor) -> Tensor:
        """As `Target.logits`: whole rows, of which each rank's head makes some columns."""
        if not len(last_hidden_ND):
            return last_hidden_ND.new_zeros(0, self.spec.vocab_size)
        group = self._running()
        states_ND = last_hidden_ND.to(self.device, self.model.dtype)
        own = partial(super().logits, states_ND)
        return group.call("logits", {}, {"last_hidden": states_ND}, own)

    def settle(self) -> None:
        """Raise where a rank was lost since: what the device then gave back is void."""
        if not self._group.closed:
            self._group.require_sound()

    def _of_cache(self, cache: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the followers' twin of a cache must know before it takes the next tokens."""
        dropped = self._dropped[:]
        del self._dropped[: len(dropped)]
        said: dict[str, Any] = {"dropped": dropped, "cache": None}
        if cache is None:
            return said, {}
        cursor: Cursor = cache.layers[0].cursor
        if cache not in self._caches:
            self._caches[cache] = next(self._ids)
            weakref.finalize(cache, self._dropped.append, self._caches[cache])
            assert not cache.layers[0].is_initialized, "its followers' rows are gone"
        said |= {
            "cache": self._caches[cache],
            "width": cache.layers[0].num_slots - 1,
            "visible": cursor.visible,
        }
        tensors = {"cache.row": cursor.row, "cache.slot": cursor.slot}
        tensors |= {f"selected.{i}": rows for i, rows in enumerate(cursor.selected)}
        cursor.selected = []
        return said, tensors

    def check(self, tokens_T: Tensor, last_hidden_TD: Tensor, logits_TV: Tensor) -> None:
        """`TargetError` unless a short pass gives what the `target` stage saw the whole one give.

        A family whose plan splits what may not be split would otherwise be captured wrongly.
        """
        found = self.forward(tokens_T[None].to(self.device)).last_hidden[0]
        pairs = {"last hidden state": (found, last_hidden_TD)}
        pairs["logits"] = (self.logits(found), logits_TV)
        for what, (here, there) in pairs.items():
            off_T = (here.float().cpu() - there.float()).norm(dim=-1)
            distance = float((off_T / there.float().norm(dim=-1).clamp(min=1e-6)).median())
            if not distance <= PROBE_DISTANCE[self.spec.dtype]:
                raise TargetError(
                    found=f"the {what} of the target's {self.spec.tensor_parallel} shards is "
                    f"{distance:.2g} of its length away from the whole target's",
                    expected=f"at most {PROBE_DISTANCE[self.spec.dtype]:g}, which rounding makes",
                    todo="set target.tensor_parallel to 1: transformers' plan does not fit this "
                    "family",
                )


def load_shard(home: Path, spec: TargetSpec) -> Any:
    """This rank's part of the model, by transformers' plan for the family."""
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists what is not split, which is as it should be
    try:
        with torch.inference_mode(False):
            return load_model(
                home,
                dtype=spec.dtype,
                trust_remote_code=spec.trust_remote_code,
                distributed_config=DistributedConfig(tp_size=spec.tensor_parallel),
            )
    finally:
        logging.set_verbosity(before)


def _follower(setup: dict[str, Any]) -> Follow:
    """Load this rank's shards; returns its part of each call."""
    spec = TargetSpec.model_validate(setup["spec"], strict=False)
    target = Target(model=load_shard(Path(setup["home"]), spec), tokenizer=None, spec=spec)
    caches: dict[int, tuple[Cursor, Any]] = {}

    @torch.inference_mode()
    def part(name: str, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if name == "logits":
            target.logits(tensors["last_hidden"])
            return
        for number in said["dropped"]:
            caches.pop(number, None)
        masks = {k.removeprefix("mask."): x for k, x in tensors.items() if k.startswith("mask.")}
        mask: Any = masks or tensors.get("mask")
        target.forward(
            tensors["tokens"],
            attention_mask=mask,
            position_ids=tensors.get("position_ids"),
            cache=_twin(caches, said, tensors, spec.num_layers),
        )

    return part


def _twin(
    caches: dict[int, tuple[Cursor, Any]],
    said: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    num_layers: int,
) -> Any:
    """The cache that holds this rank's heads of the rows in the leader's; None without one."""
    number = said["cache"]
    if number is None:
        return None
    if number not in caches:
        cursor = Cursor(tensors["cache.row"], tensors["cache.slot"], 0)
        layers = [RaggedLayer(cursor, width=said["width"]) for _ in range(num_layers)]
        caches[number] = cursor, as_cache(layers)
    cursor, cache = caches[number]
    for i in itertools.takewhile(lambda i: f"selected.{i}" in tensors, itertools.count()):
        for layer in cache.layers:
            layer.select(tensors[f"selected.{i}"])
    cursor.row, cursor.slot = tensors["cache.row"], tensors["cache.slot"]
    cursor.visible = said["visible"]
    return cache


if __name__ == "__main__":
    follow(_follower)
