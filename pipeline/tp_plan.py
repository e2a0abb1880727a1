"""Whether a model can be split over N processes: transformers' plan against its shapes, no weights.

A plan names how each matrix of a family is cut. `require_plan` refuses what cannot be cut evenly
before anything is loaded; what a plan gets wrong, the first pass of the shards finds
(`pipeline.sharded`).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from storage.errors import TargetError

# how many heads there are to share, by the names of families' configs
HEADS = ("num_attention_heads", "num_key_value_heads")
# the dimension of a parameter, counted from the last, that a style cuts
_CUT = {"colwise": -2, "packed_colwise": -2, "rowwise": -1, "packed_rowwise": -1}
_CUT |= {"colwise_gather_output": -2, "colwise_rep": -2, "embedding_rowwise": -2}
_CUT |= {"rowwise_rep": -1, "rowwise_split_input": -1}


def require_plan(home: Path, size: int, *, trust_remote_code: bool = False) -> None:
    """`TargetError` unless every matrix that the family's plan cuts can be cut into `size`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        home, trust_remote_code=trust_remote_code, local_files_only=True
    )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        _refuse(home, f"weights quantised by {how}", "weights of 16 or 32 bits", size)
    text = config.get_text_config()
    for name in HEADS:
        count = getattr(text, name, None)
        if count is not None and count % size:
            _refuse(home, f"{name} {count}", f"a multiple of target.tensor_parallel, {size}", size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    layers = [name for name in plan if ".layers." in f".{name}"]
    if not layers:
        _refuse(
            home,
            f"{type(model).__name__}, of whose layers this transformers has no tensor-parallel "
            "plan",
            "a family with one (base_model_tp_plan in its config)",
            size,
        )
    for name, dim, length in _cuts(model, plan):
        if length % size:
            what = f"{name} with {length} {'columns' if dim == -1 else 'rows'}"
            _refuse(home, what, f"a multiple of target.tensor_parallel, {size}", size)


def _cuts(model: Any, plan: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    """Each cut parameter's name, the dimension that is cut, and its length."""
    for name, parameter in model.named_parameters():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = plan.get(generic) or plan.get(generic.rpartition(".")[0])
        dim = _CUT.get(style or "")
        if dim is None:
            continue
        if parameter.ndim == 1:
            if dim == -2:  # the bias of rows that are cut
                yield name, dim, parameter.shape[0]
            continue
        length = parameter.shape[dim]
        # gate and up lie one after the other, and each is cut
        yield name, dim, length // 2 if style == "packed_colwise" else length


def _refuse(home: Path, found: str, expected: str, size: int) -> None:
    raise TargetError(
        found=f"target.tensor_parallel {size} for {home}: {found}",
        expected=expected,
        todo="set target.tensor_parallel to a number that fits, or to 1 and cluster.parallel to "
        "kind device_map",
    )
