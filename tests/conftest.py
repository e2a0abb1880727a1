"""Fixtures that every floor may use: a tiny target with logits of a useful entropy."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads cost 5x here
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton: its kernels run on a CPU here

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Build a random two-layer Llama of transformers: V = 64 unless said; 1-2 nats of entropy."""

    def build(*, vocab_size: int = 64, seed: int = 0, double: bool = False, **over: int) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=over.get("hidden_size", 32),
            intermediate_size=64,
            num_hidden_layers=over.get("num_layers", 4),
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=over.get("eos_token_id", 0),
            pad_token_id=None,
            tie_word_embeddings=False,
        )
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        # a random head gives nearly uniform laws, on which acceptance says nothing
        torch.nn.init.normal_(model.lm_head.weight, std=3.2 / config.hidden_size**0.5)
        return model.double() if double else model

    return build


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument, not by content, which may hold a clock (gzip's header does).

    pytest numbers equal names, so that these differ by their place in the list.
    """
    return argname if isinstance(val, bytes) else None
